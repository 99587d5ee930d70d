"""The operations on plain (q, scale, zero) tensors, their arguments checked."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .arguments import (
    INT32_MAX,
    check_float_dtype,
    check_integer,
    check_number,
    check_tensor,
    require,
)
from .checks import check_affine, check_no_grad, check_rows
from .formats.int4 import pack, unpack
from .ops.affine import check_factor

__all__ = ["dequantize_cache_torch", "pv_matmul", "qk_matmul", "quantize_cache_v"]

_PACKED = 4  # bits of codes of which two share a byte

Granularity = Literal["token", "head", "channel"]


def quantize_cache_v(
    x: Tensor,
    bits: int = 8,
    qmax: int | Tensor | None = None,
    qmin: int | Tensor | None = None,
    *,
    granularity: Granularity = "token",
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize keys or values to uint8 codes with ``x ~ scale * (q - zero)``.

    Args:
        x: ``(batch, heads, tokens, head_dim)``, float16, bfloat16 or float32, last dimension
            contiguous.
        bits: Bits of a code, at most 8. With 4, two codes share a byte, as in "int4" rows: byte
            ``j`` has channel ``2 j`` in its low four bits and ``2 j + 1`` in its high ones.
        qmax: Largest code, ``2**bits - 1`` by default.
        qmin: Smallest code, 0 by default.
        granularity: What shares a pair: the channels of a "token" and head, all of a "head", or a
            "channel" over ``group_size`` tokens (KIVI's keys).
        group_size: Tokens that share a pair with ``granularity="channel"``; None: all of them.

    Returns:
        ``q`` uint8 of x's shape (with 4 bits, of half as many channels), and float32 ``scale`` and
        ``zero`` of shape (b, h, s, 1) for "token", (b, h, 1, 1) for "head", (b, h,
        ceil(s / group_size), d) for "channel". Where the shared elements hold a NaN or exceed
        65504, both are NaN.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: A shape, stride or option that is not supported.
    """
    check_rows("x", x, 4, any_dim=True)
    check_no_grad(x=x)
    bits = check_integer("bits", bits, 1, 8)
    high = float(2**bits - 1) if qmax is None else _code("qmax", qmax)
    low = 0.0 if qmin is None else _code("qmin", qmin)
    if not 0 <= low < high <= 255:
        raise ValueError(f"qmin, qmax: expected 0 <= qmin < qmax <= 255, got {low:g} and {high:g}")
    require(
        bits != _PACKED or (x.shape[3] % 2 == 0 and high <= 15),
        f"x: 4 bits need an even head_dim and codes up to 15, got {x.shape[3]} and {high:g}",
    )
    require(
        isinstance(granularity, str) and granularity in ("token", "head", "channel"),
        f"granularity: expected 'token', 'head' or 'channel', got {granularity!r}",
    )
    if granularity != "channel":
        require(group_size is None, f"group_size: only for 'channel', not {granularity!r}")
        group = 0
    elif group_size is None:
        group = max(1, x.shape[2])
    else:
        group = min(check_integer("group_size", group_size, 1, INT32_MAX), max(1, x.shape[2]))
    q, scale, zero = ops.call("quantize", x, low, high, granularity, group)
    return pack(q) if bits == _PACKED else q, scale, zero


def dequantize_cache_torch(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    dtype: torch.dtype | None = None,
    *,
    group_size: int | None = None,
    bits: int = 8,
) -> Tensor:
    """``scale * (q - zero)`` for every granularity of `quantize_cache_v`.

    Args:
        q: uint8 ``(batch, heads, tokens, head_dim)``.
        scale: As returned by `quantize_cache_v`: its shape tells the granularity.
        zero: Like ``scale``.
        dtype: Of the result: float16, bfloat16 or float32; scale's by default.
        group_size: As given to `quantize_cache_v`.
        bits: As given to `quantize_cache_v`: with 4, ``q`` has ``head_dim // 2`` bytes a row.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Shapes that do not belong together.
    """
    q = _codes("q", q, bits)
    group = check_affine("q", q, scale, zero, group_size)
    dtype = scale.dtype if dtype is None else dtype
    check_float_dtype("dtype", dtype)
    result: Tensor = ops.call("dequantize", q, scale.float(), zero.float(), group, dtype)
    return result


def qk_matmul(
    query: Tensor,
    qk: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    group_size: int | None = None,
    bits: int = 8,
) -> Tensor:
    """Scores of queries against quantized keys, ``query @ dequantized(qk).mT``, without a scale.

    Args:
        query: ``(batch, q_heads, q_tokens, head_dim)``.
        qk: uint8 ``(batch, kv_heads, tokens, head_dim)``; kv_heads divides q_heads.
        scale: As returned by `quantize_cache_v`, any granularity.
        zero: Like ``scale``.
        group_size: As given to `quantize_cache_v`.
        bits: As given to `quantize_cache_v`.

    Returns:
        ``(batch, q_heads, q_tokens, tokens)`` in the query's dtype, accumulated in float32.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Shapes that do not belong together.
    """
    qk = _codes("qk", qk, bits)
    group = check_affine("qk", qk, scale, zero, group_size)
    check_factor("query", query, "qk", qk, qk.shape[3])
    result: Tensor = ops.call("qk_matmul", query, qk, scale.float(), zero.float(), group)
    return result


def pv_matmul(
    probs: Tensor,
    qv: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    group_size: int | None = None,
    bits: int = 8,
) -> Tensor:
    """Attention probabilities times quantized values, ``probs @ dequantized(qv)``.

    Args:
        probs: ``(batch, q_heads, q_tokens, tokens)``.
        qv: uint8 ``(batch, kv_heads, tokens, head_dim)``; kv_heads divides q_heads.
        scale: As returned by `quantize_cache_v`, any granularity.
        zero: Like ``scale``.
        group_size: As given to `quantize_cache_v`.
        bits: As given to `quantize_cache_v`.

    Returns:
        ``(batch, q_heads, q_tokens, head_dim)`` in probs' dtype, accumulated in float32.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Shapes that do not belong together.
    """
    qv = _codes("qv", qv, bits)
    group = check_affine("qv", qv, scale, zero, group_size)
    check_factor("probs", probs, "qv", qv, qv.shape[2])
    result: Tensor = ops.call("pv_matmul", probs, qv, scale.float(), zero.float(), group)
    return result


def _codes(name: str, q: Tensor, bits: int) -> Tensor:
    """A byte a code, of what `quantize_cache_v` made with ``bits``."""
    check_tensor(name, q)
    if check_integer("bits", bits, 1, 8) != _PACKED:
        return q
    require(q.dtype == torch.uint8, f"{name}: expected torch.uint8, got {q.dtype}", TypeError)
    require(q.dim() == 4, f"{name}: expected 4 dimensions, got shape {list(q.shape)}")
    return unpack(q)


def _code(name: str, code: Any) -> float:
    """A smallest or largest code, which Qwen's callers may give as a tensor of one element."""
    if isinstance(code, Tensor):
        require(code.numel() == 1, f"{name}: expected one number, got shape {list(code.shape)}")
        code = code.item()
    return check_number(name, code if isinstance(code, float) else check_integer(name, code))
