"""transformers' generate: on the CPU SmolLM2-135M with the 8-bit cache and with DynamicCache.

Both caches hold the same rows, those of a text over and over; generate then goes on from them. The
runs of the caches and dtypes alternate, and a token's time is what passes between two of them. On a
GPU see `benchmarks.generate_gpu`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import Report
from kvquant.demo.assets import TEXT, cache_folder, fetch
from kvquant.demo.model import cache_argument, load

TEXT_TOKENS = 1024
ATTENTION = {"DynamicCache": "sdpa", "KVQuantCache": "kvquant"}


class Clock:
    """A stopping criterion that never stops and notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """After a token."""
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    @property
    def steps(self) -> list[float]:
        """Milliseconds between tokens."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [(after - before) * 1e3 for before, after in pairs]


def greedy(
    model: Any, prompt: Tensor, cache: Any, tokens: int, clock: Clock, **options: Any
) -> Any:
    """What the model's ``generate`` gives, exactly ``tokens`` tokens, each noted by ``clock``."""
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens,
        min_new_tokens=tokens, stopping_criteria=[clock], **cache_argument(cache), **options,
    )  # fmt: skip


def fill(model: Any, ids: Tensor, context: int) -> dict[str, Any]:
    """Both caches with ``context`` rows, by name."""
    from transformers import DynamicCache

    from kvquant.integrations.transformers import KVQuantCache

    text = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(text))
    caches = {
        "DynamicCache": DynamicCache(config=model.config),
        "KVQuantCache": KVQuantCache(model.config),
    }
    for index, layer in enumerate(text.layers):
        times = -(-context // ids.shape[1])
        rows = [x.repeat(1, 1, times, 1)[:, :, :context] for x in (layer.keys, layer.values)]
        for cache in caches.values():
            cache.update(*rows, index)
    return caches


def generate(model: Any, cache: Any, attention: str, prompt: Tensor, tokens: int) -> list[float]:
    """Milliseconds of each generated token but the first; the cache is left as it was."""
    clock, length = Clock(), cache.get_seq_length()
    model.set_attn_implementation(attention)
    greedy(model, prompt, cache, tokens, clock)
    cache.crop(length - cache.get_seq_length())
    return clock.steps


#: Backends of transformers' QuantizedCache, with the most bits that each has.
QUANTIZED: dict[str, dict[str, int]] = {
    "hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1},
    "quanto": {"nbits": 4},
}


def beside_quantized(models: dict[str, Any], ids: Tensor, tokens: int) -> dict[str, Any]:
    """Tokens/s over ``tokens`` of our cache, and of transformers' QuantizedCache by backend.

    Each cache begins with the prompt; QuantizedCache quantizes everything anew every 128 tokens.
    A backend that is not installed is left out, and said to be.
    """
    from transformers import QuantizedCache

    from kvquant.integrations.transformers import KVQuantCache

    ways: dict[str, Callable[[Any], Any]] = {
        "KVQuantCache": lambda model: KVQuantCache(model.config)
    } | {
        backend: partial(_quantized, QuantizedCache, backend, options)
        for backend, options in QUANTIZED.items()
    }
    found: dict[str, Any] = {}
    for name, build in ways.items():
        speeds = []
        for dtype, model in models.items():
            try:
                cache = build(model)
            except ImportError as error:
                found[name] = str(error).splitlines()[0]
                break
            clock = Clock()
            model.set_attn_implementation("kvquant" if name == "KVQuantCache" else "sdpa")
            greedy(model, ids, cache, tokens, clock)
            speeds.append(1e3 * len(clock.steps) / sum(clock.steps))
            found[f"{name}_{dtype}"] = speeds[-1]
        if speeds:
            found[name] = max(speeds)
    for name in QUANTIZED:
        if isinstance(found[name], float):
            found[f"ratio_to_{name}"] = found["KVQuantCache"] / found[name]
    return found


def _quantized(cache: Any, backend: str, options: dict[str, int], model: Any) -> Any:
    return cache(backend, model.config, **options)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here, on a GPU.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    rounds: int = 3,
    tokens: int = 17,
    seconds: Annotated[float, typer.Option(help="On a GPU: begin nothing after them.")] = 270,
    layers: Annotated[int, typer.Option(help="On a GPU.")] = 16,
    quantized: Annotated[
        bool, typer.Option(help="On the CPU only this: 256 tokens beside QuantizedCache's.")
    ] = False,
) -> None:
    """Print decode tokens/s of both caches in float32 and bfloat16, and the ratios.

    On a GPU: tokens/s, the host's share and memory of six caches.

    Example: python -m benchmarks generate --json generate.json
    """
    torch.set_grad_enabled(False)
    if device == "cuda":
        from benchmarks import generate_gpu

        generate_gpu.run_all(json, plot, seconds, layers)
        return
    folder = cache_folder()
    tokenizer, model = load(folder)
    text = fetch(TEXT, folder).read_text(encoding="latin-1")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TEXT_TOKENS]
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    if quantized:
        beside = Report("256 tokens of generate on the CPU behind 512, SmolLM2-135M, batch 1")
        beside.add(**beside_quantized(models, ids[:, :512], 256))
        beside.finish(json)
        return
    report = Report("generate on the CPU, SmolLM2-135M, batch 1", threads=torch.get_num_threads())
    for context in (64, 512, 4096, 8192):
        prompt = ids.repeat(1, -(-(context + 1) // TEXT_TOKENS))[:, : context + 1]
        caches = {dtype: fill(models[dtype], ids, context) for dtype in models}
        steps: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for dtype, by_name in caches.items():
                for name, cache in by_name.items():
                    steps.setdefault((dtype, name), []).extend(
                        generate(models[dtype], cache, ATTENTION[name], prompt, tokens)
                    )
        speed = {key: 1e3 / statistics.median(values) for key, values in steps.items()}
        best = {name: max(v for k, v in speed.items() if k[1] == name) for name in ATTENTION}
        report.add(
            context=context,
            **{f"{name}_{dtype}": speed[dtype, name] for dtype in models for name in ATTENTION},
            ratio_float32=speed["float32", "KVQuantCache"] / speed["float32", "DynamicCache"],
            ratio_of_fastest=best["KVQuantCache"] / best["DynamicCache"],
        )
    report.finish(json)
