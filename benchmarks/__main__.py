"""`python -m benchmarks decode --json FILE`, and so on; without a name: each in turn."""

import typer

from benchmarks import decode, overhead, rows

app = typer.Typer(add_completion=False)
PROGRAMS = {"decode": decode.main, "rows": rows.main, "overhead": overhead.main}
for name, program in PROGRAMS.items():
    app.command(name)(program)


@app.callback(invoke_without_command=True)
def run_all(context: typer.Context) -> None:
    """Measure kvquant beside its peers."""
    if context.invoked_subcommand is None:
        for program in PROGRAMS.values():
            program()


if __name__ == "__main__":
    app()
