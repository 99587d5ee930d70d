"""A decode step of a transformers model on a GPU, as users of several caches have it.

The model has the shape of an 8B Llama and random weights, the caches random rows. A step's time is
that of one forward with the device waited for before and after; that of ``generate`` is what passes
between two of its tokens. A way that fails leaves its error in the table, and the others run.
"""

from __future__ import annotations

import gc
import json as json_module
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import Report, read_ceiling
from benchmarks.generate import Clock, greedy
from kvquant.demo.model import cache_argument

SHAPES = ((1, 4096), (1, 32768), (32, 8192), (128, 8192))  # batch, tokens of context
DEVICE = "cuda"
HEADS, KV_HEADS, DIM, SPARE = 32, 8, 128, 200
STEPS, WARM = 24, 8
Way = Callable[[Any, int, int], dict[str, float]]


def make_model(layers: int) -> Any:
    """Random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=32000,
        max_position_embeddings=200000, eos_token_id=None,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def filled(model: Any, cache: Any, batch: int, context: int, piece: int | None = None) -> Any:
    """``cache`` with random rows, ``piece`` of them at a time."""
    piece = max(1, min(context, piece or 2**19 // batch))
    key, value = torch.randn(2, batch, KV_HEADS, piece, DIM, device=DEVICE).unbind(0)
    for layer in range(model.config.num_hidden_layers):
        for begin in range(0, context, piece):
            n = min(piece, context - begin)
            cache.update(key[:, :, :n], value[:, :, :n], layer)
        if hasattr(cache.layers[layer], "flush"):  # no attention follows that would store them
            cache.layers[layer].flush()
    return cache


def ours(model: Any, batch: int, context: int) -> Any:
    """A filled 8-bit cache, and the model set to its attention."""
    from kvquant.integrations.transformers import KVQuantCache

    model.set_attn_implementation("kvquant")
    cache = KVQuantCache(model, max_cache_len=context + SPARE)
    return filled(model, cache, batch, context)


@contextmanager
def flash_only() -> Iterator[None]:
    """torch's flash attention, without cuDNN, which makes a plan for every length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class Step:
    """A model's forward of one token, whose inputs stay where they are."""

    def __init__(self, model: Any, cache: Any, batch: int, context: int) -> None:
        self.ids = torch.randint(0, 32000, (batch, 1), device=DEVICE)
        self.positions = torch.full((batch, 1), context, device=DEVICE)
        self.forward, self.cache = model, cache

    def __call__(self) -> Tensor:
        """The logits of the next token."""
        out = self.forward(
            input_ids=self.ids, position_ids=self.positions, use_cache=True,
            **cache_argument(self.cache),
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def timed(self, call: Callable[[], Any] | None = None) -> dict[str, float]:
        """Median milliseconds of the calls after the first ones, and what these took."""
        times = []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            (call or self)()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
            self.positions.add_(1)
        return {"ms": statistics.median(times[WARM:]), "first_s": sum(times[:WARM]) / 1e3}


def by_hand(model: Any, batch: int, context: int) -> dict[str, float]:
    """Captured with `torch.cuda.graph`: the least that a step of the model can take."""
    step = Step(model, ours(model, batch, context), batch, context)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    used = context / step.cache.layers[0].storage.capacity
    return {**step.timed(graph.replay), "cache_bytes": int(step.cache.nbytes * used)}


def graphed(model: Any, batch: int, context: int) -> dict[str, float]:
    """`graph_step`."""
    from kvquant.integrations.transformers import graph_step

    cache = ours(model, batch, context)
    found = graph_step(model, cache)
    figures = Step(model, cache, batch, context).timed()
    if found.calls["replay"] < STEPS - WARM:
        raise RuntimeError(f"not replayed: {found!r}")
    return {**figures, "capture_s": found.seconds}


def eager(model: Any, batch: int, context: int) -> dict[str, float]:
    """The 8-bit cache without a graph."""
    return Step(model, ours(model, batch, context), batch, context).timed()


def generated(model: Any, batch: int, context: int) -> dict[str, float]:
    """A token of ``generate``, greedy, with `graph_step`."""
    from kvquant.integrations.transformers import graph_step

    cache, clock = ours(model, batch, context), Clock()
    found = graph_step(model, cache)
    prompt = torch.randint(0, 32000, (batch, context + 1), device=DEVICE)
    tokens = 2 * STEPS
    greedy(model, prompt, cache, tokens, clock)
    if found.calls["replay"] < tokens - 4:
        raise RuntimeError(f"not replayed: {found!r}")
    return {"ms": statistics.median(clock.steps[WARM:])}


def compiled(model: Any, cache: Any, batch: int, context: int) -> dict[str, float]:
    """The model's forward compiled as transformers compiles it."""
    step = Step(model, cache, batch, context)
    step.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step()

    figures = step.timed(call)
    if cache.get_seq_length() != context + STEPS:
        raise RuntimeError(f"{cache.get_seq_length()} tokens, not {context + STEPS}")
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {**figures, "graph_skips": skips}


def ours_compiled(model: Any, batch: int, context: int) -> dict[str, float]:
    """The 8-bit cache, compiled."""
    return compiled(model, ours(model, batch, context), batch, context)


def static_compiled(model: Any, batch: int, context: int) -> dict[str, float]:
    """transformers' StaticCache, compiled."""
    from transformers import StaticCache

    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=model.config, max_cache_len=context + SPARE)
    return compiled(model, filled(model, cache, batch, context), batch, context)


