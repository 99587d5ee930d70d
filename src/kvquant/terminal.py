"""What the commands share: a console, a progress bar, names of devices, a JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["console", "device_name", "progress", "write_json"]


def console() -> Console:
    """Where commands print their tables."""
    return Console(highlight=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for work of ``total`` steps; call what it gives with the steps that are done.

    It is drawn on the standard error, and only in a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    on = Console(stderr=True)
    with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def device_name(device: torch.device) -> str:
    """A device as a heading."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write a command's figures, where a file is asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
        console().print(f"figures: {path}")
