"""GPU memory of generation, 16-bit caches beside the 8-bit one, and the largest batch that fits.

The model has random weights in exactly the shape asked for. A cache is filled to 8 tokens before
the end with rows that do not matter, a few at a time so that filling leaves no mark, and the model
generates the last 8. The peaks are torch's own, of these 8 steps, weights included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.batch import random_model
from benchmarks.common import Report
from kvquant.demo.model import cache_argument, use_attention_of
from kvquant.fit import FORMATS, Layout, ModelShape, cache_bytes, peer_bytes, shape_of

LAST = 8  # tokens that are generated
PIECE = 2**14  # tokens that a cache is filled by, of all sequences together
INT4_BITS = 4.25  # of a weight: 4, and a scale and a zero of 16 bits for 128 weights
CACHES = ("DynamicCache", "StaticCache", "KVQuantCache")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: what to measure, and what the original's documentation says of it.

    ``wide`` and ``narrow`` are its GB with a 16-bit and an 8-bit cache; NaN: out of memory there.
    """

    batch: int
    length: int
    wide: float | None = None
    narrow: float | None = None


NONE = float("nan")
TABLES: dict[str, tuple[str, list[Row]]] = {  # by name: the model, and its rows
    "batch": ("qwen-7b", [
        Row(1, 1024, 16.3, 15.5), Row(4, 1024, 24.1, 17.2), Row(16, 1024, 31.7, 22.3),
        Row(32, 1024, 48.7, 30.2), Row(64, 1024, NONE, 48.2), Row(100, 1024, NONE, 72.4),
        Row(200, 1024),
    ]),
    "length": ("qwen-7b", [
        Row(1, 512, 15.2, 15.0), Row(1, 1024, 16.3, 15.5), Row(1, 2048, 17.6, 15.8),
        Row(1, 4096, 19.5, 16.6), Row(1, 8192, 23.2, 17.6),
    ]),
    "weights": ("qwen-7b", [Row(1, 2048, 16.99, 15.5)]),
    "llama": ("llama-3.1-8b", [
        Row(batch, length) for length in (8192, 32768, 131072) for batch in (1, 4, 16)
    ]),
}  # fmt: skip
ORIGINAL_INT4 = {"DynamicCache": 8.21, "KVQuantCache": 7.5}


