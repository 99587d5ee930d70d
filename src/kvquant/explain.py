"""Which implementation would serve a call, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from . import backends
from .arguments import (
    check_device,
    check_float_dtype,
    check_head_dim,
    check_integer,
    require,
)
from .cache.cache import QuantizedKVCache
from .formats import CacheFormat
from .ops import OPS
from .plan import plan
from .view import CacheView, Sequences

__all__ = ["Explanation", "explain"]

_ON_CACHE = ("append_", "attention", "gather")
_OPS = (*(name for name in OPS if not name.endswith("_")), *_ON_CACHE)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found; ``print`` shows it.

    Attributes:
        op: The operation, as it is called in `kvquant`.
        backend: Who would serve it: "cuda", "cpu" or "reference".
        reason: Why this one.
        details: More to know about it, by name.
    """

    op: str
    backend: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        lines += [f"  {name}: {value}" for name, value in self.details.items()]
        return "\n".join(lines)


def explain(
    cache: QuantizedKVCache | None = None,
    *,
    op: str = "attention",
    device: torch.device | str | int | None = None,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float16,
    format: CacheFormat | str | None = None,
    layer: int = 0,
) -> Explanation:
    """Say which implementation would serve an operation, on a cache or on tensors of this kind.

    Args:
        cache: Explain a call on this cache: its device, head_dims and format count.
        op: "attention", "append_", "gather", "quantize", "dequantize", "qk_matmul" or "pv_matmul".
        device: Of the tensors; torch's default device by default.
        head_dim: Channels of a key.
        v_head_dim: Channels of a value; ``head_dim`` by default.
        dtype: Of the caller's tensors.
        format: Of the cached rows, or its name.
        layer: Of the cache, whose layers may differ in format.

    Raises:
        ValueError: An operation that there is not, a head_dim that no cache has.
        TypeError: A dtype that no operation takes, a format that is none.
    """
    require(
        isinstance(op, str) and op in _OPS, f"op: expected one of {', '.join(_OPS)}, got {op!r}"
    )
    check_float_dtype("dtype", dtype)
    require(
        cache is None or isinstance(cache, QuantizedKVCache),
        f"cache: expected a QuantizedKVCache, got {type(cache).__name__}",
        TypeError,
    )
    if cache is not None:
        formats = cache.formats
        device, format = cache.device, formats[check_integer("layer", layer, 0, len(formats) - 1)]
        head_dim, v_head_dim = cache.head_dim, cache.v_head_dim
    head_dim = check_head_dim("head_dim", head_dim)
    v_dim = head_dim if v_head_dim is None else check_head_dim("v_head_dim", v_head_dim)
    fmt = CacheFormat.of_layers(format, 1)[0]
    target = check_device("device", device)
    view = None
    if op in _ON_CACHE:
        view = CacheView.allocate(1, 1, 16, head_dim, v_dim, format=fmt, device=target)
    backend, reason = backends.choose(target, None if view is None else view.spec)
    details: dict[str, Any] = {"device": _device_name(target)}
    if backend.name != "reference":
        details.update(backends.build_info())
    if op in _ON_CACHE:
        stored, plain = fmt.row_bytes(head_dim, v_dim), 2 * (head_dim + v_dim)
        details["format"] = fmt
        details["bytes of a token and head"] = f"{stored}, {plain / stored:.2f}x less than float16"
        if fmt.by_age:
            details["young rows"] = (
                f"{fmt.young_bytes(head_dim, v_dim)} bytes more a sequence and head: its first and "
                f"its newest tokens, {fmt.young_tokens} rows of 8 bits"
            )
    if op == "attention" and view is not None:
        young = fmt.young_bytes(head_dim, v_dim) if fmt.by_age else None
        details.update(_planned(view, dtype, young))
    if cache is not None:
        details["cache"] = repr(cache)
    if cache is not None and op == "attention":
        details["prompt"] = _prompt(cache)
    return Explanation(op, backend.name, reason, details)


def _prompt(cache: QuantizedKVCache) -> str:
    """What `QuantizedKVCache.attend` does with a first prompt."""
    if cache.max_length:
        return "not empty: attend reads the stored rows"
    if cache.seq_starts is not None:
        return "left-padded: a first prompt, too, is attended to through the stored rows"
    return (
        "empty: a first dense prompt attends to its own keys and values as they are, by torch's "
        "scaled_dot_product_attention (unless exact_prompt=False, return_lse, a window, softcap, "
        "sinks or alibi)"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return str(device)


def _planned(view: CacheView, dtype: torch.dtype, young: int | None) -> dict[str, Any]:
    """The kernels of a decode step, on a cache of one block."""
    index = torch.zeros(1, 1, dtype=torch.int32, device=view.device)
    query, value = (
        torch.empty(1, 1, 1, rows.head_dim, dtype=dtype, device=view.device)
        for rows in (view.k, view.v)
    )
    slabs = None if young is None else index.new_empty((1, 1, young), dtype=torch.uint8)
    found = plan(query, view, Sequences(index, index[0], young=slabs), query, value)
    return {"kernels": found.regime, **found.details}
