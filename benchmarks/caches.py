"""Random caches of a given shape, without an append for each of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kvquant


@dataclass
class RandomCache:
    """A contiguous layer, every row in use."""

    storage: kvquant.LayerStorage
    block_table: Tensor
    seq_lens: Tensor

    @classmethod
    def make(
        cls,
        batch: int,
        kv_heads: int,
        tokens: int,
        head_dim: int,
        *,
        device: str = "cuda",
        spare: int = 0,
        format: kvquant.CacheFormat | None = None,
        seq_lens: Tensor | None = None,
    ) -> RandomCache:
        """Random codes, scales of values about one, room for ``spare`` more tokens."""
        capacity = -(-(tokens + spare) // 16) * 16
        storage = kvquant.LayerStorage.allocate(
            batch, kv_heads, capacity, head_dim, format=format, device=device
        )
        for data in (storage.k_data, storage.v_data):
            data.random_(0, 256)
        for params in (storage.k_params, storage.v_params):
            scale = torch.rand(params.shape[:-1], device=device) * 0.01 + 0.01
            params[..., 0] = scale
            params[..., 1] = -127.5 * scale
        if storage.k_mean is not None:
            storage.k_mean.normal_(0, 0.5)
        lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        table = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
        return cls(storage, table, lens if seq_lens is None else seq_lens)

    @property
    def read_bytes(self) -> int:
        """Bytes that attention over all tokens must read."""
        k, v = self.storage.k_data, self.storage.v_data
        tokens = int(self.seq_lens.sum()) * k.shape[1]
        group = self.storage.format.key_mean
        means = tokens // group * k.shape[3] * 2 if group else 0
        return tokens * self.storage.format.row_bytes(k.shape[3], v.shape[3]) + means

    def attend(self, query: Tensor, **options: object) -> Tensor:
        """`kvquant.attention` on this layer."""
        return kvquant.attention(  # type: ignore[return-value]
            query, self.storage, block_table=self.block_table, seq_lens=self.seq_lens, **options
        )
