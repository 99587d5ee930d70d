"""The functions on plain tensors, `explain`, and the list of all functions: as in `.operations`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kvquant

from .arguments import (
    HUGE,
    ODD_ROWS,
    Choice,
    Device,
    Dtype,
    Integer,
    Kind,
    Tensors,
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
from .places import random_format, random_head_dims
from .plans import MISMATCH, PLAN, RUN
from .views import ALLOCATE, CACHE_FORMAT, CACHE_VIEW, FORMAT, SEQUENCES, SLAB

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
    bits = 8
    if dice.chance(0.3):
        bits = dice.number(1, 8)
        args["bits"] = dice.integer(3 if bits == 4 and args["x"].shape[3] % 2 else bits)
    if dice.chance(0.2) and bits != 4:
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


def random_affine(dice: Dice, name: str) -> tuple[Arguments, Tensor]:
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
    args, _ = random_affine(dice, "q")
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
        args, q = random_affine(dice, codes)
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


# ---------------------------------------------------------------------------- explain, use_backend


_ON_CACHE = ("append_", "attention", "gather")


def _make_explain(dice: Dice, cache: Any) -> Arguments:
    k_dim, v_dim = random_head_dims(dice)
    args = {
        "op": dice.among(["quantize", "dequantize", "qk_matmul", "pv_matmul", *_ON_CACHE]),
        "device": dice.target,
        "head_dim": dice.integer(k_dim),
        "v_head_dim": dice.among([None, dice.integer(v_dim)]),
        "dtype": dice.among(FLOATS),
        "format": dice.among([None, random_format(dice)]),
    }
    return {name: x for name, x in args.items() if dice.flag()}


def _odd_dim(name: str) -> Relation:
    def change(dice: Dice, args: Arguments) -> Any:
        if args.get("op", "attention") not in _ON_CACHE:
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
    CACHE_VIEW,
    ALLOCATE,
    SLAB,
    SEQUENCES,
    PLAN,
    RUN,
    MISMATCH,
    EXPLAIN,
    USE_BACKEND,
)
