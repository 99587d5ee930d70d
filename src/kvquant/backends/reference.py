"""The operations in plain torch, for every device: what the compiled kernels are measured against.

Written to be read beside ``csrc/params.h``. Lengths are read on the host, sequence by sequence;
neither a whole history in floating point nor a score for every query and key exists at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops import Backend
from .reference_rows import (
    KEYS,
    MAX_ABS,
    chunks,
    dequantize,
    encode,
    pv_matmul,
    qk_matmul,
    quantize,
    rotate,
)

__all__ = ["BACKEND"]

_MIN_MEAN_ROWS = 16  # a first group's own mean needs as many rows
_QUERIES = 256  # query tokens at a time


@dataclass(frozen=True, slots=True)
class _Slabs:
    """One layer's tensors and what they mean."""

    k_data: Tensor
    k_params: Tensor
    k_mean: Tensor | None
    v_data: Tensor
    v_params: Tensor
    group: int
    k_rotation: int
    v_rotation: int

    @property
    def block_size(self) -> int:
        return self.k_data.shape[2]

    def find(self, table: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(block, row, whether there is one) of a sequence's tokens, by its row of the table."""
        if table is None or not table.numel():
            nowhere = torch.zeros_like(tokens)
            return nowhere, nowhere, nowhere.bool()
        index = tokens // self.block_size
        inside = (tokens >= 0) & (index < table.shape[0])
        block = table[index.clamp(0, table.shape[0] - 1)].long()
        inside &= (block >= 0) & (block < self.k_data.shape[0])
        return block.where(inside, 0), (tokens % self.block_size).where(inside, 0), inside

    def keys(self, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(tokens, heads, dim)`` as stored, not rotated back, and which there are."""
        block, row, there = self.find(table, tokens)
        params = self.k_params[block, :, row].float()
        x = params[..., :1] * self.k_data[block, :, row].float() + params[..., 1:]
        if self.k_mean is not None:
            home, start, known = self.find(table, tokens // self.group * self.group)
            mean = self.k_mean[home, :, start // self.group].float()
            x = x + mean.where(known[:, None, None], 0)
        return x, there

    def values(self, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Like `keys`."""
        block, row, there = self.find(table, tokens)
        params = self.v_params[block, :, row].float()
        return params[..., :1] * self.v_data[block, :, row].float() + params[..., 1:], there


def _call_rows(
    cu_seqlens: Tensor | None, batch: int, total: int, tokens: int
) -> list[tuple[int, int]]:
    """(first row, rows) of every sequence of a call of ``total`` rows."""
    if cu_seqlens is None:
        return [(b * tokens, tokens) for b in range(batch)]
    edges = cu_seqlens.tolist()
    return [
        (max(0, begin), max(0, min(tokens, min(end, total) - max(0, begin))))
        for begin, end in pairwise(edges)
    ]


def _append(
    key: Tensor,
    value: Tensor,
    k_data: Tensor,
    k_params: Tensor,
    k_mean: Tensor | None,
    v_data: Tensor,
    v_params: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_starts: Tensor | None,
    slot_mapping: Tensor | None,
    mean_group: int,
    k_rotation: int,
    v_rotation: int,
    max_tokens: int,
    advance: bool,
) -> None:
    slabs = _Slabs(
        k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation
    )  # fmt: skip
    if key.dim() == 4:
        batch = key.shape[0]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
    else:
        batch = 1 if block_table is None else block_table.shape[0]
        keys, values = key, value
    total = keys.shape[0]
    if block_table is None:  # by slots alone: whose rows they are does not matter
        calls = [(0, total)]
    else:
        calls = _call_rows(cu_seqlens, batch, total, max_tokens)
    capacity = 0 if block_table is None else block_table.shape[1] * slabs.block_size
    spans = [(0, 0)] * batch if seq_lens is None else _lengths(seq_lens, seq_starts, capacity)
    starts, lengths = [start for start, _ in spans], [length for _, length in spans]

    for b, (first, count) in enumerate(calls):
        if not count:
            continue
        rows = slice(first, first + count)
        new_keys, new_values = keys[rows].float(), values[rows].float()
        tokens = torch.arange(lengths[b], lengths[b] + count, device=key.device)
        table = None if block_table is None else block_table[b]
        if slot_mapping is None:
            block, row, there = slabs.find(table, tokens)
        else:
            slot = slot_mapping[rows]
            there = (slot >= 0) & (slot < k_data.shape[0] * slabs.block_size)
            slot = slot.where(there, 0)
            block, row = slot // slabs.block_size, slot % slabs.block_size
        finite = (new_keys.abs() <= MAX_ABS).all(-1, keepdim=True)
        y = rotate(new_keys, k_rotation)
        if k_mean is not None and mean_group and table is not None:
            usable = finite & (there & (tokens >= starts[b]))[:, None, None]
            means = _group_means(slabs, table, new_keys, usable, lengths[b], starts[b])
            y = y - means[tokens // mean_group - lengths[b] // mean_group]
        block, row = block[there], row[there]
        k_data[block, :, row], k_params[block, :, row] = (part[there] for part in encode(y, finite))
        finite = (new_values.abs() <= MAX_ABS).all(-1, keepdim=True)
        v_data[block, :, row], v_params[block, :, row] = (
            part[there] for part in encode(rotate(new_values, v_rotation), finite)
        )
    if seq_lens is not None and advance:
        seq_lens += torch.tensor([n for _, n in calls], dtype=torch.int32, device=seq_lens.device)


def _group_means(
    slabs: _Slabs, table: Tensor, keys: Tensor, usable: Tensor, length: int, start: int
) -> Tensor:
    """Means ``(groups, heads, dim)`` of the groups of new rows; those that begin are stored."""
    assert slabs.k_mean is not None
    group, count = slabs.group, keys.shape[0]
    means = []
    for g in range(length // group, (length + count - 1) // group + 1):
        block, row, there = slabs.find(table, torch.tensor([g * group], device=keys.device))
        if g * group < length:
            mean = slabs.k_mean[block, :, row // group].float()
            mean = mean[0].where(there, 0)
        else:
            total, rows = _sum_rows(slabs, table, keys, usable, length, start, (g - 1) * group)
            mean = total / rows.clamp_min(1)
            if not bool(rows.all()):
                own, own_rows = _sum_rows(slabs, table, keys, usable, length, start, g * group)
                own = (own / own_rows.clamp_min(1)).where(own_rows >= _MIN_MEAN_ROWS, 0)
                mean = mean.where(rows > 0, own)
            mean = mean.clamp(-MAX_ABS, MAX_ABS).half()
            slabs.k_mean[block[there], :, row[there] // group] = mean
            mean = mean.float()
        means.append(mean)
    return torch.stack(means)


def _sum_rows(
    slabs: _Slabs,
    table: Tensor,
    keys: Tensor,
    usable: Tensor,
    length: int,
    start: int,
    begin: int,
) -> tuple[Tensor, Tensor]:
    """Sum ``(heads, dim)`` and number ``(heads, 1)`` of the usable rows of a group."""
    end = begin + slabs.group
    begin = max(begin, 0)
    new = slice(max(begin - length, 0), max(end - length, 0))
    total = rotate(keys[new].where(usable[new], 0).sum(0), slabs.k_rotation)
    rows = usable[new].sum(0)
    first, last = max(begin, start), min(end, length)
    if first < last:
        old = torch.arange(first, last, device=keys.device)
        stored, there = slabs.keys(table, old)
        known = there[:, None, None] & ~stored.isnan().any(-1, keepdim=True)
        total, rows = total + stored.where(known, 0).sum(0), rows + known.sum(0)
    return total, rows


def _lengths(seq_lens: Tensor, seq_starts: Tensor | None, capacity: int) -> list[tuple[int, int]]:
    """(start, length) of every sequence, whatever the tensors hold."""
    lengths = [min(max(0, n), capacity) for n in seq_lens.tolist()]
    starts = [0] * len(lengths) if seq_starts is None else seq_starts.tolist()
    return [(max(0, start), length) for start, length in zip(starts, lengths, strict=True)]


def _gather(
    k_data: Tensor,
    k_params: Tensor,
    k_mean: Tensor | None,
    v_data: Tensor,
    v_params: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
    mean_group: int,
    k_rotation: int,
    v_rotation: int,
    tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    slabs = _Slabs(
        k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation
    )  # fmt: skip
    batch, heads, device = block_table.shape[0], k_data.shape[1], k_data.device
    key, value = (
        torch.zeros(batch, tokens, heads, x.shape[3], dtype=dtype, device=device)
        for x in (k_data, v_data)
    )
    capacity = block_table.shape[1] * slabs.block_size
    for b, (start, length) in enumerate(_lengths(seq_lens, seq_starts, capacity)):
        for begin in range(start, min(length, tokens), KEYS):
            at = torch.arange(begin, min(begin + KEYS, length, tokens), device=device)
            for out, read, rotation in (
                (key, slabs.keys, k_rotation),
                (value, slabs.values, v_rotation),
            ):
                x, there = read(block_table[b], at)
                out[b, at] = rotate(x.where(there[:, None, None], 0), rotation).to(dtype)
    return key, value


@dataclass(frozen=True, slots=True)
class _Scores:
    """What happens to a score between the dot product and the softmax."""

    softmax_scale: float
    causal: bool
    window: int
    softcap: float
    slopes: Tensor | None  # (kv_heads, heads / kv_heads, 1, 1)


def _attention(
    query: Tensor,
    k_data: Tensor,
    k_params: Tensor,
    k_mean: Tensor | None,
    v_data: Tensor,
    v_params: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    mean_group: int,
    k_rotation: int,
    v_rotation: int,
    max_tokens: int,
    softmax_scale: float,
    causal: bool,
    sliding_window: int,
    softcap: float,
    split_size: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    slabs = _Slabs(
        k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation
    )  # fmt: skip
    heads, kv_heads = query.shape[-2], k_data.shape[1]
    share = (kv_heads, heads // kv_heads, 1, 1)
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(share)
    rules = _Scores(softmax_scale, causal, sliding_window, softcap, slopes)
    batch = block_table.shape[0]
    packed = query.flatten(0, 1) if query.dim() == 4 else query
    tokens = query.shape[1] if query.dim() == 4 else max_tokens
    out = torch.zeros(*packed.shape[:-1], v_data.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.full(packed.shape[:-1], -torch.inf, dtype=torch.float32, device=query.device)
    lengths = _lengths(seq_lens, seq_starts, block_table.shape[1] * slabs.block_size)
    for b, (first, count) in enumerate(_call_rows(cu_seqlens, batch, packed.shape[0], tokens)):
        start, length = lengths[b]
        for begin, end in chunks(count, _QUERIES):
            rows = slice(first + begin, first + end)
            x = rotate(packed[rows].float(), k_rotation)
            x = x.transpose(0, 1).unflatten(0, share[:2])  # (kv_heads, share, queries, dim)
            top = torch.full((*x.shape[:-1], 1), -torch.inf, dtype=torch.float32, device=x.device)
            if sinks is not None:
                top = sinks.reshape(share).expand_as(top)
            span = (start, length, length - count + begin)
            acc, log_sum = _attend(slabs, block_table[b], x, top, sinks is not None, span, rules)
            out[rows] = rotate(acc, v_rotation).flatten(0, 1).transpose(0, 1).to(query.dtype)
            lse[rows] = log_sum.flatten(0, 1)[..., 0].transpose(0, 1)
    out = out.reshape(*query.shape[:-1], v_data.shape[3])
    return out, lse.reshape(query.shape[:-1]) if return_lse else lse.new_empty(0)


def _attend(
    slabs: _Slabs,
    table: Tensor,
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
    n, v_dim = query.shape[2], slabs.v_data.shape[3]
    at = torch.arange(position, position + n, device=query.device)[:, None]
    if rules.causal:
        end = min(end, position + n)
    if rules.window:
        first = max(first, position - rules.window + 1)
    total = torch.ones_like(top) if has_sink else torch.zeros_like(top)
    acc = torch.zeros(*query.shape[:3], v_dim, dtype=torch.float32, device=query.device)
    for begin in range(first, end, KEYS):
        tokens = torch.arange(begin, min(begin + KEYS, end), device=query.device)
        key, there = slabs.keys(table, tokens)
        value, _ = slabs.values(table, tokens)
        visible = there.expand(n, -1)
        if rules.causal:
            visible = visible & (tokens <= at)
        if rules.window:
            visible = visible & (tokens > at - rules.window)
        score = query @ key.permute(1, 2, 0)[:, None] * rules.softmax_scale
        if rules.softcap:
            score = rules.softcap * (score / rules.softcap).tanh()
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


def _refuses(op: str, args: Sequence[Any]) -> str | None:
    return None


BACKEND = Backend(
    name="reference",
    implementations={
        "quantize": quantize,
        "dequantize": dequantize,
        "qk_matmul": qk_matmul,
        "pv_matmul": pv_matmul,
        "append_": _append,
        "gather": _gather,
        "attention": _attention,
    },
    refuses=_refuses,
)
