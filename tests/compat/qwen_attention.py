"""A layer that does with its cache and attention what Qwen's first modeling code does.

Written for these tests from that code's documented steps: keys and values are quantized as they
come, joined to the layer's past along the tokens, and multiplied by one of two functions of the
extension `cache_autogptq_cuda_256`, in float16, or by torch on what `dequantize_cache_torch` gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant.compat.qwen import (
    cache_autogptq_cuda_256,
    dequantize_cache_torch,
    quantize_cache_v,
)

Rows = tuple[Tensor, Tensor, Tensor]
Past = tuple[Rows, Rows]


class QwenAttention(torch.nn.Module):
    """Attention of one layer on ``(batch, tokens, hidden)``, with a quantized past."""

    def __init__(self, hidden: int, heads: int, *, use_cache_kernel: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.c_attn = torch.nn.Linear(hidden, 3 * hidden)
        self.c_proj = torch.nn.Linear(hidden, hidden, bias=False)
        self.cache_kernels: Any = cache_autogptq_cuda_256 if use_cache_kernel else None
        self.qmax, self.qmin = torch.tensor(255.0), torch.tensor(0.0)

    def forward(self, x: Tensor, layer_past: Past | None = None) -> tuple[Tensor, Past]:
        """The output, and the past with the new tokens behind it."""
        batch, tokens, hidden = x.shape
        query, key, value = (
            of.view(batch, tokens, self.heads, self.head_dim).permute(0, 2, 1, 3)
            for of in self.c_attn(x).split(hidden, dim=2)
        )
        present = self.quantized(key), self.quantized(value)
        if layer_past is not None:
            present = tuple(
                tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
                for old, new in zip(layer_past, present, strict=True)
            )
        total = present[0][0].shape[2]
        seen = torch.ones(total, total, dtype=torch.bool, device=x.device).tril()[total - tokens :]
        scores = self.scores(query, *present[0]) / self.head_dim**0.5
        scores = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
        probs = scores.softmax(-1).type(query.dtype)
        out = self.weighted(probs, *present[1]).to(x.dtype)
        return self.c_proj(out.transpose(1, 2).reshape(batch, tokens, hidden)), present

    def quantized(self, x: Tensor) -> Rows:
        return quantize_cache_v(x, bits=8, qmax=self.qmax, qmin=self.qmin)

    def scores(self, query: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.cache_kernels is None:
            return query @ dequantize_cache_torch(q, scale, zero).type(query.dtype).mT
        scores = torch.zeros(*query.shape[:-1], q.shape[2], dtype=torch.half, device=query.device)
        self.cache_kernels.vecquant8matmul_batched_faster_old(
            query.half().contiguous(), q.transpose(-1, -2).contiguous(), scores,
            scale.half().contiguous(), zero.half().contiguous(),
        )  # fmt: skip
        return scores

    def weighted(self, probs: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.cache_kernels is None:
            return probs @ dequantize_cache_torch(q, scale, zero).type(probs.dtype)
        out = torch.zeros(*probs.shape[:-1], q.shape[3], dtype=torch.half, device=probs.device)
        self.cache_kernels.vecquant8matmul_batched_column_compression_faster_old(
            probs.half().contiguous(), q.contiguous(), out,
            scale.half().contiguous(), zero.half().contiguous(),
        )  # fmt: skip
        return out
