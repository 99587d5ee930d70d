"""A cache object for a whole model: append and attend."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import backends, ops
from ..arguments import (
    INT32_MAX,
    check_flag,
    check_integer,
    check_tensor,
    require,
)
from ..calls import check_append, check_out
from ..checks import check_index, check_packed, check_rows
from ..plan import AnyPlan, AttentionOptions, planned
from ..view import CacheView, Options, Sequences
from .lengths import is_capturing
from .stored import StoredCache
from .window import check_window
from .young import pieces, restored

__all__ = ["QuantizedKVCache"]

_MOST_KNOWN = 64  # options of calls, as layers with and without a window have them


class QuantizedKVCache(StoredCache):
    """Keys and values of a model as 8-bit rows, which attention reads as they are.

    Contiguous, or paged with ``block_size``; without a ``max_seq_len`` (and ``num_blocks``) it
    grows layer by layer. Lengths live on the device, and `append` and `attend` do not wait for it
    (but for long chunks on CUDA after replays of a graph, or behind left padding): the host checks
    the capacity by upper bounds. So decode steps can be captured in a CUDA graph;
    replays advance the lengths on the device only (the kernels drop rows past the capacity): call
    `reserve` before the capture, and `before_replay` before each replay, or `sync_lengths` after.

    A call that fails changes nothing. Methods that need exact lengths (all but `append`, `attend`,
    `crop` and `reset`) wait for a device that is not the CPU.

    Args:
        num_layers: Layers of the model.
        batch_size: Sequences.
        num_kv_heads: Heads of keys and values.
        head_dim: Channels of a key, a multiple of 16.
        v_head_dim: Channels of a value; ``head_dim`` by default.
        max_seq_len: Most tokens of a sequence, rounded up to a multiple of 16 or ``block_size``.
        block_size: Tokens of a block, a power of two from 16; None: contiguous.
        num_blocks: Blocks of the pool; by default enough for every sequence's ``max_seq_len``.
        format: How rows are stored: a `CacheFormat` or its name (`CacheFormat.named`), or a
            sequence of them, one per layer; ``CacheFormat()`` by default.
        dtype: What `dequantize` gives by default.
        device: Where; torch's default device by default. On "meta", as with torch's own tensors,
            nothing is stored or computed; what the cache would allocate (`nbytes`) is exact.

    Raises:
        ValueError: An argument outside the range above.
    """

    def append(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        """Quantize keys and values and store them behind a layer's tokens, in one launch.

        Args:
            layer: Which one.
            key: ``(batch, tokens, kv_heads, head_dim)``, or packed ``(total, kv_heads, head_dim)``
                with ``cu_seqlens``; float16, bfloat16 or float32, last dimension contiguous.
            value: Likewise, with ``v_head_dim``.
            cu_seqlens: int32 ``(batch + 1,)``: where each sequence's packed rows begin. On the CPU
                it tells the host exact lengths whatever the cache's device.
            max_seqlen: With ``cu_seqlens``, most packed rows of one sequence; by default their
                total.

        Raises:
            TypeError: An argument of another type, a dtype that is not supported.
            ValueError: Arguments that do not fit.
            CacheFullError: No room; nothing was written.
        """
        layer, state = self._check_layer(layer), self._state
        check_tensor("key", key)
        seqs, counts = self._batch(layer, key, "cu_seqlens", cu_seqlens, max_seqlen)
        check_append(key, value, state.view(layer), seqs)
        with state.pool.lock if state.pool.is_shared else nullcontext():
            view, seqs = self._with_room(layer, seqs, counts)
            was_stale = state.lengths.stale
            self._expect(layer, counts, cu_seqlens is not None)
            try:
                if ops.is_plain(key):
                    backend = backends.select("append_", view.device, view.spec)
                    backend.append(key, value, view, seqs, None)
                else:
                    ops.append(key, value, view, seqs, None)
            except Exception:
                self._recover()
                raise
            state.lengths.stale = was_stale

    @overload
    def attend(
        self, layer: int, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *,
        cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
        sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, out: Tensor | None = None,
        return_lse: Literal[False] = False, exact_prompt: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def attend(
        self, layer: int, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *,
        cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
        sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, out: Tensor | None = None,
        return_lse: Literal[True], exact_prompt: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def attend(
        self, layer: int, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *,
        cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
        sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, out: Tensor | None = None,
        return_lse: bool, exact_prompt: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        split_size: int | None = None,
        out: Tensor | None = None,
        return_lse: bool = False,
        exact_prompt: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append ``key`` and ``value`` if given, then attend to all of a layer's tokens.

        Args:
            layer: Which one.
            query: ``(batch, tokens, q_heads, head_dim)``, or packed ``(total, q_heads, head_dim)``
                with ``cu_seqlens_q``; its last token is the last of the cache.
            key: New keys, as in `append`.
            value: New values.
            cu_seqlens_q: int32 ``(batch + 1,)``: where each sequence's packed rows begin.
            max_seqlen_q: With ``cu_seqlens_q``, most packed rows of one sequence; by default their
                total.
            softmax_scale: ``head_dim**-0.5`` by default.
            causal: A query sees no token behind its own position.
            sliding_window: A query at ``i`` sees tokens ``j > i - sliding_window``.
            softcap: Scores become ``softcap * tanh(score / softcap)``.
            sinks: float32 ``(q_heads,)``: a logit a head that joins the softmax with no value.
            alibi_slopes: float32 ``(q_heads,)``: scores lose ``slope * |i - j|``.
            split_size: On CUDA, tokens of every split (a positive multiple of 256), so that a
                sequence's result does not depend on the batch it is in; it can cost speed. See
                `kvquant.attention`. What ``exact_prompt`` leaves to torch is torch's affair.
            out: Where the output goes; by default a new tensor.
            return_lse: Also return the log-sum-exp of the scores.
            exact_prompt: The first tokens of an empty layer attend to the keys and values as they
                are given, by torch, where no other option asks for more than that.

        Returns:
            The output in query's dtype and shape (with ``v_head_dim``), and with ``return_lse``
            float32 ``query.shape[:-1]``. Packed rows of no sequence are zero, and -inf.

        Raises:
            TypeError: An argument of another type, a dtype that is not supported.
            ValueError: Arguments that do not fit.
            CacheFullError: No room; nothing was written.
        """
        state = self._state
        is_layer = type(layer) is int and 0 <= layer < len(state.room)
        is_first = is_layer and key is not None and not state.lengths.high[layer]
        asked = (
            state.kinds[layer] if is_layer else None, key is None,
            is_first and exact_prompt is True, softmax_scale, sliding_window, type(sliding_window),
            softcap, split_size, return_lse, sinks is None, alibi_slopes is None, backends.forced(),
        )  # fmt: skip
        plan = self._known_plan(asked) if is_layer else None
        if (
            plan is not None
            and cu_seqlens_q is out is sinks is alibi_slopes is None
            and max_seqlen_q is None
            and causal is plan.options.causal
            and type(return_lse) is type(exact_prompt) is bool
        ):
            view, seqs = state.memory.views[layer], state.seqs(layer)
            if not state.pool.is_shared and plan.fits(query, view, seqs, key, value):
                if plan.reads_lengths:
                    seqs = state.told(layer, seqs, None)
                if key is None:
                    if ops.is_plain(query):
                        return plan.launch(query, view, seqs, None, None)
                elif (
                    state.room[layer] >= (tokens := key.shape[1])
                    and tokens <= state.most_at_once[layer]
                    and ops.is_plain(query)
                ):
                    lengths = state.lengths
                    was_stale = lengths.stale
                    state.room[layer] -= tokens
                    lengths.stale = True  # until the call is over: an interrupt leaves it so
                    lengths.high[layer] += tokens
                    try:
                        result = plan.launch(query, view, seqs, key, value)
                    except Exception:
                        self._recover()
                        raise
                    lengths.stale = was_stale
                    return result
        for name, flag in (
            ("causal", causal), ("return_lse", return_lse), ("exact_prompt", exact_prompt)
        ):  # fmt: skip
            check_flag(name, flag)
        layer = self._check_layer(layer)
        check_tensor("query", query)
        options = Options.of(
            state.config.head_dim, softmax_scale, causal, sliding_window, softcap, split_size
        )
        check_window(state, options.sliding_window)
        seqs, counts = self._batch(layer, query, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q)
        if key is not None and cu_seqlens_q is None:
            check_tensor("key", key)
            counts = [key.shape[1] if key.dim() > 1 else 0] * self.batch_size
        vectors = {"sinks": sinks, "alibi_slopes": alibi_slopes}
        wanted = {name: x is not None for name, x in vectors.items()} | {
            "lse": return_lse,
            "exact": exact_prompt and key is not None and not state.lengths.high[layer],
        }
        plan = planned(query, state.view(layer), seqs, key, value, options, **wanted)
        for name, x in vectors.items():
            check_index(name, x, query.shape[-2], self.device, torch.float32)
        check_out(out, None, query, state.config.v_head_dim)
        if key is not None and cu_seqlens_q is None and plan.backend != "torch":
            fed = pieces(state.config.formats[layer], state.lengths.high[layer], counts[0])
            if len(fed) > 1 and value is not None:
                self._with_room(layer, seqs, counts)
                numbers = {
                    "softmax_scale": softmax_scale, "causal": causal, "softcap": softcap,
                    "sliding_window": sliding_window, "split_size": split_size, **vectors,
                }  # fmt: skip
                return self._attend_in_pieces(
                    fed, layer, query, key, value, out, return_lse, numbers
                )
        with state.pool.lock if state.pool.is_shared else nullcontext():
            was_stale = state.lengths.stale
            view = state.view(layer)
            if key is not None:
                view, seqs = self._with_room(layer, seqs, counts)
                plan = planned(query, view, seqs, key, value, options, **wanted)
            if plan.reads_lengths:
                is_known = cu_seqlens_q is not None and cu_seqlens_q.device.type == "cpu"
                seqs = state.told(layer, seqs, counts if is_known else None)
            if key is not None:
                self._expect(layer, counts, cu_seqlens_q is not None)
            try:
                result = plan.run(query, view, seqs, key, value, out=out, **vectors)
            except Exception:
                self._recover()
                raise
            state.lengths.stale = was_stale
        if is_layer and cu_seqlens_q is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[asked] = plan
        return result

    def _attend_in_pieces(
        self,
        pieces: list[tuple[int, int]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor | None,
        return_lse: bool,
        options: dict[str, Any],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A call by age whose tokens fill several groups: each reads its own while it is young.

        If a piece fails, none is stored: what lies in blocks is behind the lengths.
        """
        state, young = self._state, self._state.young[layer]
        assert young is not None
        try:
            with restored(young, state.lengths.lens[layer]):
                found = [
                    self.attend(
                        layer, *(x[:, begin:end] for x in (query, key, value)),
                        out=None if out is None else out[:, begin:end], return_lse=return_lse,
                        exact_prompt=False, **options,
                    )
                    for begin, end in pieces
                ]  # fmt: skip
        except BaseException:
            self._recover()
            raise
        parts = [[x] if isinstance(x, Tensor) else [*x] for x in found]
        joined = [torch.cat(of, 1) for of in zip(*parts, strict=True)]
        if out is not None:
            joined[0] = out
        return (joined[0], joined[1]) if return_lse else joined[0]

    def _known_plan(self, asked: tuple[Any, ...]) -> AnyPlan | None:
        """The last plan with these options; a tensor or a list in a number's place has none."""
        try:
            return self._known.get(asked)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _batch(
        self, layer: int, rows: Tensor, name: str, cu: Tensor | None, most: int | None
    ) -> tuple[Sequences, list[int]]:
        """A call's batch, and bounds of the rows of each sequence."""
        state, batch = self._state, self.batch_size
        if cu is None:
            check_packed(name, None, batch, 0, self.device, most)
            return state.seqs(layer), [rows.shape[1] if rows.dim() > 1 else 0] * batch
        check_rows("query" if name.endswith("q") else "key", rows, 3)
        check_tensor(name, cu)
        total = rows.shape[0]
        check_index(name, cu, batch + 1, cu.device if cu.device.type == "cpu" else self.device)
        label = name.replace("cu_seqlens", "max_seqlen")
        if most is not None:
            most = check_integer(label, most, 0, INT32_MAX)
        if cu.device.type == "cpu":
            edges = cu.tolist()
            counts = [end - begin for begin, end in pairwise(edges)]
            require(
                min(counts) >= 0 and edges[0] >= 0 and edges[-1] <= total,
                f"{name}: expected offsets into {total} rows that never fall, got {edges}",
            )
            require(
                most is None or max(counts) <= most,
                f"{label}: {most}, but a sequence has {max(counts)} rows",
            )
            cu, most = cu.to(self.device, non_blocking=True), max(counts)
        else:
            state.lengths.stale = True
            most = total if most is None else min(most, total)
            counts = [most] * batch
        plain = state.seqs(layer)
        return Sequences(
            plain.block_table, plain.seq_lens, plain.seq_starts, cu, max(1, most), True, plain.young
        ), counts

    def _with_room(
        self, layer: int, seqs: Sequences, counts: list[int]
    ) -> tuple[CacheView, Sequences]:
        """See to room for new tokens; a call's memory and batch as they are then."""
        state = self._state
        if state.room[layer] < max(counts) or state.pool.is_shared:
            state.make_room(layer, counts)
        plain = state.seqs(layer)
        if seqs.cu_seqlens_q is None:
            seqs = plain
        elif seqs.block_table is not plain.block_table:
            seqs = Sequences(
                plain.block_table, plain.seq_lens, plain.seq_starts, seqs.cu_seqlens_q,
                seqs.max_seqlen_q, True, plain.young,
            )  # fmt: skip
        return state.view(layer), seqs

    def _expect(self, layer: int, counts: list[int], is_ragged: bool) -> None:
        """Raise a layer's bounds ahead of an append."""
        state, most = self._state, max(counts)
        state.room[layer] -= most
        state.lengths.stale = True
        if is_ragged:
            state.lengths.raise_bounds(layer, counts)
            state.refresh_room(layer)
        else:
            state.lengths.high[layer] += most

    def _recover(self) -> None:
        """After a call that failed below: what is stored, the device knows."""
        if not is_capturing(self.device):
            self._state.sync_lengths()
