"""The functions on plain tensors, and what describes and makes a layer: as in `.operations`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant.ops import OPS

from .arguments import (
    HUGE,
    ODD_ROWS,
    Choice,
    Device,
    Dtype,
    Flag,
    Integer,
    Kind,
    Tensors,
    Wrong,
)
from .dice import FLOATS, HEAD_DIMS, Dice
from .functions import APPEND, ATTENTION, GATHER
from .operations import (
    Arguments,
    Operation,
    Relation,
    gives,
    longer,
)
from .places import random_format, random_head_dims, random_storage

# ------------------------------------------------------------------------------------ plain tensors

_BOUND = Integer(
    optional=True,
    fine=("int", "zero", "float", "numpy float", "float tensor"),  # floats: unsure, below
    bad=(-1, 256, 2**40),
)
_GROUP = Integer(optional=True, bad=(0, -1), unsure=HUGE)
_CODES = Tensors(dtypes=(torch.int8, torch.int32, torch.float32), strided=True)
_PAIR = Tensors(
    dtypes=(torch.float64, torch.int32, torch.uint8), most_dims=4, least_dims=4, strided=False
)


def _make_quantize(dice: Dice, cache: Any) -> Arguments:
    shape = [dice.number(0, n) for n in (3, 3, 40)]
    shape = [max(1, n) for n in shape] if dice.chance(0.9) else shape
    args: Arguments = {
        "x": dice.rows(*shape, dice.among([*HEAD_DIMS, 1, 2, 3, 7, 33])),
        "granularity": dice.among(["token", "head", "channel"]),
    }
    if dice.chance(0.3):
        args["bits"] = dice.integer(dice.number(1, 8))
    if dice.chance(0.2):
        args["qmax"] = dice.integer(dice.number(100, 255))
        args["qmin"] = dice.integer(dice.number(0, 99))
    if args["granularity"] == "channel":
        args["group_size"] = dice.among([None, dice.integer(dice.number(1, 50)), 1000])
    return args


QUANTIZE = Operation(
    "quantize_cache_v",
    kvquant.quantize_cache_v,
    _make_quantize,
    {
        "x": replace(ODD_ROWS, sized=(), alone=True, least_dims=4),
        "bits": Integer(bad=(0, 9, -1, 2**40)),
        "qmax": _BOUND,
        "qmin": _BOUND,
        "granularity": Choice(),
        "group_size": _GROUP,
    },
    (
        Relation("qmin at qmax", gives(qmin=5, qmax=5)),
        Relation("qmin above qmax", gives(qmin=9, qmax=5)),
        Relation("a float bound", gives(qmax=2.5), unsure=True),
        Relation(
            "group_size without channels",
            gives(
                group_size=4,
                granularity=lambda dice, args: dice.among(["token", "head"]),
            ),
        ),
    ),
)


def _affine(dice: Dice, name: str) -> tuple[Arguments, Tensor]:
    """Codes with a scale and a zero of any granularity."""
    b, h, s = (dice.number(1, n) for n in (3, 3, 40))
    s = 0 if dice.chance(0.04) else s
    d = dice.among([*HEAD_DIMS, 1, 2, 7, 33])
    codes = dice.codes(b, h, s, d)
    if dice.chance(0.3):
        codes = dice.codes(b, h + 1, s, d + 5)[:, 1:, :, 3 : 3 + d]
    group = dice.number(1, 50)
    shape, size = dice.among(
        [
            ((b, h, s, 1), None),
            ((b, h, 1, 1), None),
            ((b, h, 1 if s else 0, d), None),
            ((b, h, -(-s // group), d), dice.integer(group)),
        ]
    )

    def pair() -> Tensor:
        return dice.normal(*shape) if dice.flag() else dice.normal(*shape[:-1], 1).expand(shape)

    dtypes = dice.among(FLOATS), dice.among(FLOATS)
    scale, zero = 0.01 + 0.01 * pair().abs(), 128 + 20 * pair()
    args = {
        name: codes,
        "scale": scale.to(dtypes[0]),
        "zero": zero.to(dtypes[1]),
        "group_size": size,
    }
    return args, codes


def _wrong_pair(dice: Dice, args: Arguments, cache: Any) -> bool:
    """Both of a shape that no granularity has."""
    if not isinstance(args["scale"], Tensor) or args["scale"].dim() != 4:
        return False
    size = list(args["scale"].shape)
    size[dice.among([0, 1])] += 1
    for name in ("scale", "zero"):
        args[name] = torch.ones(size)
    return True


_PAIR_MISTAKES = (
    Relation("scale and zero of no granularity", _wrong_pair, "size"),
    longer("zero", 1, "zero with more heads"),
    longer("scale", 0, "scale with a larger batch"),
)


def _make_dequantize(dice: Dice, cache: Any) -> Arguments:
    args, _ = _affine(dice, "q")
    return {**args, "dtype": dice.among([None, *FLOATS])}


DEQUANTIZE = Operation(
    "dequantize_cache_torch",
    kvquant.dequantize_cache_torch,
    _make_dequantize,
    {
        "q": _CODES,
        "scale": _PAIR,
        "zero": _PAIR,
        "dtype": Dtype(optional=True),
        "group_size": _GROUP,
    },
    _PAIR_MISTAKES,
)


def _matmul(name: str, codes: str) -> Operation:
    def make(dice: Dice, cache: Any) -> Arguments:
        args, q = _affine(dice, codes)
        b, h, s, d = q.shape
        last = d if name == "query" else s
        heads = h * dice.number(1, 3)
        if last:
            x = dice.rows(b, heads, dice.number(0, 5), last, clean=True)
        else:
            x = torch.zeros(b, heads, 2, 0)
        return {**args, name: x}

    def odd_heads(dice: Dice, args: Arguments) -> Any:
        x, q = args[name], args[codes]
        if q.shape[1] == 1 or not isinstance(x, Tensor):
            return NotImplemented
        return x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])

    function = "qk_matmul" if name == "query" else "pv_matmul"
    return Operation(
        function,
        getattr(kvquant, function),
        make,
        {
            name: replace(ODD_ROWS, sized=(0, -1), least_dims=4),
            codes: _CODES,
            "scale": _PAIR,
            "zero": _PAIR,
            "group_size": _GROUP,
        },
        (*_PAIR_MISTAKES, Relation(f"{name} of odd heads", gives(**{name: odd_heads}), "size")),
    )


# ----------------------------------------------------------------------------- formats and storages


class Format(Kind):
    """A `CacheFormat`."""


FORMAT = Format(optional=True)


def _make_format(dice: Dice, cache: Any) -> Arguments:
    args = {
        "bits": dice.integer(8),
        "key_rotation": dice.flag(),
        "key_mean": dice.among([None, *map(dice.integer, (16, 32, 64, 256, 1024))]),
        "value_rotation": dice.flag(),
    }
    return {name: x for name, x in args.items() if dice.flag()}


CACHE_FORMAT = Operation(
    "CacheFormat",
    kvquant.CacheFormat,
    _make_format,
    {
        "bits": Integer(bad=(4, 0, 16, -8, 2**40)),
        "key_rotation": Flag(),
        "key_mean": Integer(optional=True, bad=(0, 1, 8, 24, -16, 100)),
        "value_rotation": Flag(),
    },
)


def _make_storage(dice: Dice, cache: Any) -> Arguments:
    size, dims = 16 * dice.number(1, 20), random_head_dims(dice)
    storage = random_storage(
        dice, dice.number(1, 4), dice.number(1, 4), size, dims, random_format(dice)
    )
    return {"k_mean": None, **storage.tensors, "format": storage.format}


class Part(Tensors):
    """One of a layer's tensors: its rows must be contiguous and aligned."""

    def wrong(self, x: Any, dice: Dice) -> Any:
        yield from super().wrong(x, dice)
        if not isinstance(x, Tensor):
            return
        wide = torch.cat([x, x], 3)
        if x.shape[2] > 1:
            yield Wrong("rows apart", lambda: wide[..., : x.shape[3]])
        flat = x.new_zeros(x.numel() + 1)
        yield Wrong("not aligned", lambda: flat[1:].view(x.shape))


