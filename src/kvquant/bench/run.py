"""The command ``kvquant bench``: a minute on the GPU or the CPU that is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from .. import __version__, append_
from ..terminal import console, device_name, progress, write_json
from .caches import RandomCache
from .timing import Call, buffers_for, cpu_bandwidth, graph_ms, read_ceiling, wall_ms

__all__ = ["Options", "Shape", "draw", "run"]

_STORED = 1024  # tokens before those that are stored
_LAST_CACHE = 100_000_000  # bytes, more than a CPU's holds


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences, heads and lengths of a call."""

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}, {self.q_heads}, {self.kv_heads}, {self.tokens}, {self.head_dim}"


_LLAMA = Shape(1, 32, 8, 1, 128)
_DECODE = {  # by device: (batch, tokens)
    "cuda": [(1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 8192), (64, 8192)],
    "cpu": [(1, 1024), (1, 4096), (1, 16384), (4, 4096)],
}
_PROMPT = {"cuda": [(1, 4096), (4, 2048)], "cpu": [(1, 512)]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        device: "cpu" or "cuda"; None: a GPU if there is one.
        decode: (batch, tokens) of decode steps, by default some for the device.
        prompt: (batch, tokens) of prompts, likewise.
        rounds: Calls of each in a turn on the CPU.
        json: Where to write the figures.
        picture: Where to draw them.
    """

    device: str | None = None
    decode: list[tuple[int, int]] | None = None
    prompt: list[tuple[int, int]] | None = None
    rounds: int = 5
    json: Path | None = None
    picture: Path | None = None


def run(options: Options) -> dict[str, Any]:
    """Measure, print a table and return the figures.

    Raises:
        ValueError: A device that is not here.
    """
    found = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if found not in ("cpu", "cuda") or (found == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected 'cpu', or 'cuda' where a GPU is, got '{found}'")
    device = torch.device(found)
    shapes = [
        (what, replace(_LLAMA, batch=batch, tokens=tokens))
        for what, sizes in (
            ("decode", options.decode or _DECODE[found]),
            ("prompt", options.prompt or _PROMPT[found]),
        )
        for batch, tokens in sizes
    ]
    with torch.no_grad(), progress("measuring", 1 + len(shapes) + 1) as advance:
        gbs = read_ceiling() * 1e3 if found == "cuda" else cpu_bandwidth()
        advance(1)
        rows = []
        for what, shape in shapes:
            rows.append(_MEASURES[what](shape, device, gbs, options.rounds))
            advance(1)
        rows.append(_store(replace(_LLAMA, tokens=2048), device, gbs, options.rounds))
        advance(1)
    figures = {
        "device": device_name(device),
        "versions": {"kvquant": __version__, "torch": torch.__version__},
        "read_gbs": gbs,
        "rows": rows,
    }
    _print(figures)
    if options.picture is not None:
        draw(figures, options.picture)
        console().print(f"picture: {options.picture}")
    write_json(options.json, figures)
    return figures


def _time(device: torch.device, rounds: int, *rotations: list[Call]) -> Iterator[float]:
    """Milliseconds of a call of each rotation."""
    if device.type == "cuda":
        for calls in rotations:
            yield graph_ms(calls)
            torch.cuda.empty_cache()
    else:
        yield from wall_ms(*rotations, rounds=rounds)


def _waited(call: Call, device: torch.device) -> Call:
    """``call``, and what the device does for it."""
    if device.type != "cuda":
        return call

    def both() -> None:
        call()
        torch.cuda.synchronize(device)

    return both


def _peer_dtype(device: torch.device) -> torch.dtype:
    """What torch's attention is fast in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def _buffers(nbytes: int, device: torch.device) -> range:
    """Rotated, so that no cache of the processor serves them."""
    if device.type == "cuda":
        return range(buffers_for(nbytes, most=4))
    return range(buffers_for(nbytes, at_least=_LAST_CACHE))


def _decode(shape: Shape, device: torch.device, gbs: float, rounds: int) -> dict[str, Any]:
    """Attention of one query token on stored rows."""
    b, hq, hk, s, d = shape.batch, shape.q_heads, shape.kv_heads, shape.tokens, shape.head_dim
    dtype = _peer_dtype(device)
    cache = RandomCache.make(b, hk, s, d, device=device.type)
    caches = [cache] + [
        RandomCache.make(b, hk, s, d, device=device.type)
        for _ in _buffers(cache.read_bytes, device)[1:]
    ]
    query = torch.randn(b, 1, hq, d, device=device, dtype=dtype)
    peer_bytes = 2 * b * hk * s * d * dtype.itemsize
    peers = [
        torch.randn(2, b, hk, s, d, device=device, dtype=dtype)
        for _ in _buffers(peer_bytes, device)
    ]
    ours: list[Call] = [partial(c.attend, query) for c in caches]
    theirs: list[Call] = [partial(_sdpa, query.transpose(1, 2), *kv, causal=False) for kv in peers]
    ms, peer_ms = _time(device, rounds, ours, theirs)
    return _row("decode", shape, cache.read_bytes, ms, peer_bytes, peer_ms, gbs)


def _prompt(shape: Shape, device: torch.device, gbs: float, rounds: int) -> dict[str, Any]:
    """A prompt's causal attention to its stored rows."""
    b, hq, hk, s, d = shape.batch, shape.q_heads, shape.kv_heads, shape.tokens, shape.head_dim
    dtype = _peer_dtype(device)
    cache = RandomCache.make(b, hk, s, d, device=device.type)
    query = torch.randn(b, s, hq, d, device=device, dtype=dtype)
    key, value = torch.randn(2, b, hk, s, d, device=device, dtype=dtype)
    # Not in a graph, which a long chunk's attention does not run in as it does outside of one.
    ms, peer_ms = wall_ms(
        [_waited(partial(cache.attend, query), device)],
        [_waited(partial(_sdpa, query.transpose(1, 2), key, value, causal=True), device)],
        rounds=rounds,
    )
    return _row("prompt", shape, cache.read_bytes, ms, 2 * key.nbytes, peer_ms, gbs)


def _store(shape: Shape, device: torch.device, gbs: float, rounds: int) -> dict[str, Any]:
    """A prompt's keys and values quantized into the cache, beside a copy of them."""
    b, hk, s, d = shape.batch, shape.kv_heads, shape.tokens, shape.head_dim
    dtype = _peer_dtype(device)
    nbytes = 2 * b * hk * s * d * dtype.itemsize
    count = len(_buffers(nbytes, device))
    caches = [
        RandomCache.make(b, hk, _STORED, d, device=device.type, spare=s) for _ in range(count)
    ]
    inputs = [torch.randn(b, s, hk, d, device=device, dtype=dtype) for _ in range(count)]
    copies = [torch.empty(2, b, s, hk, d, device=device, dtype=dtype) for _ in range(count)]

    def store(cache: RandomCache, rows: Tensor) -> None:
        append_(rows, rows, cache.view, block_table=cache.block_table, seq_lens=cache.seq_lens)

    def copy(targets: Tensor, rows: Tensor) -> None:
        for target in targets:
            target.copy_(rows)

    ours: list[Call] = [partial(store, *pair) for pair in zip(caches, inputs, strict=True)]
    theirs: list[Call] = [partial(copy, *pair) for pair in zip(copies, inputs, strict=True)]
    ms, peer_ms = _time(device, rounds, ours, theirs)
    moved = nbytes + b * hk * s * caches[0].view.format.row_bytes(d, d)
    return _row("store", shape, moved, ms, 2 * nbytes, peer_ms, gbs)


_MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"decode": _decode, "prompt": _prompt}


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Torch's attention on (batch, heads, tokens, head_dim), grouped heads as they are."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def _row(
    what: str, shape: Shape, nbytes: int, ms: float, peer_bytes: int, peer_ms: float, gbs: float
) -> dict[str, Any]:
    return {
        "what": what,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "shape": str(shape),
        "bytes": nbytes,
        "floor_ms": nbytes / gbs / 1e6,
        "ms": ms,
        "percent": nbytes / ms / 1e6 / gbs * 100,
        "torch_bytes": peer_bytes,
        "torch_ms": peer_ms,
        "speedup": peer_ms / ms,
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table(
        title=f"kvquant beside torch ({figures['device']})",
        caption=f"reads at {figures['read_gbs']:.0f} GB/s; shapes: batch, query heads, KV heads, "
        "tokens, head_dim; store: beside a copy of the same rows",
    )
    table.add_column("")
    for name in ("shape", "MB", "floor, ms", "ms", "of the bandwidth", "torch, ms", "speedup"):
        table.add_column(name, justify="right")
    for row in figures["rows"]:
        # A prompt computes: what its bytes would take says nothing.
        percent = "" if row["what"] == "prompt" else f"{row['percent']:.0f}%"
        table.add_row(
            row["what"], row["shape"], f"{row['bytes'] / 1e6:.1f}", f"{row['floor_ms']:.4f}",
            f"{row['ms']:.4f}", percent, f"{row['torch_ms']:.4f}", f"{row['speedup']:.2f}",
        )  # fmt: skip
    console().print(table)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Decode time by context at batch 1, with the memory's floor drawn in, and the speedups."""
    from .. import pictures

    figure, (left, right) = pictures.panels(2)
    rows = [row for row in figures["rows"] if row["what"] == "decode" and row["batch"] == 1]
    named = {"torch, 16 or 32 bits": "torch_ms", "kvquant, 8 bits": "ms", "floor": "floor_ms"}
    series = {name: [(row["tokens"], row[key]) for row in rows] for name, key in named.items()}
    pictures.lines(
        left, series, x="tokens", y="ms", title="a decode step's attention, batch 1",
        floor="floor",
    )  # fmt: skip
    labels = [f"{row['what']} {row['batch']}, {row['tokens']}" for row in figures["rows"]]
    drawn = right.barh(labels, [row["speedup"] for row in figures["rows"]], color=pictures.BLUE)
    right.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    right.axvline(1, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set_title("times faster than torch", fontsize=10)
    pictures.save(figure, path, figures["device"])
