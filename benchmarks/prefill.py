"""Attention of long chunks over the 8-bit history beside dense kernels on an fp16 history.

Calls alternate in one run; times are medians of CUDA events around eager calls, everything included
(choice, dequantized pieces, merge; lengths known to the host as a cache knows them). TFLOP/s count
the causal work, 4·B·Hq·D·(T·S − T(T−1)/2). cuDNN's and flash's kernels in torch run without a mask
where T < S, and are rated on their own, larger count. Extra memory: the peak above what was
allocated before the call, without its output.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Report

SHAPES = [  # batch, q_heads, kv_heads, query tokens, tokens
    (1, 32, 8, 2048, 32768),
    (1, 32, 8, 512, 131072),
    (8, 32, 8, 4096, 4096),
    (1, 28, 4, 8192, 8192),
    (8, 32, 8, 2048, 10240),
]
DIM = 128
Call = Callable[[], object]


def alternating_ms(
    calls: dict[str, Call], rounds: int = 9, warm: int = 2, before: Call | None = None
) -> dict[str, float]:
    """Median milliseconds of each call, all of them in turn; a call that fails is left out.

    ``before`` runs ahead of each call, outside the time taken.
    """
    times: dict[str, list[float]] = {}
    for i in range(warm + rounds):
        order = list(calls) if i % 2 else list(reversed(calls))
        for name in order:
            if i and name not in times:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
                torch.cuda.synchronize()
            try:
                start.record()
                calls[name]()
                end.record()
            except Exception as error:
                print(f"{name}: {str(error).splitlines()[0][:150]}", flush=True)
                times.pop(name, None)
                continue
            end.synchronize()
            times.setdefault(name, [])
            if i >= warm:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(of) for name, of in times.items()}


def extra_mib(call: Call, out_bytes: int) -> float:
    """MiB that a call takes at its peak, beside what there is and its output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - out_bytes) / 2**20


def ours(
    cache: RandomCache, query: Tensor, *, on_host: bool = True, **options: Any
) -> tuple[Call, kvquant.Plan]:
    """A planned attention on a full cache."""
    lens = tuple(cache.seq_lens.tolist())
    known = kvquant.HostLengths(lens) if on_host else None
    seqs = kvquant.Sequences(cache.block_table, cache.seq_lens, on_host=known)
    plan = kvquant.plan(query, cache.view, seqs, **options)
    return lambda: plan.run(query, cache.view, seqs), plan


def codes_kernel(cache: RandomCache, query: Tensor) -> Call:
    """The kernel that reads codes, which serves a captured graph."""
    plan = ours(cache, query)[1]
    prepared = getattr(plan.launch, "__self__", None)
    otherwise = getattr(prepared, "otherwise", prepared)
    assert otherwise is not None
    seqs = kvquant.Sequences(cache.block_table, cache.seq_lens)
    return lambda: otherwise.launch(query, cache.view, seqs, None, None)