def _part(*dtypes: torch.dtype, sized: tuple[int, ...], optional: bool = False) -> Part:
    return Part(dtypes=dtypes, sized=sized, strided=False, optional=optional)


_OTHER_CODES, _OTHER_HALVES = (torch.int8, torch.float16), (torch.bfloat16, torch.float32)


def _mean(dice: Dice, args: Arguments, cache: Any) -> bool:
    """A mean that the format has not, or none where it has one."""
    mean, data = args["k_mean"], args["k_data"]
    if mean is not None:
        args["k_mean"] = None
    else:
        args["k_mean"] = torch.zeros_like(data, dtype=torch.float16)
    return True


LAYER_STORAGE = Operation(
    "LayerStorage",
    kvquant.LayerStorage,
    _make_storage,
    {
        "k_data": _part(*_OTHER_CODES, sized=(0, 1, 2)),
        "k_params": _part(*_OTHER_HALVES, sized=(0, 1, 2, 3)),
        "k_mean": _part(*_OTHER_HALVES, sized=(0, 1, 2, 3), optional=True),
        "v_data": _part(*_OTHER_CODES, sized=(0, 1, 2)),
        "v_params": _part(*_OTHER_HALVES, sized=(0, 1, 2, 3)),
        "format": Format(),
    },
    (Relation("a mean where there is none, or none", _mean),),
    compare=False,
)


