"""``python -m tests.fuzz``: random calls, and files that are not as they were written."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .run import Total

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)

Seed = Annotated[int, typer.Option(help="Another seed, other calls.")]
Device = Annotated[str, typer.Option(help="Where the tensors are: cpu or cuda.")]


Count = Annotated[int, typer.Option(help="How many calls.")]
First = Annotated[int, typer.Option(help="The number of the first one.")]
Only = Annotated[int | None, typer.Option(help="One call in this process, shown.")]
Wrap = Annotated[str, typer.Option(help="A tool to run the calls under.")]
Limit = Annotated[
    float | None, typer.Option(help="Most seconds of one call: 20, within a tool 120.")
]
Jobs = Annotated[int, typer.Option(min=1, help="How many processes at a time.")]
Seconds = Annotated[
    float | None, typer.Option(help="After so many seconds no further number begins.")
]


@app.command()
def calls(
    count: Count = 2000,
    first: First = 0,
    only: Only = None,
    seed: Seed = 0,
    device: Device = "cpu",
    wrap: Wrap = "",
    limit: Limit = None,
    jobs: Jobs = 1,
    seconds: Seconds = None,
) -> None:
    """Random calls of everything public, good and bad: none crashes, all do as they should."""
    from . import run

    if missing := run.uncovered():
        raise typer.BadParameter(f"nothing fuzzes {', '.join(missing)}")
    _run("calls", count, first, only, seed, device, wrap, limit, jobs, seconds)


@app.command()
def ops(
    count: Count = 5000,
    first: First = 0,
    only: Only = None,
    seed: Seed = 0,
    device: Device = "cpu",
    wrap: Wrap = "",
    limit: Limit = None,
    jobs: Jobs = 1,
    seconds: Seconds = None,
) -> None:
    """Random calls of torch.ops.kvquant's operators, good and spoilt: none crashes."""
    _run("ops", count, first, only, seed, device, wrap, limit, jobs, seconds)


def _run(
    what: str,
    count: int,
    first: int,
    only: int | None,
    seed: int,
    device: str,
    wrap: str,
    limit: float | None,
    jobs: int,
    seconds: float | None,
) -> None:
    from . import run

    if only is not None:
        raise typer.Exit(_only(what, only, seed, device))
    begin = said = time.monotonic()
    with console.status("starting") as status:

        def told(total: run.Total) -> None:
            nonlocal said
            text = (
                f"{total.numbers:,} numbers, {total.calls.total():,} calls, "
                f"{len(total.failures)} distinct failures"
            )
            status.update(text)
            if not console.is_terminal and time.monotonic() - said >= 15:
                said = time.monotonic()
                print(f"{said - begin:.0f} s: {text}", flush=True)

        total = run.run_all(
            seed, first, first + count, what=what, device=device, wrap=wrap, jobs=jobs, told=told,
            limit=limit or (120.0 if wrap else 20.0),
            seconds=math.inf if seconds is None else seconds,
        )  # fmt: skip
    _show(what, total, seed, device)
    if total.numbers < count:
        console.print(
            f"stopped after {total.seconds:.0f} s: {total.numbers:,} numbers, "
            f"{total.calls.total():,} calls"
        )
    raise typer.Exit(bool(total.failures))


def _only(what: str, number: int, seed: int, device: str) -> int:
    """Run one call here; its exit status."""
    import torch

    from . import run
    from .calls import Report

    torch.set_num_threads(1)

    def plainly(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    report = Report(begin=lambda what: plainly(f"> {what}"), trace=plainly)
    run.run_one(seed, number, device, report, what)
    for failure in report.failures:
        plainly(f"FAILED {failure.operation}: {failure.kind}: {failure.message}")
    return int(bool(report.failures))


def _show(what: str, total: Total, seed: int, device: str) -> None:
    table = Table("operation", "calls", "accepted", "refused", title="Calls")
    for name, number in sorted(total.calls.items()):
        accepted = total.accepted[name]
        table.add_row(name, f"{number:,}", f"{accepted:,}", f"{number - accepted:,}")
    console.print(table)
    made, accepted = total.calls.total(), total.accepted.total()
    rate = made / max(total.seconds, 1e-9)
    console.print(
        f"{total.numbers:,} numbers, {made:,} calls ({rate:.0f} a second), "
        f"{accepted:,} accepted, {made - accepted:,} refused or lost, {total.children} processes"
    )
    where = "" if device == "cpu" else f" --device {device}"
    for (name, kind, message), (number, times, details) in sorted(total.failures.items()):
        console.print(f"[red]{escape(name)}: {escape(kind)}: {escape(message)}[/red] ({times}x)")
        lines = details.splitlines() or [""]
        report = [line for line in lines[1:] if line.startswith("=========")][:12]
        for line in (lines[0], *report):  # the second: a sanitizer's
            console.print(f"    {line}"[:400], markup=False)
        console.print(f"    python -m tests.fuzz {what} --only {number} --seed {seed}{where}")
    if not total.failures:
        console.print("no failure")


@app.command(hidden=True)
def child(
    path: str,
    what: str,
    seed: Seed = 0,
    first: int = 0,
    end: int = 0,
    step: int = 1,
    device: Device = "cpu",
    until: float = math.inf,
) -> None:
    """What `calls` and `ops` start."""
    from .run import child

    child(path, what, seed, first, end, step, device, until)


@app.command()
def files(
    count: Annotated[int, typer.Option(help="How many files.")] = 100_000,
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option(help="How many processes.")] = 2,
    only: Annotated[int | None, typer.Option(help="One file, shown.")] = None,
) -> None:
    """Files that are not as they were written: none is loaded as if it were."""
    from .files import main

    main(count, seed, jobs, only)


if __name__ == "__main__":
    app(prog_name="python -m tests.fuzz")
