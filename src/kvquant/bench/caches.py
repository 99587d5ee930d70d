"""Random caches of a given shape, without an append for each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import CacheFormat, CacheView, Sequences, attention, plan


@dataclass
class RandomCache:
    """A layer whose every row is in use."""

    view: CacheView
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
        format: CacheFormat | None = None,
        seq_lens: Tensor | None = None,
    ) -> RandomCache:
        """Random codes, scales of values about one, room for ``spare`` more tokens.

        Contiguous, or in shuffled blocks of ``block_size``.
        """
        size = block_size or 16
        blocks = -(-(tokens + spare) // size)
        width, rows = (blocks, size) if block_size else (1, blocks * size)
        view = CacheView.allocate(
            batch * width, kv_heads, rows, head_dim, format=format, device=device
        )
        for data in (view.k.codes, view.v.codes):
            data.random_(0, 256)
        for params in (view.k.params.view(torch.float16), view.v.params.view(torch.float16)):
            scale = torch.rand(params.shape[:-1], device=device) * 0.01 + 0.01
            params[..., 0] = scale
            params[..., 1] = -127.5 * scale
        if view.mean is not None:
            view.mean.view(torch.float16).normal_(0, 0.5)
        lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        order = torch.randperm if block_size else torch.arange
        table = order(batch * width, device=device).to(torch.int32).view(batch, width)
        return cls(view, table, lens if seq_lens is None else seq_lens)

    @property
    def read_bytes(self) -> int:
        """Bytes that attention over all tokens must read."""
        view = self.view
        tokens = int(self.seq_lens.sum()) * view.num_kv_heads
        group = view.format.key_mean
        means = tokens // group * view.k.head_dim * 2 if group else 0
        return tokens * view.format.row_bytes(view.k.head_dim, view.v.head_dim) + means

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """`kvquant.attention` on this layer."""
        out: Tensor = attention(
            query, self.view, block_table=self.block_table, seq_lens=self.seq_lens, **options
        )
        return out

    def prepare_step(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """A decode step as `QuantizedKVCache.attend` does it: appends, attends, adds to lengths."""
        seqs = Sequences(self.block_table, self.seq_lens, advance=True)
        step = plan(query, self.view, seqs, key, value)
        return lambda: step.run(query, self.view, seqs, key, value)
