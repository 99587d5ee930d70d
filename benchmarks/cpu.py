"""The CPU kernels against torch's in one run: decode, a prompt's attention, rows in and out.

Calls rotate through buffers larger than the last cache, as the layers of a model do. Those that are
compared take turns, a few rounds each, so that all meet the same machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Call, Report, buffers_for
from kvquant.backends import build_info
from kvquant.bench.timing import cpu_bandwidth, wall_ms

SHAPES = [  # batch, q_heads, kv_heads, tokens, head_dim
    (1, 32, 8, 4096, 128),
    (1, 32, 8, 32768, 128),
    (8, 32, 8, 4096, 128),
    (4, 28, 4, 8192, 128),
    (1, 32, 32, 4096, 128),
]
PROMPTS = [(1, 9, 3, 2048, 64), (1, 32, 8, 2048, 128)]  # the first: SmolLM2's
ROWS = (2, 8, 2048, 128)
STEPS = 512  # appends of one token that are timed together
LAST_CACHE = 100_000_000  # bytes, more than it holds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def decode(report: Report, rounds: int) -> None:
    """One query token against torch's attention in its three dtypes."""
    bandwidth = report.facts["read_gbs"]
    for batch, q_heads, kv_heads, tokens, dim in SHAPES:
        cache = RandomCache.make(batch, kv_heads, tokens, dim, device="cpu")
        caches = [cache]
        for _ in range(buffers_for(cache.read_bytes, at_least=LAST_CACHE) - 1):
            caches.append(RandomCache.make(batch, kv_heads, tokens, dim, device="cpu"))
        query = torch.randn(batch, 1, q_heads, dim)
        half = query.bfloat16()
        rotations: list[list[Call]] = [
            [partial(c.attend, query) for c in caches],
            [partial(c.attend, half) for c in caches],
        ]
        for dtype in DTYPES.values():
            nbytes = 2 * batch * kv_heads * tokens * dim * dtype.itemsize
            rotations.append(
                [
                    sdpa(
                        query.transpose(1, 2).to(dtype),
                        *torch.randn(2, batch, kv_heads, tokens, dim, dtype=dtype),
                        causal=False,
                    )
                    for _ in range(buffers_for(nbytes, at_least=LAST_CACHE))
                ]
            )
        ms, half_ms, *peers = wall_ms(*rotations, rounds=rounds)
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


