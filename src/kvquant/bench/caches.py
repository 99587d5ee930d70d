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
    young: Tensor | None = None  # of a format by age

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
        format = CacheFormat() if format is None else format
        size = block_size or 16
        blocks = -(-(tokens + spare) // size)
        width, rows = (blocks, size) if block_size else (1, blocks * size)
        view = CacheView.allocate(
            batch * width, kv_heads, rows, head_dim, format=format, device=device
        )
        young, views = None, [view]
        if format.by_age:
            size = format.young_bytes(head_dim, head_dim)
            young = torch.zeros(batch, kv_heads, size, dtype=torch.uint8, device=device)
            views.append(
                CacheView.slab(young, head_dim, block_size=format.young_tokens, format=format.young)
            )
        for rows_view in [rows for x in views for rows in (x.k, x.v)]:
            rows_view.codes.random_(0, 256)
            params = rows_view.params.view(torch.float16)
            scale = torch.rand(params.shape[:-1], device=device) * 0.01 + 0.01
            params[..., 0] = scale
            params[..., 1:] = -127.5 * scale[..., None]  # offsets, where rows have them
        if view.mean is not None:
            view.mean.view(torch.float16).normal_(0, 0.5)
        lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        order = torch.randperm if block_size else torch.arange
        table = order(batch * width, device=device).to(torch.int32).view(batch, width)
        return cls(view, table, lens if seq_lens is None else seq_lens, young)

    @property
    def read_bytes(self) -> int:
        """Bytes that attention over all tokens must read."""
        view, format = self.view, self.view.format
        dims = view.k.head_dim, view.v.head_dim
        tokens = int(self.seq_lens.sum()) * view.num_kv_heads
        means = tokens // format.key_mean * dims[0] * 2 if format.key_mean else 0
        if self.young is None:
            return tokens * format.row_bytes(*dims) + means
        group, held = format.age_group, format.young.row_bytes(*dims)
        lens: list[int] = self.seq_lens.tolist()
        opened = (n - max(0, n - 1) // group * group for n in lens)
        young = sum(n if n <= group else group + new for n, new in zip(lens, opened, strict=True))
        young *= view.num_kv_heads
        return (tokens - young) * format.row_bytes(*dims) + young * held + means

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """`kvquant.attention` on this layer."""
        if self.young is not None:
            seqs = Sequences(self.block_table, self.seq_lens, young=self.young)
            found = plan(query, self.view, seqs, **options).run(query, self.view, seqs)
            assert isinstance(found, Tensor)
            return found
        out: Tensor = attention(
            query, self.view, block_table=self.block_table, seq_lens=self.seq_lens, **options
        )
        return out

    def prepare_step(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """A decode step as `QuantizedKVCache.attend` does it: appends, attends, adds to lengths."""
        seqs = Sequences(self.block_table, self.seq_lens, advance=True, young=self.young)
        step = plan(query, self.view, seqs, key, value)
        return lambda: step.run(query, self.view, seqs, key, value)
