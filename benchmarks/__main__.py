"""`python -m benchmarks decode --json FILE`, and so on; without a name: each in turn."""

import torch
import typer

from benchmarks import (
    batch,
    cpu,
    decode,
    generate,
    host,
    memory,
    mixed,
    opening,
    overhead,
    prefill,
    prompt,
    quality,
    rows,
    serve,
    slab,
    step,
    store,
)

app = typer.Typer(add_completion=False)
ON_GPU = {
    "decode": decode.main,
    "prefill": prefill.main,
    "mixed": mixed.main,
    "rows": rows.main,
    "opening": opening.main,
    "store": store.main,
    "overhead": overhead.main,
    "prompt": prompt.main,
    "step": step.main,
}
PROGRAMS = {
    "batch": batch.main,
    "cpu": cpu.main,
    "generate": generate.main,
    "host": host.main,
    "memory": memory.main,
    "quality": quality.main,
    "serve": serve.main,
    "slab": slab.main,
    **ON_GPU,
}
for name, program in PROGRAMS.items():
    app.command(name)(program)


@app.callback(invoke_without_command=True)
def run_all(context: typer.Context) -> None:
    """Measure kvquant beside its peers."""
    if context.invoked_subcommand is None:
        cpu.main()
        generate.main()
        for program in ON_GPU.values() if torch.cuda.is_available() else ():
            program()


if __name__ == "__main__":
    app()
