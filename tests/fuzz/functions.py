"""The functions on a layer: append_, gather and attention, as in `.operations`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvquant

from .arguments import (
    CAP,
    INDEX,
    MAYBE_INDEX,
    MAYBE_ROWS,
    ROWS,
    SCALE,
    WINDOW,
    Dtype,
    Flag,
    Integer,
    Pair,
    View,
)
from .compare import parts
from .dice import FLOATS, Dice
from .operations import (
    MAYBE_COUNT,
    OUT,
    TABLE,
    WHERE,
    WHERE_KINDS,
    Arguments,
    Operation,
    Relation,
    by_slots,
    capacity_of,
    edited,
    gives,
    longer,
    new_out,
    offsets,
    other_dtype,
)
from .places import Place, options_of, random_place

# ------------------------------------------------------------------------------------------ append_


def packed_offsets(dice: Dice, new: list[int]) -> tuple[list[int], int]:
    """Offsets of packed rows and how many rows there are, some of them nobody's."""
    edges = [dice.number(0, 2) if dice.chance(0.3) else 0]
    for count in new:
        edges.append(edges[-1] + count)
    return edges, edges[-1] + (dice.number(0, 3) if dice.chance(0.3) else 0)


def most_of(dice: Dice, new: list[int]) -> Any:
    """A ``max_seqlen`` that is right: however large."""
    if dice.chance(0.5):
        return None
    return dice.integer(max(new) + dice.among([0, 0, 1, 7, 100, 10**5, 2**30]))


def new_rows(dice: Dice, view: Any, *lead: int) -> Arguments:
    heads, dtype = view.k.codes.shape[1], dice.among(FLOATS)
    dims = view.k.head_dim, view.v.head_dim
    key, value = (dice.rows(*lead, heads, dim, dtype=dtype) for dim in dims)
    return {"key": key, "value": value}


def _make_append(dice: Dice, cache: Any) -> Arguments:
    packed = dice.flag()
    place = random_place(dice, most_new=dice.among([1, 1, 3, 40]), ragged=packed)
    view, new, batch = place.view, place.new, len(place.new)
    args = options_of(place, dice)
    if packed:
        edges, total = packed_offsets(dice, new)
        args |= {**new_rows(dice, view, total), "cu_seqlens": dice.index(edges)}
        args["max_seqlen"] = most_of(dice, new)
    else:
        args |= new_rows(dice, view, batch, new[0])
        total = batch * new[0]
    if dice.chance(0.35):
        args["slot_mapping"] = random_slots(dice, place, total)
        if view.format.key_mean is None and dice.flag():
            for name in ("block_table", "seq_lens", "cu_seqlens", "seq_starts", "max_seqlen"):
                args[name] = None
    else:
        args["advance"] = dice.flag()
    return args


