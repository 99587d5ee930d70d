"""The operations on a cache, their arguments checked: a call that raises writes nothing."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import backends, ops
from .arguments import check_flag, check_float_dtype, check_integer, check_tensor, require
from .calls import check_append, check_gather, check_memory, check_out, problem_of
from .checks import check_device_of, check_index, check_packed, check_table
from .errors import CacheFullError
from .plan import AttentionOptions, dispatch, options_of, planned
from .view import CacheView, Sequences

__all__ = ["append_", "attention", "gather", "gather_rows"]


def append_(
    key: Tensor,
    value: Tensor,
    view: CacheView,
    *,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    max_seqlen: int | None = None,
    advance: bool = False,
) -> None:
    """Quantize keys and values and scatter them into a layer's memory, in one launch.

    Rows land behind ``seq_lens`` through the block table, or at ``slot_mapping``. Rows that the
    memory has no place for are dropped on the device; on the host they are an error.

    Args:
        key: ``(batch, tokens, kv_heads, head_dim)``, or packed ``(total, kv_heads, head_dim)`` with
            ``cu_seqlens``; float16, bfloat16 or float32, any strides, last dimension contiguous.
        value: Likewise, its head_dim may differ.
        view: Where to write.
        block_table: int32 ``(batch, max_blocks)``. Needed unless ``slot_mapping`` is given and the
            format has no key mean; without it the slots alone say where rows go, and
            ``cu_seqlens``, ``seq_starts`` and ``max_seqlen`` are refused.
        seq_lens: int32 ``(batch,)``: tokens stored before the call. Given like ``block_table``.
        cu_seqlens: int32 ``(batch + 1,)``: where each sequence's packed rows begin.
        seq_starts: int32 ``(batch,)``: tokens before it are padding (left out of key means).
        slot_mapping: int64, one a row: ``block * block_size + row``, -1 to skip.
        max_seqlen: With ``cu_seqlens``, most packed rows of one sequence; by default their total.
        advance: Add the new tokens to ``seq_lens``, in the same launch.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
        CacheFullError: Past the table's capacity, where the lengths are on the host.
    """
    check_flag("advance", advance)
    require(
        (block_table is None) == (seq_lens is None)
        and not (block_table is None and slot_mapping is None),
        "block_table, seq_lens: needed without a slot_mapping, and with a key mean; else both or "
        "neither",
    )
    require(
        not advance or (seq_lens is not None and slot_mapping is None),
        "advance: needs seq_lens, and no slot_mapping",
    )
    seqs = None
    if block_table is None or seq_lens is None:
        for name, x in (
            ("cu_seqlens", cu_seqlens), ("seq_starts", seq_starts), ("max_seqlen", max_seqlen)
        ):  # fmt: skip
            require(x is None, f"{name}: only with a block_table, got a slot_mapping alone")
    else:
        check_tensor("key", key)
        require(
            slot_mapping is None or cu_seqlens is not None or key.dim() != 3,
            "cu_seqlens: needed for packed rows with a block_table",
        )
        seqs = _batch(
            key, block_table, seq_lens, seq_starts, "cu_seqlens", cu_seqlens, max_seqlen, advance
        )
    check_append(key, value, view, seqs, slot_mapping)
    if _on_host(key.device):
        if seqs is not None:
            by_table = slot_mapping is None or view.mean_group > 0
            _check_contents(seqs, view, _added(seqs, key) if by_table else 0)
        _check_slots(slot_mapping, view)
    if ops.is_plain(key):
        backend = backends.select("append_", view.device, view.spec)
        backend.append(key, value, view, seqs, slot_mapping)
    else:
        ops.append(key, value, view, seqs, slot_mapping)


def gather(
    view: CacheView,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None = None,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dequantize a layer: the keys and values that attention sees.

    Args:
        view: The layer.
        block_table: int32 ``(batch, max_blocks)``.
        seq_lens: int32 ``(batch,)``: stored tokens.
        seq_starts: int32 ``(batch,)``: tokens before it are padding.
        tokens: Rows of the result, the table's capacity by default.
        dtype: Of the result: float16, bfloat16 or float32.
        out: Where key and value go, instead of ``tokens`` and ``dtype``; by default new tensors.

    Returns:
        key ``(batch, tokens, kv_heads, head_dim)`` and value ``(batch, tokens, kv_heads,
        v_head_dim)``; rows outside ``[seq_starts, seq_lens)`` are zero.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
    """
    check_memory(view)
    check_table(block_table)
    check_device_of("block_table", block_table, view.device)
    seqs = Sequences(block_table, seq_lens, seq_starts)
    check_memory(view, seqs)
    if _on_host(view.device):
        _check_contents(seqs, view, 0)
    check_float_dtype("dtype", dtype)
    if out is None:
        capacity = seqs.spec.max_blocks * view.block_size
        if tokens is None:
            tokens = capacity
        elif not 0 <= (tokens := check_integer("tokens", tokens)) <= capacity:
            raise ValueError(f"tokens: expected 0 to {capacity}, got {tokens}")
        return gather_rows(view, seqs, tokens, dtype)
    require(tokens is None, "tokens: out says how many")
    require(
        isinstance(out, tuple) and len(out) == 2,
        f"out: expected a pair of tensors, got {type(out).__name__}",
        TypeError,
    )
    check_gather(view, seqs, *out)
    _gather(view, seqs, *out)
    return out


