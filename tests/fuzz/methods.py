"""All methods of a cache: arguments good for the cache as it stands, as in `.operations`."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant import QuantizedKVCache

from .arguments import (
    INTEGERS,
    MAYBE_INDEX,
    Dtype,
    Indices,
    Integer,
    Kind,
    Wrong,
)
from .caches import APPEND, ATTEND, LAYER, dims_of, layer_of, offsets_for, rows_for
from .dice import FLOATS, Dice
from .operations import Arguments, Operation, Relation, gives
from .places import random_head_dims


class Once:
    """An iterable that is neither a sequence nor worn out by one look."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __repr__(self) -> str:
        return f"Once({self.values})"


# -------------------------------------------------------------------------------- what is stored


class State(Kind):
    """A state dict of the cache's own shapes."""

    on_device = True

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        name = dice.among(list(x))
        one: Tensor = x[name]
        for label, value in (
            ("of another dtype", one.double()),
            ("with more dimensions", one[None]),
            ("larger", torch.cat([one, one])),
            ("a list", one.tolist()),
            ("None", None),
            ("a text", "text"),
        ):
            yield Wrong(f"a tensor {label}", partial(dict, x, **{name: value}))
        lens = x["seq_lens"]
        yield Wrong("negative lengths", partial(dict, x, seq_lens=lens - 1 - lens.amax()))
        yield Wrong("other lengths", partial(dict, x, seq_lens=lens + 1000))
        yield Wrong("another version", partial(dict, x, format=x["format"] + 1))
        yield Wrong("one too many", partial(dict, x, more=one))
        yield Wrong("a number for a name", lambda: {**x, 1: one})
        if name != "seq_starts":
            yield Wrong("one missing", lambda: {k: v for k, v in x.items() if k != name})


def _make_state(dice: Dice, cache: Any) -> Arguments:
    if dice.flag():
        return {"state": cache.state_dict()}
    k_dim, v_dim = dims_of(cache)
    other = QuantizedKVCache(
        cache.num_layers, cache.batch_size, cache.num_kv_heads, k_dim, v_head_dim=v_dim,
        format=cache.formats, device=cache.device,
    )  # fmt: skip
    most = min(cache.capacity or 60, 60)
    for layer in range(cache.num_layers):
        more, total = offsets_for(dice, [dice.number(0, most) for _ in range(cache.batch_size)])
        other.append(layer, **rows_for(dice, cache, total), **more)
    if dice.flag():
        other.set_seq_starts(dice.index([dice.number(0, 30) for _ in range(cache.batch_size)]))
    return {"state": other.state_dict()}


def _not_plain(args: Arguments, cache: QuantizedKVCache) -> bool:
    lens = cache.seq_lens_of(int(args["layer"])).tolist()
    return not cache.formats[int(args["layer"])].is_plain or len(set(lens)) > 1


class Past(Kind):
    """(codes, scale, zero) of keys and values, a pair a layer."""

    on_device = True
    fine: tuple[str, ...] = ()

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        (qk, ks, kz), values = x[0]
        rest = x[1:]
        for label, pair in (
            ("one of two", ((qk, ks, kz),)),
            ("two of three", ((qk, ks), values)),
            ("None", None),
            ("a text", "text"),
            ("None for codes", ((None, ks, kz), values)),
            ("None for a scale", ((qk, None, kz), values)),
            ("a list for codes", ((qk.tolist(), ks, kz), values)),
            ("other codes", ((qk.int(), ks, kz), values)),
            ("3-D codes", ((qk[0], ks, kz), values)),
            ("0-D codes", ((qk.new_zeros(()), ks, kz), values)),
            ("a 0-D scale", ((qk, ks.new_zeros(()), kz), values)),
            ("an integer scale", ((qk, ks.int(), kz), values)),
            ("a wider scale", ((qk, torch.cat([ks, ks], 1), torch.cat([kz, kz], 1)), values)),
            ("scales beyond float16", ((qk, torch.full_like(ks, 1e6), kz), values)),
            ("codes on meta", ((qk.to("meta"), ks, kz), values)),
            ("a scale on meta", ((qk, ks.to("meta"), kz), values)),
            ("more heads", ((torch.cat([qk, qk], 1), torch.cat([ks, ks], 1),
                             torch.cat([kz, kz], 1)), values)),
        ):  # fmt: skip
            if qk.numel():
                yield Wrong(f"a layer: {label}", partial(list, [pair, *rest]))


