"""``python -m tests.modes``: generation's modes on the 8-bit cache, as a table."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import rich
import rich.table
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from ..marked import write
from .judge import MODELS, judge
from .modes import MODES


def row(mode: str, verdicts: list[str]) -> list[str]:
    """A mode, a word for each model, and the reasons where the word is not yes."""
    words, reasons = [], []
    for verdict in verdicts:
        word, _, reason = verdict.partition(": ")
        words.append(word)
        if reason and reason not in reasons:
            reasons.append(reason)
    return [mode, *words, "; ".join(reasons).replace("|", "\\|")]


def main(
    output: Annotated[Path | None, typer.Option("--write", help="a file with markers")] = None,
) -> None:
    """Run every mode with every model on the CPU."""
    warnings.simplefilter("ignore")
    head = ["mode", *MODELS.values(), "why"]
    rows = [row(mode, [judge(name, mode, "cpu") for name in MODELS]) for mode in MODES]
    table = rich.table.Table(*head)
    for cells in rows:
        table.add_row(*cells)
    rich.print(table)
    if output is not None:
        lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]
        write(output, "modes", "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