def gather_rows(
    view: CacheView, seqs: Sequences, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of checked sequences, in new tensors of ``tokens`` rows each."""
    lead, new = (seqs.spec.batch, tokens, view.num_kv_heads), view.k.codes.new_empty
    key, value = (new((*lead, rows.head_dim), dtype=dtype) for rows in (view.k, view.v))
    _gather(view, seqs, key, value)
    return key, value


def _gather(view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
    if ops.is_plain(view.k.codes):
        backend = backends.select("gather_", view.device, view.spec)
        backend.gather(view, seqs, key, value)
    else:
        ops.gather(view, seqs, key, value)


@overload
def attention(
    query: Tensor, view: CacheView, key: Tensor | None = None, value: Tensor | None = None, *,
    block_table: Tensor, seq_lens: Tensor, seq_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
    sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, advance: bool = False,
    young: Tensor | None = None, out: Tensor | None = None, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, view: CacheView, key: Tensor | None = None, value: Tensor | None = None, *,
    block_table: Tensor, seq_lens: Tensor, seq_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
    sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, advance: bool = False,
    young: Tensor | None = None, out: Tensor | None = None, return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def attention(
    query: Tensor, view: CacheView, key: Tensor | None = None, value: Tensor | None = None, *,
    block_table: Tensor, seq_lens: Tensor, seq_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
    sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, advance: bool = False,
    young: Tensor | None = None, out: Tensor | None = None, return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    view: CacheView,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    advance: bool = False,
    young: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention straight on the quantized rows, flash-style (Dao et al.), split over tokens.

    One contract for decode, speculative chunks and prefill over a history. Query token ``i`` of
    ``n`` stands at position ``seq_len - n + i``. With ``key`` and ``value``, these are appended
    first, and ``seq_lens`` is what was stored before them (it is not changed unless ``advance``).
    For a loop of many steps, `plan` once and `Plan.run` at each. On CUDA, long chunks attend to
    dequantized pieces of the history in bounded scratch memory, for which the lengths are read back
    (`Sequences.on_host` avoids it).

    Args:
        query: ``(batch, tokens, q_heads, head_dim)``, or packed ``(total, q_heads, head_dim)`` with
            ``cu_seqlens_q``; float16, bfloat16 or float32, any strides, last dimension contiguous.
        view: The layer; its heads divide q_heads.
        key: New keys, as in `append_`; packed, as many rows as queries.
        value: New values.
        block_table: int32 ``(batch, max_blocks)``.
        seq_lens: int32 ``(batch,)``: stored tokens, the queries' own among them unless ``key`` is
            given.
        seq_starts: int32 ``(batch,)``: tokens before it are padding and never seen.
        cu_seqlens_q: int32 ``(batch + 1,)``: where each sequence's packed queries begin.
        max_seqlen_q: With ``cu_seqlens_q``, most packed queries of one sequence; by default their
            total.
        sinks: float32 ``(q_heads,)``: a logit a head that joins the softmax with no value
            (GPT-OSS).
        alibi_slopes: float32 ``(q_heads,)``: scores lose ``slope * |i - j|``.
        advance: Add the new tokens to ``seq_lens``, for the next call.
        young: With a format by age, the first and the newest tokens: see `Sequences`.
        out: Where the output goes; by default a new tensor.
        return_lse: Also return the log-sum-exp of the scores (and sinks).
        **options: ``softmax_scale`` (``head_dim**-0.5`` by default); ``causal`` (True): a query
            sees no token behind its own position; ``sliding_window``: a query at ``i`` sees tokens
            ``j > i - sliding_window``; ``softcap``: scores become ``softcap * tanh(score /
            softcap)`` (Gemma 2); ``split_size``: on CUDA a sequence's tokens are cut into splits
            whose number depends on the sizes of the whole call (batch, heads, capacity), so that
            the same sequence in another batch may differ in its last bits. With a split_size every
            split has so many tokens (a positive multiple of 256, at most 2**30), whatever else is
            in the call: a sequence's result does not depend on the batch it is in. It can cost
            speed, and the capacity may be 256 splits at most. Packed calls need the same
            max_seqlen_q for the same bits. On the CPU and in the torch reference results never
            depend on the batch: there it changes nothing.

    Returns:
        The output in query's dtype and shape (value's head_dim), zero where a query sees nothing
        and in packed rows of no sequence (in ``out`` these keep what it held); with ``return_lse``
        also float32 ``query.shape[:-1]``: the logarithm of the softmax's denominator, the sink's
        part included; -inf where there is neither token nor sink, and in packed rows of no
        sequence.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
        CacheFullError: New keys past the capacity, where the lengths are on the host.
    """
    check_tensor("query", query)
    for name, flag in (("return_lse", return_lse), ("advance", advance)):
        check_flag(name, flag)
    seqs = _batch(
        query, block_table, seq_lens, seq_starts, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q,
        advance, young,
    )  # fmt: skip
    numbers = options_of(query.shape[-1] if query.dim() else 1, options)
    heads = query.shape[-2] if query.dim() > 1 else 0
    check_index("sinks", sinks, heads, query.device, torch.float32)
    check_index("alibi_slopes", alibi_slopes, heads, query.device, torch.float32)
    wanted = {"sinks": sinks is not None, "alibi_slopes": alibi_slopes is not None}
    if not ops.is_plain(query):
        problem_of(query, view, seqs, key, value, numbers, **wanted)
        check_out(out, None, query, view.v.head_dim)
        if _on_host(query.device):
            _check_contents(seqs, view, 0 if key is None else _added(seqs, key))
        return dispatch(
            query, view, seqs, key, value, numbers, sinks, alibi_slopes, out, None, return_lse
        )
    plan = planned(query, view, seqs, key, value, numbers, **wanted, lse=return_lse)
    check_out(out, None, query, view.v.head_dim)
    if _on_host(query.device):
        _check_contents(seqs, view, 0 if key is None else _added(seqs, key))
    return plan.launch(query, view, seqs, key, value, sinks, alibi_slopes, out)


def _batch(
    rows: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
    name: str,
    cu_seqlens: Tensor | None,
    most: int | None,
    advance: bool,
    young: Tensor | None = None,
) -> Sequences:
    """A call's sequences; on the host, packed rows are checked to be among the rows there are."""
    batch = check_table(block_table)
    check_tensor("query" if name.endswith("q") else "key", rows)
    check_device_of("block_table", block_table, rows.device)
    total = rows.shape[0] if rows.dim() else 0
    most = check_packed(name, cu_seqlens, batch, total, rows.device, most)
    bound = 0
    if cu_seqlens is not None:
        bound = max(1, total) if most is None else most
    return Sequences(block_table, seq_lens, seq_starts, cu_seqlens, bound, advance, young)


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _added(seqs: Sequences, rows: Tensor) -> int | Tensor:
    return rows.shape[1] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.diff()


def _check_contents(seqs: Sequences, view: CacheView, added: int | Tensor) -> None:
    """What a table and lengths hold, where the host may look."""
    lens, table = seqs.seq_lens, seqs.block_table
    capacity, num_blocks = seqs.spec.max_blocks * view.block_size, view.num_blocks
    ends = lens + added
    if bool((lens < 0).any()):
        raise ValueError(f"seq_lens: expected no negative length, got {lens.tolist()}")
    if bool((ends > capacity).any()):
        error = CacheFullError if bool((lens <= capacity).all()) else ValueError
        raise error(f"seq_lens: {ends.tolist()} tokens, but there is room for {capacity} each")
    first = torch.arange(seqs.spec.max_blocks, dtype=torch.int32) * view.block_size
    bad = (first < ends.unsqueeze(1)) & ((table < 0) | (table >= num_blocks))
    if seqs.seq_starts is not None:  # a block of padding alone may be missing
        bad &= first + view.block_size > seqs.seq_starts.unsqueeze(1)
    if bool(bad.any()):
        raise ValueError(
            f"block_table: block {table[bad][0].item()} is out of range, the view has {num_blocks}"
        )


def _check_slots(slot_mapping: Tensor | None, view: CacheView) -> None:
    """Slots in range, none of them twice."""
    if slot_mapping is None:
        return
    slots = view.num_blocks * view.block_size
    if bool(((slot_mapping < -1) | (slot_mapping >= slots)).any()):
        raise ValueError(
            f"slot_mapping: expected -1 to {slots - 1}, got {int(slot_mapping.min())} to "
            f"{int(slot_mapping.max())}"
        )
    taken = slot_mapping[slot_mapping >= 0]
    if taken.unique().numel() != taken.numel():
        raise ValueError("slot_mapping: a slot is given twice")
