"""Random caches of a given shape, without an append for each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kvquant
from kvquant import ops


@dataclass
class RandomCache:
    """A layer whose every row is in use."""

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
        block_size: int | None = None,
        format: kvquant.CacheFormat | None = None,
        seq_lens: Tensor | None = None,
    ) -> RandomCache:
        """Random codes, scales of values about one, room for ``spare`` more tokens.

        Contiguous, or in shuffled blocks of ``block_size``.
        """
        size = block_size or 16
        blocks = -(-(tokens + spare) // size)
        width, rows = (blocks, size) if block_size else (1, blocks * size)
        storage = kvquant.LayerStorage.allocate(
            batch * width, kv_heads, rows, head_dim, format=format, device=device
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
        order = torch.randperm if block_size else torch.arange
        table = order(batch * width, device=device).to(torch.int32).view(batch, width)
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

    def prepare_step(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """A decode step as `QuantizedKVCache.attend` does it: appends, attends, adds to lengths."""
        at = self.storage
        tensors = (at.k_data, at.k_params, at.k_mean, at.v_data, at.v_params)
        k_dim, v_dim = at.k_data.shape[3], at.v_data.shape[3]
        rotation = (at.format.mean_group, at.format.k_rotation(k_dim), at.format.v_rotation(v_dim))
        scale = k_dim**-0.5
        step = ops.prepare_step(tensors, query, key, value, rotation, scale, True, 0, 0.0)
        assert step is not None
        rest = (self.block_table, self.seq_lens, None, query, key, value)
        return lambda: step(0, tensors, *rest)
