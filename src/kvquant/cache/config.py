"""What a cache is made of, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import INT32_MAX, check_head_dim, check_integer, require
from ..formats import CacheFormat
from .blocks import ceil_to

__all__ = ["CacheConfig", "check_layers"]

_MOST_LAYERS = 2**16


def check_layers(num_layers: int) -> int:
    """A number of layers that a model may have."""
    return check_integer("num_layers", num_layers, 1, _MOST_LAYERS)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a `CacheState` is made of; ``num_blocks`` is None unless the caller chose it.

    ``formats`` has one per layer.
    """

    num_layers: int
    batch_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    max_seq_len: int | None
    block_size: int | None
    num_blocks: int | None
    formats: tuple[CacheFormat, ...]
    device: torch.device

    def __post_init__(self) -> None:
        layers = check_layers(self.num_layers)
        object.__setattr__(self, "num_layers", layers)
        object.__setattr__(self, "formats", CacheFormat.of_layers(self.formats, layers))
        for name in ("batch_size", "num_kv_heads", "max_seq_len", "num_blocks"):
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
    def is_uniform(self) -> bool:
        """Whether all layers are of one format."""
        return self.formats.count(self.formats[0]) == self.num_layers

    @property
    def mean_group(self) -> int:
        """Tokens of the largest group with one key mean over all layers, 0 without any."""
        return max(format.mean_group for format in self.formats)

    @property
    def pool_share(self) -> int:
        """Blocks that this many sequences may come to need."""
        if self.block_size is None or self.capacity is None:
            return self.batch_size
        return self.num_blocks or self.batch_size * (self.capacity // self.block_size)
