"""What the benchmarks share: timing, the read ceiling, tables and JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kvquant
from kvquant.bench.timing import (
    Call,
    Captured,
    buffers_for,
    graph_ms,
    graphs_ms,
    read_ceiling,
    read_ms,
)

__all__ = [
    "Call",
    "Captured",
    "Report",
    "buffers_for",
    "graph_ms",
    "graphs_ms",
    "host_us",
    "read_ceiling",
    "read_ms",
]


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
