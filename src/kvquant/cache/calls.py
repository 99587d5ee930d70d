"""Checks of a cache's calls, apart from what every function of kvquant checks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from ..arguments import INT32_MAX, check_integer, check_tensor, require
from ..checks import check_index, check_no_grad, check_pair, check_rows, check_storage
from ..storage import LayerStorage
from .config import CacheConfig
from .state import CacheState

__all__ = ["check_call", "look", "ragged"]


def look(x: Tensor | None) -> tuple[Any, ...] | None:
    """What checks of a tensor depend on."""
    if x is None:
        return None
    try:
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or a sparse one
        return type(x), id(x)


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
    if query is not None:
        check_rows("query", query, dims)
        check_no_grad(query=query)
        check_storage(storage, query=query)
    if key is not None and value is not None:
        check_pair(key, value, dims)
        check_storage(storage, key=key, value=value)
        require(
            key.shape[-2] == config.kv_heads,
            f"key: {key.shape[-2]} heads, but the storage has {config.kv_heads}",
        )
    for name, x in (("query", query), ("key", key)):
        require(
            packed or x is None or x.shape[0] == config.batch_size,
            f"{name}: batch {0 if x is None else x.shape[0]}, but the cache has "
            f"{config.batch_size}",
        )
    if query is not None:
        require(
            query.shape[-2] > 0 and query.shape[-2] % config.kv_heads == 0,
            f"query: {query.shape[-2]} heads are no multiple of the storage's "
            f"{config.kv_heads} (got shape {list(query.shape)})",
        )
        require(
            key is None or dims == 4 or key.shape[0] == query.shape[0],
            f"key: {0 if key is None else key.shape[0]} packed rows, but query has "
            f"{query.shape[0]}",
        )


def ragged(
    state: CacheState, name: str, cu: Tensor, rows: Tensor, most: int | None
) -> tuple[Tensor, list[int], int]:
    """``cu`` on the device, bounds of each sequence's rows, and the largest of them."""
    check_tensor(name, cu)
    config, total = state.config, rows.shape[0]
    device = cu.device if cu.device.type == "cpu" else config.device
    check_index(name, cu, config.batch_size + 1, device)
    label = name.replace("cu_seqlens", "max_seqlen")
    if most is not None:
        most = check_integer(label, most, 0, INT32_MAX)
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
