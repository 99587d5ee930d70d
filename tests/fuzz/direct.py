"""Operators called as torch has them: arguments by their schemas, and some of them spoilt.

A new operator needs no line here as long as its arguments have names that others have. One of
another name is given something of its type, which the operator may refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import kvquant
from kvquant.checks import check_affine
from kvquant.fields import flatten, names_of
from kvquant.formats import ROW_FORMATS
from kvquant.ops import OPS
from kvquant.view import Options

from .calls import Failure, Outcome, Report, plain, show, synchronize, where_from
from .compare import Memory
from .dice import FLOATS, HEAD_DIMS, Dice
from .functions import attention_options, new_rows, packed_offsets, random_slots
from .moving import moved
from .operations import Arguments, new_lse, new_out
from .others import random_affine
from .places import options_of, random_place

_ALLOWED = (TypeError, ValueError, RuntimeError)


class Argument(NamedTuple):
    """One of a schema's."""

    name: str
    kind: str
    is_optional: bool
    is_written: bool


@cache
def arguments_of(op: str) -> tuple[Argument, ...]:
    found = []
    for x in getattr(torch.ops.kvquant, op).default._schema.arguments:
        kind = str(x.real_type)
        written = x.alias_info is not None and x.alias_info.is_write
        bare = kind.removeprefix("Optional[").removesuffix("]")
        found.append(Argument(x.name, bare, bare != kind, written))
    return tuple(found)


# ------------------------------------------------------------------------------------- a good call


def _on_cache(dice: Dice, arguments: tuple[Argument, ...]) -> Arguments:
    """What operators on a cache take, by name."""
    of = {x.name: x for x in arguments}
    gathers = "key" in of and of["key"].is_written
    packed = not gathers and dice.flag()
    place = random_place(dice, most_new=dice.among([1, 1, 3, 40]), ragged=packed)
    view, where, batch = place.view, options_of(place, dice), len(place.lens)
    del where["view"]
    lead: tuple[int, ...] = batch, place.new[0]
    total = batch * place.new[0]
    if packed:
        edges, total = packed_offsets(dice, place.new)
        lead, where["cu_seqlens_q"] = (total,), dice.index(edges)
        where["max_seqlen_q"] = dice.among([0, max(1, *place.new), 10**5])
    seqs = kvquant.Sequences(**where, advance=dice.flag())
    heads = view.num_kv_heads * dice.number(1, 3)
    numbers = attention_options(dice, heads)
    numbers = {name: x for name, x in numbers.items() if name in names_of(Options)}
    options = Options.of(view.k.head_dim, **numbers)
    query = dice.rows(*lead, heads, view.k.head_dim, clean=True)
    values = {
        "query": query,
        **new_rows(dice, view, *lead),
        "sinks": dice.normal(heads),
        "alibi_slopes": 0.05 * dice.normal(heads).abs(),
        "out": new_out(dice, query, view.v.head_dim),
        "lse": new_lse(query),
        "slot_mapping": random_slots(dice, place, total),
    }
    for x in (view, seqs, options):
        values |= zip(names_of(type(x)), flatten(x), strict=True)
    if gathers:
        rows = torch.empty(*lead, view.num_kv_heads, 16, dtype=dice.among(FLOATS))
        for name, dim in (("key", view.k.head_dim), ("value", view.v.head_dim)):
            values[name] = new_out(dice, rows, dim)
    for names in (("sinks",), ("alibi_slopes",), ("lse",), ("key", "value"), ("slot_mapping",)):
        if all(name in of and of[name].is_optional for name in names) and dice.flag():
            values.update(dict.fromkeys(names))
    if "slot_mapping" in of and values["slot_mapping"] is not None:
        values["advance"] = False
        if of["block_table"].is_optional and not view.mean_group and dice.flag():
            where = names_of(kvquant.Sequences)[:-3]
            values |= {**dict.fromkeys(where), "max_seqlen_q": 0}
    return values


