"""What the benchmarks share: timing, the read ceiling, tables and JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kvquant

Call = Callable[[], object]


def graph_ms(
    calls: Sequence[Call], rounds: int = 11, per_graph: int = 10, before: Call | None = None
) -> float:
    """Median milliseconds of a call, by replays of a CUDA graph that rotates through ``calls``.

    ``before`` runs ahead of each replay, outside the time taken.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(per_graph):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            before()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / per_graph)
    return statistics.median(times)


def host_us(call: Call, calls: int = 300, rounds: int = 9) -> float:
    """Median microseconds of host time of an eager call, the device left to catch up between."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def read_ms(nbytes: int, *, rounds: int = 7, per_graph: int = 10) -> float:
    """Milliseconds of a kernel that only reads about ``nbytes``: the best of some launches."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(x, out, block: tl.constexpr, steps: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0)
        total = tl.zeros((block,), tl.int32)
        for i in range(steps):
            at = program.to(tl.int64) * block * steps + i * block
            total += tl.load(x + at + tl.arange(0, block))
        tl.store(out + program, tl.sum(total, 0))

    words = nbytes // 4
    buffers = [
        torch.randint(0, 255, (words,), dtype=torch.int32, device="cuda")
        for _ in range(buffers_for(nbytes))
    ]
    best = float("inf")
    for block, programs in (
        (4096, words // 32768), (2048, words // 32768), (8192, words // 131072),
        (1024, words // 65536),
        (2048, 264), (4096, 264), (2048, 528), (2048, 2112),
    ):  # fmt: skip
        steps = words // (block * max(1, programs))
        if not steps or not programs:
            continue
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def call(
            x: torch.Tensor, block: int = block, steps: int = steps, out: torch.Tensor = out
        ) -> None:
            read[(out.numel(),)](x, out, block, steps, num_warps=8)

        ms = graph_ms([lambda x=x: call(x) for x in buffers], rounds, per_graph)
        best = min(best, ms * words / (block * steps * programs))
    return best


def read_ceiling() -> float:
    """TB/s of a kernel that only reads 2 GiB: the ceiling for whatever reads a cache."""
    nbytes = 1 << 31
    return nbytes / read_ms(nbytes, per_graph=3) / 1e9


def buffers_for(nbytes: int, *, at_least: int = 400_000_000, most: int = 8) -> int:
    """How many buffers of ``nbytes`` to rotate so that the L2 cache does not serve them."""
    return max(1, min(most, at_least // max(1, nbytes)))


class Report:
    """Rows of figures: printed as a table at the end, written as JSON where asked."""

    def __init__(self, title: str, **facts: Any) -> None:
        self.title = title
        self.facts = {
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU ({platform.machine()})",
            "torch": torch.__version__,
            "kvquant": kvquant.__version__,
            **facts,
        }
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Keep one row; the first one fixes the columns."""
        self.rows.append(row)
        print("  ".join(f"{k} {_text(v)}" for k, v in row.items()), flush=True)

    def finish(self, path: Path | None) -> None:
        """Print the table, write ``path``."""
        self.print()
        self.save(path)

    def save(self, path: Path | None) -> None:
        """Write what there is so far, where a file is asked for."""
        if path:
            path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1))

    def print(self) -> None:
        """Print the table."""
        facts = [f"{k} {v}" for k, v in self.facts.items() if not isinstance(v, list)]
        table = Table(title=self.title, caption=", ".join(facts))
        for column in self.rows[0]:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(_text(value) for value in row.values()))
        Console(width=180).print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