def dynamic(model: Any, batch: int, context: int) -> dict[str, float]:
    """transformers' DynamicCache, with torch's flash attention only."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    cache = filled(model, DynamicCache(config=model.config), batch, context)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    with flash_only():
        return {**Step(model, cache, batch, context).timed(), "cache_bytes": nbytes}


WAYS: dict[str, Way] = {
    "hand": by_hand,
    "step": graphed,
    "generate": generated,
    "eager": eager,
    "dynamic": dynamic,
    "compiled": ours_compiled,
    "static": static_compiled,
}  # those that compile come last


def measure(model: Any, way: Way, batch: int, context: int) -> dict[str, Any]:
    """A way's figures and its peak of memory above the weights; or its error."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures: dict[str, Any] = dict(way(model, batch, context))
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:400]}
    figures["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    figures["took_s"] = time.perf_counter() - begin
    return figures


def row_of(found: dict[str, dict[str, Any]], weights: int, ceiling: float) -> dict[str, Any]:
    """The figures of one shape, and the ratios that matter."""
    nan = float("nan")
    ms = {name: found.get(name, {}).get("ms", nan) for name in WAYS}
    best = ms["hand"]
    nbytes = found.get("hand", {}).get("cache_bytes", nan)  # of the context's tokens
    full = found.get("dynamic", {}).get("cache_bytes", nan)
    return {
        **ms,
        "step/hand": ms["step"] / best,
        "comp/hand": ms["compiled"] / best,
        "gen-hand": ms["generate"] - best,
        "static/step": ms["static"] / ms["step"],
        "dyn/step": ms["dynamic"] / ms["step"],
        "bytes": nbytes / full,
        "bandwidth": (weights + nbytes) / ceiling / 1e9 / ms["step"],
    }


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin nothing after this time.")] = 270,
    layers: int = 16,
    only: Annotated[str, typer.Option(help="Ways, with commas between; all by default.")] = "",
) -> None:
    """Print milliseconds of a decode step, by way and shape; figures are written as they come.

    Example: python -m benchmarks step --only hand,step --json step.json
    """
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    begin = time.perf_counter()
    import transformers

    model = make_model(layers)
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    ceiling = read_ceiling()
    report = Report(
        f"A decode step of a Llama of 8B shape, {layers} layers, ms",
        transformers=transformers.__version__, read_ceiling_tbs=round(ceiling, 3),
        weights_gb=round(weights / 1e9, 2), setup_s=round(time.perf_counter() - begin, 1),
    )  # fmt: skip
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {shape: {} for shape in SHAPES}
    for name in only.split(",") if only else WAYS:
        for batch, context in SHAPES:
            if time.perf_counter() - begin > seconds:
                figures: dict[str, Any] = {"error": "not begun: out of time"}
            else:
                figures = measure(model, WAYS[name], batch, context)
            found[batch, context][name] = figures
            print(f"{name} ({batch}, {context}): {figures}", flush=True)
            if json is not None:
                details = {f"{b},{s}": ways for (b, s), ways in found.items()}
                json.write_text(json_module.dumps({**report.facts, "details": details}, indent=1))
    for (batch, context), ways in found.items():
        report.add(batch=batch, context=context, **row_of(ways, weights, ceiling))
    report.print()
    report.facts["details"] = {f"{b},{s}": ways for (b, s), ways in found.items()}
    if json is not None:
        json.write_text(json_module.dumps({**report.facts, "rows": report.rows}, indent=1))
    if plot:
        draw(report, plot)


def draw(report: Report, path: Path) -> None:
    """Milliseconds of each way, a group of bars for each shape."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(report.rows), figsize=(13, 3.8), sharey=True)
    names = [name for name in WAYS if name != "eager"][::-1]
    for axis, row in zip(axes, report.rows, strict=True):
        colors = ["#bbbbbb" if name in ("static", "dynamic") else "#4477aa"
                  for name in names]  # fmt: skip
        bars = axis.barh(names, [row[name] for name in names], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.margins(x=0.25)
        axis.set_title(f"batch {row['batch']}, {row['context']} tokens", fontsize=10)
        axis.set_xlabel("ms")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.title}; {report.facts['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