def dense_peers(b: int, hq: int, hk: int, t: int, s: int) -> tuple[dict[str, Call], float]:
    """Torch's kernels on an fp16 history, and the operations that they count."""
    query = torch.randn(b, hq, t, DIM, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, b, hk, s, DIM, device="cuda", dtype=torch.float16)

    def attend(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=t == s, enable_gqa=True
            )

    calls: dict[str, Call] = {
        "cudnn": lambda: attend(SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: attend(SDPBackend.FLASH_ATTENTION),
    }
    return calls, float(b * hq * t) * (s if t < s else (t + 1) / 2) * 4 * DIM


def flashinfer_peers(b: int, hq: int, hk: int, t: int, s: int) -> dict[str, Call]:
    """FlashInfer's causal kernels on paged histories, fp16 (fa3) and fp8 (fa2); none: not there."""
    try:
        import flashinfer
    except ImportError:
        return {}
    calls: dict[str, Call] = {}
    page, pages = 16, s // 16
    query = torch.randn(b * t, hq, DIM, device="cuda", dtype=torch.float16)
    for name, backend, dtype in (
        ("fi16", "fa3", torch.float16), ("fi8", "fa2", torch.float8_e4m3fn)
    ):  # fmt: skip
        cache = torch.randn(b * pages, 2, page, hk, DIM, device="cuda", dtype=torch.float16)
        index = torch.arange(b + 1, dtype=torch.int32, device="cuda")
        try:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend=backend
            )
            wrapper.plan(
                index * t, index * pages,
                torch.arange(b * pages, dtype=torch.int32, device="cuda"),
                torch.full((b,), page, dtype=torch.int32, device="cuda"), hq, hk, DIM, page,
                causal=True, q_data_type=torch.float16, kv_data_type=dtype,
            )  # fmt: skip
        except Exception as error:
            print(f"{name}: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        stored = cache.to(dtype)
        calls[name] = lambda w=wrapper, kv=stored: w.run(query, kv)
    return calls


def relative_error(cache: RandomCache, query: Tensor, out: Tensor) -> float:
    """||out - ref|| / ||ref|| of the last rows of a head, in float64 on the dequantized cache."""
    rows, t, s = 16, query.shape[1], int(cache.seq_lens[0])
    one = kvquant.Sequences(cache.block_table[:1], cache.seq_lens[:1])
    key, value = kvquant.gather(
        cache.view, block_table=one.block_table, seq_lens=one.seq_lens, dtype=torch.float32
    )
    score = query[0, t - rows :, 0].double() @ key[0, :s, 0].double().T * DIM**-0.5
    token = torch.arange(s, device="cuda")
    score = score.masked_fill(token > torch.arange(s - rows, s, device="cuda")[:, None], -torch.inf)
    ref = score.softmax(-1) @ value[0, :s, 0].double()
    return float((out[0, t - rows :, 0].double() - ref).norm() / ref.norm())


def measure(
    report: Report, b: int, hq: int, hk: int, t: int, s: int, layouts: dict[str, int | None]
) -> None:
    """One shape, on each layout."""
    query = torch.randn(b, t, hq, DIM, device="cuda", dtype=torch.float16)
    work = 4 * b * hq * DIM * (t * s - t * (t - 1) / 2)
    peers, peer_work = dense_peers(b, hq, hk, t, s)
    calls = {**peers, **flashinfer_peers(b, hq, hk, t, s)}
    facts: dict[str, Any] = {}
    for name, block in layouts.items():
        cache = RandomCache.make(b, hk, s, DIM, block_size=block)
        call, plan = ours(cache, query)
        calls[name] = call
        if name == "contiguous":
            facts["regime"] = plan.regime
            out = call()
            facts["error"] = relative_error(cache, query, out)  # type: ignore[arg-type]
            facts["repeats"] = torch.equal(out, call())  # type: ignore[arg-type]
            del out
            facts["extra_mib"] = extra_mib(call, b * t * hq * DIM * 2)
            calls["read_back"] = ours(cache, query, on_host=False)[0]
            calls["codes"] = codes_kernel(cache, query)
    ms = alternating_ms(calls)
    own = ("contiguous", "read_back", *layouts, "codes", "fi16", "fi8")
    rates = {name: (work if name in own else peer_work) / ms[name] / 1e9 for name in ms}
    report.add(
        shape=",".join(map(str, (b, hq, hk, t, s))),
        ms=ms["contiguous"],
        **{f"{name}_ms": ms.get(name, float("nan")) for name in calls if name != "contiguous"},
        **{f"{name}_tflops": rates.get(name, float("nan")) for name in calls},
        of_cudnn=ms.get("cudnn", float("nan")) / ms["contiguous"],
        paged_ratio=max(ms[name] for name in layouts) / ms["contiguous"],
        **facts,
    )
    del calls, peers
    torch.cuda.empty_cache()


def windows(report: Report) -> None:
    """A window's time does not depend on what lies before it."""
    found: dict[str, Call] = {}
    query = torch.randn(1, 2048, 32, DIM, device="cuda", dtype=torch.float16)
    for s in (6144, 131072):
        cache = RandomCache.make(1, 8, s, DIM)
        found[str(s)] = ours(cache, query, sliding_window=4096)[0]
    ms = alternating_ms(found)
    print(f"window 4096, 2048 rows: {ms}, ratio {ms['131072'] / ms['6144']:.3f}")
    report.facts["window_ms"] = list(ms.items())
    report.facts["window_ratio"] = ms["131072"] / ms["6144"]


def first_prompt(report: Report) -> None:
    """Attention and store of a first prompt beside cuDNN's attention alone."""
    b, hq, hk, t = 8, 32, 8, 4096
    query, key, value = (
        torch.randn(b, t, h, DIM, device="cuda", dtype=torch.float16) for h in (hq, hk, hk)
    )
    cache = kvquant.QuantizedKVCache(1, b, hk, DIM, max_seq_len=t, device="cuda")

    peers, _ = dense_peers(b, hq, hk, t, t)
    calls: dict[str, Call] = {
        "ours": lambda: cache.attend(0, query, key, value),
        "store": lambda: cache.append(0, key, value),
        "cudnn": peers["cudnn"],
    }
    ms = alternating_ms(calls, before=cache.reset)
    print(f"first prompt {b},{hq},{hk},{t}: {ms}, ratio {ms['ours'] / ms['cudnn']:.3f}")
    report.facts["first_prompt_ms"] = list(ms.items())
    report.facts["first_prompt_ratio"] = ms["ours"] / ms["cudnn"]


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    shapes: Annotated[int, typer.Option(help="How many of the shapes.")] = len(SHAPES),
) -> None:
    """Print milliseconds, TFLOP/s, ratios to cuDNN, extra memory and errors.

    Example: python -m benchmarks prefill --shapes 2 --json prefill.json
    """
    torch.set_grad_enabled(False)
    report = Report("Chunks of prompts over the 8-bit history")
    layouts = {"contiguous": None, "paged64": 64, "paged16": 16}
    for shape in SHAPES[:shapes]:
        measure(report, *shape, layouts)
    windows(report)
    first_prompt(report)
    report.finish(json)
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """TFLOP/s of each kernel on each shape."""
    import matplotlib.pyplot as plt

    names = {
        "contiguous": ("kvquant, 8 bits", "#4477aa"),
        "codes": ("kvquant, kernel on codes", "#99bbdd"),
        "cudnn": ("cuDNN, fp16", "#bbbbbb"),
        "flash": ("flash in torch, fp16", "#dddddd"),
        "fi16": ("FlashInfer fa3, fp16", "#228833"),
        "fi8": ("FlashInfer fa2, fp8", "#ccbb44"),
    }
    shown = [name for name in names if any(f"{name}_tflops" in row for row in report.rows)]
    figure, axis = plt.subplots(figsize=(8, 5))
    width = 0.85 / len(shown)
    for i, name in enumerate(shown):
        label, color = names[name]
        rates = [row.get(f"{name}_tflops", float("nan")) for row in report.rows]
        at = [j + (i - len(shown) / 2 + 0.5) * width for j in range(len(rates))]
        bars = axis.barh(at, rates, width, color=color, label=label)
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=7)
    axis.set_yticks(range(len(report.rows)), [row["shape"] for row in report.rows])
    axis.invert_yaxis()
    axis.set_ylabel("batch, query heads, KV heads,\nquery tokens, tokens")
    axis.set_xlabel("TFLOP/s")
    figure.suptitle(f"Chunks of prompts, {report.facts['device']}")
    figure.legend(loc="lower right", frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
