"""Time of a decode step at a long context: transformers' own cache beside the 8-bit one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .model import cache_argument

__all__ = ["decode_times"]


@torch.no_grad()
def decode_times(
    model: Any,
    ids: Tensor,
    *,
    context: int,
    steps: int = 20,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """Median milliseconds of a step behind ``context`` tokens, for "dense" and "kvquant".

    Dense is transformers' DynamicCache with sdpa, in the model's dtype. Both caches hold the same
    rows, those of ``ids`` over and over: their number is what takes time. The steps of the two
    alternate, so that both meet the same machine.

    Args:
        model: A causal language model.
        ids: A text, ``(1, tokens)``.
        context: Tokens in the caches.
        steps: Timed steps of each, three more warm up.
        advance: Told of each finished step.
    """
    from transformers import DynamicCache

    from ..integrations.transformers import KVQuantCache

    warm_up = 3
    text, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(text))
    ours = KVQuantCache(model.config, max_cache_len=context + steps + warm_up)
    times_over = -(-context // ids.shape[1])
    for index, layer in enumerate(text.layers):
        rows = [x.repeat(1, 1, times_over, 1)[:, :, :context] for x in (layer.keys, layer.values)]
        dense.update(*rows, index)
        ours.update(*rows, index)
        ours.layers[index].flush()
    caches = {"dense": (dense, "sdpa"), "kvquant": (ours, "kvquant")}
    times: dict[str, list[float]] = {name: [] for name in caches}
    token = ids[:, -1:]
    for step in range(steps + warm_up):
        for name, (cache, attention) in caches.items():
            model.set_attn_implementation(attention)
            _synchronize(model.device)
            begin_time = time.perf_counter()
            model(input_ids=token, use_cache=True, **cache_argument(cache))
            _synchronize(model.device)
            if step >= warm_up:
                times[name].append((time.perf_counter() - begin_time) * 1e3)
            advance(1)
    model.set_attn_implementation("kvquant")
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
