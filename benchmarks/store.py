"""Stores of prompts beside a copy kernel that moves as many bytes.

An append reads 2 bytes an element and writes 1 (and 4 bytes a row): the ceiling is a kernel that
reads 2 bytes and writes 1 and does nothing else. Times are medians of CUDA-graph replays over
rotated buffers that L2 cannot hold.
"""

from __future__ import annotations

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


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
) -> None:
    """Print milliseconds, TB/s and % of the copy kernel.

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
