"""The command ``kvquant``: ``info`` and ``doctor`` need torch alone, others ``kvquant[demo]``."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __doc__ as about
from . import __version__, dequantize_cache_torch, quantize_cache_v, use_backend
from .backends import build_info

__all__ = ["collect", "main"]

_USAGE = (
    "usage: kvquant info|doctor [--json FILE]; with pip install 'kvquant[demo]': bench|demo|fit"
)
_EXTRA = (
    "kvquant {command} needs more packages ({missing} is missing): pip install 'kvquant[{extra}]'"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import typer
    except ImportError:
        raise SystemExit(_plain(args)) from None
    _app(typer)(args, prog_name="kvquant")


def collect() -> dict[str, Any]:
    """Versions, hardware, and which backends work (with the reason and the remedy if not)."""
    built = build_info()
    return {
        "versions": {
            "kvquant": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "extension": built,
        "cpu": {"isa": built.get("cpu_isa"), "threads": torch.get_num_threads()},
        "cuda": {
            "torch": torch.version.cuda,
            "runtime": _cuda_version(built.get("cuda_runtime")),
            "driver": _cuda_version(built.get("cuda_driver")),
            "archs": built.get("cuda_archs"),
            "devices": _devices(),
        },
        "backends": {
            "reference": _works("reference", "cpu", None, ""),
            "cpu": _works("auto", "cpu", *_cpu_trouble(built)),
            "cuda": _works("auto", "cuda", *_cuda_trouble(built)),
        },
    }


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        }
        for index in range(torch.cuda.device_count())
    ]


def _cuda_version(number: int | None) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _cpu_trouble(built: dict[str, Any]) -> tuple[str | None, str]:
    """Why the compiled CPU kernels cannot work, and what to do."""
    if "error" not in built:
        return None, ""
    return (
        f"the compiled extension is not there: {built['error']}",
        "install a wheel of kvquant for this Python, or build it: pip install . in its source",
    )


def _cuda_trouble(built: dict[str, Any]) -> tuple[str | None, str]:
    """Why the CUDA kernels cannot work, and what to do."""
    if "error" in built:
        return _cpu_trouble(built)
    if not built.get("cuda"):
        return "built without CUDA", "build with KVQUANT_CUDA=ON where nvcc is, or take a wheel"
    if not built.get("devices"):
        error = built.get("cuda_error") or "no device"
        needed = _cuda_version(built.get("cuda_runtime"))
        return (
            f"no GPU to be seen: {error}",
            f"check nvidia-smi; the driver must support CUDA {needed} or a later minor version",
        )
    if not torch.version.cuda:
        return "this torch is a CPU build", "install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no GPU", "check that torch's CUDA build fits the driver"
    return None, ""


def _works(backend: str, device: str, trouble: str | None, advice: str) -> dict[str, Any]:
    """Quantize a row for real, unless the reason why that cannot work is known."""
    if trouble is None:
        try:
            x = torch.linspace(-1, 1, 64, device=device).view(1, 1, 1, 64)
            with use_backend(backend):
                q, scale, zero = quantize_cache_v(x)
                error = (dequantize_cache_torch(q, scale, zero) - x).abs().max().item()
            if not error < 0.01:
                trouble = f"wrong results (error {error:g})"
        except (RuntimeError, ValueError, TypeError, OSError) as exception:
            trouble = f"{type(exception).__name__}: {exception}"
        if trouble is not None:
            advice = "report this as a bug, with the output of kvquant info"
    found: dict[str, Any] = {"works": trouble is None}
    return found if trouble is None else {**found, "reason": trouble, "advice": advice}


def _lines(info: dict[str, Any]) -> list[str]:
    """The plain rendering, for a terminal without rich."""
    cuda, cpu, versions = info["cuda"], info["cpu"], info["versions"]
    built_for = cuda["archs"] or "nothing"
    lines = [
        f"kvquant     {versions['kvquant']} (python {versions['python']}, {info['machine']})",
        f"torch       {versions['torch']} (CUDA {cuda['torch'] or 'none'})",
        f"cpu         {cpu['isa'] or 'no compiled kernels'}, {cpu['threads']} threads",
    ]
    lines.append(
        f"cuda        runtime {cuda['runtime'] or 'none'}, driver {cuda['driver'] or 'none'}, "
        f"built for {built_for}"
    )
    for index, device in enumerate(cuda["devices"]):
        lines.append(
            f"gpu {index}       {device['name']}, compute capability {device['compute_capability']}"
        )
    for name, state in info["backends"].items():
        text = "works" if state["works"] else f"does not work: {state['reason']}"
        lines.append(f"{name:<11} {text}")
        if not state["works"]:
            lines.append(f"{'':<11} -> {state['advice']}")
    return lines


def _info(file: Path | None) -> None:
    logging.getLogger("kvquant").setLevel(logging.ERROR)  # trying the reference would be reported
    info = collect()
    print("\n".join(_lines(info)))
    if file is not None:
        file.write_text(json.dumps(info, indent=2) + "\n")


def _doctor(
    model: str | None, file: Path | None, *, batch: int = 1, length: int = 8192,
    device_memory: float | None = None,
) -> int:  # fmt: skip
    """Print what is wrong; 1 if something stops what was asked for, else 0."""
    from .doctor import examine

    logging.getLogger("kvquant").setLevel(logging.ERROR)  # the rows say it
    rows = examine(collect())
    if model is not None:
        from .terminal import progress

        memory = None if device_memory is None else int(device_memory * 2**30)
        with progress("the model, without weights", 1) as advance:
            from .doctor import examine_model

            rows += examine_model(model, batch=batch, length=length, device_memory=memory)
            advance(1)
    for row in rows:
        print(f"{row.state:<6} {row.check:<21} {row.what}")
        if row.advice and row.state != "ok":
            print(f"{'':<28} -> {row.advice}")
    stopped = sum(row.state == "stops" for row in rows)
    slow = sum(row.state == "slow" for row in rows)
    print(f"{stopped or 'nothing'} stops it, {slow or 'nothing'} makes it slow")
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(stopped > 0)


def _plain(args: list[str]) -> int | str:
    """The command line without typer: ``info`` works; returns what to exit with."""
    command, rest = (args[0] if args else "--help"), args[1:]
    if command in ("bench", "demo", "fit"):
        return _EXTRA.format(command=command, missing="typer", extra="demo")
    if command in ("info", "doctor") and (not rest or (len(rest) == 2 and rest[0] == "--json")):
        file = Path(rest[1]) if rest else None
        if command == "doctor":
            return _doctor(None, file)
        _info(file)
        return 0
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    return _USAGE


@contextmanager
def _needing(command: str, extra: str) -> Iterator[None]:
    """End with one line where a package is missing or an option is out of range."""
    logging.getLogger("kvquant").setLevel(logging.ERROR)  # the tables say it
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise SystemExit(_EXTRA.format(command=command, missing=missing, extra=extra)) from error
    except ValueError as error:
        raise SystemExit(f"kvquant {command}: {error}") from error


def _app(typer: Any) -> Any:
    """The command line with typer."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, help=about)
    json_option = typer.Option(None, "--json", metavar="FILE", help="Also write it as JSON.")
    png_option = typer.Option(None, "--picture", metavar="FILE", help="Also draw it as PNG.")
    picture_option = typer.Option(Path("kvquant-demo.png"), help="Where to save the picture.")

    def info(json_file: Path | None = json_option) -> None:
        """Versions, hardware, and which backends work; if one does not, why and what to do.

        Example: kvquant info --json info.json
        """
        _info(json_file)

    def demo(
        key_bias: bool = typer.Option(
            False, "--key-bias", help="Also measure with Qwen2-like key biases injected."
        ),
        context: int = typer.Option(2048, help="Tokens of the quality figures (2048 or 8192)."),
        json_file: Path | None = json_option,
        picture: Path = picture_option,
        device: str | None = typer.Option(None, help="cpu or cuda; by default a GPU if any."),
    ) -> None:
        """A small language model on an 8-bit cache: answers, quality, bytes and speed.

        Example: kvquant demo --key-bias --json demo.json
        """
        if context < 512:
            raise typer.BadParameter("--context: expected at least 512")
        with _needing("demo", "demo"):
            from .demo import AssetError, Options, run

            options = Options(
                context=context, key_bias=key_bias, device=device, json=json_file, picture=picture
            )
            try:
                run(options)
            except AssetError as error:
                raise SystemExit(f"kvquant demo: {error}") from error

    def fit(
        model: str = typer.Argument(help="A folder, a config.json, or a well-known name."),
        batch: int = typer.Option(1, help="Sequences."),
        length: int = typer.Option(8192, help="Tokens of each."),
        generated: int = typer.Option(0, help="Of these, tokens that come one at a time."),
        block_size: int | None = typer.Option(None, help="Tokens of a block; else contiguous."),
        device_memory: float | None = typer.Option(
            None, help="GiB; by default this machine's GPU's, 80 without one."
        ),
        spare: float = typer.Option(1.0, help="GiB for activations and CUDA."),
        weights_bits: float = typer.Option(16, help="Bits of a weight of a linear layer."),
        json_file: Path | None = json_option,
        picture: Path | None = png_option,
    ) -> None:
        """What a model's cache takes, and the largest batch and length that fit.

        Example: kvquant fit llama-3.1-8b --batch 16 --length 32768 --device-memory 80
        """
        with _needing("fit", "demo"):
            from .fit.run import Options, run

            run(
                Options(
                    model=model, batch=batch, length=length, generated=generated,
                    block_size=block_size, device_memory=device_memory, spare=spare,
                    weights_bits=weights_bits, json=json_file, picture=picture,
                )
            )  # fmt: skip

    def doctor(
        model: str | None = typer.Argument(
            None, help="Also a model: a folder, a config.json, or a well-known name."
        ),
        batch: int = typer.Option(1, help="Sequences that the model's cache is to hold."),
        length: int = typer.Option(8192, help="Tokens of each."),
        device_memory: float | None = typer.Option(None, help="GiB that all must fit in."),
        json_file: Path | None = json_option,
    ) -> None:
        """What is wrong on this machine, or with a model, and what to do; exit code 1 if it stops.

        Example: kvquant doctor llama-3.1-8b --batch 16 --length 32768 --device-memory 80
        """
        with _needing("doctor", "transformers"):
            status = _doctor(
                model, json_file, batch=batch, length=length, device_memory=device_memory
            )
        raise SystemExit(status)

    def bench(
        device: str | None = typer.Option(None, help="cpu or cuda; by default a GPU if any."),
        json_file: Path | None = json_option,
        picture: Path | None = png_option,
    ) -> None:
        """This machine's decode, prompt and store beside torch's attention, in about a minute.

        Example: kvquant bench --json bench.json --picture bench.png
        """
        with _needing("bench", "demo"):
            from .bench.run import Options, run

            run(Options(device=device, json=json_file, picture=picture))

    for command in (info, doctor, demo, fit, bench):
        app.command()(command)
    return app