class Trial:
    """One model, caches that come and go, and torch's statistics."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self.model, self.shape = model, shape
        self.device: torch.device = model.device
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def cache(self, kind: str, length: int) -> Any:
        """An empty cache for ``length`` tokens."""
        import transformers

        from kvquant.integrations.transformers import KVQuantCache

        if kind == "DynamicCache":
            return transformers.DynamicCache(config=self.model.config)
        if kind == "StaticCache":
            return transformers.StaticCache(config=self.model.config, max_cache_len=length)
        return KVQuantCache(self.model, max_cache_len=length)

    def fill(self, cache: Any, kind: str, batch: int, tokens: int) -> None:
        """Let every layer hold ``tokens`` rows."""
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for index in range(config.num_hidden_layers):
            # DynamicCache keeps the very rows that it is given first.
            step = tokens if kind == "DynamicCache" else max(1, PIECE // batch)
            for begin in range(0, tokens, step):
                size = (batch, config.num_key_value_heads, min(step, tokens - begin), dim)
                key, value = (self.rows(size, kind == "DynamicCache") for _ in range(2))
                cache.update(key, value, index)
                if kind == "KVQuantCache":
                    cache.layers[index].flush()

    def rows(self, size: tuple[int, ...], is_kept: bool) -> torch.Tensor:
        """Random rows, the same ones again where they are only copied from."""
        if is_kept:
            return torch.zeros(size, dtype=self.model.dtype, device=self.device)
        if size not in self._rows:
            self._rows.clear()
            self._rows[size] = torch.randn(size, dtype=self.model.dtype, device=self.device)
        return self._rows[size]

    @torch.no_grad()
    def measure(self, kind: str, batch: int, length: int) -> dict[str, float]:
        """Peaks of the last steps in GiB, NaN where memory runs out.

        Raises:
            RuntimeError: The cache does not hold what it should.
        """
        found = {"peak_gib": NONE, "reserved_gib": NONE, "cache_gib": NONE}
        cache = None
        with suppress(torch.OutOfMemoryError):
            cache = self.cache(kind, length)
            self.fill(cache, kind, batch, length - LAST)
            self._rows.clear()
            self.reset()
            use_attention_of(self.model, cache)
            token = torch.ones(batch, 1, dtype=torch.long, device=self.device)
            for _ in range(LAST):
                out = self.model(input_ids=token, use_cache=True, **cache_argument(cache))
                token = out.logits[:, -1:].argmax(-1)
                del out
            if int(cache.get_seq_length()) != length:
                raise RuntimeError(f"{kind} holds {cache.get_seq_length()} tokens, not {length}")
            found = {**self.peaks(), "cache_gib": nbytes_of(cache) / GIB}
        del cache
        self._rows.clear()
        gc.collect()
        self.reset()
        return found

    def reset(self) -> None:
        """Forget what was before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, float]:
        """torch's statistics; a CPU has none."""
        if self.device.type != "cuda":
            return {"peak_gib": NONE, "reserved_gib": NONE}
        torch.cuda.synchronize()
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }

    def predicted(self, kind: str, batch: int, length: int) -> int:
        """Bytes of a cache as `kvquant fit` says them."""
        if kind == "KVQuantCache":
            layout = Layout(reserved=True, format=next(iter(FORMATS.values())))
            return sum(cache_bytes(self.shape, batch, length, layout).values())
        return peer_bytes(self.shape, batch, length, kind)  # type: ignore[arg-type]

    def largest_batch(self, kind: str, length: int, memory: float) -> int:
        """The largest batch that runs: from what the bytes say, by steps of 2%."""
        each = self.predicted(kind, 1, length)
        room = memory * GIB - self.shape.weight_bytes() - GIB // 2
        batch = max(1, int(room // each))
        step = max(1, batch // 50)

        def runs(batch: int) -> bool:
            found = self.measure(kind, batch, length)["cache_gib"]
            return found == found  # NaN: out of memory

        if runs(batch):
            while runs(batch + step):
                batch += step
            return batch
        while batch > 0 and not runs(batch):
            batch -= step
        return max(0, batch)


def nbytes_of(cache: Any) -> int:
    """Bytes that a cache holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def rows_of(trial: Trial, table: str, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """A table's measurements."""
    for row in rows:
        for kind in CACHES:
            found = trial.measure(kind, row.batch, row.length)
            original = {"KVQuantCache": row.narrow, "DynamicCache": row.wide}.get(kind)
            yield {
                "table": table, "batch": row.batch, "length": row.length, "cache": kind,
                "weights": "16 bits", **found, "original": original,
            }  # fmt: skip
            if table == "weights" and kind in ORIGINAL_INT4:
                saved = trial.shape.weight_bytes() - trial.shape.weight_bytes(INT4_BITS)
                peaks = {name: found[name] - saved / GIB for name in ("peak_gib", "reserved_gib")}
                yield {
                    "table": table, "batch": row.batch, "length": row.length, "cache": kind,
                    "weights": "4 bits, by bytes", **found, **peaks,
                    "original": ORIGINAL_INT4[kind],
                }  # fmt: skip


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here, row by row.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    tables: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(TABLES),
    memory: Annotated[float, typer.Option(help="GiB that this process may take.")] = 80,
    device: str = "cuda",
    model: Annotated[
        str | None, typer.Option(help="Instead of a table's: see kvquant fit.")
    ] = None,
    scale: Annotated[int, typer.Option(help="Divide lengths by this, to try it out.")] = 1,
    largest: Annotated[bool, typer.Option(help="Also look for the largest batch.")] = True,
) -> None:
    """Print peak memory of the original's tables, and of a Llama's, for three caches.

    Example: python -m benchmarks memory --tables batch,length --json memory.json --plot memory.png
    """
    asked = tables.split(",")
    if unknown := set(asked) - set(TABLES):
        raise typer.BadParameter(f"--tables: {', '.join(unknown)} is none of {', '.join(TABLES)}")
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * GIB / total))
    report = Report("Memory of generation", memory_gib=memory)
    trials: dict[str, Trial] = {}
    for table in asked:
        name = model or TABLES[table][0]
        if name not in trials:
            trials.clear()
            gc.collect()
            loaded = random_model(name, device)
            trials[name] = Trial(loaded, shape_of(loaded.config))
            trials[name].reset()
            del loaded
        trial = trials[name]
        rows = [Row(r.batch, r.length // scale, r.wide, r.narrow) for r in TABLES[table][1]]
        for row in rows_of(trial, table, rows):
            report.add(model=name, **row, largest_batch=None)
            report.save(json)
        if largest and table in ("batch", "llama"):
            for length in sorted({row.length for row in rows}):
                for kind in CACHES:
                    best = trial.largest_batch(kind, length, memory)
                    report.add(
                        model=name, table=table, batch=None, length=length, cache=kind,
                        weights="16 bits", peak_gib=None, reserved_gib=None, cache_gib=None,
                        original=None, largest_batch=best,
                    )  # fmt: skip
                    report.save(json)
    report.finish(json)
    if plot:
        draw(report.rows, report.facts, plot)


def draw(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Memory by batch and by length, measured and as the original states it."""
    from kvquant import pictures

    present = [name for name in ("batch", "length") if any(row["table"] == name for row in rows)]
    if not present:
        raise typer.BadParameter("--plot: needs the table 'batch' or 'length'")
    figure, axes = pictures.panels(len(present))
    pick: Callable[[str, str, str, str], list[tuple[float, float]]] = lambda table, kind, x, y: [  # noqa: E731
        (row[x], row[y])
        for row in rows
        if row["table"] == table and row["cache"] == kind and row[y] is not None
        and row[x] is not None and row[y] == row[y]
    ]  # fmt: skip
    for axis, table in zip(axes, present, strict=True):
        x = table  # the column that the table goes by
        series = {
            "DynamicCache, 16 bits": pick(table, "DynamicCache", x, "peak_gib"),
            "kvquant, 8 bits": pick(table, "KVQuantCache", x, "peak_gib"),
            "original, 16 bits (A100)": pick(table, "DynamicCache", x, "original"),
            "original, 8 bits (A100)": pick(table, "KVQuantCache", x, "original"),
        }
        title = "1,024 tokens" if table == "batch" else "batch 1"
        labels = {"batch": "batch", "length": "tokens"}
        shown = {name: points for name, points in series.items() if points}
        pictures.lines(axis, shown, x=labels[x], y="GiB, with the weights", title=title)
    pictures.save(figure, path, f"Peak memory, 7.7e9 parameters in bf16, {facts['device']}")