def random_slots(dice: Dice, place: Place, total: int) -> Tensor:
    """With a mean, of rows that hold no token: a mean may be taken from those that do."""
    view, table = place.view, place.table.cpu().long()
    blocks, _, size, _ = view.k.codes.shape
    free = torch.ones(blocks * size, dtype=torch.bool)
    if view.format.key_mean is not None:
        for row, length in zip(table, place.lens, strict=True):
            token = torch.arange(length)
            free[row[token // size] * size + token % size] = False
    slots = free.nonzero().flatten()
    slots = slots[torch.randperm(len(slots), generator=dice.generator)][:total]
    slots = torch.cat([slots, slots.new_full((total - len(slots),), -1)])
    skipped = torch.rand(total, generator=dice.generator) < 0.1
    return slots.masked_fill(skipped, -1)


def _only_one(dice: Dice, args: Arguments, cache: Any) -> bool:
    """One of block_table and seq_lens."""
    given = [name for name in ("block_table", "seq_lens") if args.get(name) is not None]
    if len(given) == 2:
        args[dice.among(given)] = None
    elif not given:
        args["seq_lens"] = dice.index([0])
    return len(given) != 1


def _neither(dice: Dice, args: Arguments, cache: Any) -> bool:
    view = args.get("view")
    if not isinstance(view, kvquant.CacheView):
        return False
    if args.get("slot_mapping") is not None and view.format.key_mean is None:
        return False
    args["block_table"] = args["seq_lens"] = None
    return True


def _beside_slots(dice: Dice, args: Arguments, cache: Any) -> bool:
    """What says nothing where the slots say it all."""
    if args.get("slot_mapping") is None or args.get("block_table") is not None:
        return False
    key = args["key"]
    batch = key.shape[0] if isinstance(key, Tensor) and key.dim() == 4 else 1
    name = dice.among(["cu_seqlens", "seq_starts", "max_seqlen", "advance"])
    args[name] = {
        "cu_seqlens": dice.index([0] * (batch + 1)),
        "seq_starts": dice.index([0] * batch),
        "max_seqlen": dice.integer(40),
        "advance": True,
    }[name]
    return True


def _no_offsets(dice: Dice, args: Arguments, cache: Any) -> bool:
    if args.get("cu_seqlens") is None:
        return False
    args["cu_seqlens"] = None
    return True


def _twice(dice: Dice, x: Tensor, args: Arguments) -> bool | None:
    taken = (x >= 0).nonzero().flatten().tolist() if x.dim() == 1 else []
    if len(taken) < 2:
        return False
    x[taken[0]] = x[taken[-1]]
    return None


def _no_slot(dice: Dice, x: Tensor, args: Arguments) -> None:
    blocks, _, size, _ = args["view"].k.codes.shape
    x[dice.number(0, len(x) - 1)] = dice.among([-2, blocks * size, 2**40, -(2**63)])


def _full(dice: Dice, args: Arguments) -> Any:
    key, lens, cu = args.get("key"), args.get("seq_lens"), args.get("cu_seqlens")
    if not isinstance(key, Tensor) or key.dim() != 4 or not key.shape[1] or cu is not None:
        return NotImplemented
    if not isinstance(lens, Tensor) or by_slots(args):
        return NotImplemented
    return torch.full_like(lens, capacity_of(args))


def _advance_slots(dice: Dice, args: Arguments) -> Any:
    return True if args.get("slot_mapping") is not None else NotImplemented


SIZES = (
    longer("value", 0, "value longer than key"),
    longer("key", -2, "key with more heads"),
    longer("value", -2, "value with more heads"),
)

APPEND = Operation(
    "append_",
    kvquant.append_,
    _make_append,
    {
        **WHERE_KINDS,
        "key": ROWS,
        "value": ROWS,
        "block_table": replace(TABLE, optional=True),
        "seq_lens": MAYBE_INDEX,
        "cu_seqlens": MAYBE_INDEX,
        "slot_mapping": replace(INDEX, optional=True, dtypes=(torch.int32, torch.float32)),
        "max_seqlen": MAYBE_COUNT,
        "advance": Flag(),
    },
    (
        *WHERE,
        *offsets("cu_seqlens"),
        *SIZES,
        other_dtype("value", "key"),
        Relation("only one of block_table and seq_lens", _only_one),
        Relation("neither block_table nor seq_lens", _neither),
        Relation("beside slots alone", _beside_slots),
        Relation("packed without cu_seqlens", _no_offsets),
        Relation("a slot twice", edited("slot_mapping", _twice), "contents", of="slot_mapping"),
        Relation("no such slot", edited("slot_mapping", _no_slot), "contents", of="slot_mapping"),
        Relation("advance with slots", gives(advance=_advance_slots)),
        Relation(
            "full",
            gives(seq_lens=_full),
            "contents",
            of="seq_lens",
            error=kvquant.CacheFullError,
        ),
    ),
    written=lambda args: [
        *parts(args["view"]).values(),
        *([args["seq_lens"]] if args.get("advance") is True else []),
    ],
    covers=("CacheFullError",),
)


# ----------------------------------------------------------------------------- gather and attention


def _make_gather(dice: Dice, cache: Any) -> Arguments:
    place = random_place(dice)
    args = options_of(place, dice)
    if dice.chance(0.3):
        lead = (len(place.lens), dice.number(0, place.capacity), place.view.num_kv_heads)
        rows = torch.empty(*lead, 16, dtype=dice.among(FLOATS))
        dims = place.view.k.head_dim, place.view.v.head_dim
        return args | {"out": tuple(new_out(dice, rows, dim) for dim in dims)}
    tokens = dice.among([None, dice.integer(dice.number(0, place.capacity))])
    return args | {"tokens": tokens, "dtype": dice.among(FLOATS)}


def _tokens_beside(dice: Dice, args: Arguments) -> Any:
    return NotImplemented if args.get("out") is None else dice.integer(1)


GATHER = Operation(
    "gather",
    kvquant.gather,
    _make_gather,
    {
        **WHERE_KINDS,
        "view": View(sized=False),
        "tokens": Integer(optional=True, bad=(-1, -(2**40), 2**40)),
        "dtype": Dtype(),
        "out": Pair(optional=True),
    },
    (
        *WHERE,
        Relation("tokens beside out", gives(tokens=_tokens_beside)),
        Relation("tokens beyond the table", gives(tokens=lambda dice, args: capacity_of(args) + 1)),
    ),
    written=lambda args: list(args.get("out") or ()),
    names=("key", "value"),
)

SPLIT = Integer(optional=True, bad=(0, -256, 300, 2**30 + 256, 2**40))
_FLOATS = replace(INDEX, optional=True, dtypes=(torch.bfloat16, torch.float64, torch.int32))
OPTION_KINDS = {
    "softmax_scale": SCALE,
    "causal": Flag(),
    "sliding_window": WINDOW,
    "softcap": CAP,
    "sinks": _FLOATS,
    "alibi_slopes": _FLOATS,
    "split_size": SPLIT,
    "return_lse": Flag(),
}


def attention_options(dice: Dice, heads: int) -> Arguments:
    """Each given or left out."""
    window = dice.number(1, 80)
    floats = partial(dice.normal, heads)
    choices: Arguments = {
        "softmax_scale": dice.real(dice.random.uniform(-0.05, 0.2)),
        "causal": dice.flag(),
        "sliding_window": dice.among([window, float(window), 2**31 - 1, 2**40]),
        "softcap": dice.real(dice.random.uniform(1, 50)),
        "sinks": floats(),
        "alibi_slopes": 0.05 * floats().abs(),
        "split_size": dice.integer(dice.among([256, 512, 2**30])),
        "return_lse": dice.flag(),
    }
    return {name: x for name, x in choices.items() if dice.chance(0.25)}


def make_attention(dice: Dice, cache: Any) -> Arguments:
    packed, appends = dice.flag(), dice.flag()
    place = random_place(dice, most_new=dice.among([1, 1, 3, 40]) if appends else 0, ragged=packed)
    view, batch = place.view, len(place.lens)
    heads = view.k.codes.shape[1] * dice.number(1, 3)
    args = options_of(place, dice) | attention_options(dice, heads)
    new = place.new
    if not appends:
        most = dice.among([1, 1, 3, 40])
        new = [dice.number(0, most) for _ in new] if packed else [dice.number(0, most)] * batch
    lead: tuple[int, ...] = batch, new[0]
    if packed:
        edges, total = packed_offsets(dice, new)
        lead = (total,)
        args |= {"cu_seqlens_q": dice.index(edges), "max_seqlen_q": most_of(dice, new)}
    args["query"] = dice.rows(*lead, heads, view.k.head_dim, clean=True)
    if appends:
        args |= new_rows(dice, view, *lead)
    if dice.chance(0.3):
        args["out"] = new_out(dice, args["query"], view.v.head_dim)
    return args


def _odd_heads(dice: Dice, args: Arguments, cache: Any) -> bool:
    query = args.get("query")
    heads = args["view"].k.codes.shape[1] if cache is None else cache.num_kv_heads
    if not isinstance(query, Tensor) or query.dim() < 3 or heads == 1:
        return False
    args["query"] = query.new_zeros(*query.shape[:-2], query.shape[-2] + 1, query.shape[-1])
    return True


def _no_heads(dice: Dice, args: Arguments) -> Any:
    query = args.get("query")
    if not isinstance(query, Tensor) or query.dim() < 3:
        return NotImplemented
    return query.new_zeros(*query.shape[:-2], 0, query.shape[-1])


def _one_of_two(dice: Dice, args: Arguments, cache: Any) -> bool:
    """A key without a value, or the other way round."""
    if args.get("key") is None:
        return False
    args[dice.among(["key", "value"])] = None
    return True


HEADS = (
    Relation("query of odd heads", _odd_heads, "size"),
    Relation("query of no heads", gives(query=_no_heads), "size", unsure=True),
    Relation("one of key and value", _one_of_two),
)

ATTENTION = Operation(
    "attention",
    kvquant.attention,
    make_attention,
    {
        **WHERE_KINDS,
        **OPTION_KINDS,
        "query": ROWS,
        "key": MAYBE_ROWS,
        "value": MAYBE_ROWS,
        "out": OUT,
        "cu_seqlens_q": MAYBE_INDEX,
        "max_seqlen_q": MAYBE_COUNT,
    },
    (
        *WHERE,
        *offsets("cu_seqlens_q"),
        *HEADS,
        *SIZES,
        other_dtype("value", "key"),
        other_dtype("out", "query"),
        Relation(
            "full",
            gives(seq_lens=_full),
            "contents",
            of="seq_lens",
            error=kvquant.CacheFullError,
        ),
    ),
    written=lambda args: [
        *(parts(args["view"]).values() if args.get("key") is not None else ()),
        *([args["out"]] if args.get("out") is not None else ()),
    ],
    names=tuple(OPTION_KINDS),
)
