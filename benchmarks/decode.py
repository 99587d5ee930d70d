"""Decode attention on the 8-bit cache against torch's fp16 kernels, in one run.

Times are medians of CUDA-graph replays over rotated buffers larger than the L2 cache. The floor is
the bytes of codes, params and means over the measured read ceiling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.caches import RandomCache
from benchmarks.common import Report, buffers_for, graph_ms, read_ceiling

SHAPES = [  # batch, q_heads, kv_heads, tokens, head_dim, query tokens
    (64, 32, 8, 8192, 128, 1),
    (32, 32, 32, 2048, 128, 1),
    (1, 32, 8, 131072, 128, 1),
    (1, 32, 8, 4096, 128, 1),
    (8, 32, 8, 4096, 128, 1),
    (32, 28, 4, 4096, 128, 1),
    (64, 32, 8, 4096, 64, 1),
    (256, 32, 8, 1024, 128, 1),
    (16, 64, 8, 16384, 128, 1),
    (8, 32, 8, 8192, 128, 4),
    (64, 32, 8, 8192, 128, 8),
]


def time_kvquant(b: int, hq: int, hk: int, s: int, d: int, tq: int) -> tuple[float, int]:
    """Milliseconds, and the bytes that had to be read."""
    count = buffers_for(b * hk * s * 2 * (d + 4))
    caches = [RandomCache.make(b, hk, s, d) for _ in range(count)]
    query = torch.randn(b, tq, hq, d, device="cuda", dtype=torch.float16)
    calls = [lambda c=cache: c.attend(query) for cache in caches]
    return graph_ms(calls), caches[0].read_bytes


def time_sdpa(backend: SDPBackend, b: int, hq: int, hk: int, s: int, d: int, tq: int) -> float:
    """Milliseconds of torch's attention on an fp16 cache; NaN where it refuses the shape."""
    count = buffers_for(b * hk * s * 4 * d, most=4)
    query = torch.randn(b, hq, tq, d, device="cuda", dtype=torch.float16)
    key_values = [
        torch.randn(2, b, hk, s, d, device="cuda", dtype=torch.float16) for _ in range(count)
    ]
    # A causal mask of several query tokens against a longer cache costs torch its fast kernels:
    # the peers run without a mask, which flatters them.
    calls = [
        lambda kv=kv: F.scaled_dot_product_attention(query, kv[0], kv[1], enable_gqa=hq != hk)
        for kv in key_values
    ]
    try:
        with sdpa_kernel(backend):
            return graph_ms(calls)
    except RuntimeError as error:
        print(f"{backend}: {str(error).splitlines()[0]}")
        return float("nan")


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
) -> None:
    """Print time, TB/s, % of the read ceiling and the ratio to the best fp16 kernel."""
    ceiling = read_ceiling()
    report = Report("Decode attention", read_ceiling_tbs=round(ceiling, 3))
    for shape in SHAPES:
        ms, nbytes = time_kvquant(*shape)
        torch.cuda.empty_cache()
        peers = {}
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ):
            peers[name] = time_sdpa(backend, *shape)
            torch.cuda.empty_cache()
        best = min(peers.values(), key=lambda x: float("inf") if x != x else x)
        report.add(
            shape=",".join(map(str, shape)),
            floor_ms=nbytes / ceiling / 1e9,
            kvquant_ms=ms,
            tbs=nbytes / ms / 1e9,
            percent=nbytes / ms / 1e9 / ceiling * 100,
            **{f"{name}_fp16_ms": value for name, value in peers.items()},
            ratio=best / ms,
        )
    report.finish(json)
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """A bar a shape: how many times faster than the best fp16 kernel."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5))
    names = [row["shape"] for row in report.rows]
    axis.barh(names, [row["ratio"] for row in report.rows], color="#4477aa")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("times faster than the best fp16 kernel of the same run")
    axis.set_title(f"Decode on the 8-bit cache, {report.facts['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
