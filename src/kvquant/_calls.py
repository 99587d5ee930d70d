"""Checks of a cache's calls, apart from what every function of kvquant checks."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from kvquant._checks import check_index, check_no_grad, check_rows, check_storage, require
from kvquant._config import CacheConfig
from kvquant._state import CacheState
from kvquant.storage import LayerStorage

__all__ = ["check_call", "finite", "look", "positive", "ragged"]


def look(x: Tensor | None) -> tuple[Any, ...] | None:
    """What checks of a tensor depend on."""
    if isinstance(x, Tensor):
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    return None if x is None else (type(x), id(x))


def check_call(
    config: CacheConfig,
    storage: LayerStorage,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    *,
    packed: bool,
) -> None:
    """The tensors of an append, an attend or both."""
    dims = 3 if packed else 4
    require((key is None) == (value is None), "key, value: expected both or neither")
    require(query is not None or key is not None, "key: expected a tensor, got None", TypeError)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is not None:
            check_rows(name, x, dims)
            check_no_grad(**{name: x})
            check_storage(
                storage,
                x,
                key_dim=None if name == "value" else x.shape[-1],
                value_dim=x.shape[-1] if name == "value" else None,
            )
            require(
                dims == 3 or x.shape[0] == config.batch_size,
                f"{name}: batch {x.shape[0]}, but the cache has {config.batch_size}",
            )
    if key is not None and value is not None:
        require(
            key.shape[:-1] == value.shape[:-1] and key.dtype == value.dtype,
            f"value: expected key's dtype and shape but for head_dim ({key.dtype}, "
            f"{list(key.shape)}), got {value.dtype}, {list(value.shape)}",
        )
        require(
            key.shape[-2] == config.kv_heads,
            f"key: {key.shape[-2]} heads, but the storage has {config.kv_heads}",
        )
    if query is not None:
        require(
            query.shape[-2] > 0 and query.shape[-2] % config.kv_heads == 0,
            f"query: {query.shape[-2]} heads are no multiple of the storage's "
            f"{config.kv_heads} (got shape {list(query.shape)})",
        )
        require(
            key is None or dims == 4 or key.shape[0] == query.shape[0],
            "key: packed rows must be as many as query's",
        )


def ragged(
    state: CacheState, name: str, cu: Tensor, rows: Tensor, most: int | None
) -> tuple[Tensor, list[int], int]:
    """``cu`` on the device, bounds of each sequence's rows, and the largest of them."""
    if not isinstance(cu, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(cu).__name__}")
    config, total = state.config, rows.shape[0]
    device = cu.device if cu.device.type == "cpu" else config.device
    check_index(name, cu, config.batch_size + 1, device)
    label = name.replace("cu_seqlens", "max_seqlen")
    require(most is None or most >= 0, f"{label}: expected none or more, got {most}")
    if cu.device.type != "cpu":
        state.inexact = True
        most = total if most is None else min(most, total)
        return cu, [most] * config.batch_size, most
    edges = cu.tolist()
    counts = [end - begin for begin, end in pairwise(edges)]
    require(
        min(counts) >= 0 and edges[0] >= 0 and edges[-1] <= total,
        f"{name}: expected offsets into {total} rows that never fall, got {edges}",
    )
    require(
        most is None or max(counts) <= most,
        f"{label}: {most}, but a sequence has {max(counts)} rows",
    )
    return cu.to(config.device, non_blocking=True), counts, max(counts)


def _number(name: str, number: float, above: float, kind: str) -> float:
    require(above < number < math.inf, f"{name}: expected a {kind} number, got {number}")
    return float(number)


positive = partial(_number, above=0.0, kind="positive")
finite = partial(_number, above=-math.inf, kind="finite")
