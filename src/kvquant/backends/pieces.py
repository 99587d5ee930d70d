"""Attention of long chunks by torch's dense kernels, on bounded pieces of the history.

A piece of the history is dequantized into scratch memory, a dense kernel attends to it, and the
pieces' results are merged by their log-sum-exps. What is taken from where `cuts` says; whatever
touches a device is a parameter (`Steps`), so that the same code runs anywhere.

The host has to know the lengths. Where `Sequences.on_host` does not say, they are read back, which
waits for the device. Calls that are being captured in a CUDA graph, or are too small, go to the
kernel that reads codes.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..formats import GROUP_TOKENS, read_from
from ..view import CacheView, Sequences
from . import cuts
from .base import Outputs, Prepared, Problem, aligned, look_of
from .cuts import EDGE, FOLD, FULL, Call, Costs, Pass, Piece, Rates, Run
from .dense import DTYPES, Dense
from .runs import runs_of_call
from .steps import MOST_READS, History, Read, Result, Steps

__all__ = ["Pieces", "costs_of", "refuses"]

_logger = logging.getLogger(__name__.split(".backends")[0])
_reported: set[tuple[str, torch.Size, torch.Size]] = set()


def costs_of(problem: Problem, memory: int) -> Costs:
    """What the rows and tokens of a problem take."""
    heads, view = problem.query.shape[-2], problem.view
    size = problem.query.dtype.itemsize
    dims = view.head_dim + view.v_head_dim
    return Costs(
        heads * (view.v_head_dim * size + 4), view.num_kv_heads * dims * size, memory,
        2 * heads * dims, heads,
    )  # fmt: skip


def refuses(problem: Problem, memory: int, rates: Rates) -> str | None:
    """Why dense pieces cannot serve a problem; None: they may."""
    options, query = problem.options, problem.query
    if problem.max_seqlen_q < cuts.MIN_ROWS:
        return f"fewer than {cuts.MIN_ROWS} query tokens"
    if query.dtype not in DTYPES:
        return f"dense kernels do not take {query.dtype}"
    if options.softcap:
        return "dense kernels have no softcap"
    if problem.alibi_slopes:
        return "dense kernels have no ALiBi slopes"
    if options.softmax_scale <= 0:
        return f"a softmax_scale that is not positive ({options.softmax_scale})"
    if options.split_size:
        return "split_size: a result must not depend on the batch"
    if 0 < options.sliding_window < cuts.MIN_WINDOW:
        return f"a sliding_window under {cuts.MIN_WINDOW} tokens"
    capacity = problem.seqs.max_blocks * problem.view.block_size
    if capacity >= 2**30:
        return "a capacity over 2**30 tokens"
    most = Run(0, problem.seqs.batch, problem.max_seqlen_q, capacity, 0, True)
    call = Call(options.causal, options.sliding_window)
    costs = costs_of(problem, memory)
    if capacity < most.rows or not cuts.may_be_worth_it(most, call, costs, rates):
        return "the kernel that reads codes is faster, whatever the lengths"
    if (least := cuts.least_memory(costs)) > memory:
        return f"KVQUANT_CHUNK_MEMORY: {memory} bytes, and it takes {least}"
    return None


class Pieces(Prepared):
    """A call that may have long chunks.

    Attributes:
        otherwise: The kernel that reads codes, for all of the call.
    """

    regime = "pieces"
    reads_lengths = True

    def __init__(
        self,
        problem: Problem,
        steps: Steps,
        otherwise: Prepared,
        memory: int,
        rates: Rates,
        names: list[str],
    ) -> None:
        self.otherwise, self.backend = otherwise, otherwise.backend
        self._problem, self._steps = problem, steps
        self._costs, self._rates = costs_of(problem, memory), rates
        self._call = Call(problem.options.causal, problem.options.sliding_window)
        self._outputs = Outputs(problem)
        self.details = {
            "dense": ", else ".join(names),
            "memory": f"at most {memory / 2**20:.0f} MiB for pieces of the history",
            "otherwise": f"{otherwise.regime}: in a captured graph, or where it is faster",
            **otherwise.details,
        }

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
        steps, kernels = self._steps, tuple[Dense, ...]()
        if not view.spec.is_empty and query.numel() and not steps.is_capturing(query):
            kernels = steps.kernels(self._problem)
        runs, worth = tuple[Run, ...](), list[bool]()
        if kernels:
            runs = runs_of_call(query, view, seqs, key is not None, self._problem.max_seqlen_q)
            rates = self._rates._replace(dense=kernels[0].rate)  # it may not be the fastest one
            worth = [cuts.is_worth_it(run, self._call, self._costs, rates) for run in runs]
        if not any(worth):
            return self.otherwise.launch(
                query, view, seqs, key, value, sinks, alibi_slopes, out, lse
            )
        work = _Work(self, query, view, seqs, key is not None, sinks, kernels)
        if key is not None and value is not None:
            steps.append(key, value, view, seqs, None)
        return work.run(runs, worth, out, lse)


def _filled(query: Tensor, rows: int) -> Tensor:
    """Queries ``(n, rows there are, ..)`` with zeros behind them."""
    if query.shape[1] == rows:
        return query
    more = query.new_zeros(query.shape[0], rows, *query.shape[2:])
    more[:, : query.shape[1]] = query
    return more


class _Unserved(Exception):
    """No dense kernel takes a piece."""


def _report(name: str, query: Tensor, key: Tensor, error: str) -> None:
    """Say once a size what a dense kernel does not take."""
    what = (name, query.shape, key.shape)
    if what not in _reported:
        _reported.add(what)
        _logger.warning(
            "%s attention does not take %s queries to %s tokens: %s", name, query.shape[1],
            key.shape[2], error.splitlines()[0],
        )  # fmt: skip


class _Work:
    """One call's way through its runs."""

    def __init__(
        self,
        plan: Pieces,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        appends: bool,
        sinks: Tensor | None,
        kernels: tuple[Dense, ...],
    ) -> None:
        self._plan, self._steps, self._problem = plan, plan._steps, plan._problem
        self._query, self._view, self._seqs = aligned(query), view, seqs
        self._must_count = appends and not seqs.advance
        self._sinks, self._scale = sinks, plan._problem.options.softmax_scale
        self._kernels = kernels
        self._buffer: Tensor | None = None

    def run(
        self, runs: tuple[Run, ...], worth: list[bool], out: Tensor | None, lse: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``worth``: of each run, whether dense pieces serve it."""
        call, costs = self._plan._call, self._plan._costs
        if len(runs) == 1 and out is None and self._sinks is None:
            passes = cuts.cut(runs[0], call, costs, True)
            if (result := self._direct(runs[0], passes)) is not None:
                return self._with_lse(result, lse)
        out, lse = self._plan._outputs.of(self._query, out, lse)
        at = row = 0
        while at < len(runs):
            end = at + 1
            while not worth[at] and end < len(runs) and not worth[end]:
                end += 1
            rows = sum(run.batch * run.rows for run in runs[at:end])
            if worth[at]:
                self._run_dense(runs[at], row, out, lse)
            elif rows:
                self._run_rest(runs[at:end], row, rows, out, lse)
            at, row = end, row + rows
        return out if lse is None else (out, lse)

    # ------------------------------------------------------------------------------ long chunks

    def _run_dense(self, run: Run, row: int, out: Tensor, lse: Tensor | None) -> None:
        call = self._plan._call
        whole, whole_lse = out, lse
        query = self._of_run(self._query, run, row)
        out = self._of_run(out, run, row)
        lse = None if lse is None else self._of_run(lse, run, row)
        if blind := cuts.blind_rows(run, call):
            out[:, :blind].zero_()
            if lse is not None:
                lse[:, :blind] = -torch.inf if self._sinks is None else self._sinks
        for part in cuts.cut(run, call, self._plan._costs, False):
            try:
                results = self._attend(part, query, run)
            except _Unserved:
                self._run_rest((run,), row, run.batch * run.rows, whole, whole_lse)
                return
            at = slice(part.first - run.first, part.first - run.first + part.batch)
            rows = slice(part.begin, part.end)
            self._steps.merge(
                results, self._sinks, out[at, rows], None if lse is None else lse[at, rows]
            )

    def _direct(self, run: Run, passes: tuple[Pass, ...]) -> Result | None:
        """The one piece of a call, which is the output as it is; None: there are more."""
        if len(passes) != 1 or len(passes[0].pieces) != 1 or passes[0].begin:
            return None
        if run.batch * run.rows != self._query.shape[:-2].numel():
            return None
        try:
            (result,) = self._attend(passes[0], self._of_run(self._query, run, 0), run)
        except _Unserved:
            return None
        return result

    def _with_lse(self, result: Result, lse: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        out = result.out.reshape(*self._query.shape[:-1], -1).contiguous()
        if not self._problem.lse:
            return out
        found = result.lse.reshape(self._query.shape[:-1])
        return out, found.contiguous() if lse is None else lse.copy_(found)

    def _attend(self, part: Pass, query: Tensor, run: Run) -> list[Result]:
        """A pass's results, but for the last merge."""
        at = part.first - run.first
        q = query
        if (part.batch, part.begin, part.end) != (q.shape[0], 0, q.shape[1]):  # slicing takes 2 us
            q = query[at : at + part.batch, part.begin : part.end]
        history = self._history(run, part)
        rows, results = q.shape[1], list[Result]()
        filled = cuts.size_from(rows)
        for pieces in cuts.together(part, MOST_READS):
            reads = self._reads(part, pieces, filled)
            self._steps.read(self._view, history, reads)
            for piece, read in zip(pieces, reads, strict=True):
                if len(results) == FOLD:
                    results = [self._fold(results)]
                given = _filled(q.flip(1) if read.is_backwards else q, filled)
                out, lse = self._dense(
                    given, read.key, read.value, piece.kind != FULL, piece.recurs
                )
                results.append(Result(out[:, :rows], lse[:, :rows], read.is_backwards))
        return results

    def _history(self, run: Run, part: Pass) -> History:
        table, young, group = self._seqs.block_table, self._seqs.young, self._view.mean_group
        if part.batch != table.shape[0]:
            at = slice(part.first, part.first + part.batch)
            table, young = table[at], None if young is None else young[at]
        if young is None:
            return History(table)
        return History(table, young, read_from(group or GROUP_TOKENS, run.length, run.rows))

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, recurs: bool
    ) -> tuple[Tensor, Tensor]:
        """By the fastest kernel, or one that does not mind a size that may not come again."""
        kernels = sorted(self._kernels, key=lambda kernel: kernel.knows_sizes and not recurs)
        for kernel in kernels:
            try:
                return kernel.run(query, key, value, causal, self._scale)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _report(kernel.name, query, key, str(error))
        raise _Unserved

    def _fold(self, results: list[Result]) -> Result:
        out = torch.empty(results[0].out.shape, dtype=torch.float32, device=self._query.device)
        lse = out.new_empty(out.shape[:-1])
        self._steps.merge(results, None, out, lse)
        return Result(out, lse)

    def _reads(self, part: Pass, pieces: tuple[Piece, ...], filled: int) -> list[Read]:
        """Pieces that are read together, one behind the other in memory that all of them share."""
        view = self._view.spec
        heads, dims = view.num_kv_heads, (view.head_dim, view.v_head_dim)
        rows = part.batch * heads
        count = rows * sum(dims) * cuts.widest(part)
        if self._buffer is None or self._buffer.numel() < count:
            self._buffer = None  # before the next one is made
            self._buffer = self._query.new_empty(count)
        reads, at = list[Read](), 0
        for piece in pieces:
            tokens = cuts.tokens_of(piece, filled)
            is_edge = piece.kind == EDGE
            both = []
            for dim in dims:  # one as_strided takes half the time of a slice and a view
                shape = part.batch, heads, tokens, dim
                strides = heads * tokens * dim, tokens * dim, dim, 1
                both.append(self._buffer.as_strided(shape, strides, at))
                at += rows * tokens * dim
            first = piece.end - tokens if is_edge else piece.first
            reads.append(Read(first, (piece.first, piece.end), is_edge, both[0], both[1]))
        return reads

    # ------------------------------------------------------------------------------ all others

    def _run_rest(
        self, runs: tuple[Run, ...], row: int, rows: int, out: Tensor, lse: Tensor | None
    ) -> None:
        """Neighbouring sequences by the kernel that reads codes; their rows are stored."""
        first, count = runs[0].first, sum(run.batch for run in runs)
        seqs, cu, most = self._seqs, None, 0
        lens = seqs.seq_lens[first : first + count]
        is_equal = len({run.rows for run in runs}) == 1
        query: Tensor = self._query
        if is_equal:
            of = Run(first, count, runs[0].rows, 0, 0, False)
            query, out = self._of_run(query, of, row), self._of_run(out, of, row)
            lse = None if lse is None else self._of_run(lse, of, row)
            if self._must_count:
                lens = lens + runs[0].rows
        else:
            query, out = query[row : row + rows], out[row : row + rows]
            lse = None if lse is None else lse[row : row + rows]
            assert seqs.cu_seqlens_q is not None
            cu = seqs.cu_seqlens_q[first : first + count + 1]
            if self._must_count:
                lens = lens + cu.diff()
            cu, most = cu - row, max(run.rows for run in runs)
        starts = None if seqs.seq_starts is None else seqs.seq_starts[first : first + count]
        at = slice(first, first + count)
        young = None if seqs.young is None else seqs.young[at]
        part = Sequences(seqs.block_table[at], lens, starts, cu, most, young=young)
        problem = self._problem._replace(
            query=look_of(query, not is_equal), key=None, value=None, seqs=part.spec,
            max_seqlen_q=part.max_seqlen_q or query.shape[1],
        )  # fmt: skip
        prepared = self._steps.prepare(problem)
        prepared.launch(query, self._view, part, None, None, self._sinks, None, out, lse)

    def _of_run(self, x: Tensor, run: Run, row: int) -> Tensor:
        """The run's sequences of a tensor of rows, ``(count, rows, ...)``."""
        if self._problem.seqs.is_packed:
            packed = x[row : row + run.batch * run.rows]
            return packed.reshape(run.batch, run.rows, *x.shape[1:])
        return x if run.batch == x.shape[0] else x[run.first : run.first + run.batch]
