"""`kvquant.plan` and what a `Plan` does, as in `.operations`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kvquant

from .arguments import MAYBE_INDEX, MAYBE_ROWS, ROWS, Flag, Kind, View, Wrong
from .compare import own_fields, parts
from .dice import Dice
from .functions import (
    HEADS,
    OPTION_KINDS,
    SIZES,
    make_attention,
)
from .operations import OUT, Arguments, Operation, Relation, gives, new_lse, new_out, other_dtype

_IN_SEQS = ("block_table", "seq_lens", "seq_starts", "cu_seqlens_q", "max_seqlen_q")
_VECTORS = ("sinks", "alibi_slopes")
_FLAGS = (*_VECTORS, "return_lse", "exact")
_INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Batch(Kind):
    """`Sequences`; ``planned``: a plan says how they have to look."""

    on_device = True
    planned: bool = False

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        yield Wrong("a tensor", lambda: x.block_table)
        fields = dict(own_fields(x))

        def other(**changes: Any) -> kvquant.Sequences:
            return kvquant.Sequences(**{**fields, **changes})

        meta = {name: fields[name].to("meta") for name in _IN_SEQS[:-1] if fields[name] is not None}
        yield Wrong("on meta", lambda: other(**meta), "meta")
        batch, width = x.block_table.shape
        if self.planned or x.cu_seqlens_q is None:
            more = {
                name: torch.zeros(batch + 1 + (name[0] == "c"), dtype=torch.int32)
                for name in ("seq_lens", "seq_starts", "cu_seqlens_q")
                if fields[name] is not None
            }
            more["block_table"] = torch.zeros(batch + 1, width, dtype=torch.int32)
            yield Wrong("of another batch", lambda: other(**more), "size")
        if not self.planned:
            return
        wide = torch.zeros(batch, width + 1, dtype=torch.int32)
        yield Wrong("of more blocks", lambda: other(block_table=wide), "size")
        starts = x.seq_lens.clone() if x.seq_starts is None else None
        yield Wrong("padded or not", lambda: other(seq_starts=starts))
        yield Wrong("advancing or not", lambda: other(advance=not x.advance))
        if x.cu_seqlens_q is not None:
            bound = operator.index(x.max_seqlen_q) ^ 64
            yield Wrong("of another bound", lambda: other(max_seqlen_q=bound))


class PlannedView(View):
    """A view as planned."""

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        fmt = replace(x.format, value_rotation=not x.format.value_rotation)
        other = replace(x, v=replace(x.v, format=fmt.rows[1]))
        yield Wrong("of another format", lambda: other)


def _make_plan(dice: Dice, cache: Any) -> Arguments:
    """Sequences in the place of their parts, and flags in the place of what is only announced."""
    args = make_attention(dice, cache)
    most = args.pop("max_seqlen_q", None)
    where = {name: args.pop(name, None) for name in _IN_SEQS[:-1]}
    where["max_seqlen_q"] = 0 if most is None else most
    args["seqs"] = kvquant.Sequences(**where, advance=dice.flag())
    args.pop("out", None)
    for name in _VECTORS:
        if name in args:
            args[name] = True
    if not dice.moves and dice.chance(0.15):  # what torch does on a device, `.lives` compares
        args["exact"] = dice.flag()
    return args


PLAN_KINDS = {
    "query": ROWS,
    "key": MAYBE_ROWS,
    "value": MAYBE_ROWS,
}
SHARED = (*HEADS, *SIZES, other_dtype("value", "key"))
PLAN = Operation(
    "plan",
    kvquant.plan,
    _make_plan,
    {
        **PLAN_KINDS,
        **{name: kind for name, kind in OPTION_KINDS.items() if name not in _VECTORS},
        **dict.fromkeys(_FLAGS, Flag()),
        "view": View(),
        "seqs": Batch(),
    },
    SHARED,
    compare=False,
    covers=("Plan",),
    names=_IN_SEQS + tuple(OPTION_KINDS),
)


# ---------------------------------------------------------------------------------------- Plan.run


def _make_run(dice: Dice, cache: Any) -> Arguments:
    planned = _make_plan(dice, cache)
    args = {name: planned.get(name) for name in ("query", "view", "seqs", "key", "value")}
    query, seqs, heads = planned["query"], planned["seqs"], planned["query"].shape[-2]
    for name in _VECTORS:
        if planned.get(name):
            args[name] = dice.normal(heads)
    if dice.chance(0.4):
        args["out"] = new_out(dice, query, args["view"].v.head_dim)
    if planned.get("return_lse") and dice.flag():
        args["lse"] = new_lse(query)
    if seqs.cu_seqlens_q is not None and seqs.max_seqlen_q and dice.flag():
        more = dice.number(0, 5)  # packed rows in any number
        for name in ("query", "key", "value"):
            if planned.get(name) is not None:
                x = planned[name]
                planned[name] = x.new_empty_strided((more, *x.shape[1:]), x.stride())
    if dice.chance(0.4):
        args["seqs"] = _garbage(dice, args, seqs)
    return {**args, "planned": planned}


def _garbage(dice: Dice, args: Arguments, seqs: kvquant.Sequences) -> kvquant.Sequences:
    """Contents that lead nowhere: blocks that there are not, lengths past the table."""
    changes = {}
    for x in parts(args["view"]).values():  # lengths may lead to what was never written
        if x.is_floating_point():
            x.nan_to_num_(nan=0.01)
    blocks, capacity = args["view"].num_blocks, seqs.block_table.shape[1] * args["view"].block_size
    for name, choices in (
        ("block_table", (-1, blocks, *_INT32)),
        ("seq_lens", (-1, capacity - 1, capacity, capacity + 1, *_INT32)),
        ("seq_starts", (-1, capacity, *_INT32)),
    ):
        x = getattr(seqs, name)
        if x is not None and dice.flag():
            changed = torch.rand(x.shape, generator=dice.generator) < 0.3
            changes[name] = x.where(~changed, dice.among(choices))
    return replace(seqs, **changes)


def _run(
    planned: Arguments,
    query: Any,
    view: Any,
    seqs: Any,
    key: Any = None,
    value: Any = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    out: Any = None,
    lse: Any = None,
) -> Any:
    return kvquant.plan(**planned).run(
        query, view, seqs, key, value, sinks=sinks, alibi_slopes=alibi_slopes, out=out, lse=lse
    )


def _mismatch(
    planned: Arguments, query: Any, view: Any, seqs: Any, key: Any = None, value: Any = None
) -> None:
    """A refusal, too, where `Plan.mismatch` names one."""
    if text := kvquant.plan(**planned).mismatch(query, view, seqs, key, value):
        raise ValueError(text)


def _written(args: Arguments) -> list[Tensor]:
    written = [x for x in (args.get("out"), args.get("lse")) if x is not None]
    if args.get("key") is not None:
        written += parts(args["view"]).values()
        if args["seqs"].advance:
            written.append(args["seqs"].seq_lens)
    return written


def _other_offsets(dice: Dice, args: Arguments, cache: Any) -> bool:
    """Offsets that may be anything; then nobody knows whose rows they are."""
    seqs = args["seqs"]
    if not isinstance(seqs, kvquant.Sequences) or seqs.cu_seqlens_q is None:
        return False
    cu = seqs.cu_seqlens_q.clone()
    cu[dice.number(0, len(cu) - 1)] = dice.among([-1, 1, 1000, *_INT32])
    args["seqs"] = replace(seqs, cu_seqlens_q=cu)
    return True


def _unplanned(name: str) -> Relation:
    """A vector, or an lse, that was not planned, or none where it was."""

    def change(dice: Dice, args: Arguments, cache: Any) -> bool:
        query, planned = args["query"], args["planned"]
        if not isinstance(query, Tensor) or query.dim() < 3:
            return False
        if name == "lse":
            if not planned.get("return_lse"):
                args["lse"] = torch.zeros(query.shape[:-1])
            return not planned.get("return_lse")
        args[name] = None if planned.get(name) else torch.zeros(query.shape[-2])
        return True

    return Relation(f"{name} unplanned", change)


def _absent(dice: Dice, args: Arguments, cache: Any) -> bool:
    """Without the keys and values that were planned, or with ones that were not."""
    if args["planned"].get("key") is not None:
        args["key"] = args["value"] = None
        return True
    query, view = args["query"], args["view"]
    if not isinstance(query, Tensor) or not isinstance(view, kvquant.CacheView):
        return False
    for name, rows in (("key", view.k), ("value", view.v)):
        args[name] = torch.zeros(*query.shape[:-2], view.num_kv_heads, rows.head_dim)
    return True


def _rows_apart(dice: Dice, args: Arguments) -> Any:
    query = args["query"]
    if not isinstance(query, Tensor) or not query.numel() or query.dim() < 3:
        return NotImplemented
    return torch.stack([query, query], 1)[:, dice.number(0, 1)]


_RUN_KINDS = {**PLAN_KINDS, "view": PlannedView(), "seqs": Batch(planned=True)}
_MISFITS = (
    *SHARED,
    Relation("keys unplanned", _absent),
    Relation("query of other strides", gives(query=_rows_apart), unsure=True),
)
_OPTIONAL = replace(MAYBE_INDEX, dtypes=(torch.bfloat16, torch.float64, torch.int32))
RUN = Operation(
    "Plan.run",
    _run,
    _make_run,
    {
        **_RUN_KINDS,
        "sinks": _OPTIONAL,
        "alibi_slopes": _OPTIONAL,
        "out": OUT,
        "lse": replace(OUT, dtypes=(torch.float16, torch.float64), step=1, least_dims=2),
    },
    (
        *_MISFITS,
        *map(_unplanned, (*_VECTORS, "lse")),
        other_dtype("out", "query"),
        Relation("any offsets", _other_offsets, "contents", unseen=True),
    ),
    written=_written,
    covers=("Plan.launch", "Plan.fits"),
    names=_IN_SEQS,
)
MISMATCH = Operation(
    "Plan.mismatch",
    _mismatch,
    lambda dice, cache: {
        name: x
        for name, x in _make_run(dice, cache).items()
        if name in ("planned", "query", "view", "seqs", "key", "value")
    },
    _RUN_KINDS,
    _MISFITS,
    names=_IN_SEQS,
)
