"""``python -m tests.modes``: generation's modes on the 8-bit cache, as a table."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import rich
import rich.table
import torch
import transformers
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from ..marked import write
from .judge import MODELS, judge
from .modes import MODES

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def row(mode: str, device: str) -> list[str]:
    """A mode, a word for each model, where it was judged, and the reasons where it is not yes."""
    words, reasons = [], []
    verdicts = [judge(name, mode, device) for name in MODELS]
    on_cpu = MODES[mode].on_cpu if device == "cpu" else ""
    where = ": ".join(filter(None, (DEVICES[device], MODES[mode].always, on_cpu)))
    for verdict in verdicts:
        word, _, reason = verdict.partition(": ")
        words.append(word)
        if reason and reason not in reasons:
            reasons.append(reason)
    return [mode, *words, where, "; ".join(reasons).replace("|", "\\|")]


def main(
    output: Annotated[Path | None, typer.Option("--write", help="a file with markers")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Run every mode with every model."""
    if device not in DEVICES:
        raise typer.BadParameter(f"--device: expected one of {', '.join(DEVICES)}, got {device!r}")
    warnings.simplefilter("ignore")
    head = ["mode", *MODELS.values(), "judged on", "why"]
    rows = [row(mode, device) for mode in MODES]
    table = rich.table.Table(*head)
    for cells in rows:
        table.add_row(*cells)
    rich.print(table)
    if output is not None:
        lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        write(output, "modes", "\n".join([f"With {versions}:", "", *lines]))


if __name__ == "__main__":
    typer.run(main)
