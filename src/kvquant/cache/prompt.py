"""A first prompt's attention: to its keys and values as they are, by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["exact_attention"]

_HALVES = (torch.float16, torch.bfloat16)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> Tensor:
    """A prompt's attention to itself, by torch's own kernels."""
    share = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"is_causal": causal, "scale": scale}
    if share > 1 and q.is_cuda and q.dtype in _HALVES and k.shape[3] == v.shape[3]:
        options["enable_gqa"] = True  # where flash attention takes heads in groups
    elif share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2)
