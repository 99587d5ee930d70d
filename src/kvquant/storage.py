"""One layer's tensors: codes, parameters and means, in blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import (
    INT32_MAX,
    check_device,
    check_head_dim,
    check_integer,
    check_tensor,
    require,
)
from .formats import CacheFormat, check_format

__all__ = ["LayerStorage"]


@dataclass(frozen=True, slots=True)
class LayerStorage:
    """The 8-bit rows of one layer, in blocks of tokens.

    The rows of one (block, head) are contiguous and 16-byte aligned; blocks and heads may lie
    anywhere in a larger buffer. A contiguous cache is one block a sequence.

    Attributes:
        k_data: uint8, ``(num_blocks, kv_heads, block_size, k_dim)``.
        k_params: float16, ``(num_blocks, kv_heads, block_size, 2)``: (scale, offset).
        k_mean: float16, ``(num_blocks, kv_heads, ceil(block_size / group), k_dim)``, or None.
        v_data: uint8, ``(num_blocks, kv_heads, block_size, v_dim)``.
        v_params: float16, ``(num_blocks, kv_heads, block_size, 2)``.
        format: What the rows mean.

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: Shapes, strides or devices that do not belong together.
    """

    k_data: Tensor
    k_params: Tensor
    k_mean: Tensor | None
    v_data: Tensor
    v_params: Tensor
    format: CacheFormat

    def __post_init__(self) -> None:
        check_format(self.format)
        for name in _TENSORS:
            if (x := getattr(self, name)) is not None or name != "k_mean":
                check_tensor(name, x)
                require(x.dim() == 4, f"{name}: expected 4 dimensions, got shape {list(x.shape)}")
        blocks, heads, size, k_dim = self.k_data.shape
        require(heads > 0, f"k_data: expected a head at least, got shape {[*self.k_data.shape]}")
        for name, data in (("k_data", self.k_data), ("v_data", self.v_data)):
            check_head_dim(f"{name}: head_dim", data.shape[3])
        slots = self.format.mean_slots(size)
        if (self.k_mean is None) != (self.format.key_mean is None):
            raise ValueError(f"k_mean: does not go with {self.format}")
        widths = {
            "k_data": (size, k_dim),
            "k_params": (size, 2),
            "k_mean": (slots, k_dim),
            "v_data": (size, self.v_data.shape[3]),
            "v_params": (size, 2),
        }
        for name, x in self.tensors.items():
            dtype = torch.uint8 if name.endswith("data") else torch.float16
            if x.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
            if x.shape != (blocks, heads, *widths[name]):
                raise ValueError(
                    f"{name}: expected shape {[blocks, heads, *widths[name]]}, got {list(x.shape)}"
                )
            if x.device != self.k_data.device:
                raise ValueError(f"{name}: on {x.device}, but k_data on {self.k_data.device}")
            steps = [step * x.element_size() for step in x.stride()[:2]]
            apart = (*steps, x.storage_offset() * x.element_size())
            if x.numel() and (
                x.stride()[2:] != (x.shape[3], 1) or any(step % 16 for step in apart)
            ):
                raise ValueError(
                    f"{name}: the rows of a block and head must be contiguous and 16-byte aligned, "
                    f"got strides {list(x.stride())}"
                )

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        kv_heads: int,
        block_size: int,
        k_dim: int,
        v_dim: int | None = None,
        *,
        format: CacheFormat | None = None,
        device: torch.device | str | None = None,
    ) -> LayerStorage:
        """Unwritten storage for ``num_blocks`` blocks of ``block_size`` tokens.

        Args:
            num_blocks: Blocks.
            kv_heads: Heads of keys and values.
            block_size: Tokens of a block, a multiple of 16 (0: no rows yet).
            k_dim: Channels of a key, a multiple of 16.
            v_dim: Channels of a value; ``k_dim`` by default.
            format: What the rows mean; ``CacheFormat()`` by default.
            device: Where; torch's default device by default.

        Raises:
            TypeError: An argument of another type.
            ValueError: A size out of range, a device that is not here.
        """
        fmt = CacheFormat() if format is None else check_format(format)
        lead = (
            check_integer("num_blocks", num_blocks, 0, INT32_MAX),
            check_integer("kv_heads", kv_heads, 1, INT32_MAX),
        )
        size = check_integer("block_size", block_size, 0, INT32_MAX)
        require(size % 16 == 0, f"block_size: {size} is not a multiple of 16")
        k_dim = check_head_dim("k_dim", k_dim)
        v_dim = k_dim if v_dim is None else check_head_dim("v_dim", v_dim)
        require(
            lead[1] * size * max(k_dim, v_dim) < 2**60,
            f"block_size: {size} tokens of {lead[1]} heads are more than a tensor can hold",
        )
        device = check_device("device", device)

        def rows(width: int, dtype: torch.dtype, length: int = size) -> Tensor:
            return torch.empty(*lead, length, width, dtype=dtype, device=device)

        slots = fmt.mean_slots(size)
        return cls(
            k_data=rows(k_dim, torch.uint8),
            k_params=rows(2, torch.float16),
            k_mean=None if fmt.key_mean is None else rows(k_dim, torch.float16, slots),
            v_data=rows(v_dim, torch.uint8),
            v_params=rows(2, torch.float16),
            format=fmt,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without an absent mean."""
        named = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.k_data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


_TENSORS = ("k_data", "k_params", "k_mean", "v_data", "v_params")
