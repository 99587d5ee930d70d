"""An engine's slabs beside our own memory, through one plan: eager, compiled, in a captured graph.

``python -m benchmarks slab`` prints the time of decode steps whose lengths grow on both, and their
ratio, each mode's calls in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Report

STEPS = 8  # of a chunk
SIZES = {"cuda": (256, 8192), "cpu": (8, 2048)}  # sequences, tokens


def slab_of(view: kvquant.CacheView) -> kvquant.CacheView:
    """The same rows where each (block, head) has one slab for all its parts."""
    dims, fmt, size = (view.k.head_dim, view.v.head_dim), view.format, view.block_size
    buffer = torch.zeros(
        view.num_blocks,
        view.num_kv_heads,
        fmt.slab_bytes(*dims, size),
        dtype=torch.uint8,
        device=view.device,
    )
    slab = kvquant.CacheView.slab(buffer, dims[0], v_head_dim=dims[1], block_size=size, format=fmt)
    for name, tensor in view.tensors.items():
        slab.tensors[name].copy_(tensor)
    return slab


def modes(
    step: Callable[[], object], lens: Tensor, tokens: int, on_gpu: bool
) -> dict[str, Callable[[], None]]:
    """A chunk of decode steps from ``tokens`` on, by how they are run."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)

    def times(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            lens.fill_(tokens)
            for _ in range(STEPS):
                call()

        return run

    found = {"eager": times(step), "compiled": times(compiled)}
    if on_gpu:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found["graph"] = times(graph.replay)
    return found


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    rounds: int = 9,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print decode steps on our own memory and on an engine's slabs, and their ratio.

    Example: python -m benchmarks slab --json slab.json
    """
    torch.set_grad_enabled(False)
    batch, tokens = SIZES[device]
    heads, kv_heads, dim, dtype = 32, 8, 128, torch.bfloat16
    ours = RandomCache.make(
        batch, kv_heads, tokens, dim, device=device, spare=4 * STEPS, block_size=16
    )
    query = torch.randn(batch, 1, heads, dim, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, 1, kv_heads, dim, device=device, dtype=dtype)
    runs = []
    for view in (ours.view, slab_of(ours.view)):
        lens = ours.seq_lens.clone()
        seqs = kvquant.Sequences(ours.block_table, lens, advance=True)
        plan = kvquant.plan(query, view, seqs, key, value)

        def step(
            plan: kvquant.Plan = plan,
            view: kvquant.CacheView = view,
            seqs: kvquant.Sequences = seqs,
        ) -> object:
            return plan.run(query, view, seqs, key, value)

        runs.append(modes(step, lens, tokens, device == "cuda"))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    report = Report("Decode steps on slabs beside our own memory, ms", host=device)
    for mode in runs[0]:
        pairs = []
        for i in range(rounds + 2):
            taken = {}
            for j in (0, 1) if i % 2 else (1, 0):
                wait()
                start = time.perf_counter()
                runs[j][mode]()
                wait()
                taken[j] = (time.perf_counter() - start) / STEPS * 1e3
            pairs.append((taken[0], taken[1]))
        ratios = [slab / own for own, slab in pairs[2:]]  # the first compile and warm up
        report.add(
            mode=mode,
            own_ms=min(own for own, _ in pairs),
            slab_ms=min(slab for _, slab in pairs),
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
        )
    report.finish(json)
