"""Stores of prompts, and of a decode step, beside a copy kernel that moves as many bytes.

An append reads 2 bytes an element and writes 1 (and 4 bytes a row): the ceiling is a kernel that
reads 2 bytes and writes 1 and does nothing else. Times are medians of CUDA-graph replays over
rotated buffers that L2 cannot hold. A step that opens a group of 256 takes the mean of the group
before it; beside it the step before, on the same lengths but for one token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Report, buffers_for, graph_ms

HEADS, DIM = 8, 128
PROMPTS = [(8, 4096), (16, 4096), (1, 8192), (1, 65536), (1, 2048), (64, 256)]
FORMS: dict[str, tuple[int | None, bool]] = {  # blocks, whether heads come before tokens
    "contiguous": (None, False),
    "paged16": (16, False),
    "transposed": (None, True),
}


def copy_ms(elements: int) -> float:
    """Milliseconds of a kernel that reads 2 bytes an element and writes 1: the best of some."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        word = tl.load(x + at, mask=at < count)
        tl.store(out + at, (word & 255).to(tl.uint8), mask=at < count)

    buffers = [
        (
            torch.randint(0, 255, (elements,), dtype=torch.int16, device="cuda"),
            torch.empty(elements, dtype=torch.uint8, device="cuda"),
        )
        for _ in range(buffers_for(3 * elements))
    ]
    best = float("inf")
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (16384, 8)):
        grid = (-(-elements // block),)
        calls = [
            lambda x=x, out=out, grid=grid, block=block, warps=warps: copy[grid](
                x, out, elements, block, num_warps=warps
            )
            for x, out in buffers
        ]
        best = min(best, graph_ms(calls, 7))
    return best


def new_rows(batch: int, tokens: int, transposed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values; transposed: ``(batch, heads, tokens, dim)`` in memory."""
    if transposed:
        shape = (batch, HEADS, tokens, DIM)
        return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in "kv"]
    return [torch.randn(batch, tokens, HEADS, DIM, device="cuda", dtype=dtype) for _ in "kv"]


def prompt_calls(
    batch: int, tokens: int, block: int | None, transposed: bool
) -> list[Callable[[], object]]:
    """Appends to empty caches, as many as L2 cannot hold."""
    calls: list[Callable[[], object]] = []
    for _ in range(buffers_for(3 * batch * tokens * HEADS * 2 * DIM)):
        cache = RandomCache.make(batch, HEADS, tokens, DIM, block_size=block)
        cache.seq_lens.zero_()
        key, value = new_rows(batch, tokens, transposed, torch.bfloat16)

        def append(cache: RandomCache = cache, key: Tensor = key, value: Tensor = value) -> None:
            kvquant.append_(
                key, value, cache.view, block_table=cache.block_table, seq_lens=cache.seq_lens
            )

        calls.append(append)
    return calls


def step_us(batch: int, rounds: int = 15, count: int = 8) -> dict[str, float]:
    """Microseconds of an append and of a decode step, where a group opens and where none does."""
    found: dict[str, float] = {}
    length = 2048
    caches = [
        RandomCache.make(batch, HEADS, length, DIM, spare=256)
        for _ in range(buffers_for(batch * length * HEADS * 2 * DIM, most=count))
    ]
    key, value = torch.randn(2, batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(batch, 1, 4 * HEADS, DIM, device="cuda", dtype=torch.bfloat16)

    def append(cache: RandomCache) -> None:
        kvquant.append_(
            key, value, cache.view, block_table=cache.block_table, seq_lens=cache.seq_lens
        )

    def attend(cache: RandomCache) -> None:
        kvquant.attention(
            query, cache.view, key, value, block_table=cache.block_table, seq_lens=cache.seq_lens
        )

    for name, call in (("append", append), ("step", attend)):
        times: dict[str, list[float]] = {"opens": [], "ordinary": []}
        for _ in range(3):  # in turn
            for kind, at in (("ordinary", length - 1), ("opens", length)):
                for cache in caches:
                    cache.seq_lens.fill_(at)
                calls = [lambda cache=cache, call=call: call(cache) for cache in caches]
                times[kind].append(graph_ms(calls, rounds) * 1e3)
        for kind, of in times.items():
            found[f"{name}_{kind}_us"] = statistics.median(of)
        found[f"{name}_extra_us"] = found[f"{name}_opens_us"] - found[f"{name}_ordinary_us"]
    return found


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
) -> None:
    """Print milliseconds, TB/s and % of the copy kernel; and microseconds of decode steps.

    Example: python -m benchmarks store --json store.json --plot store.png
    """
    report = Report("Stores of prompts")
    for batch, tokens in PROMPTS:
        elements = batch * tokens * HEADS * 2 * DIM
        nbytes = elements * 3 + batch * tokens * HEADS * 8
        ceiling = copy_ms(elements)
        torch.cuda.empty_cache()
        row: dict[str, float] = {}
        for name, form in FORMS.items():
            ms = graph_ms(prompt_calls(batch, tokens, *form))
            row |= {
                f"{name}_ms": ms,
                f"{name}_tbs": nbytes / ms / 1e9,
                f"{name}_percent": ceiling / ms * 100,
            }
            torch.cuda.empty_cache()
        report.add(
            shape=f"{batch}x{tokens}", mbytes=nbytes / 1e6, copy_ms=ceiling,
            copy_tbs=3 * elements / ceiling / 1e9, **row,
        )  # fmt: skip
    steps = Report("The step that opens a group")
    for batch in (1, 8, 64):
        steps.add(batch=batch, **step_us(batch))
        torch.cuda.empty_cache()
    steps.print()
    report.facts["steps"] = steps.rows
    report.finish(json)
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """Percent of the copy kernel's rate for each form."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    for i, (name, color) in enumerate(zip(FORMS, ("#4477aa", "#ccbb44", "#228833"), strict=True)):
        at = [j + (i - 1) * 0.28 for j in range(len(report.rows))]
        bars = axis.barh(
            at, [row[f"{name}_percent"] for row in report.rows], 0.28, color=color, label=name
        )
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axis.set_yticks(range(len(report.rows)), [row["shape"] for row in report.rows])
    axis.invert_yaxis()
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_ylabel("sequences x tokens")
    axis.set_xlabel("% of a kernel that only copies: reads 2 bytes an element, writes 1")
    figure.suptitle(f"Stores of prompts, 8 heads of 128 channels, {report.facts['device']}")
    figure.legend(loc="lower right", frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
