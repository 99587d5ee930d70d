"""The command ``kvquant fit``: tables, a picture, and figures for a JSON file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..terminal import console, progress, write_json
from .layers import ModelShape, shape_of
from .models import read_config
from .sizes import FORMATS, Layout, cache_bytes, gib, largest, peer_bytes

__all__ = ["Options", "run"]

_PEER = "DynamicCache, 16 bits"
_SEQUENCES = 64  # tried at most; a larger batch is alike, and takes the host long to try
_CURVE = 8  # points of each line in the picture
_Bytes = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to work out.

    Attributes:
        model: A folder, a config.json, or a name in `kvquant.fit.MODELS`.
        batch: Sequences.
        length: Tokens of each.
        generated: How many of them come one at a time, behind the prompt.
        block_size: Tokens of a block; None: contiguous.
        device_memory: GiB; None: this machine's GPU, 80 without one.
        spare: GiB left for activations, the logits and the CUDA context.
        weights_bits: Of linear layers (4.25: 4 bits and a 16-bit scale and zero for 128 weights).
        json: Where to write the figures.
        picture: Where to draw them.
    """

    model: str
    batch: int = 1
    length: int = 8192
    generated: int = 0
    block_size: int | None = None
    device_memory: float | None = None
    spare: float = 1.0
    weights_bits: float = 16
    json: Path | None = None
    picture: Path | None = None


def run(options: Options) -> dict[str, Any]:
    """Print what fits and return the figures.

    Raises:
        ValueError: An option out of range, a model that is not served.
    """
    for name in ("weights_bits", "device_memory"):
        number = getattr(options, name)
        if number is not None and not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    config = read_config(options.model)
    with progress("the model, without weights", 1) as advance:
        shape = shape_of(config)
    budget = _device_memory(options.device_memory)
    weights = shape.weight_bytes(options.weights_bits)
    room = budget - weights - int(options.spare * 2**30)
    limit = getattr(shape.config, "max_position_embeddings", None)
    least = options.generated + 1  # tokens: the prompt has one at least
    by_layer = list(_layers(shape, options))
    ways = dict(_ways(shape, options))
    with progress("sizes", len(ways) * (2 + 2 * _CURVE)) as advance:
        fits = {name: _fits(nbytes, room, limit, options, advance) for name, nbytes in ways.items()}
        curves = {
            "batch": _curve(ways, lambda f, n: f(n, options.length), options.batch, 1, advance),
            "length": _curve(
                ways, lambda f, n: f(options.batch, n), options.length, least, advance
            ),
        }
    figures = {
        "model": options.model,
        "parameters": shape.parameters,
        "weights_bytes": weights,
        "weights_bits": options.weights_bits,
        "device_memory_bytes": budget,
        "spare_bytes": int(options.spare * 2**30),
        "batch": options.batch,
        "length": options.length,
        "layers": by_layer,
        "shared_layers": shape.shared,
        "max_position_embeddings": limit,
        "why_dequantized": shape.why_dequantized,
        "cache_bytes": {name: f(options.batch, options.length) for name, f in ways.items()},
        "fits": fits,
        "curves": curves,
    }
    _print(figures, shape)
    if options.picture is not None:
        draw(figures, options.picture)
        console().print(f"picture: {options.picture}")
    write_json(options.json, figures)
    return figures


def _device_memory(given: float | None) -> int:
    if given is not None:
        return int(given * 2**30)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return 80 * 2**30


def _ways(shape: ModelShape, options: Options) -> Iterator[tuple[str, _Bytes]]:
    """Ways to keep a cache, by name: bytes for a batch and a length."""

    def ours(layout: Layout) -> _Bytes:
        @functools.cache
        def few(batch: int, length: int) -> int:
            return sum(cache_bytes(shape, batch, length, layout).values())

        def nbytes(batch: int, length: int) -> int:
            tried = min(batch, _SEQUENCES)
            return few(tried, length) * batch // tried

        return nbytes

    yield _PEER, lambda batch, length: peer_bytes(shape, batch, length)
    for name, format in FORMATS.items():
        common: dict[str, Any] = {"format": format, "block_size": options.block_size}
        yield name, ours(Layout(**common, generated=options.generated))
        if name == next(iter(FORMATS)):
            yield f"{name}, max_cache_len", ours(Layout(**common, reserved=True))


