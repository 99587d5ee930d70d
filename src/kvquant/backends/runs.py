"""A call's sequences as runs that are alike, by the lengths that the host knows or reads back."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..view import CacheView, HostLengths, Sequences
from .cuts import Run, runs_of

__all__ = ["runs_of_call"]


def runs_of_call(
    query: Tensor, view: CacheView, seqs: Sequences, appends: bool, most_rows: int
) -> list[Run]:
    """The runs of a call of at most ``most_rows`` rows a sequence.

    None where a sequence is no usual one: rows that have no place, or more rows than tokens.
    """
    known, batch = seqs.on_host, seqs.spec.batch
    is_packed = seqs.spec.is_packed
    if known is None:
        known = _read_back(seqs, view, appends, 0 if is_packed else query.shape[1])
    if known is None:
        return []
    rows = known.rows or (query.shape[1],) * batch
    added = rows if appends else (0,) * batch
    lengths = [n + new for n, new in zip(known.seq_lens, added, strict=True)]
    is_odd = (
        (is_packed and sum(rows) > query.shape[0])
        or max(rows) > most_rows
        or max(lengths) > seqs.spec.max_blocks * view.block_size
        or any(n < new for n, new in zip(lengths, rows, strict=True))
    )
    starts = [max(0, n) for n in known.seq_starts or (0,) * batch]
    return [] if is_odd else runs_of(lengths, list(rows), starts)


def _read_back(seqs: Sequences, view: CacheView, appends: bool, tokens: int) -> HostLengths | None:
    """The lengths that the device has; None: a block that is needed is none, or rows are odd.

    ``tokens``: the call's rows of a sequence, if they are dense.
    """
    batch, lens = seqs.spec.batch, seqs.seq_lens
    starts = torch.zeros_like(lens) if seqs.seq_starts is None else seqs.seq_starts
    cu = lens.new_zeros(1) if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q
    first = torch.arange(seqs.spec.max_blocks, device=lens.device) * view.block_size
    table, size = seqs.block_table, view.block_size
    added = 0 if not appends else tokens if seqs.cu_seqlens_q is None else cu.diff()
    missing = (first < (lens + added)[:, None]) & ((table < 0) | (table >= view.num_blocks))
    missing &= first + size > starts[:, None]
    numbers = torch.cat([lens, starts, cu, missing.any().to(torch.int32)[None]]).tolist()
    if numbers[-1] or min(numbers[:batch]) < 0:
        return None
    rows = None
    if seqs.cu_seqlens_q is not None:
        edges = numbers[2 * batch : 3 * batch + 1]
        rows = tuple(b - a for a, b in pairwise(edges))
        if edges[0] or min(rows) < 0:
            return None
    return HostLengths(tuple(numbers[:batch]), tuple(numbers[batch : 2 * batch]), rows)