def _make_past(dice: Dice, cache: Any) -> Arguments:
    batch, heads, tokens = dice.number(1, 3), dice.number(1, 3), dice.number(1, 40)
    dims, granularity = random_head_dims(dice), dice.among(["token", "head"])
    past = [
        tuple(
            kvquant.quantize_cache_v(
                dice.rows(batch, heads, tokens, dim, clean=True), granularity=granularity
            )
            for dim in dims
        )
        for _ in range(dice.number(1, 2))
    ]
    args = {
        "past": dice.among([list, tuple])(past),
        "max_seq_len": dice.integer(dice.number(tokens, 100)),
        "block_size": dice.among([None, dice.integer(dice.among([16, 64]))]),
        "dtype": dice.among(FLOATS),
    }
    return {name: x for name, x in args.items() if name == "past" or dice.flag()}


FROM_LAYER_PAST = Operation(
    "QuantizedKVCache.from_layer_past",
    QuantizedKVCache.from_layer_past,
    _make_past,
    {
        "past": Past(),
        "max_seq_len": Integer(optional=True, bad=(0, -1)),
        "block_size": Integer(optional=True, bad=(0, 8, 24, -16)),
        "dtype": Dtype(),
    },
    compare=False,
)


# ------------------------------------------------------------------------------------- sequences


def _make_indices(dice: Dice, cache: Any, count: int | None = None) -> Arguments:
    count = dice.number(1, 3) if count is None else count
    chosen = [dice.number(0, cache.batch_size - 1) for _ in range(count)]
    form: Callable[[list[int]], Any] = dice.among(
        [
            list,
            tuple,
            Once,
            partial(torch.tensor, dtype=dice.among(INTEGERS)),
            torch.tensor,
            lambda values: [dice.integer(i) for i in values],
        ]
    )
    dice.places["indices"] = form is torch.tensor
    return {"indices": form(chosen)}


def _other_number(dice: Dice, args: Arguments) -> Any:
    return [0] * (len(list(args["indices"])) + dice.among([1, 2]))


def _reserved(args: Arguments, cache: QuantizedKVCache) -> bool | None:
    if cache.capacity is None:
        return False
    if int(args["tokens"]) > cache.capacity:
        return True
    return None if cache.block_size is not None else False


def _pooled(args: Arguments, cache: QuantizedKVCache) -> bool | None:
    """Sequences that shared blocks may need more of them than the pool has."""
    return None if cache.block_size is not None and cache.capacity is not None else False


def _simple(name: str, *, compare: bool = True, **kinds: Kind) -> Operation:
    """A method whose arguments are a layer, or nothing."""

    def make(dice: Dice, cache: Any) -> Arguments:
        return {"layer": layer_of(dice, cache)} if kinds else {}

    method = getattr(QuantizedKVCache, name)
    return Operation(f"QuantizedKVCache.{name}", method, make, kinds, compare=compare)


def _method(
    name: str, make: Callable[..., Arguments], kinds: dict[str, Kind], *relations: Relation,
    refused: Callable[..., bool | None] = lambda args, cache: False,
) -> Operation:  # fmt: skip
    method = getattr(QuantizedKVCache, name)
    full = f"QuantizedKVCache.{name}"
    return Operation(full, method, make, kinds, relations, refused=refused)


def _nothing(dice: Dice, cache: Any) -> Arguments:
    return {}


