"""A long prompt through transformers, in chunks, with the 8-bit cache and with DynamicCache.

The model has the shape of an 8B Llama, few layers and random weights. Each cache reads the whole
prompt, in turns; a time is that of all chunks, the device waited for before and after. The first
turn has everything that happens once (compilation of kernels for new sizes) and is printed by
itself. What the layers do besides attention is the same work for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import Report
from benchmarks.step import DEVICE, make_model
from kvquant.demo.model import cache_argument


def read(model: Any, cache: Any, ids: Tensor, chunk: int) -> list[float]:
    """Seconds of each chunk, the device waited for after it."""
    times = []
    torch.cuda.synchronize()
    for part in ids.split(chunk, dim=1):
        start = time.perf_counter()
        model(input_ids=part, use_cache=True, logits_to_keep=1, **cache_argument(cache))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    tokens: int = 65536,
    chunk: int = 2048,
    layers: int = 4,
    turns: int = 3,
) -> None:
    """Print seconds of a prompt, of its last chunk, and peak memory above the weights, in GB.

    Example: python -m benchmarks prompt --json prompt.json
    """
    from transformers import DynamicCache

    from kvquant.integrations.transformers import KVQuantCache

    torch.set_grad_enabled(False)
    model = make_model(layers)
    ids = torch.randint(0, 32000, (1, tokens), device=DEVICE)
    ways: dict[str, tuple[str, Callable[[], Any]]] = {
        "KVQuantCache": ("kvquant", lambda: KVQuantCache(model, max_cache_len=tokens)),
        "DynamicCache": ("sdpa", lambda: DynamicCache(config=model.config)),
    }
    report = Report("A prompt in chunks", tokens=tokens, chunk=chunk, layers=layers)
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for _ in range(1 + turns):
        for name, (attention, make) in ways.items():
            model.set_attn_implementation(attention)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found[name].append(read(model, make(), ids, chunk))
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    for name, runs in found.items():
        report.add(
            cache=name,
            seconds=statistics.median(sum(run) for run in runs[1:]),
            last_chunk_ms=statistics.median(run[-1] for run in runs[1:]) * 1e3,
            first_turn_seconds=sum(runs[0]),
            peak_gb=peaks[name],
        )
    ours, theirs = (row["seconds"] for row in report.rows)
    report.facts["ratio"] = theirs / ours
    report.finish(json)
