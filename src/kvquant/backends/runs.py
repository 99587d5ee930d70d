"""A call's sequences as runs that are alike, by the lengths that the host knows or reads back."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..view import CacheView, HostLengths, Sequences
from .cuts import Run, runs_of

__all__ = ["runs_of_call"]

_SMALL_TABLE = 4096  # entries


def runs_of_call(
    query: Tensor, view: CacheView, seqs: Sequences, appends: bool, most_rows: int
) -> tuple[Run, ...]:
    """The runs of a call of at most ``most_rows`` rows a sequence.

    No runs where a sequence is no usual one: rows that have no place, or more rows than tokens.
    """
    known, batch = seqs.on_host, seqs.spec.batch
    is_packed = seqs.spec.is_packed
    if known is None and batch:
        known = _read_back(seqs, view, appends, 0 if is_packed else query.shape[1])
    if known is None or not batch:
        return ()
    if known.rows is None:
        known = known._replace(rows=(query.shape[1],) * batch)
    elif is_packed and sum(known.rows) > query.shape[0]:
        return ()
    return _runs_of(known, appends, most_rows, seqs.spec.max_blocks * view.block_size)


@lru_cache(64)
def _runs_of(known: HostLengths, appends: bool, most_rows: int, room: int) -> tuple[Run, ...]:
    rows, batch = known.rows, len(known.seq_lens)
    assert rows is not None
    added = rows if appends else (0,) * batch
    lengths = [n + new for n, new in zip(known.seq_lens, added, strict=True)]
    starts = [max(0, n) for n in known.seq_starts or (0,) * batch]
    is_odd = (
        max(rows) > most_rows
        or max(lengths) > room
        or any(n < new for n, new in zip(lengths, rows, strict=True))
    )
    return () if is_odd else tuple(runs_of(lengths, list(rows), starts))


def _read_back(seqs: Sequences, view: CacheView, appends: bool, tokens: int) -> HostLengths | None:
    """The lengths that the device has; None: a block that is needed is none, or rows are odd.

    ``tokens``: the call's rows of a sequence, if they are dense. A small block table comes along:
    the host checks it sooner than the device would.
    """
    batch, table, cu = seqs.spec.batch, seqs.block_table, seqs.cu_seqlens_q
    lens = seqs.seq_lens
    starts = torch.zeros_like(lens) if seqs.seq_starts is None else seqs.seq_starts
    edges = lens.new_zeros(0) if cu is None else cu
    is_small = table.numel() <= _SMALL_TABLE
    if is_small:
        of_table = table.flatten()
    else:
        added: int | Tensor = 0 if not appends else tokens if cu is None else cu.diff()
        of_table = _lacks_blocks(table, lens + added, starts, view).to(torch.int32)[None]
    numbers = torch.cat([lens, starts, edges, of_table]).tolist()
    known = HostLengths(tuple(numbers[:batch]), tuple(numbers[batch : 2 * batch]))
    if min(known.seq_lens, default=0) < 0:
        return None
    at = 2 * batch + len(edges)
    if cu is not None:
        rows = tuple(b - a for a, b in pairwise(numbers[2 * batch : at]))
        if numbers[2 * batch] or min(rows) < 0:
            return None
        known = known._replace(rows=rows)
    if not is_small:
        return None if numbers[at] else known
    counts = (known.rows or (tokens,) * batch) if appends else (0,) * batch
    ends = torch.tensor([n + new for n, new in zip(known.seq_lens, counts, strict=True)])
    on_host = torch.tensor(numbers[at:]).view(table.shape)
    lacks = _lacks_blocks(on_host, ends, torch.tensor(numbers[batch : 2 * batch]), view)
    return None if bool(lacks) else known


def _lacks_blocks(table: Tensor, ends: Tensor, starts: Tensor, view: CacheView) -> Tensor:
    """Whether a sequence has no block for some of its tokens from its start to its end."""
    first = torch.arange(table.shape[1], device=table.device) * view.block_size
    needed = (first < ends[:, None]) & (first + view.block_size > starts[:, None])
    return (needed & ((table < 0) | (table >= view.num_blocks))).any()