def _slide(cache: QuantizedKVCache, sliding_window: Any, slack: Any) -> Any:
    """Of a fork, which then attends: a cache that has slid is no longer compared as a whole."""
    fork = cache.fork()
    fork.slide(sliding_window, slack)
    fork.compact()
    query = torch.ones(cache.batch_size, 1, cache.num_kv_heads, cache.head_dim, device=cache.device)
    return fork.attend(0, query, sliding_window=operator.index(sliding_window))


def _before_replay(cache: QuantizedKVCache, tokens: Any) -> Any:
    """Of a fork: a replay that does not come leaves bounds that are too high until it looks."""
    fork = cache.fork()
    fork.before_replay(tokens)
    fork.sync_lengths()
    return fork.max_length


METHODS = (
    *[APPEND] * 4,  # more often than the rest
    *[ATTEND] * 6,
    _method(
        "dequantize",
        lambda dice, cache: {
            "layer": layer_of(dice, cache),
            "dtype": dice.among([None, *FLOATS]),
        },
        {"layer": LAYER, "dtype": Dtype(optional=True)},
    ),
    _method(
        "layer_past",
        lambda dice, cache: {"layer": layer_of(dice, cache)},
        {"layer": LAYER},
        refused=_not_plain,
    ),
    _simple("state_dict", compare=False),
    _method("load_state_dict", _make_state, {"state": State()}, refused=_pooled),
    _simple("max_length_of", layer=LAYER),
    _simple("seq_lens_of", layer=LAYER),
    _simple("layer", compare=False, layer=LAYER),
    _method(
        "set_seq_starts",
        lambda dice, cache: {
            "seq_starts": dice.among(
                [None, dice.index([dice.number(-3, 40) for _ in range(cache.batch_size)])]
            )
        },
        {"seq_starts": MAYBE_INDEX},
    ),
    _method(
        "reserve",
        lambda dice, cache: {
            "tokens": dice.integer(dice.number(0, min(2 * (cache.capacity or 200), 400)))
        },
        {"tokens": Integer(bad=(-1, -(2**40)))},
        refused=_reserved,
    ),
    _simple("sync_lengths"),
    _method(
        "crop",
        lambda dice, cache: {
            "max_length": dice.integer(
                dice.among([dice.number(-20, 20), cache.max_length - 1, 2**40, -(2**40)])
            )
        },
        {"max_length": Integer()},
    ),
    _simple("reset"),
    _method(
        "reorder",
        lambda dice, cache: _make_indices(dice, cache, cache.batch_size),
        {"indices": Indices()},
        Relation("another number of indices", gives(indices=_other_number)),
    ),
    _method("select", _make_indices, {"indices": Indices()}),
    _method(
        "repeat_interleave",
        lambda dice, cache: {"repeats": dice.integer(2 if cache.batch_size < 3 else 1)},
        {"repeats": Integer(bad=(0, -1))},
    ),
    _simple("fork", compare=False),
    Operation(
        "QuantizedKVCache.slide",
        _slide,
        lambda dice, cache: {
            "sliding_window": dice.integer(dice.number(1, 100)),
            "slack": dice.integer(dice.number(0, 20)),
        },
        {"sliding_window": Integer(bad=(0, -1)), "slack": Integer(bad=(-1,))},
        refused=lambda arguments, cache: cache.block_size is None,
        covers=("QuantizedKVCache.compact",),
        names=("slide",),
    ),
    Operation(
        "QuantizedKVCache.before_replay",
        _before_replay,
        lambda dice, cache: {"tokens": dice.integer(dice.number(0, 40))},
        {"tokens": Integer(bad=(-1, -(2**40)))},
        refused=lambda arguments, cache: None,  # as its room is, and its pool's
        names=("before_replay",),
    ),
    Operation("copy.deepcopy", copy.deepcopy, _nothing, compare=False),
    Operation(
        "pickle",
        lambda cache: pickle.loads(pickle.dumps(cache)),
        _nothing,
        compare=False,
    ),
)