def _make_allocate(dice: Dice, cache: Any) -> Arguments:
    k_dim, v_dim = random_head_dims(dice)
    args = {
        "num_blocks": dice.integer(dice.number(1, 4)),
        "kv_heads": dice.integer(dice.number(1, 4)),
        "block_size": dice.integer(16 * dice.number(1, 20)),
        "k_dim": dice.integer(k_dim),
    }
    more = {
        "v_dim": dice.among([None, dice.integer(v_dim)]),
        "format": dice.among([None, random_format(dice)]),
        "device": dice.among([dice.target, torch.device(dice.target)]),
    }
    return args | {name: x for name, x in more.items() if dice.flag() or name == "device"}


_SIZE = Integer(bad=(-1, -(2**40)))
ALLOCATE = Operation(
    "LayerStorage.allocate",
    kvquant.LayerStorage.allocate,
    _make_allocate,
    {
        **dict.fromkeys(("num_blocks", "kv_heads", "block_size", "k_dim"), _SIZE),
        "v_dim": Integer(optional=True, bad=(-1,)),
        "format": FORMAT,
        "device": Device(),
    },
    tuple(
        Relation(f"no {name}", gives(**{name: 0}), unsure=True)
        for name in ("num_blocks", "kv_heads", "block_size", "k_dim", "v_dim")
    ),
    compare=False,
)


# ---------------------------------------------------------------------------- explain, use_backend


def _make_explain(dice: Dice, cache: Any) -> Arguments:
    k_dim, v_dim = random_head_dims(dice)
    args = {
        "op": dice.among(list(OPS)),
        "device": dice.target,
        "head_dim": dice.integer(k_dim),
        "v_head_dim": dice.among([None, dice.integer(v_dim)]),
        "dtype": dice.among(FLOATS),
        "format": dice.among([None, random_format(dice)]),
    }
    return {name: x for name, x in args.items() if dice.flag()}


def _odd_dim(name: str) -> Relation:
    def change(dice: Dice, args: Arguments) -> Any:
        if args.get("op", "attention") not in ("attention", "append_", "gather"):
            return NotImplemented
        return dice.among([0, 24, -16, 100])

    return Relation(f"{name} no multiple of 16", gives(**{name: change}))


EXPLAIN = Operation(
    "explain",
    kvquant.explain,
    _make_explain,
    {
        "cache": Kind(optional=True),
        "op": Choice(),
        "device": Device(),
        "head_dim": Integer(),
        "v_head_dim": Integer(optional=True),
        "dtype": Dtype(),
        "format": FORMAT,
    },
    (_odd_dim("head_dim"), _odd_dim("v_head_dim")),
    compare=False,
    covers=("Explanation",),
)


def _use_backend(name: Any) -> str:
    with kvquant.use_backend(name):
        return kvquant.explain(op="quantize").backend


USE_BACKEND = Operation(
    "use_backend",
    _use_backend,
    lambda dice, cache: {"name": dice.among(["auto", "reference"])},
    {"name": Choice()},
    compare=False,
)

FUNCTIONS = (
    APPEND,
    GATHER,
    ATTENTION,
    QUANTIZE,
    DEQUANTIZE,
    _matmul("query", "qk"),
    _matmul("probs", "qv"),
    CACHE_FORMAT,
    LAYER_STORAGE,
    ALLOCATE,
    EXPLAIN,
    USE_BACKEND,
)
