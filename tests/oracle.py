"""What kvquant computes, in float64 and plain steps: the formula of docs and docstrings, no more.

A token's row is ``R.T @ (scale * q + offset + mean)``. Nothing here calls kvquant; a view is any
object with its tensors and a format as attributes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MAX_ABS = 65504.0
MIN_SCALE = 2.0**-24
MIN_MEAN_ROWS = 16


def hadamard(dim: int) -> Tensor:
    """Orthonormal, symmetric, block-diagonal in the largest power of two that divides ``dim``."""
    length = 1
    while dim % (2 * length) == 0:
        length *= 2
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < length:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / math.sqrt(length)] * (dim // length))


def rotation(on: bool, dim: int, device: torch.device | str = "cpu") -> Tensor:
    matrix = hadamard(dim) if on else torch.eye(dim, dtype=torch.float64)
    return matrix.to(device)


def finite_rows(x: Tensor) -> Tensor:
    """Which rows count as finite: all elements within fp16's range."""
    return (x.double().abs() <= MAX_ABS).all(-1)  # False for NaN


# Row formats: the fp32 recipe of each, step by step.


def half_down(x: np.ndarray) -> np.ndarray:
    """The largest fp16 <= x."""
    half = x.astype(np.float16)
    return np.where(half.astype(np.float64) > x, np.nextafter(half, np.float16(-np.inf)), half)


def half_up(x: np.ndarray) -> np.ndarray:
    """The smallest fp16 >= x."""
    return -half_down(-x)


