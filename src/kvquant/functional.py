"""The operations on a cache, their arguments checked: a call that raises writes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .arguments import (
    check_flag,
    check_float_dtype,
    check_integer,
    check_number,
    require,
)
from .checks import (
    check_block_table,
    check_index,
    check_no_grad,
    check_packed,
    check_pair,
    check_rows,
    check_slots,
    check_split_size,
    check_storage,
    check_table,
    check_window,
)
from .storage import LayerStorage

__all__ = [
    "append_",
    "attention",
    "gather",
]


def append_(
    key: Tensor,
    value: Tensor,
    storage: LayerStorage,
    *,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    max_seqlen: int | None = None,
    advance: bool = False,
) -> None:
    """Quantise keys and values and scatter them into a layer's storage, in one launch.

    Rows land behind ``seq_lens`` through the block table, or at ``slot_mapping``. Rows that the
    storage has no place for are dropped on the device; on the host they are an error.

    Args:
        key: ``(batch, tokens, kv_heads, head_dim)``, or packed ``(total, kv_heads, head_dim)`` with
            ``cu_seqlens``; float16, bfloat16 or float32, any strides, last dimension contiguous.
        value: Likewise, its head_dim may differ.
        storage: Where to write.
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
    packed = cu_seqlens is not None
    if slot_mapping is not None and isinstance(key, Tensor):
        packed = packed or key.dim() == 3
    check_pair(key, value, 3 if packed else 4)
    check_flag("advance", advance)
    check_storage(storage, key=key, value=value)
    require(
        key.shape[-2] == storage.k_data.shape[1],
        f"key: {key.shape[-2]} heads, but the storage has {storage.k_data.shape[1]}",
    )
    rows = key.shape[0] if packed else key.shape[0] * key.shape[1]
    by_table = slot_mapping is None or storage.format.key_mean is not None
    require(
        (block_table is None) == (seq_lens is None) and not (by_table and block_table is None),
        "block_table, seq_lens: needed without a slot_mapping, and with a key mean; else both or "
        "neither",
    )
    require(
        not advance or (seq_lens is not None and slot_mapping is None),
        "advance: needs seq_lens, and no slot_mapping",
    )
    new_tokens = rows if packed else key.shape[1]
    if block_table is None or seq_lens is None:
        for name, x in (
            ("cu_seqlens", cu_seqlens), ("seq_starts", seq_starts), ("max_seqlen", max_seqlen)
        ):  # fmt: skip
            require(x is None, f"{name}: only with a block_table, got a slot_mapping alone")
    else:
        batch = check_table(block_table)
        require(
            packed or key.shape[0] == batch,
            f"key: batch {key.shape[0]}, but block_table has {batch}",
        )
        require(
            not packed or cu_seqlens is not None,
            "cu_seqlens: needed for packed rows with a block_table",
        )
        max_seqlen = check_packed("cu_seqlens", cu_seqlens, batch, rows, key.device, max_seqlen)
        check_index("seq_starts", seq_starts, batch, key.device)
        added: int | Tensor = new_tokens if cu_seqlens is None else cu_seqlens.diff()
        check_block_table(
            block_table, seq_lens, storage, key.device, added=added if by_table else 0
        )
    check_slots(slot_mapping, rows, storage, key.device)
    fmt = storage.format
    ops.call(
        "append_",
        key,
        value,
        storage.k_data,
        storage.k_params,
        storage.k_mean,
        storage.v_data,
        storage.v_params,
        block_table,
        seq_lens,
        cu_seqlens,
        seq_starts,
        slot_mapping,
        fmt.mean_group,
        fmt.k_rotation(key.shape[-1]),
        fmt.v_rotation(value.shape[-1]),
        new_tokens if max_seqlen is None else max_seqlen,
        advance,
    )


