"""Decode attention on the CPU against torch's in its three dtypes, in one run."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from benchmarks.caches import RandomCache
from benchmarks.common import Call, Report
from kvquant.backends import build_info

SHAPES = [  # batch, q_heads, kv_heads, tokens, head_dim
    (1, 32, 8, 4096, 128),
    (1, 32, 8, 32768, 128),
    (8, 32, 8, 4096, 128),
    (4, 28, 4, 8192, 128),
    (1, 32, 32, 4096, 128),
]


def wall_ms(call: Call, rounds: int) -> float:
    """Median milliseconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def read_bandwidth() -> float:
    """GB/s of a sum over 512 MiB by all threads: the ceiling for whatever reads a cache."""
    x = torch.ones(1 << 27)
    return x.nbytes / wall_ms(x.sum, 7) / 1e6


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    rounds: int = 7,
) -> None:
    """Print time, GB/s, % of the read bandwidth and the ratio to torch's fastest dtype."""
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    report = Report(
        "Decode attention on the CPU",
        isa=build_info()["cpu_isa"],
        threads=torch.get_num_threads(),
        read_gbs=round(bandwidth, 1),
    )
    for batch, q_heads, kv_heads, tokens, dim in SHAPES:
        cache = RandomCache.make(batch, kv_heads, tokens, dim, device="cpu")
        query = torch.randn(batch, 1, q_heads, dim)
        ms = wall_ms(lambda cache=cache, query=query: cache.attend(query), rounds)
        peers = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            key, value = torch.randn(2, batch, kv_heads, tokens, dim, dtype=dtype)
            q = query.transpose(1, 2).to(dtype)

            def sdpa(q: torch.Tensor = q, k: torch.Tensor = key, v: torch.Tensor = value) -> None:
                F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

            peers[str(dtype).removeprefix("torch.")] = wall_ms(sdpa, 3)
        report.add(
            shape=f"{batch},{q_heads},{kv_heads},{tokens},{dim}",
            kvquant_ms=ms,
            gbs=cache.read_bytes / ms / 1e6,
            percent=cache.read_bytes / ms / 1e6 / bandwidth * 100,
            **{f"torch_{name}_ms": value for name, value in peers.items()},
            ratio=min(peers.values()) / ms,
        )
    report.finish(json)
