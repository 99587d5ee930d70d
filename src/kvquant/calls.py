"""Whether the parts of a call fit together: asked once, wherever the call comes from."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .arguments import check_tensor
from .backends import Problem, look_of
from .checks import check_device_of, check_index, check_no_grad, check_pair, check_rows
from .formats import CacheFormat
from .view import CacheView, Options, Sequences

__all__ = ["check_append", "check_gather", "check_memory", "check_out", "problem_of"]


def check_memory(view: CacheView, seqs: Sequences | None = None, **rows: Tensor) -> None:
    """A view and a batch, on one device with the caller's rows, and of their head_dims.

    ``rows``: by the names of the call; "value" has the values' head_dim, all others the keys'.
    """
    if not isinstance(view, CacheView):
        raise TypeError(f"view: expected a CacheView, got {type(view).__name__}")
    for name, x in rows.items():
        of, dim = ("values", view.v.head_dim) if name == "value" else ("keys", view.k.head_dim)
        if x.shape[-1] != dim:
            raise ValueError(
                f"{name}: head_dim {x.shape[-1]}, but the view's {of} have {dim} (got shape "
                f"{list(x.shape)})"
            )
        if x.device != view.spec.device:
            raise ValueError(f"{name}: on {x.device}, but the view is on {view.spec.device}")
    if seqs is None:
        return
    if not isinstance(seqs, Sequences):
        raise TypeError(f"seqs: expected Sequences, got {type(seqs).__name__}")
    check_device_of("block_table", seqs.block_table, view.spec.device)
    if seqs.young is not None:
        _check_young(seqs.young, view)
    size, max_blocks = view.spec.block_size, seqs.spec.max_blocks
    if size % 16 or (max_blocks > 1 and size & (size - 1)):
        raise ValueError(
            f"view: block_size {size}, expected a multiple of 16, and a power of two where a "
            f"sequence has {max_blocks} blocks"
        )


def _young_bytes(format: CacheFormat, head_dim: int, v_head_dim: int) -> int:
    return replace(format, by_age=True).young_bytes(head_dim, v_head_dim)


_known_young_bytes = lru_cache(64)(_young_bytes)


def _check_young(young: Tensor, view: CacheView) -> None:
    young_bytes = _young_bytes if torch.compiler.is_compiling() else _known_young_bytes
    try:
        needed = young_bytes(view.format, view.k.head_dim, view.v.head_dim)
    except ValueError as error:
        raise ValueError(f"young: not with this view ({error})") from None
    if young.shape[1] != view.num_kv_heads or young.shape[2] < needed:
        raise ValueError(
            f"young: expected slabs of {view.num_kv_heads} heads and at least {needed} bytes, got "
            f"shape {list(young.shape)}"
        )


def _check_batch(name: str, x: Tensor, seqs: Sequences) -> None:
    if not seqs.spec.is_packed and x.shape[0] != seqs.spec.batch:
        raise ValueError(f"{name}: batch {x.shape[0]}, expected {seqs.spec.batch} sequences")


def check_append(
    key: Tensor,
    value: Tensor,
    view: CacheView,
    seqs: Sequences | None,
    slot_mapping: Tensor | None = None,
) -> None:
    """New rows, and where they go: behind ``seqs``, or to slots.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
    """
    packed = seqs is not None and seqs.spec.is_packed
    if seqs is None:
        check_tensor("key", key)
        packed = key.dim() == 3
    check_pair(key, value, 3 if packed else 4)
    check_memory(view, seqs, key=key, value=value)
    if key.shape[-2] != view.num_kv_heads:
        raise ValueError(f"key: {key.shape[-2]} heads, but the view has {view.num_kv_heads}")
    if seqs is not None:
        _check_batch("key", key, seqs)
    if slot_mapping is None and seqs is None:
        raise ValueError("block_table, seq_lens: needed without a slot_mapping")
    if slot_mapping is None:
        return
    if seqs is not None and seqs.young is not None:
        raise ValueError("slot_mapping: not with young rows, which have no slots")
    if seqs is None and view.mean_group:
        raise ValueError("block_table, seq_lens: needed with a key mean")
    if seqs is not None and seqs.advance:
        raise ValueError("advance: needs seq_lens, and no slot_mapping")
    rows = key.shape[0] if packed else key.shape[0] * key.shape[1]
    check_index("slot_mapping", slot_mapping, rows, key.device, torch.int64)


def problem_of(
    query: Tensor,
    view: CacheView,
    seqs: Sequences,
    key: Tensor | None,
    value: Tensor | None,
    options: Options,
    *,
    sinks: bool = False,
    alibi_slopes: bool = False,
    lse: bool = False,
    exact: bool = False,
) -> Problem:
    """An attention call as numbers, its parts checked against each other.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
    """
    check_memory(view)
    if not isinstance(seqs, Sequences):
        raise TypeError(f"seqs: expected Sequences, got {type(seqs).__name__}")
    packed = seqs.spec.is_packed
    check_rows("query", query, 3 if packed else 4)
    check_no_grad(query=query)
    check_memory(view, seqs, query=query)
    _check_batch("query", query, seqs)
    heads, kv_heads = query.shape[-2], view.num_kv_heads
    if heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query: {heads} heads are no multiple of the view's {kv_heads} (got shape "
            f"{list(query.shape)})"
        )
    if (key is None) != (value is None):
        raise ValueError("key, value: expected both or neither")
    if key is not None and value is not None:
        check_append(key, value, view, seqs)
        if packed and key.shape[0] != query.shape[0]:
            raise ValueError(f"key: {key.shape[0]} packed rows, but query has {query.shape[0]}")
    tokens = query.shape[0 if packed else 1]
    most = seqs.spec.max_seqlen_q or tokens if packed else tokens
    any_total = packed and seqs.spec.max_seqlen_q > 0
    looks = [None if x is None else look_of(x, any_total) for x in (query, key, value)]
    assert looks[0] is not None
    return Problem(
        looks[0], looks[1], looks[2], view.spec, seqs.spec, options, most, sinks, alibi_slopes,
        lse, exact,
    )  # fmt: skip


def check_out(out: Tensor | None, lse: Tensor | None, query: Tensor, v_head_dim: int) -> None:
    """What a call writes into, if the caller gives it."""
    if out is not None:
        check_tensor("out", out)
        shape = (*query.shape[:-1], v_head_dim)
        if out.dtype != query.dtype:
            raise TypeError(f"out: expected {query.dtype}, got {out.dtype}")
        if out.shape != shape or out.device != query.device or out.stride(-1) != 1:
            raise ValueError(
                f"out: expected shape {list(shape)} on {query.device} with a contiguous last "
                f"dimension, got {list(out.shape)}, strides {list(out.stride())}, on {out.device}"
            )
        check_no_grad(out=out)
    if lse is not None:
        check_tensor("lse", lse)
        if lse.dtype != torch.float32:
            raise TypeError(f"lse: expected {torch.float32}, got {lse.dtype}")
        if lse.shape != query.shape[:-1] or lse.device != query.device or not lse.is_contiguous():
            raise ValueError(
                f"lse: expected contiguous {list(query.shape[:-1])} on {query.device}, got "
                f"{list(lse.shape)}, strides {list(lse.stride())}, on {lse.device}"
            )
        check_no_grad(lse=lse)


def check_gather(view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
    """What the first tokens of each sequence are dequantized into."""
    check_memory(view, seqs)
    check_pair(key, value, 4)
    check_memory(view, key=key, value=value)
    lead = (seqs.spec.batch, key.shape[1], view.num_kv_heads)
    if key.shape[:3] != lead:
        raise ValueError(
            f"key: expected {seqs.spec.batch} sequences and {view.num_kv_heads} heads, got shape "
            f"{list(key.shape)}"
        )
