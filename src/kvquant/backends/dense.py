"""Torch's dense attention kernels that return a log-sum-exp, tried on a device before their use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Dense", "candidates", "find", "rate_of"]

DTYPES = (torch.float16, torch.bfloat16)
_logger = logging.getLogger(__name__.split(".backends")[0])


class Dense(NamedTuple):
    """A dense attention.

    Attributes:
        name: What it is called.
        knows_sizes: It is made anew for every size, which takes far longer than a call.
        rate: Floating-point operations a second on an H200.
        run: ``(query, key, value, causal, scale)`` to ``(out, lse)``: query ``(n, rows, heads,
            dim)``, key and value ``(n, kv_heads, tokens, dim)``, out like query, lse float32 ``(n,
            rows, heads)``. Causal: as many rows as tokens.
    """

    name: str
    knows_sizes: bool
    rate: float
    run: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query.transpose(1, 2), key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return _by_rows(out, lse)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        query.transpose(1, 2), key, value, 0.0, causal, False, scale=scale
    )[:2]
    return _by_rows(out, lse)


def _by_rows(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    n, heads, rows, _ = out.shape
    return out.transpose(1, 2), lse.reshape(n, heads, -1)[..., :rows].transpose(1, 2)


_KERNELS = (Dense("cuDNN", True, 5.5e14, _cudnn), Dense("flash", False, 3e14, _flash))


def candidates(head_dim: int, v_head_dim: int, capability: tuple[int, int]) -> list[str] | str:
    """The kernels that may serve such rows, the fastest first, or why there are none."""
    if capability < (8, 0):
        here = ".".join(map(str, capability))
        return f"torch's dense attention needs compute capability 8.0, not {here}"
    if head_dim != v_head_dim:
        return f"dense kernels that know no sizes take no head_dims {head_dim} and {v_head_dim}"
    # Flash is written for compute capability 8.0; cuDNN takes 1.8x less time on an H200.
    return ["cuDNN", "flash"] if capability[0] in (9, 10) else ["flash"]


def rate_of(names: list[str]) -> float:
    """The highest rate of the kernels of these names."""
    return max(kernel.rate for kernel in _KERNELS if kernel.name in names)


@cache
def find(
    device: int, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int]
) -> tuple[Dense, ...]:
    """The kernels that run on a device, of ``heads`` queries and KV heads; waits for it."""
    names = candidates(*dims, torch.cuda.get_device_capability(device))
    found = []
    for kernel in _KERNELS if isinstance(names, list) else ():
        if kernel.name not in names:
            continue
        if (why := _fails(kernel, device, dtype, heads, dims)) is None:
            found.append(kernel)
        else:
            _logger.info("%s attention does not serve head_dims %s: %s", kernel.name, dims, why)
    return tuple(sorted(found, key=lambda kernel: names.index(kernel.name)))


def _fails(
    kernel: Dense, device: int, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int]
) -> str | None:
    """Why a kernel does not run on random rows, or how it differs from the formula; None: good."""
    rows = 128
    with torch.random.fork_rng([device]), torch.no_grad():
        q, k, v = (
            torch.randn(1, *shape, device=f"cuda:{device}", dtype=dtype)
            for shape in ((rows, heads[0], dims[0]), (heads[1], rows, dims[0]),
                          (heads[1], rows, dims[1]))
        )  # fmt: skip
        scale = dims[0] ** -0.5
        for causal in (False, True):
            try:
                out, lse = kernel.run(q, k, v, causal, scale)
            except RuntimeError as error:
                return str(error).splitlines()[0]
            wide = (x.float().repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
            key, value = wide
            score = q.float().transpose(1, 2) @ key.mT * scale
            if causal:
                hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
                score = score.masked_fill(hidden, -torch.inf)
            expected = (score.softmax(-1) @ value).transpose(1, 2)
            sums = score.logsumexp(-1).transpose(1, 2)
            if out.shape != expected.shape or lse.shape != sums.shape:
                return f"shapes {list(out.shape)}, {list(lse.shape)}"
            off = max(float(x.abs().max()) for x in (out.float() - expected, lse - sums))
            if not off < 0.05:
                return f"it is {off:.2g} off"
    return None
