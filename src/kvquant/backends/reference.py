"""The operations in plain torch, for every device: what the compiled kernels are measured against.

Written to be read beside ``csrc/params.h``. Lengths are read on the host, sequence by sequence;
neither a whole history in floating point nor a score for every query and key exists at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..formats import open_start, read_from
from ..formats.affine import MAX_ABS
from ..view import CacheView, Options, Sequences, ViewSpec
from .base import Backend, Outputs, Prepared, Problem
from .reference_age import Held, append_by_age, young_rows
from .reference_rows import KEYS, chunks, dequantize, pv_matmul, qk_matmul, quantize, rotate

__all__ = ["REFERENCE"]

_MIN_MEAN_ROWS = 16  # a first group's own mean needs as many rows
_QUERIES = 256  # query tokens at a time


class _Memory:
    """One layer's tensors, read and written by token."""

    def __init__(self, view: CacheView, seqs: Sequences | None = None) -> None:
        self.young = young_rows(view, seqs)
        self.view, self.group, self.block_size = view, view.mean_group, view.block_size
        self.k_rotation, self.v_rotation = (
            rows.format.rotation(rows.head_dim) for rows in (view.k, view.v)
        )
        self.mean = None if view.mean is None else view.mean.view(torch.float16)

    def find(self, table: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(block, row, whether there is one) of a sequence's tokens, by its row of the table."""
        if table is None or not table.numel():
            nowhere = torch.zeros_like(tokens)
            return nowhere, nowhere, nowhere.bool()
        index = tokens // self.block_size
        inside = (tokens >= 0) & (index < table.shape[0])
        block = table[index.clamp(0, table.shape[0] - 1)].long()
        inside &= (block >= 0) & (block < self.view.num_blocks)
        return block.where(inside, 0), (tokens % self.block_size).where(inside, 0), inside

    def keys(self, held: Held, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(tokens, heads, dim)`` as stored, not rotated back, and which there are."""
        block, row, there = self.find(held.table, tokens)
        k = self.view.k
        x = k.format.decode(k.codes[block, :, row], k.params[block, :, row])
        if self.young is not None:
            x = self.young.read(self.young.view.k, held, tokens, x)
        if self.mean is not None:
            home, start, known = self.find(held.table, tokens // self.group * self.group)
            mean = self.mean[home, :, start // self.group].float()
            x = x + mean.where(known[:, None, None], 0)
        return x, there

    def values(self, held: Held, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Like `keys`."""
        block, row, there = self.find(held.table, tokens)
        v = self.view.v
        x = v.format.decode(v.codes[block, :, row], v.params[block, :, row])
        if self.young is not None:
            x = self.young.read(self.young.view.v, held, tokens, x)
        return x, there


def _call_rows(seqs: Sequences, total: int, rows: Tensor) -> list[tuple[int, int]]:
    """(first row, rows) of every sequence of a call of ``total`` rows."""
    if seqs.cu_seqlens_q is None:
        return [(b * rows.shape[1], rows.shape[1]) for b in range(seqs.spec.batch)]
    edges, most = seqs.cu_seqlens_q.tolist(), seqs.max_seqlen_q or total
    return [
        (max(0, begin), max(0, min(most, min(end, total) - max(0, begin))))
        for begin, end in pairwise(edges)
    ]


def _append(
    key: Tensor,
    value: Tensor,
    view: CacheView,
    seqs: Sequences | None,
    slot_mapping: Tensor | None,
) -> list[int]:
    """Store rows; how many came of each sequence."""
    memory = _Memory(view, seqs)
    total = key.shape[0] if key.dim() == 3 else key.shape[0] * key.shape[1]
    keys, values = (x.reshape(total, *x.shape[-2:]) for x in (key, value))
    if seqs is None:  # by slots alone: whose rows they are does not matter
        calls, spans = [(0, total)], [(0, 0)]
    else:
        calls = _call_rows(seqs, total, key)
        spans = _lengths(seqs, memory.block_size)
    starts, lengths = [start for start, _ in spans], [length for _, length in spans]

    for b, (first, count) in enumerate(calls):
        if not count:
            continue
        rows = slice(first, first + count)
        new_keys, new_values = keys[rows].float(), values[rows].float()
        tokens = torch.arange(lengths[b], lengths[b] + count, device=key.device)
        table = None if seqs is None else seqs.block_table[b]
        if slot_mapping is None:
            block, row, there = memory.find(table, tokens)
        else:
            slot = slot_mapping[rows]
            there = (slot >= 0) & (slot < view.num_blocks * memory.block_size)
            slot = slot.where(there, 0)
            block, row = slot // memory.block_size, slot % memory.block_size
        finite = (new_keys.abs() <= MAX_ABS).all(-1, keepdim=True)
        y = rotate(new_keys, memory.k_rotation)
        if memory.mean is not None and table is not None:
            usable = finite & (there & (tokens >= starts[b]))[:, None, None]
            held = Held(table, b, open_start(memory.young.group, lengths[b]) if memory.young else 0)
            means = _group_means(memory, held, new_keys, usable, lengths[b], starts[b])
            y = y - means[tokens // memory.group - lengths[b] // memory.group]
        k, v = view.k, view.v
        if memory.young is not None:
            span, places = (lengths[b], lengths[b] + count), (tokens, block, row, there)
            young, values_in = memory.young.view, rotate(new_values, memory.v_rotation)
            fine = (new_values.abs() <= MAX_ABS).all(-1, keepdim=True)
            append_by_age(memory.young, (k, young.k), places, b, *span, y, finite)
            append_by_age(memory.young, (v, young.v), places, b, *span, values_in, fine)
            continue
        block, row = block[there], row[there]
        k.codes[block, :, row], k.params[block, :, row] = (
            part[there] for part in k.format.encode(y, finite)
        )
        finite = (new_values.abs() <= MAX_ABS).all(-1, keepdim=True)
        v.codes[block, :, row], v.params[block, :, row] = (
            part[there] for part in v.format.encode(rotate(new_values, memory.v_rotation), finite)
        )
    if seqs is not None and seqs.advance:
        counts = [n for _, n in calls]
        seqs.seq_lens.add_(torch.tensor(counts, dtype=torch.int32, device=seqs.device))
    return [n for _, n in calls]


def _group_means(
    memory: _Memory, held: Held, keys: Tensor, usable: Tensor, length: int, start: int
) -> Tensor:
    """Means ``(groups, heads, dim)`` of the groups of new rows; those that begin are stored."""
    assert memory.mean is not None
    group, count = memory.group, keys.shape[0]
    means = []
    for g in range(length // group, (length + count - 1) // group + 1):
        block, row, there = memory.find(held.table, torch.tensor([g * group], device=keys.device))
        if g * group < length:
            mean = memory.mean[block, :, row // group].float()
            mean = mean[0].where(there, 0)
        else:
            total, rows = _sum_rows(memory, held, keys, usable, length, start, (g - 1) * group)
            mean = total / rows.clamp_min(1)
            if not bool(rows.all()):
                own, own_rows = _sum_rows(memory, held, keys, usable, length, start, g * group)
                own = (own / own_rows.clamp_min(1)).where(own_rows >= _MIN_MEAN_ROWS, 0)
                mean = mean.where(rows > 0, own)
            mean = mean.clamp(-MAX_ABS, MAX_ABS).half()
            memory.mean[block[there], :, row[there] // group] = mean
            mean = mean.float()
        means.append(mean)
    return torch.stack(means)


def _sum_rows(
    memory: _Memory,
    held: Held,
    keys: Tensor,
    usable: Tensor,
    length: int,
    start: int,
    begin: int,
) -> tuple[Tensor, Tensor]:
    """Sum ``(heads, dim)`` and number ``(heads, 1)`` of the usable rows of a group."""
    end = begin + memory.group
    begin = max(begin, 0)
    new = slice(max(begin - length, 0), max(end - length, 0))
    total = rotate(keys[new].where(usable[new], 0).sum(0), memory.k_rotation)
    rows = usable[new].sum(0)
    first, last = max(begin, start), min(end, length)
    if first < last:
        old = torch.arange(first, last, device=keys.device)
        stored, there = memory.keys(held, old)
        known = there[:, None, None] & ~stored.isnan().any(-1, keepdim=True)
        total, rows = total + stored.where(known, 0).sum(0), rows + known.sum(0)
    return total, rows


def _lengths(
    seqs: Sequences, block_size: int, added: list[int] | None = None
) -> list[tuple[int, int]]:
    """(start, length) of every sequence, whatever the tensors hold; with ``added`` tokens."""
    capacity = seqs.spec.max_blocks * block_size
    lengths = [min(max(0, n), capacity) for n in seqs.seq_lens.tolist()]
    if added is not None:
        lengths = [min(n + new, capacity) for n, new in zip(lengths, added, strict=True)]
    starts = [0] * len(lengths) if seqs.seq_starts is None else seqs.seq_starts.tolist()
    return [(max(0, start), length) for start, length in zip(starts, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class _Scores:
    """What happens to a score between the dot product and the softmax."""

    options: Options
    slopes: Tensor | None  # (kv_heads, heads / kv_heads, 1, 1)


class _Call(Prepared):
    """Append, then attend."""

    backend, regime = "reference", "torch"

    def __init__(self, problem: Problem) -> None:
        self._options, self._outputs = problem.options, Outputs(problem)
        self.details = {}

    def launch(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = self._outputs.of(query, out, lse)
        lengths = seqs.seq_lens.clone() if key is not None and seqs.advance else None
        added = None
        if key is not None and value is not None:
            added = _append(key, value, view, seqs, None)
        try:
            spans = _lengths(seqs, view.block_size, None if seqs.advance else added)
            self._read(query, view, seqs, sinks, alibi_slopes, out, lse, spans)
        except BaseException:
            if lengths is not None:
                seqs.seq_lens.copy_(lengths)
            raise
        return out if lse is None else (out, lse)

    def _read(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        spans: list[tuple[int, int]],
    ) -> None:
        memory = _Memory(view, seqs)
        group = memory.young.group if memory.young else 1
        heads, kv_heads = query.shape[-2], view.num_kv_heads
        share = (kv_heads, heads // kv_heads, 1, 1)
        slopes = None if alibi_slopes is None else alibi_slopes.reshape(share)
        rules = _Scores(self._options, slopes)
        is_packed = query.dim() == 3
        total = query.shape[0] if is_packed else query.shape[0] * query.shape[1]
        for b, (first, count) in enumerate(_call_rows(seqs, total, query)):
            start, length = spans[b]
            held = Held(seqs.block_table[b], b, read_from(group, length, count))
            for begin, end in chunks(count, _QUERIES):
                if is_packed:
                    rows: Any = slice(first + begin, first + end)
                else:
                    rows = b, slice(begin, end)
                x = rotate(query[rows].float(), memory.k_rotation)
                x = x.transpose(0, 1).unflatten(0, share[:2])  # (kv_heads, share, queries, dim)
                top = x.new_full((*x.shape[:-1], 1), -torch.inf)
                if sinks is not None:
                    top = sinks.reshape(share).expand_as(top)
                span = (start, length, length - count + begin)
                acc, log_sum = _attend(memory, held, x, top, sinks is not None, span, rules)
                acc = rotate(acc, memory.v_rotation)
                out[rows] = acc.flatten(0, 1).transpose(0, 1).to(query.dtype)
                if lse is not None:
                    lse[rows] = log_sum.flatten(0, 1)[..., 0].transpose(0, 1)


def _attend(
    memory: _Memory,
    held: Held,
    query: Tensor,
    top: Tensor,
    has_sink: bool,
    span: tuple[int, int, int],
    rules: _Scores,
) -> tuple[Tensor, Tensor]:
    """Online softmax of queries ``(kv_heads, share, n, dim)`` over a sequence's visible tokens.

    ``top`` is where the running maximum begins: the sinks, which count once each. ``span`` is
    (first token, end, position of the first query).
    """
    first, end, position = span
    n, v_dim, options = query.shape[2], memory.view.v.head_dim, rules.options
    at = torch.arange(position, position + n, device=query.device)[:, None]
    if options.causal:
        end = min(end, position + n)
    if options.sliding_window:
        first = max(first, position - options.sliding_window + 1)
    total = torch.ones_like(top) if has_sink else torch.zeros_like(top)
    acc = torch.zeros(*query.shape[:3], v_dim, dtype=torch.float32, device=query.device)
    for begin in range(first, end, KEYS):
        tokens = torch.arange(begin, min(begin + KEYS, end), device=query.device)
        key, there = memory.keys(held, tokens)
        value, _ = memory.values(held, tokens)
        visible = there.expand(n, -1)
        if options.causal:
            visible = visible & (tokens <= at)
        if options.sliding_window:
            visible = visible & (tokens > at - options.sliding_window)
        score = query @ key.permute(1, 2, 0)[:, None] * options.softmax_scale
        if options.softcap:
            score = options.softcap * (score / options.softcap).tanh()
        if rules.slopes is not None:
            score = score - rules.slopes * (at - tokens).abs()
        score = score.where(visible, -torch.inf)
        new_top = torch.maximum(top, score.amax(-1, keepdim=True))
        finite_top = new_top.where(new_top != -torch.inf, 0)
        prob, fade = (score - finite_top).exp(), (top - finite_top).exp()
        # 0 * NaN is NaN: rows that are not finite are taken out, and put back for who sees them.
        value = value.transpose(0, 1)[:, None]  # (kv_heads, 1, tokens, dim)
        good = value.isfinite().all(-1, keepdim=True)
        acc = acc * fade + prob @ value.where(good, 0)
        seen = (visible[None, None] & ~good.mT).any(-1, keepdim=True)
        acc = acc.where(~seen, torch.nan)
        total = total * fade + prob.sum(-1, keepdim=True)
        top = new_top
    return (acc / total).where(total != 0, 0), top + total.log()


class _Reference(Backend):
    name = "reference"

    def refuses(self, device: torch.device, view: ViewSpec | None = None) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Prepared:
        return _Call(problem)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        view: CacheView,
        seqs: Sequences | None,
        slot_mapping: Tensor | None,
    ) -> None:
        _append(key, value, view, seqs, slot_mapping)

    def gather(self, view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
        memory, tokens = _Memory(view, seqs), key.shape[1]
        group = memory.young.group if memory.young else 1
        for b, (start, length) in enumerate(_lengths(seqs, memory.block_size)):
            held = Held(seqs.block_table[b], b, open_start(group, length))
            for out, read, rotation in (
                (key, memory.keys, memory.k_rotation),
                (value, memory.values, memory.v_rotation),
            ):
                out[b].zero_()
                for begin in range(start, min(length, tokens), KEYS):
                    end = min(begin + KEYS, length, tokens)
                    at = torch.arange(begin, end, device=out.device)
                    x, there = read(held, at)
                    x = rotate(x.where(there[:, None, None], 0), rotation)
                    out[b, begin:end] = x.to(out.dtype)

    def quantize(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return quantize(*args)

    def dequantize(self, *args: Any) -> Tensor:
        return dequantize(*args)

    def qk_matmul(self, *args: Any) -> Tensor:
        return qk_matmul(*args)

    def pv_matmul(self, *args: Any) -> Tensor:
        return pv_matmul(*args)


REFERENCE = _Reference()
