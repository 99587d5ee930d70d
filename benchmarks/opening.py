"""Decode steps that open a group of 256 tokens, beside ordinary ones; and appends alone.

A step that opens a group takes the mean of the group before it. It is compared with a step that
ends where that group does, on the same buffers, larger than the L2 cache.
Lengths stay as they are, so a CUDA graph holds several steps of one kind. A time is the median of
five repetitions, in turns, its spread (largest - smallest) / median.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Captured, Report, buffers_for, graphs_ms
from benchmarks.decode import FORMATS
from kvquant import ops

Q_HEADS, HEADS, DIM, GROUP = 32, 8, 128, 256
SHAPES = [  # sequences, tokens, query tokens
    (1, 2048, 1),
    (1, 4096, 1),
    (8, 4096, 1),
    (64, 2048, 1),
    (64, 8192, 1),
    (1, 4096, 8),
    (8, 8192, 8),
    (64, 2048, 8),
]


def graphs(
    format: kvquant.CacheFormat, sequences: int, tokens: int, new: int
) -> dict[str, Captured]:
    """Steps and appends that begin a group, at ``tokens``, and that do not."""
    count = buffers_for(sequences * tokens * HEADS * format.row_bytes(DIM, DIM))
    query = torch.randn(sequences, new, Q_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(
        2, sequences, new, HEADS, DIM, device="cuda", dtype=torch.bfloat16
    ).unbind(0)
    caches = [
        RandomCache.make(sequences, HEADS, tokens, DIM, spare=GROUP, format=format)
        for _ in range(count)
    ]
    found = {}
    for kind, at in (("ordinary", tokens - new), ("opening", tokens)):
        lens = torch.full((sequences,), at, dtype=torch.int32, device="cuda")
        steps, appends = [], []
        for cache in caches:
            seqs = kvquant.Sequences(cache.block_table, lens, young=cache.young)
            step = kvquant.plan(query, cache.view, seqs, key, value)
            steps.append(partial(step.run, query, cache.view, seqs, key, value))
            appends.append(partial(ops.append, key, value, cache.view, seqs, None))
        found[f"{kind}_step"] = Captured.of(steps)
        found[f"{kind}_append"] = Captured.of(appends)
    return found


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    formats: Annotated[str, typer.Option(help="Of the cache, by comma.")] = (
        "int8,k8v4 by age,k4v4 by age"
    ),
) -> None:
    """Print microseconds of steps and appends that open a group, and of ordinary ones.

    Shapes are sequences, tokens, new tokens.

    Example: python -m benchmarks opening --formats int8 --json opening.json
    """
    torch.set_grad_enabled(False)
    report = Report("Steps that open a group, µs")
    for name in formats.split(","):
        for shape in SHAPES:
            row: dict[str, Any] = {"format": name, "shape": ",".join(map(str, shape))}
            times = graphs_ms(graphs(FORMATS[name], *shape))
            for what in ("step", "append"):
                ordinary, opening = (times[f"{kind}_{what}"] for kind in ("ordinary", "opening"))
                row |= {
                    what: ordinary[0] * 1e3,
                    f"{what}_opening": opening[0] * 1e3,
                    f"{what}_more": (opening[0] - ordinary[0]) * 1e3,
                    f"{what}_spread": max(ordinary[1], opening[1]),
                }
            report.add(**row)
            torch.cuda.empty_cache()
    report.finish(json)