def _layers(shape: ModelShape, options: Options) -> Iterator[dict[str, Any]]:
    """Each kind of layer, with its bytes by format."""
    layouts = {
        name: Layout(format=format, block_size=options.block_size, generated=options.generated)
        for name, format in FORMATS.items()
    }
    sizes = {
        name: cache_bytes(shape, options.batch, options.length, layout)
        for name, layout in layouts.items()
    }
    for layer in shape.layers:
        yield {
            "kind": layer.kind,
            "layers": len(layer.indices),
            "kv_heads": layer.kv_heads,
            "k_dim": layer.k_dim,
            "v_dim": layer.v_dim,
            "bytes": {name: of[layer] for name, of in sizes.items()},
        }


def _fits(
    nbytes: _Bytes, room: int, limit: int | None, options: Options, advance: Callable[[int], None]
) -> dict[str, int]:
    """The largest batch at the length, and the largest length, up to ``limit``, at the batch."""
    least = options.generated + 1  # tokens: the prompt has one at least
    batch = largest(lambda n: nbytes(n, options.length), room)
    advance(1)
    most = [] if limit is None else [max(limit, least)]
    length = largest(lambda n: nbytes(options.batch, max(n, least)), room, *most)
    advance(1)
    return {"largest_batch": batch, "largest_length": length if length >= least else 0}


def _curve(
    ways: dict[str, _Bytes],
    of: Callable[[_Bytes, int], int],
    middle: int,
    least: int,
    advance: Callable[[int], None],
) -> dict[str, list[tuple[int, int]]]:
    """Bytes at powers of two about ``middle``, by way."""
    powers = range(-_CURVE // 2, _CURVE // 2)
    points = sorted({max(least, int(middle * 2.0**p)) for p in powers})
    curve: dict[str, list[tuple[int, int]]] = {}
    for name, nbytes in ways.items():
        curve[name] = []
        for point in points:
            curve[name].append((point, of(nbytes, point)))
            advance(1)
    return curve


def _print(figures: dict[str, Any], shape: ModelShape) -> None:
    out = console()
    table = Table(title=f"{figures['model']}: layers, batch {figures['batch']}, "
                  f"{figures['length']:,} tokens")  # fmt: skip
    table.add_column("layers", justify="right")
    table.add_column("kind")
    table.add_column("KV heads (key, value)", justify="right")
    for name in FORMATS:
        table.add_column(name, justify="right")
    for row in figures["layers"]:
        heads = f"{row['kv_heads']} ({row['k_dim']}, {row['v_dim']})"
        sizes = (gib(row["bytes"][name]) for name in FORMATS)
        table.add_row(str(row["layers"]), row["kind"], heads, *sizes)
    if shape.shared:
        table.add_row(
            str(shape.shared), "shared: read an earlier layer's", "", *["0"] * len(FORMATS)
        )
    out.print(table)
    if shape.why_dequantized:
        out.print(f"dequantized at each step: {shape.why_dequantized}")
    budget, weights = figures["device_memory_bytes"], figures["weights_bytes"]
    table = Table(
        title=f"What fits in {gib(budget)}",
        caption=f"weights {gib(weights)} ({figures['parameters'] / 1e9:.2f}e9 parameters, "
        f"{figures['weights_bits']:g} bits), {gib(figures['spare_bytes'])} spared for activations "
        "and CUDA",
    )
    table.add_column("cache")
    for name in (
        "bytes", f"largest batch at {figures['length']:,} tokens",
        f"largest length at batch {figures['batch']}",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for name, nbytes in figures["cache_bytes"].items():
        fits = figures["fits"][name]
        table.add_row(
            name, gib(nbytes), f"{fits['largest_batch']:,}", f"{fits['largest_length']:,}"
        )
    out.print(table)
    if (limit := figures["max_position_embeddings"]) is not None:
        out.print(f"lengths end at the model's own limit, {limit:,} tokens")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Memory by batch and by length, weights included, with the device's memory as a line."""
    from .. import pictures

    figure, axes = pictures.panels(2)
    weights, budget = figures["weights_bytes"], figures["device_memory_bytes"]
    for axis, (by, curves) in zip(axes, figures["curves"].items(), strict=True):
        shown = {
            name: [(at, (weights + nbytes) / 2**30) for at, nbytes in curves[name]]
            for name in (_PEER, next(iter(FORMATS)))
        }
        other = "length" if by == "batch" else "batch"
        pictures.lines(
            axis, shown, x="batch" if by == "batch" else "tokens", y="GiB, with the weights",
            title=f"{other} {figures[other]:,}",
        )  # fmt: skip
        axis.axhline(budget / 2**30, color="black", linewidth=0.8)
        top = max(y for points in shown.values() for _, y in points)
        axis.set_ylim(0, min(1.15 * top, 2 * budget / 2**30))
    pictures.save(figure, path, f"{figures['model']}: memory, device of {gib(budget)}")
