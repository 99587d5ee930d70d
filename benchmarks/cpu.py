"""The CPU kernels against torch's in one run: decode, a prompt's attention, rows in and out.

The calls that are compared alternate, so that all meet the same machine and none finds its data in
a cache that it alone has used.
"""

from __future__ import annotations

import statistics
import time
from json import dumps
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import kvquant
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
PROMPTS = [(1, 9, 3, 2048, 64), (1, 32, 8, 2048, 128)]  # the first: SmolLM2's
ROWS = (8, 8, 2048, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wall_ms(*calls: Call, rounds: int) -> list[float]:
    """Median milliseconds of each call, in turn, after one of each to warm up."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, mine in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in times]


def read_bandwidth() -> float:
    """GB/s of a sum over 512 MiB by all threads: the ceiling for whatever reads a cache."""
    x = torch.ones(1 << 27)
    return x.nbytes / min(wall_ms(x.sum, rounds=1)[0] for _ in range(9)) / 1e6


def decode(report: Report, rounds: int) -> None:
    """One query token against torch's attention in its three dtypes."""
    bandwidth = report.facts["read_gbs"]
    for batch, q_heads, kv_heads, tokens, dim in SHAPES:
        cache = RandomCache.make(batch, kv_heads, tokens, dim, device="cpu")
        query = torch.randn(batch, 1, q_heads, dim)
        half = query.bfloat16()
        calls: list[Call] = [
            lambda cache=cache, q=query: cache.attend(q),
            lambda cache=cache, q=half: cache.attend(q),
        ]
        for dtype in DTYPES.values():
            key, value = torch.randn(2, batch, kv_heads, tokens, dim, dtype=dtype)
            calls.append(sdpa(query.transpose(1, 2).to(dtype), key, value, causal=False))
        ms, half_ms, *peers = wall_ms(*calls, rounds=rounds)
        floor = cache.read_bytes / bandwidth / 1e6
        report.add(
            shape=f"{batch},{q_heads},{kv_heads},{tokens},{dim}",
            floor_ms=floor,
            kvquant_ms=ms,
            gbs=cache.read_bytes / ms / 1e6,
            percent=floor / ms * 100,
            kvquant_bf16_ms=half_ms,
            **{f"torch_{name}_ms": peer for name, peer in zip(DTYPES, peers, strict=True)},
            ratio=min(peers) / ms,
        )


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Call:
    """torch's attention on (batch, heads, tokens, head_dim)."""
    grouped = query.shape[1] != key.shape[1]
    return lambda: F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=grouped
    )


def prompt(report: Report, rounds: int) -> None:
    """A prompt's causal attention to its stored rows, against torch's to fp32 ones."""
    for batch, q_heads, kv_heads, tokens, dim in PROMPTS:
        cache = RandomCache.make(batch, kv_heads, tokens, dim, device="cpu")
        query = torch.randn(batch, tokens, q_heads, dim)
        key, value = torch.randn(2, batch, kv_heads, tokens, dim)
        ms, peer = wall_ms(
            lambda cache=cache, q=query: cache.attend(q),
            sdpa(query.transpose(1, 2), key, value, causal=True),
            rounds=rounds,
        )
        report.add(
            shape=f"{batch},{q_heads},{kv_heads},{tokens},{dim}",
            kvquant_ms=ms,
            gflops=2 * batch * q_heads * tokens * (tokens + 1) * dim / ms / 1e6,
            torch_float32_ms=peer,
            ratio=peer / ms,
        )


def rows(report: Report, rounds: int) -> None:
    """Quantise, dequantise and append: bytes read and written, against a copy of the same input."""
    batch, heads, tokens, dim = ROWS
    for name, dtype in DTYPES.items():
        x = torch.randn(ROWS, dtype=dtype)
        copied = torch.empty_like(x)
        q, scale, zero = kvquant.quantize_cache_v(x)
        cache = kvquant.QuantizedKVCache(1, batch, heads, dim, max_seq_len=tokens, device="cpu")
        key = x.transpose(1, 2).contiguous()

        def append(cache: kvquant.QuantizedKVCache = cache, key: Tensor = key) -> None:
            cache.reset()
            cache.append(0, key, key)

        calls: dict[str, tuple[int, Call]] = {
            "quantize": (1, lambda x=x: kvquant.quantize_cache_v(x)),
            "dequantize": (
                1,
                lambda q=q, s=scale, z=zero, d=dtype: kvquant.dequantize_cache_torch(q, s, z, d),
            ),
            "append": (2, append),
        }
        ms, *ours = wall_ms(
            lambda x=x, to=copied: to.copy_(x), *(call for _, call in calls.values()), rounds=rounds
        )
        copy_gbs = 2 * x.nbytes / ms / 1e6
        for (op, (times, _)), mine in zip(calls.items(), ours, strict=True):
            pairs = 4 if op == "append" else 8
            nbytes = times * (x.nbytes + q.nbytes + x.numel() // dim * pairs)
            gbs = nbytes / mine / 1e6
            report.add(
                op=op,
                dtype=name,
                ms=mine,
                gbs=gbs,
                copy_gbs=copy_gbs,
                percent=gbs / copy_gbs * 100,
            )


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    rounds: int = 9,
) -> None:
    """Print decode, prompt and row figures, each beside torch's."""
    torch.set_grad_enabled(False)
    facts = {"isa": build_info()["cpu_isa"], "threads": torch.get_num_threads()}
    bandwidth = round(read_bandwidth(), 1)
    reports = {
        decode: Report("Decode attention on the CPU", **facts, read_gbs=bandwidth),
        prompt: Report("A prompt's attention on the CPU", **facts),
        rows: Report("Rows in and out on the CPU", **facts),
    }
    for measure, report in reports.items():
        measure(report, rounds)
        report.finish(None)
    if json:
        parts = {f.__name__: {**r.facts, "rows": r.rows} for f, r in reports.items()}
        json.write_text(dumps(parts, indent=1))
