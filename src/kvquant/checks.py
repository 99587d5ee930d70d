"""Checks of tensors: each error names the argument, what came and what is expected."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .arguments import (
    FLOATS,
    INT32_MAX,
    check_integer,
    check_number,
    check_tensor,
    require,
)

__all__ = [
    "check_affine",
    "check_device_of",
    "check_index",
    "check_no_grad",
    "check_packed",
    "check_pair",
    "check_rows",
    "check_slabs",
    "check_split_size",
    "check_table",
    "check_window",
]

_SPLIT_STEP, _MAX_SPLIT_SIZE = 256, 2**30


def check_rows(name: str, x: Tensor, dims: int, *, any_dim: bool = False) -> None:
    """A float tensor of ``dims`` dimensions with a contiguous last one, a multiple of 16."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous, got strides {list(x.stride())}"
        )
    if not any_dim and (x.shape[-1] % 16 or not x.shape[-1]):
        raise ValueError(
            f"{name}: head_dim {x.shape[-1]} is not a multiple of 16 (got shape {list(x.shape)})"
        )


def check_slabs(name: str, x: Tensor, needed: int = 0) -> None:
    """Bytes ``(blocks, heads, at least needed)`` whose slabs begin at multiples of 16."""
    check_tensor(name, x)
    if x.dtype != torch.uint8:
        raise TypeError(f"{name}: expected {torch.uint8}, got {x.dtype}")
    require(
        x.dim() == 3 and x.shape[2] >= needed and x.stride(2) == 1,
        f"{name}: expected (num_blocks, num_kv_heads, at least {needed}) with a contiguous last "
        f"dimension, got shape {list(x.shape)}, strides {list(x.stride())}",
    )
    # dynamo traces no offset; the operator that compiled code calls checks it again
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    require(
        not x.numel() or not any(n % 16 for n in (*x.stride()[:2], offset)),
        f"{name}: expected slabs at multiples of 16 bytes, got strides {list(x.stride())} behind "
        f"byte {offset}",
    )


def check_pair(key: Tensor, value: Tensor, dims: int) -> None:
    """New keys and values: alike but for their head_dims."""
    check_rows("key", key, dims)
    check_rows("value", value, dims)
    check_no_grad(key=key, value=value)
    if key.shape[:-1] != value.shape[:-1] or key.dtype != value.dtype:
        raise ValueError(
            f"value: expected key's dtype and shape but for head_dim ({key.dtype}, "
            f"{list(key.shape)}), got {value.dtype}, {list(value.shape)}"
        )
    if key.device != value.device:
        raise ValueError(f"value: on {value.device}, but key on {key.device}")


def check_no_grad(**tensors: Tensor) -> None:
    """Refuse inputs that autograd would follow: the operations have no gradient."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, but kvquant has no gradients: "
                    f"detach it or call under torch.no_grad()"
                )


def check_index(
    name: str,
    index: Tensor | None,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.int32,
) -> None:
    """An optional contiguous vector of ``length`` on ``device``."""
    if index is None:
        return
    check_tensor(name, index)
    if index.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {index.dtype}")
    if index.shape != (length,) or not index.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous vector of {length}, got shape {list(index.shape)}, "
            f"strides {list(index.stride())}"
        )
    check_device_of(name, index, device)


def check_device_of(name: str, x: Tensor, device: torch.device) -> None:
    """A tensor on the device of the call."""
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, but the call is on {device}")


def check_packed(
    name: str,
    cu_seqlens: Tensor | None,
    batch: int,
    rows: int,
    device: torch.device,
    most: int | None = None,
) -> int | None:
    """Where each sequence's packed rows begin; on the host also that they are among the rows.

    ``most``: what the caller says the longest sequence has, if anything; returned as an int.
    """
    label = name.replace("cu_seqlens", "max_seqlen")
    if most is not None:
        if cu_seqlens is None:
            raise ValueError(f"{label}: only with {name}, got {most}")
        most = check_integer(label, most, 0, INT32_MAX)
    check_index(name, cu_seqlens, batch + 1, device)
    if cu_seqlens is None or device.type != "cpu" or torch.compiler.is_compiling():
        return most
    edges = cu_seqlens.tolist()
    if edges != sorted(edges) or edges[0] < 0 or edges[-1] > rows:
        raise ValueError(f"{name}: expected rising numbers from 0 to {rows}, got {edges}")
    longest = max(end - begin for begin, end in pairwise(edges))
    if most is not None and longest > most:
        raise ValueError(f"{label}: {most}, but a sequence has {longest} rows")
    return most


def check_table(block_table: Tensor) -> int:
    """The batch of a block table: int32, contiguous rows."""
    check_tensor("block_table", block_table)
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: expected torch.int32, got {block_table.dtype}")
    if block_table.dim() != 2 or (block_table.shape[1] > 1 and block_table.stride(1) != 1):
        raise ValueError(
            f"block_table: expected (batch, max_blocks) with contiguous rows, got shape "
            f"{list(block_table.shape)}, strides {list(block_table.stride())}"
        )
    return block_table.shape[0]


def check_affine(
    name: str, q: Tensor, scale: Tensor, zero: Tensor, group_size: int | None, of: str = ""
) -> int:
    """Codes with a (scale, zero) of one of the granularities; returns the tokens of a group.

    ``of``: what they are part of, for the error.
    """
    name = of + name
    check_tensor(name, q)
    if q.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, got {q.dtype}")
    if q.dim() != 4 or (q.shape[-1] > 1 and q.stride(-1) != 1):
        raise ValueError(
            f"{name}: expected (batch, heads, tokens, head_dim) with a contiguous last dimension, "
            f"got shape {list(q.shape)}, strides {list(q.stride())}"
        )
    for label, x in ((f"{of}scale", scale), (f"{of}zero", zero)):
        check_tensor(label, x)
        if x.dtype not in FLOATS:
            raise TypeError(f"{label}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{label}: on {x.device}, but {name} on {q.device}")
    b, h, s, d = q.shape
    group = max(1, s)
    if group_size is not None:
        group = check_integer("group_size", group_size, 1, INT32_MAX)
    if scale.shape == zero.shape:
        for rows, width, tokens in ((-(-s // group), d, group), (1, 1, max(1, s)), (s, 1, 1)):
            if scale.shape == (b, h, rows, width):
                return tokens
    raise ValueError(
        f"{of}scale, zero: expected shape [{b}, {h}, {s} or 1, 1], or [{b}, {h}, "
        f"{-(-s // group)}, {d}] with group_size {group_size}, got {list(scale.shape)} and "
        f"{list(zero.shape)}"
    )


def check_window(sliding_window: float | None) -> int:
    """The kernels' encoding of a window: 0 for none; one beyond int32 is none that matters."""
    if sliding_window is None:
        return 0
    if isinstance(sliding_window, float):
        number = check_number("sliding_window", sliding_window, positive=True)
        whole = number == int(number)
        require(whole, f"sliding_window: expected an integer, got {sliding_window}")
        sliding_window = int(number)
    return min(check_integer("sliding_window", sliding_window, 1), INT32_MAX)


def check_split_size(split_size: int | None) -> int:
    """The kernels' encoding of a length of splits: 0 for none given."""
    if split_size is None:
        return 0
    split_size = check_integer("split_size", split_size)
    if not 0 < split_size <= _MAX_SPLIT_SIZE or split_size % _SPLIT_STEP:
        raise ValueError(
            f"split_size: expected a positive multiple of {_SPLIT_STEP}, at most "
            f"{_MAX_SPLIT_SIZE}, got {split_size}"
        )
    return split_size
