"""How far a cache moves a model: next-token distributions against an fp32 cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import CacheFormat
from .model import cache_argument, use_attention_of

__all__ = ["KEY_BIAS", "Score", "caches", "fp16_bytes", "key_bias", "measure", "rounded_cache"]

KEY_BIAS = 100.0  # standard deviation, as large as Qwen2's


@dataclass(frozen=True, slots=True)
class Score:
    """Of one cache.

    Attributes:
        ppl: Perplexity of the text.
        kl: Mean Kullback-Leibler divergence from the fp32 cache's distribution, in nats.
        top1: Share of positions with the same most likely token.
    """

    ppl: float
    kl: float
    top1: float

    def as_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        return asdict(self)


def rounded_cache(config: Any, dtype: torch.dtype) -> Any:
    """A full cache whose keys and values are rounded to ``dtype`` as they come."""
    from transformers import DynamicCache

    limit = torch.finfo(dtype).max

    class RoundedCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> Any:
            key, value = (
                x.clamp(-limit, limit).to(dtype).to(x.dtype) for x in (key_states, value_states)
            )
            return super().update(key, value, *args, **kw)

    return RoundedCache(config=config)


def caches(config: Any, tokens: int) -> dict[str, Any]:
    """The caches that the demo compares, by name; "fp32" is the reference."""
    from transformers import DynamicCache

    from ..integrations.transformers import KVQuantCache

    def ours(format: CacheFormat) -> Any:
        return KVQuantCache(config, max_cache_len=tokens, format=format, exact_prompt=False)

    return {
        "fp32": DynamicCache(config=config),
        "bf16": rounded_cache(config, torch.bfloat16),
        "fp8": rounded_cache(config, torch.float8_e4m3fn),
        "int8_plain": ours(CacheFormat.plain()),
        "kvquant": ours(CacheFormat()),
        "k8v4": ours(CacheFormat.named("k8v4")),
        "k4v4": ours(CacheFormat.named("k4v4")),
    }


@torch.no_grad()
def measure(
    model: Any,
    ids: Tensor,
    by_name: dict[str, Any],
    *,
    chunk: int = 256,
    first: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Score]:
    """Read a text through each cache and compare the distributions with the first one's.

    The caches go through the text side by side, ``chunk`` tokens at a time, so that two chunks of
    logits are all that is ever kept. Every query sees stored rows, its own token's among them.

    Args:
        model: A causal language model.
        ids: The text, ``(1, tokens)``.
        by_name: Empty caches; the first is the reference.
        chunk: Tokens of a step.
        first: The position from which on they are compared.
        advance: Told the tokens of each finished forward.
    """
    total = ids.shape[1]
    count = total - first
    sums = {name: [0.0, 0.0, 0.0] for name in by_name}
    for begin in range(0, total, chunk):
        part = ids[:, begin : begin + chunk]
        next_ids = ids[0, max(begin, first) + 1 : begin + 1 + chunk]
        reference: Tensor | None = None
        for name, cache in by_name.items():
            use_attention_of(model, cache)
            logits = model(input_ids=part, use_cache=True, **cache_argument(cache)).logits[0]
            scores = F.log_softmax(logits.float(), -1)[max(0, first - begin) :]
            if reference is None:
                reference = scores
            nll = -scores[: len(next_ids)].gather(1, next_ids.unsqueeze(1)).sum()
            kl = (reference.exp() * (reference - scores)).sum()
            same = (scores.argmax(-1) == reference.argmax(-1)).sum()
            for index, number in enumerate((nll, kl, same)):
                sums[name][index] += number.item()
            advance(part.shape[1])
    return {
        name: Score(ppl=math.exp(nll / (count - 1)), kl=kl / count, top1=same / count)
        for name, (nll, kl, same) in sums.items()
    }


@contextmanager
def key_bias(model: Any, std: float = KEY_BIAS) -> Iterator[None]:
    """Give a Llama model key biases like Qwen2's: large, on three low-frequency pairs a head."""
    config = model.config
    heads, dim = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    half = dim // 2
    generator = torch.Generator().manual_seed(0)
    projections = [layer.self_attn.k_proj for layer in model.model.layers]
    before = [projection.bias for projection in projections]
    try:
        for projection in projections:
            bias = torch.zeros(heads, dim)
            for head in range(heads):
                pairs = half - 8 + torch.randperm(8, generator=generator)[:3]
                bias[head, pairs] = std * torch.randn(3, generator=generator)
                bias[head, pairs + half] = std * torch.randn(3, generator=generator)
            projection.bias = torch.nn.Parameter(
                bias.flatten().to(projection.weight), requires_grad=False
            )
        yield
    finally:
        for projection, bias_before in zip(projections, before, strict=True):
            projection.bias = bias_before


def fp16_bytes(model: Any, tokens: int) -> int:
    """Bytes of a 16-bit cache of one sequence."""
    config = model.config
    dim = model.model.layers[0].self_attn.head_dim
    return int(config.num_hidden_layers * config.num_key_value_heads * 2 * dim * 2 * tokens)
