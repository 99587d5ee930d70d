"""The reference's arithmetic: plain tensors with (scale, zero), and the rotation of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.affine import MAX_ABS, MIN_SCALE

__all__ = [
    "KEYS",
    "chunks",
    "dequantize",
    "pv_matmul",
    "qk_matmul",
    "quantize",
    "rotate",
]

KEYS = 1024  # tokens dequantized at a time


def chunks(count: int, size: int) -> list[tuple[int, int]]:
    """``range(count)`` in (begin, end) pieces of ``size``."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def quantize(
    x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, s, d = x.shape
    groups = -(-s // group_size) if granularity == "channel" else 1
    if not x.numel():
        shape = {"token": (b, h, s, 1), "head": (b, h, 1, 1), "channel": (b, h, groups, d)}
        scale = torch.full(shape[granularity], torch.nan, dtype=torch.float32, device=x.device)
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device), scale, scale.clone()
    rows = x.float()
    if granularity == "channel":
        if pad := groups * group_size - s:  # by the last row, which changes no minimum
            rows = torch.cat([rows, rows[:, :, -1:].expand(b, h, pad, d)], 2)
        rows, over = rows.reshape(b, h, groups, group_size, d), [3]
    else:
        over = [3] if granularity == "token" else [2, 3]
    low, high = rows.amin(over, keepdim=True), rows.amax(over, keepdim=True)
    finite = (rows.abs() <= MAX_ABS).all(dim=over[-1], keepdim=True)
    if len(over) == 2:
        finite = finite.all(dim=2, keepdim=True)
    scale = (high - low) / torch.full_like(low, qmax - qmin)
    scale = scale.maximum(torch.maximum(low.abs(), high.abs()) * 2.0**-20).clamp_min(MIN_SCALE)
    scale = scale.where(finite, torch.nan)
    zero = qmin - low / scale
    codes = (rows * (torch.ones_like(scale) / scale) + zero).round().clamp(qmin, qmax)
    q = codes.where(finite, qmin).to(torch.uint8).contiguous()
    if granularity == "channel":
        q = q.reshape(b, h, -1, d)[:, :, :s].contiguous()
        scale, zero = scale[:, :, :, 0].contiguous(), zero[:, :, :, 0].contiguous()
    return q, scale, zero


def _affine_rows(
    q: Tensor, scale: Tensor, zero: Tensor, group: int, begin: int, end: int
) -> Tensor:
    """Tokens ``begin`` to ``end`` of ``scale * (q - zero)`` in float32."""
    index = torch.arange(begin, end, device=q.device) // max(1, group)
    return scale[:, :, index] * (q[:, :, begin:end].float() - zero[:, :, index])


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for begin, end in chunks(q.shape[2], KEYS):
        out[:, :, begin:end] = _affine_rows(q, scale, zero, group_size, begin, end)
    return out


def qk_matmul(query: Tensor, qk: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    b, heads, rows, d = query.shape
    kv_heads, tokens = qk.shape[1:3]
    out = torch.empty(b, heads, rows, tokens, dtype=query.dtype, device=query.device)
    x = query.float().reshape(b, kv_heads, -1, d)
    for begin, end in chunks(tokens, KEYS):
        keys = _affine_rows(qk, scale, zero, group_size, begin, end)
        out[..., begin:end] = (x @ keys.mT).reshape(b, heads, rows, end - begin)
    return out


def pv_matmul(probs: Tensor, qv: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    b, heads, rows, tokens = probs.shape
    kv_heads, d = qv.shape[1], qv.shape[3]
    shape = (b, kv_heads, heads // kv_heads * rows, d)
    out = torch.zeros(shape, dtype=torch.float32, device=probs.device)
    for begin, end in chunks(tokens, KEYS):
        x = probs[..., begin:end].float().reshape(b, kv_heads, -1, end - begin)
        out += x @ _affine_rows(qv, scale, zero, group_size, begin, end)
    return out.reshape(b, heads, rows, d).to(probs.dtype)


def rotate(x: Tensor, length: int) -> Tensor:
    """Hadamard blocks along the last dimension; its own inverse. The order of steps is fixed."""
    if length < 2:
        return x
    shape, step = x.shape, 1
    while step < length:
        pairs = x.reshape(*shape[:-1], -1, 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2)
        step *= 2
    norm = 0.5 ** (length.bit_length() // 2)
    if length.bit_length() % 2 == 0:  # 2, 8, 32, ..: one factor of sqrt(2) is left
        norm *= 2 * torch.tensor(0.70710678, dtype=torch.float32).item()
    return x.reshape(shape) * norm
