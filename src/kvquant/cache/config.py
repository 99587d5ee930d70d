"""What a cache is made of, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import INT32_MAX, check_head_dim, check_integer, require
from ..formats import CacheFormat, check_format
from .blocks import ceil_to

__all__ = ["CacheConfig"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a `CacheState` is made of; ``num_blocks`` is None unless the caller chose it."""

    num_layers: int
    batch_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    max_seq_len: int | None
    block_size: int | None
    num_blocks: int | None
    format: CacheFormat
    device: torch.device

    def __post_init__(self) -> None:
        check_format(self.format)
        for name in ("num_layers", "batch_size", "num_kv_heads", "max_seq_len", "num_blocks"):
            size = getattr(self, name)
            if size is not None or name not in ("max_seq_len", "num_blocks"):
                object.__setattr__(self, name, check_integer(name, size, 1, INT32_MAX))
        for name in ("head_dim", "v_head_dim"):
            object.__setattr__(self, name, check_head_dim(name, getattr(self, name)))
        if self.block_size is not None:
            size = check_integer("block_size", self.block_size)
            require(
                16 <= size <= 2**30 and size & (size - 1) == 0,
                f"block_size: expected None or a power of two from 16 to 2**30, got {size}",
            )
            object.__setattr__(self, "block_size", size)
        require(
            self.num_blocks is None or self.block_size is not None,
            "num_blocks: only with a block_size",
        )

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
