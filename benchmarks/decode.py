"""Decode attention on the 8-bit cache against torch's and FlashInfer's kernels, in one run.

Times are medians of CUDA-graph replays over rotated buffers larger than the L2 cache; `kvquant_ms`
is the attention alone, `step_ms` that of a decode step, which appends its tokens too. The floor is
the bytes of codes, params and means over the measured read ceiling; `read_ms` is what a kernel that
only reads as many bytes takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.caches import RandomCache
from benchmarks.common import Report, buffers_for, graph_ms, read_ceiling, read_ms

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


ROOM = 16  # steps that a cache has room for when they are timed


def time_kvquant(b: int, hq: int, hk: int, s: int, d: int, tq: int) -> tuple[float, float, int]:
    """Milliseconds of the attention alone and of a step with its append, and the bytes to read."""
    count = buffers_for(b * hk * s * 2 * (d + 4))
    caches = [RandomCache.make(b, hk, s, d) for _ in range(count)]
    query = torch.randn(b, tq, hq, d, device="cuda", dtype=torch.float16)
    attention = graph_ms([lambda c=cache: c.attend(query) for cache in caches])
    nbytes = caches[0].read_bytes  # steps leave the lengths shorter
    key, value = torch.randn(2, b, tq, hk, d, device="cuda", dtype=torch.float16)

    def rewind() -> None:
        for cache in caches:
            cache.seq_lens.fill_(s - ROOM * tq)

    rewind()
    steps = [cache.prepare_step(query, key, value) for cache in caches]
    return attention, graph_ms(steps, before=rewind), nbytes


def time_layout(
    b: int, hq: int, hk: int, s: int, d: int, split_size: int | None = None, **layout: Any
) -> tuple[float, int]:
    """Milliseconds of the attention of one query token on a cache of another layout, and bytes."""
    count = buffers_for(b * hk * s * 2 * (d + 4))
    caches = [RandomCache.make(b, hk, s, d, **layout) for _ in range(count)]
    query = torch.randn(b, 1, hq, d, device="cuda", dtype=torch.float16)
    calls = [lambda c=cache: c.attend(query, split_size=split_size) for cache in caches]
    return graph_ms(calls), caches[0].read_bytes


def time_flashinfer(dtype: torch.dtype, b: int, hq: int, hk: int, s: int, d: int) -> float:
    """Milliseconds of FlashInfer's decode on blocks of ``dtype``; NaN where it is missing."""
    try:
        import flashinfer
    except ImportError:
        return float("nan")
    page, pages = 16, s // 16
    count = buffers_for(b * hk * s * 2 * d * dtype.itemsize, most=4)
    caches = [
        torch.randn(b * pages, 2, page, hk, d, device="cuda", dtype=torch.float16).to(dtype)
        for _ in range(count)
    ]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=hq != hk
    )
    index = torch.arange(b + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        index * pages, torch.arange(b * pages, dtype=torch.int32, device="cuda"),
        torch.full((b,), page, dtype=torch.int32, device="cuda"), hq, hk, d, page,
        q_data_type=torch.float16, kv_data_type=dtype,
    )  # fmt: skip
    query = torch.randn(b, hq, d, device="cuda", dtype=torch.float16)
    return graph_ms([lambda c=cache: wrapper.run(query, c) for cache in caches])


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
    """Print time, TB/s, % of the read ceiling and the ratio to the best fp16 kernel.

    Example: python -m benchmarks decode --json decode.json --plot decode.png
    """
    ceiling = read_ceiling()
    report = Report("Decode attention", read_ceiling_tbs=round(ceiling, 3))
    for shape in SHAPES:
        ms, step_ms, nbytes = time_kvquant(*shape)
        torch.cuda.empty_cache()
        peers = {}
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ):
            peers[name] = time_sdpa(backend, *shape)
            torch.cuda.empty_cache()
        if shape[5] == 1:
            for name, dtype in (("fi16", torch.float16), ("fi8", torch.float8_e4m3fn)):
                peers[name] = time_flashinfer(dtype, *shape[:5])
                torch.cuda.empty_cache()
        else:
            peers["fi16"] = peers["fi8"] = float("nan")
        best = min((ms for name, ms in peers.items() if name != "fi8" and ms == ms))
        report.add(
            shape=",".join(map(str, shape)),
            floor_ms=nbytes / ceiling / 1e9,
            read_ms=read_ms(nbytes),
            kvquant_ms=ms,
            step_ms=step_ms,
            tbs=nbytes / ms / 1e9,
            percent=nbytes / ms / 1e9 / ceiling * 100,
            **{f"{name}_ms": value for name, value in peers.items()},
            ratio=best / ms,
            ratio_fp8=peers["fi8"] / ms,
        )
    layouts = Report("Other layouts and splits, 32 query and 8 KV heads of 128 channels")
    lengths = torch.randint(1, 16385, (64,), generator=torch.Generator().manual_seed(0))
    even = int(lengths.float().mean())
    for batch, name, tokens, layout in (
        (64, "contiguous", 8192, {}),
        (64, "blocks of 16", 8192, {"block_size": 16}),
        (64, "blocks of 64", 8192, {"block_size": 64}),
        (64, "ragged, 1 to 16384", 16384, {"seq_lens": lengths.to("cuda", torch.int32)}),
        (64, f"even, of {even}", even, {}),
        *((64, f"splits of {n}", 8192, {"split_size": n}) for n in (4096, 2048, 1024, 512)),
        (8, "contiguous", 4096, {}),
        *((8, f"splits of {n}", 4096, {"split_size": n}) for n in (2048, 1024, 512)),
        (1, "contiguous", 32768, {}),
        *((1, f"splits of {n}", 32768, {"split_size": n}) for n in (2048, 1024, 512)),
    ):
        ms, nbytes = time_layout(batch, 32, 8, tokens, 128, **layout)
        torch.cuda.empty_cache()
        layouts.add(
            batch=batch, tokens=tokens, layout=name, ms=ms,
            percent=nbytes / ms / 1e9 / ceiling * 100,
        )  # fmt: skip
    layouts.print()
    report.facts["layouts"] = layouts.rows
    report.finish(json)
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """How many times faster than the best fp16 kernel, one query token, for each shape."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.6))
    rows = [row for row in report.rows if row["shape"].endswith(",1")]
    at = range(len(rows))
    for shift, key, color, label in (
        (-0.2, "kvquant_ms", "#4477aa", "kvquant, 8 bits"),
        (0.2, "fi8_ms", "#ccbb44", "FlashInfer, fp8"),
    ):
        best = [row["ratio"] * row["kvquant_ms"] for row in rows]
        ratios = [fp16 / row[key] for fp16, row in zip(best, rows, strict=True)]  # NaN: no bar
        bars = axis.barh([i + shift for i in at], ratios, 0.38, color=color, label=label)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_yticks(list(at), [", ".join(row["shape"].split(",")[:5]) for row in rows])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_ylabel("batch, query heads, KV heads,\ntokens, head_dim")
    axis.set_xlabel("times faster than the fastest fp16 kernel (cuDNN, flash, FlashInfer)")
    figure.suptitle(f"Decode attention, {report.facts['device']}")
    figure.legend(loc="upper right", frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
