"""One layer's memory, whoever owns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arguments import (
    INT32_MAX,
    check_device,
    check_head_dim,
    check_integer,
    check_tensor,
    require,
)
from ..checks import check_slabs
from ..formats import CacheFormat, RowFormat, check_format
from .specs import ViewSpec, interned

__all__ = ["CacheView", "RowsView"]


@dataclass(frozen=True, eq=False)
class RowsView:
    """The stored keys, or values, of one layer, as bytes that only their format can read.

    Attributes:
        codes: uint8 ``(num_blocks, num_kv_heads, block_size, code_bytes)``.
        params: uint8 ``(num_blocks, num_kv_heads, block_size, params_bytes)``.
        head_dim: Channels of a row.
        format: What the bytes mean.
    """

    codes: Tensor
    params: Tensor
    head_dim: int
    format: RowFormat


@dataclass(frozen=True, eq=False)
class CacheView:
    """One layer's memory in blocks of tokens, whoever owns it.

    The rows of one (block, head) are contiguous and 16-byte aligned; blocks and heads may lie
    anywhere in a larger buffer. A contiguous cache is one block a sequence.

    Attributes:
        k: The keys.
        v: The values.
        mean: uint8 ``(num_blocks, num_kv_heads, ceil(block_size / mean_group), 2 * head_dim)``:
            float16 key means as bytes; None without.
        mean_group: Tokens that share a key mean; 0: none.

    Raises:
        TypeError: A part of another type or dtype.
        ValueError: Shapes, strides or devices that do not belong together.
    """

    k: RowsView
    v: RowsView
    mean: Tensor | None
    mean_group: int
    spec: ViewSpec = field(init=False, repr=False)
    _twin: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        widths = {}
        for name, rows in (("k", self.k), ("v", self.v)):
            if not isinstance(rows, RowsView):
                raise TypeError(f"{name}: expected a RowsView, got {type(rows).__name__}")
            if not isinstance(rows.format, RowFormat):
                raise TypeError(f"{name}.format: expected a RowFormat, got {rows.format!r}")
            dim = check_head_dim(f"{name}.head_dim", rows.head_dim)
            object.__setattr__(rows, "head_dim", dim)
            widths[f"{name}.codes"] = rows.format.code_bytes(dim)
            widths[f"{name}.params"] = rows.format.params_bytes(dim)
        widths["mean"] = 2 * self.k.head_dim
        group = check_integer("mean_group", self.mean_group, 0, 2**30)
        object.__setattr__(self, "mean_group", group)
        if group and (group < 16 or group & (group - 1)):
            raise ValueError(
                f"mean_group: expected 0 or a power of two from 16 to 2**30, got {group}"
            )
        if (self.mean is None) != (group == 0):
            raise ValueError(
                f"mean: expected {'none' if group == 0 else 'a tensor'} with a mean_group of "
                f"{group}"
            )
        check_tensor("k.codes", self.k.codes)
        codes = self.k.codes
        if codes.dim() != 4 or not codes.shape[1]:
            raise ValueError(
                f"k.codes: expected 4 dimensions and a head at least, got shape {[*codes.shape]}"
            )
        blocks, heads, size, _ = codes.shape
        for name, x in self.tensors.items():
            check_tensor(name, x)
            if x.dtype != torch.uint8:
                raise TypeError(f"{name}: expected {torch.uint8}, got {x.dtype}")
            rows_of = -(-size // group) if name == "mean" else size
            if x.shape != (blocks, heads, rows_of, widths[name]):
                raise ValueError(
                    f"{name}: expected shape {[blocks, heads, rows_of, widths[name]]}, got "
                    f"{list(x.shape)}"
                )
            if x.device != codes.device:
                raise ValueError(f"{name}: on {x.device}, but k.codes on {codes.device}")
            strides, offset = x.stride(), x.storage_offset()
            is_apart = strides[0] % 16 or strides[1] % 16 or offset % 16
            if (strides[2:] != (widths[name], 1) or is_apart) and x.numel():
                raise ValueError(
                    f"{name}: the rows of a block and head must be contiguous and 16-byte aligned, "
                    f"got strides {list(strides)} behind byte {offset}"
                )
        spec = ViewSpec(
            heads, size, self.k.head_dim, self.v.head_dim, self.k.format, self.v.format, group,
            not (blocks and size), codes.device,
        )  # fmt: skip
        object.__setattr__(self, "spec", interned(spec))
        object.__setattr__(self, "_twin", None)

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        format: CacheFormat | None = None,
        device: torch.device | str | int | None = None,
    ) -> CacheView:
        """Unwritten memory for ``num_blocks`` blocks of ``block_size`` tokens.

        Args:
            num_blocks: Blocks.
            num_kv_heads: Heads of keys and values.
            block_size: Tokens of a block, a multiple of 16 (0: no rows yet).
            head_dim: Channels of a key, a multiple of 16.
            v_head_dim: Channels of a value; ``head_dim`` by default.
            format: What the rows mean; ``CacheFormat()`` by default.
            device: Where; torch's default device by default.

        Raises:
            TypeError: An argument of another type.
            ValueError: A size out of range, a device that is not here.
        """
        fmt = CacheFormat() if format is None else check_format(format)
        lead = (
            check_integer("num_blocks", num_blocks, 0, INT32_MAX),
            check_integer("num_kv_heads", num_kv_heads, 1, INT32_MAX),
        )
        size = check_integer("block_size", block_size, 0, INT32_MAX)
        require(size % 16 == 0, f"block_size: {size} is not a multiple of 16")
        dims = (
            check_head_dim("head_dim", head_dim),
            check_head_dim("v_head_dim", head_dim if v_head_dim is None else v_head_dim),
        )
        require(
            lead[1] * size * max(dims) < 2**60,
            f"block_size: {size} tokens of {lead[1]} heads are more than a tensor can hold",
        )
        device = check_device("device", device)

        def part(length: int, width: int) -> Tensor:
            return torch.empty(*lead, length, width, dtype=torch.uint8, device=device)

        k, v = (
            RowsView(part(size, of.code_bytes(dim)), part(size, of.params_bytes(dim)), dim, of)
            for of, dim in zip(fmt.rows, dims, strict=True)
        )
        mean = part(fmt.mean_slots(size), 2 * dims[0]) if fmt.mean_group else None
        return cls(k, v, mean, fmt.mean_group)

    @classmethod
    def slab(
        cls,
        buffer: Tensor,
        head_dim: int,
        *,
        block_size: int,
        v_head_dim: int | None = None,
        format: CacheFormat | None = None,
    ) -> CacheView:
        """A layer in an engine's buffer, where each (block, head) has one slab for all its parts.

        A slab holds, one behind the other: the key codes of ``block_size`` tokens, the value
        codes, the keys' parameters, the values' parameters, the key means.

        Args:
            buffer: uint8 ``(num_blocks, num_kv_heads, at least CacheFormat.slab_bytes(..))``; any
                strides that are multiples of 16 but in the last dimension, which is contiguous.
            head_dim: Channels of a key, a multiple of 16.
            block_size: Tokens of a block, a multiple of 16.
            v_head_dim: Channels of a value; ``head_dim`` by default.
            format: What the rows mean; ``CacheFormat()`` by default.

        Raises:
            TypeError: An argument of another type or dtype.
            ValueError: Slabs that are too short, a size or stride out of range.
        """
        fmt = CacheFormat() if format is None else check_format(format)
        size = check_integer("block_size", block_size, 16, INT32_MAX)
        require(size % 16 == 0, f"block_size: {size} is not a multiple of 16")
        dims = (
            check_head_dim("head_dim", head_dim),
            check_head_dim("v_head_dim", head_dim if v_head_dim is None else v_head_dim),
        )
        check_slabs("buffer", buffer, fmt.slab_bytes(*dims, size))
        begin = 0

        def part(length: int, width: int) -> Tensor:
            nonlocal begin
            end = begin + length * width
            x: Tensor = buffer[:, :, begin:end].unflatten(2, (length, width))
            begin = end
            return x

        codes = [part(size, of.code_bytes(dim)) for of, dim in zip(fmt.rows, dims, strict=True)]
        params = [part(size, of.params_bytes(dim)) for of, dim in zip(fmt.rows, dims, strict=True)]
        k, v = (RowsView(*of) for of in zip(codes, params, dims, fmt.rows, strict=True))
        mean = part(fmt.mean_slots(size), 2 * dims[0]) if fmt.mean_group else None
        return cls(k, v, mean, fmt.mean_group)

    def replaced(self, tensors: Mapping[str, Tensor]) -> CacheView:
        """The same view of other ``tensors``, by name."""
        k, v = (
            RowsView(tensors[f"{name}.codes"], tensors[f"{name}.params"], of.head_dim, of.format)
            for name, of in (("k", self.k), ("v", self.v))
        )
        return CacheView(k, v, tensors.get("mean"), self.mean_group)

    @property
    def format(self) -> CacheFormat:
        """What the rows mean."""
        return CacheFormat(
            key=self.k.format.name,
            value=self.v.format.name,
            key_rotation=self.k.format.rotated,
            key_mean=self.mean_group or None,
            value_rotation=self.v.format.rotated,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without an absent mean."""
        named = {
            "k.codes": self.k.codes,
            "k.params": self.k.params,
            "v.codes": self.v.codes,
            "v.params": self.v.params,
        }
        return named if self.mean is None else {**named, "mean": self.mean}

    @property
    def num_blocks(self) -> int:
        """Blocks."""
        return self.k.codes.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.k.codes.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.k.codes.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.k.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheView, (self.k, self.v, self.mean, self.mean_group)
