"""Attention against the oracle: at most twice the error of torch's own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvquant
import oracle
from support import FP32, Cache, index, starts_of


def attend(cache: Cache, queries: list[Tensor], **options: Any) -> Any:
    """`kvquant.attention` on packed queries of every sequence."""
    return kvquant.attention(
        torch.cat(queries),
        cache.view,
        block_table=cache.table,
        seq_lens=cache.lens,
        cu_seqlens_q=index(starts_of(len(q) for q in queries), cache.device),
        seq_starts=cache.starts,
        **options,
    )


def expected(cache: Cache, queries: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(output, lse) of the oracle on the dequantized cache, packed."""
    return _each(oracle.attention, cache, queries, options)


def torch_own(cache: Cache, queries: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(output, lse) of torch in the queries' dtype on the dequantized cache."""
    return _each(_torch_attention, cache, queries, options)


def _each(function: Any, cache: Cache, queries: list[Tensor], options: dict[str, Any]) -> Any:
    starts = [0] * len(queries) if cache.starts is None else cache.starts.tolist()
    results = [
        function(q, *cache.decode(b), start=starts[b], **options) for b, q in enumerate(queries)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    start: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention's math; softcap and sinks, which it lacks, as eager models."""
    n, heads, _ = query.shape
    length = len(key)
    seen = oracle.visible(n, length, start, causal, window).to(query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q = query.transpose(0, 1)
    k, v = (
        x.to(query.dtype).repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)
        for x in (key, value)
    )
    bias = torch.zeros(heads, n, length, device=query.device)
    if alibi is not None:
        positions = torch.arange(length - n, length, device=query.device)
        distance = (positions[:, None] - torch.arange(length, device=query.device)).abs()
        bias -= alibi[:, None, None] * distance
    bias = bias.masked_fill(~seen, -math.inf)
    score = (q @ k.mT).float() * scale
    if softcap is not None:
        score = softcap * (score / softcap).tanh()
    score = score + bias
    if softcap is None and sinks is None:
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], bias[None], scale=scale
            )[0]
    else:
        logits = score
        if sinks is not None:
            logits = torch.cat([score, sinks[:, None, None].expand(-1, n, 1)], -1)
        out = logits.softmax(-1)[..., :length].to(query.dtype) @ v
    out = out.masked_fill(~seen.any(-1)[:, None], 0)
    lse = score.logsumexp(-1) if length else torch.full((heads, n), -math.inf, device=query.device)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return out.transpose(0, 1), lse.T


def assert_as_good(out: Tensor, ref: Tensor, own: Tensor, floor: float | None = None) -> None:
    """The error against float64 is at most twice torch's own, and one rounding of the dtype."""
    assert out.shape == ref.shape
    floor = floor or (2e-5 if out.dtype == FP32 else torch.finfo(out.dtype).eps / 2)
    out, own = out.double(), own.double()
    assert out.isfinite().all()
    for norm in (torch.linalg.vector_norm, lambda x: x.abs().max() if x.numel() else x.sum()):
        error, allowed = norm(out - ref), 2 * norm(own - ref) + floor * norm(ref)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_lse(lse: Tensor, ref: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    assert lse.dtype == FP32
    assert torch.equal(lse.isneginf(), ref.isneginf())
    kept = ~ref.isneginf()
    assert_as_good(lse[kept], ref[kept], own[kept], floor=2e-5 if dtype == FP32 else 2e-4)


def check_attention(cache: Cache, queries: list[Tensor], **options: Any) -> None:
    """kvquant's output and lse against the oracle's, in kvquant's names of the options."""
    short = {
        "softmax_scale": "scale",
        "sliding_window": "window",
        "alibi_slopes": "alibi",
    }
    plain = {short.get(name, name): value for name, value in options.items()}
    for name in ("split_size", "max_seqlen_q"):  # the result is the same but for rounding
        plain.pop(name, None)
    out, lse = attend(cache, queries, return_lse=True, **options)
    ref, ref_lse = expected(cache, queries, **plain)
    own, own_lse = torch_own(cache, queries, **plain)
    assert out.dtype == queries[0].dtype
    assert_as_good(out, ref, own)
    assert (out[(ref == 0).all(-1)] == 0).all()
    assert_lse(lse, ref_lse, own_lse, queries[0].dtype)