def _on_plain(dice: Dice, arguments: tuple[Argument, ...]) -> Arguments:
    """What operators on (q, scale, zero) take, by name."""
    names = [x.name for x in arguments]
    args, codes = random_affine(dice, "q")
    args["group_size"] = check_affine("q", **args)
    batch, heads, tokens, dim = codes.shape
    lead = batch, heads * dice.number(1, 3), dice.number(0, 5)
    values = {
        **args,
        "qk": codes,
        "qv": codes,
        "scale": args["scale"].float(),
        "zero": args["zero"].float(),
        "query": dice.rows(*lead, dim, clean=True),
        "probs": dice.rows(*lead, tokens, clean=True) if tokens else torch.zeros(*lead, 0),
        "dtype": dice.among(FLOATS),
        "x": dice.rows(batch, heads, dice.number(1, 40), dice.among(HEAD_DIMS)),
        "qmin": float(dice.number(0, 99)),
        "qmax": float(dice.number(100, 255)),
        "granularity": dice.among(["token", "head", "channel"]),
    }
    if "granularity" in names:
        is_channel = values["granularity"] == "channel"
        values["group_size"] = dice.number(1, 50) if is_channel else 0
    return values


def _of_kind(dice: Dice, x: Argument) -> Any:
    """Something for an argument that nothing is known about."""
    if x.is_optional and dice.flag():
        return None
    makes: dict[str, Callable[[], Any]] = {
        "Tensor": lambda: dice.rows(2, 3, 2, 64),
        "int": lambda: dice.number(0, 64),
        "float": lambda: dice.random.random(),
        "bool": dice.flag,
        "str": lambda: dice.among(list(ROW_FORMATS)),
        "ScalarType": lambda: dice.among(FLOATS),
    }
    return makes.get(x.kind, lambda: None)()


def good_call(dice: Dice, op: str) -> tuple[Arguments, bool]:
    """Arguments in the schema's order, and whether the operator has to accept them."""
    arguments = arguments_of(op)
    is_on_cache = any(x.name == "k_codes" for x in arguments)
    values = (_on_cache if is_on_cache else _on_plain)(dice, arguments)
    known = all(x.name in values for x in arguments)
    args = {x.name: values[x.name] if x.name in values else _of_kind(dice, x) for x in arguments}
    return args, known


# --------------------------------------------------------------------------------- what spoils it

_JUNK = (
    "text",
    3,
    2.5,
    1j,
    [1],
    {},
    object(),
    True,
    None,
    np.int64(3),
    torch.tensor(3),
    [torch.ones(2)],
)
_BITS = (8, 16, 31, 32, 62, 63)
_INTS = (*range(-2, 3), 7, 24, *(s * 2**n + d for n in _BITS for s in (1, -1) for d in (-1, 0, 1)))
_REALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e39, -1e39, 1e-50, 1e308)
_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
_OTHERS: dict[str, tuple[Any, ...]] = {
    "int": (*_INTS, 2**70),
    "float": _REALS,
    "bool": (True, False),
    "str": ("nonsense", "", "int8", "int4", "int8\0", "x" * 1000),
    "ScalarType": (*_DTYPES, "float16"),  # a number that is no dtype ends torch itself,
}


def _resized(x: Tensor, dice: Dice) -> Tensor:
    size = list(x.shape)
    if size:
        at = dice.number(0, len(size) - 1)
        size[at] = max(0, dice.among([0, 1, size[at] - 1, size[at] + 1, size[at] + 16]))
    return x.new_zeros(size)


def _misplaced(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape)


def _swapped(x: Tensor, dice: Dice) -> Tensor:
    dims = dice.random.sample(range(x.dim()), 2)
    return x.transpose(*dims).contiguous().transpose(*dims)


def _wrong_tensor(x: Tensor, dice: Dice) -> tuple[str, Any]:
    """A tensor that is not as it should be, though it may do."""
    ways: dict[str, Callable[[], Any]] = {
        "resized": lambda: _resized(x, dice),
        "dtype": lambda: x.to(dice.among(_DTYPES)),
        "meta": lambda: x.to("meta"),
        "host": x.clone,
        "None": lambda: None,
        "0 dimensions": lambda: x.new_zeros(()),
        "more dimensions": lambda: x[None],
        "misplaced": lambda: _misplaced(x),
        "strided": lambda: torch.stack([x, x], -1)[..., 0],
        "sparse": x.to_sparse,
    }
    if x.dim() and x.shape[0]:
        ways["fewer dimensions"] = lambda: x[0]
        ways["expanded"] = lambda: x[:1].expand_as(x)
    if x.dim() > 1:
        ways["swapped"] = lambda: _swapped(x, dice)
    if x.is_floating_point():
        ways["requires grad"] = lambda: x.detach().clone().requires_grad_()
    label = dice.among(list(ways))
    return label, ways[label]()


