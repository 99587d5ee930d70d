"""What a cache is made of, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant._checks import require
from kvquant.formats import CacheFormat, check_format
from kvquant.paged import ceil_to

__all__ = ["CacheConfig"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a `CacheState` is made of; ``num_blocks`` is None unless the caller chose it."""

    num_layers: int
    batch_size: int
    kv_heads: int
    k_dim: int
    v_dim: int
    max_seq_len: int | None
    block_size: int | None
    num_blocks: int | None
    format: CacheFormat
    device: torch.device

    def __post_init__(self) -> None:
        check_format(self.format)
        for name, size in (
            ("num_layers", self.num_layers),
            ("batch_size", self.batch_size),
            ("num_kv_heads", self.kv_heads),
            ("max_seq_len", self.max_seq_len),
            ("num_blocks", self.num_blocks),
        ):
            require(size is None or size > 0, f"{name}: expected a positive number, got {size}")
        for name, dim in (("head_dim", self.k_dim), ("v_head_dim", self.v_dim)):
            require(dim > 0 and dim % 16 == 0, f"{name}: {dim} is not a multiple of 16")
        size = self.block_size
        require(
            size is None or (size >= 16 and size & (size - 1) == 0),
            f"block_size: expected None or a power of two from 16, got {size}",
        )
        require(self.num_blocks is None or size is not None, "num_blocks: only with a block_size")

    @property
    def capacity(self) -> int | None:
        """Most tokens of a sequence; None where nothing but memory is the limit."""
        if self.max_seq_len is not None:
            return ceil_to(self.max_seq_len, self.block_size or 16)
        if self.block_size is not None and self.num_blocks is not None:
            return self.num_blocks * self.block_size
        return None

    @property
    def pool_share(self) -> int:
        """Blocks that this many sequences may come to need."""
        if self.block_size is None or self.capacity is None:
            return self.batch_size
        return self.num_blocks or self.batch_size * (self.capacity // self.block_size)