def gather(
    storage: LayerStorage,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None = None,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Dequantise a layer: the keys and values that attention sees.

    Args:
        storage: The layer.
        block_table: int32 ``(batch, max_blocks)``.
        seq_lens: int32 ``(batch,)``: stored tokens.
        seq_starts: int32 ``(batch,)``: tokens before it are padding.
        tokens: Rows of the result, the table's capacity by default.
        dtype: Of the result: float16, bfloat16 or float32.

    Returns:
        key ``(batch, tokens, kv_heads, k_dim)`` and value ``(batch, tokens, kv_heads, v_dim)``;
        rows outside ``[seq_starts, seq_lens)`` are zero.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
    """
    check_storage(storage)
    device = storage.k_data.device
    check_index("seq_starts", seq_starts, check_table(block_table), device)
    check_block_table(block_table, seq_lens, storage, device)
    capacity = block_table.shape[1] * storage.block_size
    if tokens is None:
        tokens = capacity
    elif not 0 <= (tokens := check_integer("tokens", tokens)) <= capacity:
        raise ValueError(f"tokens: expected 0 to {capacity}, got {tokens}")
    check_float_dtype("dtype", dtype)
    fmt = storage.format
    result: tuple[Tensor, Tensor] = ops.call(
        "gather",
        storage.k_data,
        storage.k_params,
        storage.k_mean,
        storage.v_data,
        storage.v_params,
        block_table,
        seq_lens,
        seq_starts,
        fmt.mean_group,
        fmt.k_rotation(storage.k_data.shape[3]),
        fmt.v_rotation(storage.v_data.shape[3]),
        tokens,
        dtype,
    )
    return result


def attention(
    query: Tensor,
    storage: LayerStorage,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    seq_starts: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    split_size: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention straight on the 8-bit rows, flash-style (Dao et al.), split over tokens.

    One contract for decode, speculative chunks and prefill over a history. Query token ``i`` of
    ``n`` stands at position ``seq_len - n + i``. With ``key`` and ``value``, these are appended
    first, and ``seq_lens`` is what was stored before them (it is not changed).

    Args:
        query: ``(batch, tokens, q_heads, head_dim)``, or packed ``(total, q_heads, head_dim)`` with
            ``cu_seqlens_q``; float16, bfloat16 or float32, any strides, last dimension contiguous.
        storage: The layer; its heads divide q_heads.
        block_table: int32 ``(batch, max_blocks)``.
        seq_lens: int32 ``(batch,)``: stored tokens, the queries' own among them unless ``key`` is
            given.
        cu_seqlens_q: int32 ``(batch + 1,)``: where each sequence's packed queries begin.
        seq_starts: int32 ``(batch,)``: tokens before it are padding and never seen.
        key: New keys, as in `append_`.
        value: New values.
        max_seqlen_q: With ``cu_seqlens_q``, most packed queries of one sequence; by default their
            total.
        softmax_scale: ``head_dim**-0.5`` by default.
        causal: A query sees no token behind its own position.
        sliding_window: A query at ``i`` sees tokens ``j > i - sliding_window``.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: float32 ``(q_heads,)``: a logit a head that joins the softmax with no value
            (GPT-OSS).
        alibi_slopes: float32 ``(q_heads,)``: scores lose ``slope * |i - j|``.
        split_size: On CUDA a sequence's tokens are cut into splits whose number depends on the
            sizes of the whole call (batch, heads, capacity), so that the same sequence in another
            batch may differ in its last bits. With a split_size every split has so many tokens (a
            positive multiple of 256, at most 2**30), whatever else is in the call: a sequence's
            result does not depend on the batch it is in. It can cost speed, and the capacity may
            be 256 splits at most. Packed calls need the same max_seqlen_q for the same bits. On
            the CPU and in the torch reference results never depend on the batch: there it changes
            nothing.
        return_lse: Also return the log-sum-exp of the scores (and sinks).

    Returns:
        The output in query's dtype and shape (value's head_dim), zero where a query sees nothing
        and in packed rows of no sequence; with ``return_lse`` also float32 ``query.shape[:-1]``:
        the logarithm of the softmax's denominator, the sink's part included; -inf where there is
        neither token nor sink, and in packed rows of no sequence.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together.
        CacheFullError: New keys past the capacity, where the lengths are on the host.
    """
    packed = cu_seqlens_q is not None
    check_rows("query", query, 3 if packed else 4)
    check_no_grad(query=query)
    check_storage(storage, query=query)
    batch, heads, kv_heads = check_table(block_table), query.shape[-2], storage.k_data.shape[1]
    require(
        heads > 0 and heads % kv_heads == 0,
        f"query: {heads} heads are no multiple of the storage's {kv_heads} (got shape "
        f"{list(query.shape)})",
    )
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    require(
        packed or query.shape[0] == batch,
        f"query: batch {query.shape[0]}, but block_table has {batch}",
    )
    max_seqlen_q = check_packed(
        "cu_seqlens_q", cu_seqlens_q, batch, query.shape[0], query.device, max_seqlen_q
    )
    check_index("seq_starts", seq_starts, batch, query.device)
    check_index("sinks", sinks, heads, query.device, torch.float32)
    check_index("alibi_slopes", alibi_slopes, heads, query.device, torch.float32)
    window = check_window(sliding_window)
    cap = 0.0 if softcap is None else check_number("softcap", softcap, positive=True)
    split = check_split_size(split_size)
    scale = query.shape[-1] ** -0.5
    if softmax_scale is not None:
        scale = check_number("softmax_scale", softmax_scale)
    require(
        (key is None) == (value is None),
        "key, value: expected both or neither",
    )
    if key is not None and value is not None:
        check_pair(key, value, 3 if packed else 4)
        require(
            not packed or key.shape[0] == query.shape[0],
            f"key: {key.shape[0]} packed rows, but query has {query.shape[0]}",
        )
        if split and not torch.compiler.is_compiling():
            layer = (storage.k_data, storage.k_params, storage.k_mean, storage.v_data)
            capacity = block_table.shape[1] * storage.block_size
            ops.refuse_splits((query, *layer), split, capacity)
        append_(
            key,
            value,
            storage,
            block_table=block_table,
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens_q,
            seq_starts=seq_starts,
            max_seqlen=max_seqlen_q,
        )
        seq_lens = seq_lens + (key.shape[1] if cu_seqlens_q is None else cu_seqlens_q.diff())
    else:
        check_block_table(block_table, seq_lens, storage, query.device)
    fmt = storage.format
    tokens = query.shape[0] if packed else query.shape[1]
    out, lse = ops.call(
        "attention",
        query,
        storage.k_data,
        storage.k_params,
        storage.k_mean,
        storage.v_data,
        storage.v_params,
        block_table,
        seq_lens,
        cu_seqlens_q,
        seq_starts,
        sinks,
        alibi_slopes,
        fmt.mean_group,
        fmt.k_rotation(query.shape[-1]),
        fmt.v_rotation(storage.v_data.shape[3]),
        tokens if max_seqlen_q is None else max_seqlen_q,
        scale,
        causal,
        window,
        cap,
        split,
        return_lse,
    )
    return (out, lse) if return_lse else out
