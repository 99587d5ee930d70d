"""A step of a server: chunks of prompts and decode steps in one packed call, beside each alone.

Appends are included; caches are paged; the lengths are known to the host, as an engine knows them.
Calls alternate in one run; times are medians of CUDA events around eager calls. The ratio is the
mixed call's time over the sum of the two others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Report
from benchmarks.prefill import alternating_ms

HEADS, KV_HEADS, DIM, STORED = 32, 8, 128, 8192
MIXTURES = [  # chunks, their rows, decodes
    (1, 2048, 63),
    (8, 256, 56),
]
BLOCKS = {"paged16": 16, "paged64": 64}


def step(
    cache: RandomCache, lens: list[int], rows: list[int], first: int
) -> tuple[Callable[[], object], kvquant.Plan]:
    """A packed step of the sequences from ``first`` on, which writes the same rows at each call."""
    count = len(rows)
    table = cache.block_table[first : first + count]
    edges = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    seqs = kvquant.Sequences(
        table.contiguous(),
        torch.tensor(lens, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=edges.to("cuda"),
        max_seqlen_q=max(rows),
        on_host=kvquant.HostLengths(tuple(lens), None, tuple(rows)),
    )
    query, key, value = (
        torch.randn(sum(rows), heads, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    plan = kvquant.plan(query, cache.view, seqs, key, value)
    out = torch.zeros_like(query)
    return lambda: plan.run(query, cache.view, seqs, key, value, out=out), plan


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print milliseconds of the mixed call, of its parts, and their ratio.

    Example: python -m benchmarks mixed --json mixed.json
    """
    torch.set_grad_enabled(False)
    report = Report("Chunks beside decode steps", stored=STORED)
    for chunks, tokens, decodes in MIXTURES:
        for layout, block in BLOCKS.items():
            batch = chunks + decodes
            cache = RandomCache.make(
                batch, KV_HEADS, STORED + tokens, DIM, block_size=block, spare=block
            )
            spread = torch.Generator().manual_seed(0)
            short = torch.randint(STORED // 2, STORED, (decodes,), generator=spread).tolist()
            for name, lens in (("even", [STORED] * decodes), ("ragged", short)):
                long = [STORED] * chunks
                mixed, plan = step(cache, long + lens, [tokens] * chunks + [1] * decodes, 0)
                alone, _ = step(cache, long, [tokens] * chunks, 0)
                decode, _ = step(cache, lens, [1] * decodes, chunks)
                ms = alternating_ms({"mixed": mixed, "chunks": alone, "decodes": decode})
                report.add(
                    mixture=f"{chunks} x {tokens}, {decodes} x 1",
                    layout=layout,
                    lengths=name,
                    regime=plan.regime,
                    **{f"{of}_ms": taken for of, taken in ms.items()},
                    ratio=ms["mixed"] / (ms["chunks"] + ms["decodes"]),
                )
            del cache
            torch.cuda.empty_cache()
    report.finish(json)
