"""transformers' generate on a GPU: tokens/s, the host's share and memory, cache by cache.

The model has the shape of an 8B Llama with 16 layers and random weights; a cache holds random rows
when generate begins. A cache that fails leaves its error in the table, and the others run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Report
from benchmarks.generate import Clock, greedy
from benchmarks.step import SPARE, filled, flash_only, make_model, measure

SHAPES = ((1, 4096), (1, 32768), (32, 8192))  # batch, tokens of context
TOKENS, WARM, PROFILED = 24, 4, 4
Build = Callable[[Any, int, int], Any]


def ours(model: Any, batch: int, context: int, *, graph: bool = False) -> Any:
    """The 8-bit cache, its steps replayed from a graph where asked for."""
    from kvquant.integrations.transformers import KVQuantCache, graph_step

    model.set_attn_implementation("kvquant")
    cache = KVQuantCache(model, max_cache_len=context + SPARE)
    if graph:
        graph_step(model, cache)
    return cache


def graphed(model: Any, batch: int, context: int) -> Any:
    """The 8-bit cache with `graph_step`."""
    return ours(model, batch, context, graph=True)


def dynamic(model: Any, batch: int, context: int) -> Any:
    """transformers' default."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    return DynamicCache(config=model.config)


def static(model: Any, batch: int, context: int) -> Any:
    """The cache for which generate compiles the step."""
    from transformers import StaticCache

    model.set_attn_implementation("sdpa")
    return StaticCache(config=model.config, max_cache_len=context + SPARE)


def quantized(model: Any, backend: str, **options: int) -> Any:
    """transformers' quantized cache, which dequantizes a layer at each step."""
    from transformers import QuantizedCache

    model.set_attn_implementation("sdpa")
    return QuantizedCache(backend, model.config, **options)


def hqq(model: Any, batch: int, context: int) -> Any:
    """hqq in 8 bits."""
    return quantized(model, "hqq", nbits=8, axis_key=1, axis_value=1)


def quanto(model: Any, batch: int, context: int) -> Any:
    """quanto in 4 bits, the most it has."""
    return quantized(model, "quanto", nbits=4)


WAYS: dict[str, Build] = {
    "KVQuantCache, graph_step": graphed,
    "KVQuantCache": ours,
    "DynamicCache, flash only": dynamic,
    "DynamicCache": dynamic,
    "QuantizedCache, hqq 8 bits": hqq,
    "QuantizedCache, quanto 4 bits": quanto,
    "StaticCache, compiled": static,
}  # that which compiles comes last


def generated(model: Any, build: Build, batch: int, context: int) -> dict[str, float]:
    """One way's tokens: their time, the device's share of it, and the peak of memory."""
    cache = build(model, batch, context)
    piece = context if build in (hqq, quanto) else max(1, 2**19 // batch)  # the first is the prompt
    filled(model, cache, batch, context, piece)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prompt = torch.randint(0, 32000, (batch, context + 1), device="cuda")
    first, clock = Clock(), Clock()

    def run(tokens: int, on: Clock) -> None:
        nonlocal prompt
        ids = greedy(model, prompt, cache, tokens, on)
        prompt = ids[:, : cache.get_seq_length() + 1]

    begin = time.perf_counter()
    run(WARM, first)
    seconds = time.perf_counter() - begin
    run(TOKENS, clock)
    peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(PROFILED, Clock())
    device_us = sum(event.self_device_time_total for event in profile.key_averages())
    ms = (clock.times[-1] - clock.times[0]) * 1e3 / (TOKENS - 1)
    return {
        "ms": ms,
        "device_ms": device_us / 1e3 / PROFILED,
        "first_s": seconds,
        "generate_peak": peak,
    }


def run_all(json: Path | None, plot: Path | None, seconds: float, layers: int) -> None:
    """Print all rows, write them as they come."""
    import transformers

    torch.manual_seed(0)
    begin, model = time.perf_counter(), make_model(layers)
    weights = torch.cuda.memory_allocated()
    report = Report(
        f"generate of a Llama of 8B shape, {layers} layers, greedy",
        transformers=transformers.__version__, weights_gb=round(weights / 1e9, 2),
    )  # fmt: skip
    nan = float("nan")
    for name, build in WAYS.items():
        for batch, context in SHAPES:
            if time.perf_counter() - begin > seconds:
                figures: dict[str, Any] = {"error": "not begun: out of time"}
            elif "flash only" in name:
                with flash_only():
                    figures = measure(model, bound(build), batch, context)
            else:
                figures = measure(model, bound(build), batch, context)
            ms, device_ms, first, peak = (
                figures.get(key, nan) for key in ("ms", "device_ms", "first_s", "generate_peak")
            )
            report.add(
                cache=name, batch=batch, context=context, tokens_per_s=batch / ms * 1e3, ms=ms,
                device_ms=device_ms, host_ms=max(0.0, ms - device_ms), first_s=first,
                peak_gb=(peak - weights) / 1e9, note=figures.get("error", ""),
            )  # fmt: skip
            report.save(json)
    report.finish(json)
    if plot:
        draw(report, plot)


def bound(build: Build) -> Callable[[Any, int, int], dict[str, float]]:
    """A way as `benchmarks.step` measures it."""
    return lambda model, batch, context: generated(model, build, batch, context)


def draw(report: Report, path: Path) -> None:
    """Tokens/s of each cache, a panel for each shape."""
    from kvquant import pictures

    figure, axes = pictures.panels(len(SHAPES))
    for axis, (batch, context) in zip(axes, SHAPES, strict=True):
        rows = [row for row in report.rows if (row["batch"], row["context"]) == (batch, context)]
        rows = [row for row in rows if row["ms"] == row["ms"]][::-1]
        colours = [pictures.BLUE if "KVQuant" in row["cache"] else pictures.GREY for row in rows]
        names = [row["cache"] for row in rows]
        bars = axis.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.margins(x=0.2)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(f"batch {batch}, {context:,} tokens: tokens/s", fontsize=10)
    pictures.save(figure, path, f"{report.title}; {report.facts['device']}")