class Int8:
    """``x ~ scale * code + offset``, params (scale, offset); byte c is channel c's code."""

    max_code = 255

    @staticmethod
    def pack(codes: np.ndarray) -> np.ndarray:
        return codes

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        return packed

    @staticmethod
    def params(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        offset = half_down(low)
        span = (high - offset.astype(np.float32)) / np.float32(255)
        return np.stack([half_up(np.maximum(span, np.float32(MIN_SCALE))), offset], -1)

    @staticmethod
    def affine(params: Tensor) -> tuple[Tensor, Tensor]:
        scale, offset = params.double().unbind(-1)
        return scale, offset

    @staticmethod
    def check(low: Tensor, high: Tensor, params: Tensor, slack: Tensor | float) -> None:
        """No larger a step than rows between ``low`` and ``high`` need."""
        scale, offset = Int8.affine(params)
        assert (offset <= low + slack).all()
        assert (offset >= low - slack - 2.0**-10 * low.abs() - 2.0**-24).all()
        assert (scale <= (high - offset + slack) / 255 * (1 + 2.0**-10) + 2.0**-23).all()


class Int4(Int8):
    """The range in 16 steps, codes in their middles; byte j: codes of channels 2j and 2j + 1."""

    max_code = 15

    @staticmethod
    def pack(codes: np.ndarray) -> np.ndarray:
        return codes[..., 0::2] + 16 * codes[..., 1::2]

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        codes = packed.new_empty(*packed.shape[:-1], 2 * packed.shape[-1])
        codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
        return codes

    @staticmethod
    def params(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        offset = half_down(low + (high - low) * np.float32(1 / 32))
        span = (high - offset.astype(np.float32)) / np.float32(15.5)
        return np.stack([half_up(np.maximum(span, np.float32(MIN_SCALE))), offset], -1)

    @staticmethod
    def check(low: Tensor, high: Tensor, params: Tensor, slack: Tensor | float) -> None:
        """No larger a step than rows between ``low`` and ``high`` need."""
        scale, offset = Int8.affine(params)
        middle = low + (high - low) / 32
        assert (offset <= middle + slack).all()
        assert (offset >= middle - slack - 2.0**-10 * middle.abs() - 2.0**-24).all()
        assert (scale <= (high - offset + slack) / 15.5 * (1 + 2.0**-10) + 2.0**-23).all()


ROW_FORMATS = {"int8": Int8, "int4": Int4}


def encode(x: Tensor, name: str = "int8") -> tuple[Tensor, Tensor]:
    """Codes uint8 and params fp16 of rows as they are stored; NaN params where not finite."""
    bad = ~finite_rows(x).cpu().numpy()
    y = x.float().cpu().numpy().copy()
    y[bad] = 0
    of = ROW_FORMATS[name]
    params = of.params(y.min(-1), y.max(-1)).astype(np.float16)
    pair = of.affine(torch.from_numpy(params))
    scale, offset = (each.numpy().astype(np.float32)[..., None] for each in pair)
    steps = (y - offset) * (np.float32(1) / scale)
    params[bad] = np.nan
    codes = of.pack(np.clip(np.rint(steps), 0, of.max_code).astype(np.uint8))
    return torch.from_numpy(codes).to(x.device), torch.from_numpy(params).to(x.device)


# What a view holds.


def places(view, table: Tensor, sequence: int, length: int) -> tuple[Tensor, Tensor]:
    """Block and row of a sequence's tokens."""
    size = view.block_size
    token = torch.arange(length, device=table.device)
    return table[sequence, token // size].long(), token % size


def means(view, table: Tensor, sequence: int, length: int) -> Tensor:
    """The stored key mean of each of a sequence's tokens, ``(length, kv_heads, k_dim)``."""
    group, size = view.format.key_mean, view.block_size
    if group is None:
        heads, dim = view.num_kv_heads, view.k.head_dim
        return torch.zeros(length, heads, dim, dtype=torch.float64, device=table.device)
    start = torch.arange(length, device=table.device) // group * group
    home, slot = table[sequence, start // size].long(), start % size // group
    return view.mean.view(torch.float16)[home, :, slot].double()


def stored(view, table: Tensor, sequence: int, length: int) -> tuple[Tensor, Tensor]:
    """A sequence's keys and values in the basis they are stored in, ``(length, kv_heads, dim)``."""
    block, row = places(view, table, sequence, length)

    def decoded(rows) -> Tensor:
        params = rows.params.view(torch.float16)[block, :, row]
        of = ROW_FORMATS[rows.format.name]
        scale, offset = of.affine(params)
        codes = of.unpack(rows.codes[block, :, row]).double()
        return scale[..., None] * codes + offset[..., None]

    key, value = decoded(view.k), decoded(view.v)
    return key + means(view, table, sequence, length), value


def decode(view, table: Tensor, sequence: int, length: int) -> tuple[Tensor, Tensor]:
    """A sequence's keys and values as attention sees them."""
    key, value = stored(view, table, sequence, length)
    fmt = view.format
    return (
        key @ rotation(fmt.key_rotation, key.shape[-1], key.device),
        value @ rotation(fmt.value_rotation, value.shape[-1], value.device),
    )


def new_means(
    before: Tensor, incoming: Tensor, counts: Tensor, group: int, start: int = 0
) -> dict[int, Tensor]:
    """Means of the groups that an append opens, by group index, each ``(kv_heads, dim)``.

    ``before`` and ``incoming`` are the sequence's stored (dequantized) and new rows in the rotated
    basis; ``counts`` tells which of all these rows are there (not skipped), per (row, head).
    """
    rows = torch.cat([before, incoming])
    length, total, heads = len(before), len(rows), rows.shape[1]
    usable = counts & rows.isfinite().all(-1)
    usable[:start] = False

    def mean_of(begin: int, end: int, head: int) -> tuple[int, Tensor]:
        chosen = rows[begin:end, head][usable[begin:end, head]]
        return len(chosen), chosen.mean(0)

    result = {}
    for index in range(-(-length // group), -(-total // group)):
        begin, mean = index * group, torch.zeros_like(rows[0])
        for head in range(heads):
            found, previous = mean_of(begin - group, begin, head) if index else (0, None)
            if not found:
                own, previous = mean_of(begin, min(begin + group, total), head)
                if own < MIN_MEAN_ROWS:
                    continue
            mean[head] = previous.clamp(-MAX_ABS, MAX_ABS)
        result[index] = mean
    return result


# Attention.


def visible(
    queries: int, length: int, start: int = 0, causal: bool = True, window: int | None = None
) -> Tensor:
    """Which tokens each query sees, ``(queries, length)``."""
    position = torch.arange(length - queries, length)[:, None]
    token = torch.arange(length)[None]
    seen = (token >= start).expand(queries, length)
    if causal:
        seen = seen & (token <= position)
    if window is not None:
        seen = seen & (token > position - window)
    return seen


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    start: int = 0,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: query ``(n, q_heads, k_dim)``, key and value ``(length, kv_heads, dim)``.

    Returns the output ``(n, q_heads, v_dim)`` and the log-sum-exp ``(n, q_heads)`` of the scores,
    the sink among them.
    """
    n, heads, dim = query.shape
    length, kv_heads, _ = key.shape
    scale = dim**-0.5 if scale is None else scale
    seen = visible(n, length, start, causal, window).to(query.device)
    positions = torch.arange(length - n, length, dtype=torch.float64, device=query.device)
    distance = (positions[:, None] - torch.arange(length, device=query.device)).abs()
    used = seen.any(0)  # what no query sees may hold anything
    out, lse = [], []
    for h in range(heads):
        k, v = (x[used, h * kv_heads // heads].double() for x in (key, value))
        score = scale * query[:, h].double() @ k.T
        if softcap is not None:
            score = softcap * (score / softcap).tanh()
        if alibi is not None:
            score = score - alibi[h].double() * distance[:, used]
        score = score.masked_fill(~seen[:, used], -math.inf)
        total = score.logsumexp(1) if len(k) else torch.full_like(positions, -math.inf)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[h].double())
        lse.append(total)
        weights = (score - total[:, None]).exp().masked_fill(~seen[:, used], 0)
        out.append(weights @ v)
    return torch.stack(out, 1), torch.stack(lse, 1)


# Plain (q, scale, zero) tensors.


def dequantize(q: Tensor, scale: Tensor, zero: Tensor, group: int | None = None) -> Tensor:
    """``scale * (q - zero)`` with each pair spread over what shares it."""
    tokens = q.shape[2]

    def spread(x: Tensor) -> Tensor:
        x = x.double()
        if x.shape[2] not in (1, tokens) or (group and x.shape[3] != 1):
            x = x.repeat_interleave(group or tokens, dim=2)[:, :, :tokens]
        return x

    return spread(scale) * (q.double() - spread(zero))
