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
from .errors import CacheFullError
from .storage import LayerStorage

__all__ = [
    "check_affine",
    "check_block_table",
    "check_index",
    "check_no_grad",
    "check_packed",
    "check_pair",
    "check_rows",
    "check_slots",
    "check_split_size",
    "check_splits",
    "check_storage",
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


def check_pair(key: Tensor, value: Tensor, dims: int) -> None:
    """New keys and values: alike but for their head_dims."""
    check_rows("key", key, dims)
    check_rows("value", value, dims)
    check_no_grad(key=key, value=value)
    require(
        key.shape[:-1] == value.shape[:-1] and key.dtype == value.dtype,
        f"value: expected key's dtype and shape but for head_dim ({key.dtype}, "
        f"{list(key.shape)}), got {value.dtype}, {list(value.shape)}",
    )
    require(key.device == value.device, f"value: on {value.device}, but key on {key.device}")


def check_no_grad(**tensors: Tensor) -> None:
    """Refuse inputs that autograd would follow: the operations have no gradient."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, but kvquant has no gradients: "
                    f"detach it or call under torch.no_grad()"
                )


def check_storage(storage: LayerStorage, **rows: Tensor | None) -> None:
    """A layer on the device of the caller's tensors, and with their head_dims.

    ``rows``: by the names of the call; "value" has the values' head_dim, all others the keys'.
    """
    if not isinstance(storage, LayerStorage):
        raise TypeError(f"storage: expected a LayerStorage, got {type(storage).__name__}")
    for name, x in rows.items():
        if x is None:
            continue
        of, data = ("values", storage.v_data) if name == "value" else ("keys", storage.k_data)
        if x.shape[-1] != data.shape[3]:
            raise ValueError(
                f"{name}: head_dim {x.shape[-1]}, but the storage's {of} have {data.shape[3]}"
            )
        if x.device != data.device:
            raise ValueError(f"{name}: on {x.device}, but the storage is on {data.device}")


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
    if index.device != device:
        raise ValueError(f"{name}: on {index.device}, but the call is on {device}")


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


def check_block_table(
    block_table: Tensor,
    seq_lens: Tensor,
    storage: LayerStorage,
    device: torch.device,
    *,
    added: int | Tensor = 0,
) -> None:
    """A table and lengths that fit; on the host also what they hold."""
    batch = check_table(block_table)
    if block_table.device != device:
        raise ValueError(f"block_table: on {block_table.device}, but the call is on {device}")
    max_blocks = block_table.shape[1]
    num_blocks, _, size, _ = storage.k_data.shape
    if size % 16 or (max_blocks > 1 and size & (size - 1)):
        raise ValueError(
            f"storage: block_size {size}, expected a multiple of 16, and a power of two where a "
            f"sequence has {max_blocks} blocks"
        )
    if seq_lens is None:
        raise TypeError("seq_lens: expected a tensor, got None")
    check_index("seq_lens", seq_lens, batch, device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = seq_lens + added
    if bool((seq_lens < 0).any()):
        raise ValueError(f"seq_lens: expected no negative length, got {seq_lens.tolist()}")
    if bool((ends > max_blocks * size).any()):
        error = CacheFullError if bool((seq_lens <= max_blocks * size).all()) else ValueError
        raise error(
            f"seq_lens: {ends.tolist()} tokens, but there is room for {max_blocks * size} each"
        )
    used = torch.arange(max_blocks, dtype=torch.int32, device=device) * size < ends.unsqueeze(1)
    bad = used & ((block_table < 0) | (block_table >= num_blocks))
    if bool(bad.any()):
        raise ValueError(
            f"block_table: block {block_table[bad][0].item()} is out of range, the storage has "
            f"{num_blocks}"
        )


def check_slots(
    slot_mapping: Tensor | None, rows: int, storage: LayerStorage, device: torch.device
) -> None:
    """One slot a row; on the host also in range and not twice."""
    check_index("slot_mapping", slot_mapping, rows, device, torch.int64)
    if slot_mapping is None or device.type != "cpu" or torch.compiler.is_compiling():
        return
    slots = storage.k_data.shape[0] * storage.block_size
    if bool(((slot_mapping < -1) | (slot_mapping >= slots)).any()):
        raise ValueError(
            f"slot_mapping: expected -1 to {slots - 1}, got {int(slot_mapping.min())} to "
            f"{int(slot_mapping.max())}"
        )
    taken = slot_mapping[slot_mapping >= 0]
    if taken.unique().numel() != taken.numel():
        raise ValueError("slot_mapping: a slot is given twice")


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
    shapes: dict[tuple[int, ...], int] = {
        (b, h, s, 1): 1,
        (b, h, 1, 1): max(1, s),
        (b, h, -(-s // group), d): group,
    }
    if scale.shape != zero.shape or tuple(scale.shape) not in shapes:
        raise ValueError(
            f"{of}scale, zero: expected shape [{b}, {h}, {s} or 1, 1], or [{b}, {h}, "
            f"{-(-s // group)}, {d}] with group_size {group_size}, got {list(scale.shape)} and "
            f"{list(zero.shape)}"
        )
    return shapes[tuple(scale.shape)]


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


def check_splits(split_size: int, capacity: int, most: int | None) -> None:
    """At most ``most`` splits of a given size over a sequence's capacity."""
    if split_size and most is not None and capacity > split_size * most:
        step = _SPLIT_STEP * most
        raise ValueError(
            f"split_size: {split_size}, but a capacity of {capacity} tokens would be more than "
            f"{most} splits: expected at least {-(-capacity // step) * _SPLIT_STEP}"
        )
