"""``python -m tests.families [NAMES]``: every family on the 8-bit cache, as a table."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import rich
import rich.table
import typer

from ..marked import write
from .survey import Result, survey


def markdown(results: list[Result]) -> str:
    """The results for the documentation: those that are right in a line, the others by reason."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, state, reason in results:
        names[state, "" if state == "right" else reason].append(f"`{name}`")
    right = [name for (state, _), same in names.items() if state == "right" for name in same]
    lines = [f"On the 8-bit rows ({len(right)} families): {', '.join(right)}.", ""]
    lines += ["| families (model type) | result | why |", "| --- | --- | --- |"]
    order = ["dequantized", "refused", "not tried", "wrong"]
    rest = [key for key in names if key[0] != "right"]
    for state, reason in sorted(rest, key=lambda key: (order.index(key[0]), key[1])):
        why = reason.replace("|", "\\|")
        lines.append(f"| {', '.join(names[state, reason])} | {state} | {why} |")
    return "\n".join(lines)


def main(
    families: Annotated[list[str] | None, typer.Argument(help="model types; all")] = None,
    workers: Annotated[int, typer.Option(help="processes")] = 2,
    output: Annotated[Path | None, typer.Option("--write", help="a file with markers")] = None,
) -> None:
    """Judge all families, or the given ones."""
    from .build import names

    start = time.monotonic()
    results = survey(families or names(), workers)
    table = rich.table.Table("family", "result", "why")
    for name, state, reason in sorted(results, key=lambda result: result[1]):
        if state != "right" or families:
            table.add_row(name, state, reason)
    rich.print(table)
    counts: dict[str, int] = defaultdict(int)
    for _, state, _ in results:
        counts[state] += 1
    rich.print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    rich.print(f"{len(results)} families, {time.monotonic() - start:.0f} s")
    if output is not None:
        write(output, "families", markdown(results))
    if counts["wrong"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
