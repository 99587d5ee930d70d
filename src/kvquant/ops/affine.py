"""The operations on plain (q, scale, zero) tensors: schemas, fakes, and checks of direct calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import INT32_MAX, check_float_dtype, check_integer, require
from ..checks import check_affine, check_no_grad, check_rows

__all__ = ["CHECKS", "FAKES", "SCHEMAS", "check_factor"]

_PAIR = "Tensor scale, Tensor zero, int group_size"
SCHEMAS = {
    "quantize": (
        "(Tensor x, float qmin, float qmax, str granularity, int group_size)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "dequantize": f"(Tensor q, {_PAIR}, ScalarType dtype) -> Tensor",
    "qk_matmul": f"(Tensor query, Tensor qk, {_PAIR}) -> Tensor",
    "pv_matmul": f"(Tensor probs, Tensor qv, {_PAIR}) -> Tensor",
}


def check_factor(name: str, x: Tensor, codes: str, q: Tensor, last: int) -> None:
    """What multiplies quantized tensors: float rows that fit them."""
    check_rows(name, x, 4, any_dim=True)
    check_no_grad(**{name: x})
    require(q.shape[1] > 0, f"{codes}: expected a head at least, got shape {list(q.shape)}")
    require(
        x.shape[0] == q.shape[0] and x.shape[1] % q.shape[1] == 0 and x.shape[3] == last,
        f"{name}: expected shape [{q.shape[0]}, a multiple of {q.shape[1]}, any, {last}], got "
        f"{list(x.shape)}",
    )
    require(x.device == q.device, f"{name}: on {x.device}, but the quantized tensor on {q.device}")


def _check_pair(name: str, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> None:
    check_integer("group_size", group_size, 1, INT32_MAX)
    check_affine(name, q, scale, zero, group_size)
    for label, x in (("scale", scale), ("zero", zero)):
        if x.dtype != torch.float32:
            raise TypeError(f"{label}: expected {torch.float32}, got {x.dtype}")
    groups = -(-q.shape[2] // group_size)  # row t uses pair t // group_size
    require(
        scale.shape[2] in (groups, max(1, groups)),
        f"group_size: {group_size} does not go with a scale of shape {list(scale.shape)} and "
        f"{q.shape[2]} tokens",
    )


def _check_quantize(x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int) -> None:
    check_rows("x", x, 4, any_dim=True)
    require(
        0 <= qmin < qmax <= 255, f"qmin, qmax: expected 0 <= qmin < qmax <= 255, got {qmin}, {qmax}"
    )
    require(
        granularity in ("token", "head", "channel"),
        f"granularity: expected 'token', 'head' or 'channel', got {granularity!r}",
    )
    check_integer("group_size", group_size, 1 if granularity == "channel" else 0, INT32_MAX)


def _check_dequantize(
    q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> None:
    _check_pair("q", q, scale, zero, group_size)
    check_float_dtype("dtype", dtype)


def _check_qk(query: Tensor, qk: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> None:
    _check_pair("qk", qk, scale, zero, group_size)
    check_factor("query", query, "qk", qk, qk.shape[3])


def _check_pv(probs: Tensor, qv: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> None:
    _check_pair("qv", qv, scale, zero, group_size)
    check_factor("probs", probs, "qv", qv, qv.shape[2])


CHECKS: dict[str, Callable[..., None]] = {
    "quantize": _check_quantize,
    "dequantize": _check_dequantize,
    "qk_matmul": _check_qk,
    "pv_matmul": _check_pv,
}


def _fake_quantize(
    x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize(x, qmin, qmax, granularity, group_size)
    b, h, s, d = x.shape
    shape = {
        "token": (b, h, s, 1),
        "head": (b, h, 1, 1),
        "channel": (b, h, -(-s // group_size) if group_size else 1, d),
    }[granularity]
    pair = [x.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=torch.uint8), pair[0], pair[1]


def _fake_dequantize(
    q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    _check_dequantize(q, scale, zero, group_size, dtype)
    return q.new_empty(q.shape, dtype=dtype)


def _fake_qk(query: Tensor, qk: Tensor, *args: Any) -> Tensor:
    _check_qk(query, qk, *args)
    return query.new_empty(*query.shape[:-1], qk.shape[-2])


def _fake_pv(probs: Tensor, qv: Tensor, *args: Any) -> Tensor:
    _check_pv(probs, qv, *args)
    return probs.new_empty(*probs.shape[:-1], qv.shape[-1])


FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "dequantize": _fake_dequantize,
    "qk_matmul": _fake_qk,
    "pv_matmul": _fake_pv,
}