def formats(report: Report, rounds: int) -> None:
    """Decode and append in each pair of row formats, uniform and by age, in turns."""
    four_bit = {name: kvquant.CacheFormat.named(name) for name in ("k8v4", "k4v4")}
    named = {
        "int8": kvquant.CacheFormat(),
        **{name: replace(fmt, by_age=False) for name, fmt in four_bit.items()},
        **{f"{name} by age": fmt for name, fmt in four_bit.items()},
    }
    for batch, q_heads, kv_heads, tokens, dim in SHAPES:
        query = torch.randn(batch, 1, q_heads, dim)
        rotations: list[list[Call]] = []
        for fmt in named.values():
            made = partial(RandomCache.make, batch, kv_heads, tokens, dim, device="cpu", format=fmt)
            first = made()
            more = buffers_for(first.read_bytes, at_least=LAST_CACHE) - 1
            caches = [first, *(made() for _ in range(more))]
            rotations.append([partial(c.attend, query) for c in caches])
        ms = wall_ms(*rotations, rounds=rounds)
        report.add(
            op="decode",
            shape=f"{batch},{q_heads},{kv_heads},{tokens},{dim}",
            **{f"{name}_ms": x for name, x in zip(named, ms, strict=True)},
            **{f"{name}/int8": x / ms[0] for name, x in zip(named, ms, strict=True)},
        )
    batch, heads, tokens, dim = ROWS
    layers = [
        kvquant.QuantizedKVCache(1, batch, heads, dim, max_seq_len=tokens, format=fmt, device="cpu")
        for fmt in named.values()
    ]

    def append(layer: kvquant.QuantizedKVCache, x: Tensor, times: int) -> None:
        layer.crop(0)
        for _ in range(times):
            layer.append(0, x, x)

    for count in (tokens, 1):
        for name, dtype in DTYPES.items():
            x = torch.randn(batch, count, heads, dim, dtype=dtype)
            times = min(tokens // count, STEPS)
            ms = wall_ms(*([partial(append, layer, x, times)] for layer in layers), rounds=rounds)
            report.add(
                op="append",
                shape=f"{batch},{heads},{count},{dim} {name}",
                **{f"{name}_ms": t / times for name, t in zip(named, ms, strict=True)},
                **{f"{name}/int8": t / ms[0] for name, t in zip(named, ms, strict=True)},
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
            [partial(cache.attend, query)],
            [sdpa(query.transpose(1, 2), key, value, causal=True)],
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
    """Quantize, dequantize and append: bytes read and written, against torch's copy of the input.

    The last results are kept, so that each goes to memory that no cache holds, and are small enough
    for the allocator to use their memory again: fresh pages cost more than what is measured.
    """
    batch, heads, tokens, dim = ROWS
    results: deque[object] = deque(maxlen=16)

    def keep(op: Callable[..., object], *args: object) -> Call:
        return lambda: results.append(op(*args))

    for name, dtype in DTYPES.items():
        count = buffers_for(math.prod(ROWS), at_least=LAST_CACHE)
        inputs = [torch.randn(ROWS, dtype=dtype) for _ in range(count)]
        quantized = [kvquant.quantize_cache_v(x) for x in inputs]
        layers = kvquant.QuantizedKVCache(
            count, batch, heads, dim, max_seq_len=tokens, device="cpu"
        )

        def append(layer: int, x: Tensor, layers: kvquant.QuantizedKVCache = layers) -> None:
            layers.crop(0)
            layers.append(layer, x.transpose(1, 2), x.transpose(1, 2))

        ops: dict[str, list[Call]] = {
            "quantize": [keep(kvquant.quantize_cache_v, x) for x in inputs],
            "dequantize": [
                keep(kvquant.dequantize_cache_torch, *parts, dtype) for parts in quantized
            ],
            "append": [partial(append, layer, x) for layer, x in enumerate(inputs)],
        }
        copy_ms, *times = wall_ms([keep(x.clone) for x in inputs], *ops.values(), rounds=rounds)
        copy_gbs = 2 * inputs[0].nbytes / copy_ms / 1e6
        for op, ms in zip(ops, times, strict=True):
            tensors, pair = (2, 4) if op == "append" else (1, 8)
            elements = inputs[0].numel()
            nbytes = tensors * (inputs[0].nbytes + elements + elements // dim * pair)
            gbs = nbytes / ms / 1e6
            report.add(
                op=op, dtype=name, ms=ms, gbs=gbs, copy_gbs=copy_gbs, percent=gbs / copy_gbs * 100
            )


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    rounds: int = 3,
) -> None:
    """Print decode, prompt and row figures, each beside torch's.

    Example: python -m benchmarks cpu --json cpu.json
    """
    torch.set_grad_enabled(False)
    facts = {"isa": build_info()["cpu_isa"], "threads": torch.get_num_threads()}
    bandwidth = round(cpu_bandwidth(), 1)
    reports = {
        decode: Report("Decode attention on the CPU", **facts, read_gbs=bandwidth),
        prompt: Report("A prompt's attention on the CPU", **facts),
        rows: Report("Rows in and out on the CPU", **facts),
        formats: Report("Row formats on the CPU", **facts),
    }
    for measure, report in reports.items():
        measure(report, rounds)
        report.finish(None)
    if json:
        parts = {f.__name__: {**r.facts, "rows": r.rows} for f, r in reports.items()}
        json.write_text(dumps(parts, indent=1))
