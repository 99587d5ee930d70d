"""Decode attention on the quantized cache against torch's and FlashInfer's kernels, in one run.

All kernels of a shape are captured in CUDA graphs that rotate over buffers larger than the L2 cache
and are replayed in turns: a time is the median of five repetitions, its spread (largest - smallest)
/ median. `ms` is the attention alone, `step_ms` that of a decode step, which appends its tokens
too. % is of the floor: the bytes of codes, params and means over the measured read ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import (
    Captured,
    Report,
    buffers_for,
    graphs_ms,
    read_ceiling,
)
from benchmarks.peers import decode_peers

SHAPES = [  # batch, q_heads, kv_heads, tokens, head_dim, query tokens
    (64, 32, 8, 8192, 128, 1),
    (32, 32, 32, 2048, 128, 1),
    (16, 64, 8, 16384, 128, 1),
    (256, 32, 8, 1024, 128, 1),
    (1, 32, 8, 131072, 128, 1),
    (32, 28, 4, 4096, 128, 1),
    (8, 32, 8, 4096, 128, 1),
    (1, 32, 8, 4096, 128, 1),
    (64, 32, 8, 4096, 64, 1),
    (8, 32, 8, 8192, 128, 4),
    (64, 32, 8, 8192, 128, 8),
    (8, 32, 8, 8192, 128, 16),
]
SEVERAL = [  # of several query tokens, measured alone
    (8, 32, 8, 4096, 128, 8),
    (1, 32, 8, 4096, 128, 8),
    (1, 32, 8, 4096, 128, 16),
    (1, 32, 8, 32768, 128, 8),
    (64, 32, 8, 1024, 128, 8),
    (64, 32, 8, 1024, 128, 16),
    (32, 28, 4, 4096, 128, 4),
    (8, 64, 8, 4096, 128, 4),
    (64, 32, 8, 4096, 64, 8),
    (1, 32, 8, 4096, 128, 64),
]
FORMATS = {
    "int8": kvquant.CacheFormat(),
    "k8v4": kvquant.CacheFormat(value="int4"),
    "k4v4": kvquant.CacheFormat(key="int4", value="int4"),
    "k8v4 by age": kvquant.CacheFormat.named("k8v4"),
    "k4v4 by age": kvquant.CacheFormat.named("k4v4"),
}
# Steps that a cache has room for when they are timed: none of up to 16 tokens opens a group of 256.
ROOM = 12


def own_graphs(
    format: kvquant.CacheFormat, b: int, hq: int, hk: int, s: int, d: int, tq: int
) -> tuple[dict[str, Captured], int]:
    """The attention alone and a step with its append, and the bytes to read."""
    count = buffers_for(b * hk * s * format.row_bytes(d, d))
    query = torch.randn(b, tq, hq, d, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, b, tq, hk, d, device="cuda", dtype=torch.float16)
    make = [RandomCache.make(b, hk, s, d, format=format) for _ in range(count)]
    nbytes = make[0].read_bytes
    attention = Captured.of([lambda c=cache: c.attend(query) for cache in make])
    stepped = [
        RandomCache(cache.view, cache.block_table, cache.seq_lens - ROOM * tq, cache.young)
        for cache in make
    ]
    steps = [cache.prepare_step(query, key, value) for cache in stepped]

    def rewind() -> None:
        for cache in stepped:
            cache.seq_lens.fill_(s - ROOM * tq)

    return {"": attention, "step_": Captured.of(steps, before=rewind)}, nbytes


def measure(shape: tuple[int, ...], formats: list[str], ceiling: float) -> list[dict[str, Any]]:
    """One shape in each format, beside the peers."""
    graphs: dict[str, Captured] = {}
    nbytes: dict[str, int] = {}
    for name in formats:
        own, nbytes[name] = own_graphs(FORMATS[name], *shape)
        graphs |= {f"{prefix}{name}": graph for prefix, graph in own.items()}
    for name, make in decode_peers(*shape).items():
        try:
            graphs[name] = Captured.of(make())
        except Exception as error:  # a peer that refuses the shape; said, and left out
            print(f"{name}: {str(error).splitlines()[0][:150]}", flush=True)
    times = graphs_ms(graphs)
    nan = float("nan")

    def best(names: tuple[str, ...]) -> float:
        return min((times[name][0] for name in names if name in times), default=nan)

    fp16, fp8 = best(("flash", "cudnn", "fi16", "fi16_tc")), best(("fi8", "fi8_tc"))
    peers = {
        f"{name}_ms": times.get(name, (nan, nan))[0]
        for name in ("flash", "cudnn", "fi16", "fi16_tc", "fi8", "fi8_tc")
    }
    rows = []
    for name in formats:
        ms, spread = times[name]
        rows.append({
            "shape": ",".join(map(str, shape)),
            "format": name,
            "floor_ms": nbytes[name] / ceiling / 1e9,
            "ms": ms,
            "spread": spread,
            "step_ms": times[f"step_{name}"][0],
            "percent": nbytes[name] / ms / 1e9 / ceiling * 100,
            "ratio": fp16 / ms,
            "ratio_fp8": fp8 / ms,
            **peers,
        })  # fmt: skip
    return rows


def layouts(ceiling: float, formats: list[str]) -> Report:
    """Blocks, ragged batches and fixed splits."""
    report = Report("Other layouts and splits, 32 query and 8 KV heads of 128 channels")
    lengths = torch.randint(1, 16385, (64,), generator=torch.Generator().manual_seed(0))
    ragged = {"seq_lens": lengths.to("cuda", torch.int32)}
    even = int(lengths.float().mean())
    groups: list[tuple[int, Mapping[str, tuple[int, dict[str, Any], dict[str, Any]]]]] = [
        (64, {
            "contiguous": (8192, {}, {}),
            "blocks of 16": (8192, {"block_size": 16}, {}),
            "blocks of 64": (8192, {"block_size": 64}, {}),
            "ragged, 1 to 16384": (16384, ragged, {}),
            f"even, of {even}": (even, {}, {}),
            **{f"splits of {n}": (8192, {}, {"split_size": n}) for n in (4096, 2048, 1024, 512)},
        }),
        (8, {
            "contiguous": (4096, {}, {}),
            **{f"splits of {n}": (4096, {}, {"split_size": n}) for n in (2048, 1024, 512)},
        }),
        (1, {
            "contiguous": (32768, {}, {}),
            **{f"splits of {n}": (32768, {}, {"split_size": n}) for n in (2048, 1024, 512)},
        }),
    ]  # fmt: skip
    for format in formats:
        for batch, group in groups if format == "int8" else groups[:1]:
            graphs, nbytes = {}, {}
            query = torch.randn(batch, 1, 32, 128, device="cuda", dtype=torch.float16)
            for name, (tokens, layout, options) in group.items():
                count = buffers_for(batch * 8 * tokens * FORMATS[format].row_bytes(128, 128))
                caches = [
                    RandomCache.make(batch, 8, tokens, 128, format=FORMATS[format], **layout)
                    for _ in range(count)
                ]
                nbytes[name] = caches[0].read_bytes
                graphs[name] = Captured.of(
                    [partial(cache.attend, query, **options) for cache in caches]
                )
            for name, (ms, spread) in graphs_ms(graphs).items():
                report.add(
                    batch=batch, tokens=group[name][0], layout=name, format=format, ms=ms,
                    spread=spread, percent=nbytes[name] / ms / 1e9 / ceiling * 100,
                )  # fmt: skip
            del graphs, caches
            torch.cuda.empty_cache()
    return report


def several(ceiling: float, formats: list[str]) -> Report:
    """Several query tokens."""
    report = Report("Several query tokens; shapes end with their number")
    for shape in SEVERAL:
        for name in formats:
            own, nbytes = own_graphs(FORMATS[name], *shape)
            times = graphs_ms(own)
            ms, spread = times[""]
            report.add(
                shape=",".join(map(str, shape)), format=name, ms=ms, spread=spread,
                step_ms=times["step_"][0], percent=nbytes / ms / 1e9 / ceiling * 100,
            )  # fmt: skip
            del own
            torch.cuda.empty_cache()
    return report


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    formats: Annotated[str, typer.Option(help="Of the cache, by comma.")] = ",".join(FORMATS),
    shapes: Annotated[int, typer.Option(help="How many of the shapes.")] = len(SHAPES),
) -> None:
    """Print time, % of the read ceiling and the ratio to the best fp16 and fp8 kernels.

    Example: python -m benchmarks decode --shapes 2 --json decode.json
    """
    torch.set_grad_enabled(False)
    ceiling = read_ceiling()
    report = Report("Decode attention", read_ceiling_tbs=round(ceiling, 3))
    named = formats.split(",")
    for shape in SHAPES[:shapes]:
        for row in measure(shape, named, ceiling):
            report.add(**row)
        torch.cuda.empty_cache()
        report.save(json)
    others = layouts(ceiling, named)
    others.print()
    report.facts["layouts"] = others.rows
    more = several(ceiling, named)
    more.print()
    report.facts["several"] = more.rows
    report.finish(json)
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """How many times faster than the best fp16 kernel, one query token, for each shape."""
    import matplotlib.pyplot as plt

    shown = [row for row in report.rows if row["shape"].endswith(",1")]
    rows = [row for row in shown if row["format"] == shown[0]["format"]]
    at = range(len(rows))
    bars_of = {
        f"kvquant, {name}": [row["ratio"] for row in shown if row["format"] == name]
        for name in dict.fromkeys(row["format"] for row in shown)
    }
    bars_of["FlashInfer, fp8"] = [row["ratio"] / row["ratio_fp8"] for row in rows]  # NaN: no bar
    colors = ("#4477aa", "#66ccee", "#228833", "#99ddff", "#bbcc33", "#ccbb44")[-len(bars_of) :]
    width = 0.85 / len(bars_of)
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.15 * len(bars_of) * len(rows)))
    for i, ((label, ratios), color) in enumerate(zip(bars_of.items(), colors, strict=True)):
        shift = (i - (len(bars_of) - 1) / 2) * width
        bars = axis.barh([j + shift for j in at], ratios, width, color=color, label=label)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
    axis.set_yticks(list(at), [", ".join(row["shape"].split(",")[:5]) for row in rows])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_ylabel("batch, query heads, KV heads,\ntokens, head_dim")
    axis.set_xlabel("times faster than the fastest fp16 kernel (cuDNN, flash, FlashInfer)")
    figure.suptitle(f"Decode attention, {report.facts['device']}")
    figure.legend(loc="lower center", ncol=3, frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
