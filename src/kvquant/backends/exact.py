"""A first prompt's attention: to its keys and values as they are, by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..view import CacheView, Sequences
from .base import Backend, Prepared, Problem, aligned

__all__ = ["Exact", "refuses"]

_HALVES = (torch.float16, torch.bfloat16)


def refuses(problem: Problem) -> str | None:
    """Why torch does not serve a prompt by its exact keys and values, or None."""
    query, key, options = problem.query, problem.key, problem.options
    if key is None or query.shape[1] != key.shape[1] or query.dtype != key.dtype:
        return "its keys are not the queries' own, of their dtype"
    if problem.max_seqlen_q < 2 or problem.seqs.is_packed or problem.seqs.is_padded:
        return "one token, packed rows, or padding"
    if problem.lse or problem.sinks or problem.alibi_slopes:
        return "log-sum-exp, sinks or ALiBi"
    if options.sliding_window or options.softcap or options.softmax_scale <= 0:
        return "a window, a softcap, or a scale that is not positive"
    return None


class Exact(Prepared):
    """Torch's attention, and the append behind it."""

    backend = "torch"
    regime = "scaled_dot_product_attention"

    def __init__(self, problem: Problem, backend: Backend, otherwise: Prepared) -> None:
        self._backend, self._options = backend, problem.options
        self.details = {"appends": otherwise.backend}

    def launch(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        assert key is not None
        assert value is not None
        share = query.shape[2] // key.shape[2]
        q, k, v = (aligned(x).transpose(1, 2) for x in (query, key, value))
        numbers: dict[str, Any] = {
            "is_causal": self._options.causal,
            "scale": self._options.softmax_scale,
        }
        if share > 1 and q.is_cuda and q.dtype in _HALVES and k.shape[3] == v.shape[3]:
            numbers["enable_gqa"] = True  # where flash attention takes heads in groups
        elif share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, **numbers).transpose(1, 2)
        out = found if out is None else out.copy_(found)
        self._backend.append(key, value, view, seqs, None)
        return out
