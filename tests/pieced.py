"""The steps of attention by dense pieces in torch: what CUDA's own are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kvquant
from kvquant import backends
from kvquant.backends import Prepared, Problem, cuts
from kvquant.backends.cuda import MANY_ROWS_RATE
from kvquant.backends.cuts import Rates
from kvquant.backends.dense import Dense, rate_of
from kvquant.backends.pieces import Pieces
from kvquant.backends.reference import REFERENCE, _Memory
from kvquant.backends.reference_age import Held
from kvquant.backends.reference_rows import rotate
from kvquant.backends.steps import MOST_READS, History, Read, Result, Steps

RATES = Rates(132, rate_of(["cuDNN"]), MANY_ROWS_RATE)  # of an H200


def dense(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention by its formula, in float32, rounded to the rows' dtype at its end."""
    share = query.shape[2] // key.shape[1]
    k, v = (x.float().repeat_interleave(share, 1) for x in (key, value))
    score = query.float().transpose(1, 2) @ k.mT * scale
    if causal:
        assert query.shape[1] == key.shape[2], "causal attention is of as many rows as tokens"
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(hidden, -torch.inf)
    out = (score.softmax(-1) @ v).transpose(1, 2)
    return out.to(query.dtype), score.logsumexp(-1).transpose(1, 2)


def merge(results: list[Result], sinks: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """The softmax over all results and sinks."""
    rows = [x.out.flip(1) if x.is_backwards else x.out for x in results]
    sums = [x.lse.flip(1) if x.is_backwards else x.lse for x in results]
    if sinks is not None:
        rows.append(torch.zeros_like(rows[0]))
        sums.append(sinks.expand_as(sums[0]))
    stacked = torch.stack(sums)
    total = stacked.logsumexp(0)
    weights = (
        (stacked - total).exp().nan_to_num(nan=0.0)
        if not total.isnan().any()
        else (stacked - total).exp()
    )
    out.copy_((weights[..., None] * torch.stack([x.float() for x in rows])).sum(0))
    if lse is not None:
        lse.copy_(total)


def read(view: kvquant.CacheView, history: History, reads: list[Read]) -> None:
    """Dequantized tokens, by the reference's formula."""
    assert 0 < len(reads) <= MOST_READS
    for one in reads:
        _read(view, history, one)


def _read(view: kvquant.CacheView, history: History, one: Read) -> None:
    table, key, value, stored = history.table, one.key, one.value, one.stored
    seqs = kvquant.Sequences(table, table.new_zeros(len(table)), young=history.young)
    memory = _Memory(view, seqs)
    tokens = torch.arange(one.first, one.first + key.shape[2], device=key.device)
    if one.is_backwards:
        tokens = tokens.flip(0)
    for b in range(len(table)):
        held = Held(table[b], b, history.young_from)
        k, there = memory.keys(held, tokens)
        v, _ = memory.values(held, tokens)
        k, v = rotate(k, memory.k_rotation), rotate(v, memory.v_rotation)
        there = there & (tokens >= stored[0]) & (tokens < stored[1])
        good = there[:, None, None] & k.isfinite().all(-1, keepdim=True)
        good = good & v.isfinite().all(-1, keepdim=True)
        key[b] = k.where(good, torch.nan).transpose(0, 1).to(key.dtype)
        value[b] = v.where(good, 0).transpose(0, 1).to(value.dtype)


def steps(
    kernels: tuple[Dense, ...] = (Dense("torch", False, 1e12, dense),), capturing: bool = False
) -> Steps:
    """Steps for any device."""

    def prepare(problem: Problem) -> Prepared:
        found = backends.choose(problem.query.device, problem.view)[0].prepare(problem)
        assert not isinstance(found, str)
        return found

    return Steps(read, lambda problem: kernels, merge, REFERENCE.append, prepare,
                 lambda x: capturing)  # fmt: skip


def through_pieces(
    monkeypatch, *, memory: int = 256 << 20, using: Steps | None = None
) -> Callable[[], list[Pieces]]:
    """All plans of a device without a regime of pieces get one; which they were."""
    from kvquant.backends import pieces

    made: list[Pieces] = []
    found = backends._prepare

    def prepare(problem: Problem) -> Prepared:
        prepared = found(problem)
        if not problem.exact and pieces.refuses(problem, memory, RATES) is None:
            prepared = Pieces(problem, using or steps(), prepared, memory, RATES, ["torch"])
            made.append(prepared)
        return prepared

    take_pieces(monkeypatch)
    monkeypatch.setattr(backends, "_prepare", prepare)
    return lambda: made


def take_pieces(monkeypatch) -> None:
    """Whatever dense pieces can serve they do, however long it takes."""
    monkeypatch.setattr(cuts, "is_worth_it", lambda run, call, costs, rates: run.alike)
    monkeypatch.setattr(cuts, "may_be_worth_it", lambda run, call, costs, rates: True)
    monkeypatch.setattr(backends, "_prepared", {})
    monkeypatch.setattr(kvquant.plan.__globals__["backends"], "_prepared", {}, raising=False)
    monkeypatch.setitem(kvquant.plan.__globals__, "_plans", {})
