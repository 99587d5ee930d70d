"""A cache's constructor, append and attend: arguments good for the cache as it stands."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant import QuantizedKVCache

from .arguments import (
    MAYBE_INDEX,
    MAYBE_ROWS,
    ROWS,
    Device,
    Dtype,
    Flag,
    Integer,
)
from .dice import FLOATS, Dice
from .functions import (
    HEADS,
    OPTION_KINDS,
    SIZES,
    attention_options,
    most_of,
    packed_offsets,
)
from .operations import (
    MAYBE_COUNT,
    OUT,
    Arguments,
    Operation,
    Relation,
    gives,
    longer,
    new_out,
    offsets,
    other_dtype,
)
from .places import random_format, random_head_dims
from .views import FORMAT

LAYER = Integer(bad=(-1, 99, 2**40))
_OFFSETS = replace(MAYBE_INDEX, anywhere=True)


def random_cache_arguments(dice: Dice) -> Arguments:
    (k_dim, v_dim), layers = random_head_dims(dice), dice.number(1, 2)
    formats = [random_format(dice) for _ in range(layers)]
    args: Arguments = {
        "num_layers": dice.integer(layers),
        "batch_size": dice.integer(dice.number(1, 3)),
        "num_kv_heads": dice.integer(dice.number(1, 3)),
        "head_dim": dice.integer(k_dim),
        "v_head_dim": dice.among([None, dice.integer(v_dim)]),
        "device": dice.among([dice.target, torch.device(dice.target)]),
        "format": dice.among([formats[0], formats, "plain", kvquant.CacheFormat.plain(), None]),
    }
    if dice.flag():
        args["max_seq_len"] = dice.integer(dice.number(1, 300))
    if dice.flag():
        args["block_size"] = dice.integer(dice.among([16, 32, 64, 256]))
        if dice.chance(0.3):
            args["num_blocks"] = dice.integer(dice.number(1, 30))
    if dice.flag():
        args["dtype"] = dice.among(FLOATS)
    return args


CONSTRUCTOR = Operation(
    "QuantizedKVCache",
    QuantizedKVCache,
    lambda dice, cache: random_cache_arguments(dice),
    {
        **dict.fromkeys(("num_layers", "batch_size", "num_kv_heads"), Integer(bad=(0, -1))),
        "head_dim": Integer(bad=(0, 24, -16)),
        "v_head_dim": Integer(optional=True, bad=(0, 24, -16)),
        "max_seq_len": Integer(optional=True, bad=(0, -1)),
        "block_size": Integer(optional=True, bad=(0, 8, 24, 48, -16)),
        "num_blocks": Integer(optional=True, bad=(0, -1)),
        "format": FORMAT,
        "dtype": Dtype(),
        "device": Device(bad=("nonsense", "", "cuda:99")),
    },
    (
        Relation(
            "num_blocks without block_size",
            gives(num_blocks=lambda dice, args: dice.integer(4), block_size=None),
        ),
    ),
    covers=("LayerFormats",),
    compare=False,
)


# ---------------------------------------------------------------------------------- append, attend


def layer_of(dice: Dice, cache: QuantizedKVCache) -> Any:
    return dice.integer(dice.number(0, cache.num_layers - 1))


def dims_of(cache: QuantizedKVCache) -> tuple[int, int]:
    return cache.head_dim, cache.v_head_dim


def rows_for(dice: Dice, cache: QuantizedKVCache, *lead: int, plain: bool = False) -> Arguments:
    dtype = torch.float32 if plain else dice.among(FLOATS)
    make = partial(dice.rows, dtype=dtype)
    if plain:  # always of the same look, so that steps repeat
        make = partial(_plain_rows, dice)
    heads = cache.num_kv_heads
    key, value = (make(*lead, heads, dim) for dim in dims_of(cache))
    return {"key": key, "value": value}


def _plain_rows(dice: Dice, *shape: int) -> Tensor:
    return dice.normal(*shape)


def offsets_for(dice: Dice, new: list[int], suffix: str = "") -> tuple[Arguments, int]:
    edges, total = packed_offsets(dice, new)
    dice.places[f"cu_seqlens{suffix}"] = dice.among([False, True])
    args = {f"cu_seqlens{suffix}": dice.index(edges), f"max_seqlen{suffix}": most_of(dice, new)}
    return args, total


def _make_append(dice: Dice, cache: Any) -> Arguments:
    most, batch = dice.among([1, 3, 40]), cache.batch_size
    args: Arguments = {"layer": layer_of(dice, cache)}
    if dice.flag():
        return args | rows_for(dice, cache, batch, dice.number(0, most))
    more, total = offsets_for(dice, [dice.number(0, most) for _ in range(batch)])
    return args | more | rows_for(dice, cache, total)


def _counts(args: Arguments, batch: int) -> list[int]:
    key, cu = args.get("key"), args.get("cu_seqlens", args.get("cu_seqlens_q"))
    if key is None:
        return [0] * batch
    return [key.shape[1]] * batch if cu is None else cu.diff().tolist()


def _no_room(args: Arguments, cache: QuantizedKVCache) -> bool | None:
    """Whether good new rows have to be refused; None: who knows (blocks may be shared)."""
    layer = int(args["layer"])
    lens, capacity = cache.seq_lens_of(layer).tolist(), cache.capacity
    ends = [n + new for n, new in zip(lens, _counts(args, cache.batch_size), strict=True)]
    if capacity is None:
        return False
    if max(ends) > capacity:
        return True
    return False if cache.block_size is None else None


APPEND = Operation(
    "QuantizedKVCache.append",
    QuantizedKVCache.append,
    _make_append,
    {
        "layer": LAYER,
        "key": ROWS,
        "value": ROWS,
        "cu_seqlens": _OFFSETS,
        "max_seqlen": MAYBE_COUNT,
    },
    (*offsets("cu_seqlens"), *SIZES, other_dtype("value", "key")),
    refused=_no_room,
)


def _make_attend(dice: Dice, cache: Any) -> Arguments:
    batch, heads, k_dim = cache.batch_size, cache.num_kv_heads, cache.head_dim
    args: Arguments = {"layer": layer_of(dice, cache)}
    if dice.chance(0.4):  # a step as all others
        query = _plain_rows(dice, batch, 1, 2 * heads, k_dim)
        return args | {"query": query} | rows_for(dice, cache, batch, 1, plain=True)
    heads = heads * dice.number(1, 3)
    args |= attention_options(dice, heads)
    most, appends = dice.among([1, 3, 40]), dice.chance(0.7)
    if dice.flag():
        args["exact_prompt"] = dice.flag()
    if dice.flag():
        more, total = offsets_for(dice, [dice.number(0, most) for _ in range(batch)], "_q")
        lead: tuple[int, ...] = (total,)
        args |= more
    else:
        lead = batch, dice.number(0, most)
    args["query"] = dice.rows(*lead, heads, k_dim, clean=True)
    if dice.chance(0.3):
        args["out"] = new_out(dice, args["query"], cache.v_head_dim)
    return args | (rows_for(dice, cache, *lead) if appends else {})


ATTEND = Operation(
    "QuantizedKVCache.attend",
    QuantizedKVCache.attend,
    _make_attend,
    {
        "layer": LAYER,
        "query": ROWS,
        "key": MAYBE_ROWS,
        "value": MAYBE_ROWS,
        "out": OUT,
        "cu_seqlens_q": _OFFSETS,
        "max_seqlen_q": MAYBE_COUNT,
        **OPTION_KINDS,
        "exact_prompt": Flag(),
    },
    (
        *offsets("cu_seqlens_q"),
        *HEADS,
        *SIZES,
        longer("query", -1, "query of another head_dim"),
        other_dtype("value", "key"),
        other_dtype("out", "query"),
    ),
    written=lambda args: [x for x in [args.get("out")] if x is not None],
    refused=_no_room,
)