def _other_contents(x: Tensor, dice: Dice) -> Tensor:
    """Anything in some of the elements, or in all."""
    if not x.numel():
        return x
    if x.dtype == torch.uint8:
        garbage = dice.codes(*x.shape)
    elif x.is_floating_point():
        garbage = torch.full_like(x, dice.among([*_REALS[:6], 6e4]))
    else:
        info = torch.iinfo(x.dtype)
        choices = [n for n in (*_INTS, 15, 16, 17, 600) if info.min <= n <= info.max]
        picks = [dice.among(choices) for _ in range(x.numel())]
        garbage = torch.tensor(picks, dtype=x.dtype).view(x.shape)
    chosen = torch.rand(x.shape, generator=dice.generator) < dice.among([0.1, 0.5, 1.1])
    return torch.where(chosen, garbage, x)


def _spoil(dice: Dice, args: Arguments, x: Argument) -> tuple[str, bool]:
    """Put something else in the place of an argument; what, and whether it may be refused."""
    value = args[x.name]
    if isinstance(value, Tensor) and dice.chance(0.4):
        args[x.name] = _other_contents(value, dice)
        return "contents", False
    if dice.chance(0.1):
        label, args[x.name] = "junk", dice.among(_JUNK)
    elif isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided:
        label, args[x.name] = _wrong_tensor(value, dice)
    elif x.kind in _OTHERS:
        label, args[x.name] = "other", dice.among(_OTHERS[x.kind])
    else:
        label, args[x.name] = "made up", _of_kind(dice, x)
    return label, True


# ------------------------------------------------------------------------------------------- a call


def run_direct(dice: Dice, report: Report) -> None:
    """One call of one operator."""
    op = dice.among(list(OPS))
    args, known = good_call(dice, op)
    arguments = arguments_of(op)
    spoilt: dict[str, str] = {}
    may_refuse = not known
    for x in dice.random.sample(arguments, min(len(arguments), dice.number(0, 4))):
        if dice.chance(0.3) and not isinstance(args[x.name], Tensor):
            continue
        spoilt[x.name], may = _spoil(dice, args, x)
        may_refuse |= may
    shown = ", ".join(f"{name}={show(value)}" for name, value in args.items())
    notes = "; ".join(f"{name}: {label}" for name, label in spoilt.items())
    text = f"{op}({shown})" + (f"  # {notes}" if notes else "")
    report.begin(text)
    if dice.moves:
        host = {name for name, label in spoilt.items() if label == "host"}
        there = {name: value for name, value in args.items() if name not in host}
        args |= moved(there, dice.target)
    memory = Memory(args)
    outcome = Outcome.of(getattr(torch.ops.kvquant, op), *args.values())
    synchronize(dice)
    error = outcome.error
    report.calls[op] += 1
    report.accepted[op] += error is None
    if report.trace:
        report.trace(f"{text}\n  {show(outcome.result) if error is None else repr(error)}")
    fail = partial(_fail, report, op, text)
    if error is None:
        written = [args[x.name] for x in arguments if x.is_written]
        if name := memory.changed([x for x in written if isinstance(x, Tensor)]):
            fail("written", f"{name} is not as it was")
        return
    message = f"{type(error).__name__}: {plain(str(error))} ({where_from(error)})"
    if not isinstance(error, _ALLOWED):
        fail("wrong type of error", message)
    elif not may_refuse:
        fail("refused though good", message)
    if isinstance(error, (TypeError, ValueError)) and (name := memory.changed()):
        fail("written though refused", f"{name} is not as it was")


def _fail(report: Report, op: str, text: str, kind: str, message: str) -> None:
    report.failures.append(Failure(op, kind, message, text))
