"""What a call is made of: formats, views of memory and batches, as in `.operations`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant.formats import ROW_FORMATS

from .arguments import MAYBE_INDEX, Choice, Device, Flag, Integer, Kind, Tensors, Wrong
from .compare import own_fields
from .dice import Dice
from .functions import most_of, packed_offsets
from .operations import TABLE, WHERE_KINDS, Arguments, Operation, Relation, gives
from .places import options_of, random_format, random_head_dims, random_place, random_view

# ------------------------------------------------------------------------------------------ formats


class Format(Kind):
    """A `CacheFormat`, or the format of a view's rows."""


FORMAT = Format(optional=True)


def _make_format(dice: Dice, cache: Any) -> Arguments:
    args = {
        "key": dice.among(list(ROW_FORMATS)),
        "value": dice.among(list(ROW_FORMATS)),
        "key_rotation": dice.flag(),
        "key_mean": dice.among([None, *map(dice.integer, (16, 32, 64, 256, 1024))]),
        "value_rotation": dice.among([None, dice.flag()]),
    }
    return {name: x for name, x in args.items() if dice.flag()}


CACHE_FORMAT = Operation(
    "CacheFormat",
    kvquant.CacheFormat,
    _make_format,
    {
        "key": Choice(),
        "value": Choice(),
        "key_rotation": Flag(),
        "key_mean": Integer(optional=True, bad=(0, 1, 8, 24, -16, 100)),
        "value_rotation": Flag(optional=True),
    },
)


# -------------------------------------------------------------------------------------------- views


class Part(Tensors):
    """One of a view's tensors: its rows must be contiguous and aligned."""

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        if not isinstance(x, Tensor):
            return
        wide = torch.cat([x, x], 3)
        if x.shape[2] > 1 and x.numel():
            yield Wrong("rows apart", lambda: wide[..., : x.shape[3]])
        flat = x.new_zeros(x.numel() + 1)
        if x.numel():
            yield Wrong("not aligned", lambda: flat[1:].view(x.shape))


_OTHERS = (torch.int8, torch.float16, torch.float32)
_PART = Part(dtypes=_OTHERS, sized=(0, 1, 2, 3), strided=False)
_DIM = Integer(bad=(0, 24, -16, 2**40))
_ROW_KINDS = {"codes": _PART, "params": _PART, "head_dim": _DIM, "format": Format()}


def _within(rows: Any, name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: dataclasses.replace(rows, **{name: make()})


class Rows(Kind):
    """A `RowsView`: it checks nothing itself, the view that is made of it does."""

    on_device = True

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        if not isinstance(x, kvquant.RowsView):
            return
        for name, value in own_fields(x):
            for wrong in _ROW_KINDS[name].wrong(value, dice):
                label = f"{name} {wrong.label}"
                yield replace(wrong, label=label, make=_within(x, name, wrong.make))


def _make_view(dice: Dice, cache: Any) -> Arguments:
    size, dims = 16 * dice.number(0, 20), random_head_dims(dice)
    blocks, heads = dice.number(0, 4), dice.number(1, 4)
    view = random_view(dice, max(1, blocks), heads, max(16, size), dims, random_format(dice))
    k, v, mean, group = (x for _, x in own_fields(view))
    if blocks == 0:
        k, v = (replace(x, codes=x.codes[:0], params=x.params[:0]) for x in (k, v))
        mean = None if mean is None else mean[:0]
    return {"k": k, "v": v, "mean": mean, "mean_group": dice.integer(group)}


def _mean(dice: Dice, args: Arguments, cache: Any) -> bool:
    """A mean that there is no group for, or none where there is one."""
    k = args["k"]
    if not isinstance(k, kvquant.RowsView) or not isinstance(k.codes, Tensor):
        return False
    args["mean"] = torch.zeros_like(k.codes) if args["mean"] is None else None
    return True


def _call_view(k: Any, v: Any, mean: Any, mean_group: Any) -> str:
    """A view, and what else it has to say."""
    view = kvquant.CacheView(k, v, mean, mean_group)
    again = view.replaced(view.tensors)
    assert again.spec == view.spec
    return f"{view.format}, {view.num_blocks} blocks, {view.nbytes} bytes on {view.device}"


CACHE_VIEW = Operation(
    "CacheView",
    _call_view,
    _make_view,
    {
        "k": Rows(),
        "v": Rows(),
        "mean": replace(_PART, optional=True),
        "mean_group": Integer(bad=(1, 8, 24, -16, 100, 2**31)),
    },
    (Relation("a mean where there is none, or none", _mean),),
    compare=False,
    covers=("RowsView", "CacheView.replaced"),
)


def _make_allocate(dice: Dice, cache: Any) -> Arguments:
    k_dim, v_dim = random_head_dims(dice)
    args = {
        "num_blocks": dice.integer(dice.number(1, 4)),
        "num_kv_heads": dice.integer(dice.number(1, 4)),
        "block_size": dice.integer(16 * dice.number(1, 20)),
        "head_dim": dice.integer(k_dim),
    }
    more = {
        "v_head_dim": dice.among([None, dice.integer(v_dim)]),
        "format": dice.among([None, random_format(dice)]),
        "device": dice.among([dice.target, torch.device(dice.target)]),
    }
    return args | {name: x for name, x in more.items() if dice.flag() or name == "device"}


_SIZE = Integer(bad=(-1, -(2**40), 2**40))
ALLOCATE = Operation(
    "CacheView.allocate",
    kvquant.CacheView.allocate,
    _make_allocate,
    {
        **dict.fromkeys(("num_blocks", "num_kv_heads"), _SIZE),
        "block_size": replace(_SIZE, bad=(-1, 8, 24, 2**40)),
        "head_dim": _DIM,
        "v_head_dim": replace(_DIM, optional=True),
        "format": FORMAT,
        "device": Device(),
    },
    tuple(
        Relation(f"no {name}", gives(**{name: 0}), unsure=True)
        for name in ("num_blocks", "num_kv_heads", "block_size", "head_dim", "v_head_dim")
    ),
    compare=False,
)


def _make_slab(dice: Dice, cache: Any) -> Arguments:
    (k_dim, v_dim), fmt = random_head_dims(dice), random_format(dice)
    size, lead = 16 * dice.number(1, 20), (dice.number(1, 4), dice.number(1, 4))
    needed, before = fmt.slab_bytes(k_dim, v_dim, size), 16 * dice.number(0, 2)
    buffer = dice.codes(*lead, before + needed + 16 * dice.number(0, 2))[..., before:]
    if dice.chance(0.3):  # one that lies heads first
        buffer = buffer.transpose(0, 1).contiguous().transpose(0, 1)
    return {
        "buffer": buffer,
        "head_dim": dice.integer(k_dim),
        "block_size": dice.integer(size),
        "v_head_dim": None if v_dim == k_dim and dice.flag() else dice.integer(v_dim),
        "format": fmt,
    }


def _short(dice: Dice, args: Arguments) -> Any:
    try:
        needed = args["format"].slab_bytes(args["head_dim"], args["v_head_dim"], args["block_size"])
        return args["buffer"][..., : needed - dice.among([1, 16, needed])]
    except (AttributeError, IndexError, TypeError):  # another mistake is there
        return NotImplemented


def _apart(dice: Dice, args: Arguments) -> Any:
    """Slabs that no row is aligned in."""
    buffer = args["buffer"]
    if not isinstance(buffer, Tensor) or buffer.dim() != 3 or buffer.is_meta:
        return NotImplemented
    odd = dice.among([1, 2, 4, 8])
    return buffer.new_zeros(*buffer.shape[:2], buffer.shape[2] + odd)[..., odd:]


SLAB = Operation(
    "CacheView.slab",
    kvquant.CacheView.slab,
    _make_slab,
    {
        "buffer": Tensors(dtypes=_OTHERS, most_dims=3, least_dims=3, alone=True),
        "head_dim": _DIM,
        "block_size": Integer(bad=(0, -1, -16, 8, 24, 2**40)),
        "v_head_dim": replace(_DIM, optional=True),
        "format": FORMAT,
    },
    (
        Relation("slabs too short", gives(buffer=_short), "size"),
        Relation("slabs not aligned", gives(buffer=_apart), "size"),
    ),
    compare=False,
)


# ------------------------------------------------------------------------------------------ batches


def _make_sequences(dice: Dice, cache: Any) -> Arguments:
    place = random_place(dice, most_new=dice.among([0, 1, 40]), ragged=True)
    args = options_of(place, dice)
    del args["view"]
    if dice.flag():
        edges, _ = packed_offsets(dice, place.new)
        most = most_of(dice, place.new)
        args |= {"cu_seqlens_q": dice.index(edges), "max_seqlen_q": 0 if most is None else most}
    if dice.flag():
        args["advance"] = dice.flag()
    if dice.flag():
        args["on_host"] = _host_lengths(args)
    return args


def _host_lengths(args: Arguments) -> kvquant.HostLengths:
    """What the index tensors hold, or would hold if they were right."""

    def numbers(name: str) -> tuple[int, ...] | None:
        found = args.get(name)
        return None if found is None else tuple(max(0, int(x)) for x in found.tolist())

    edges = numbers("cu_seqlens_q")
    rows = None if edges is None else tuple(max(0, b - a) for a, b in pairwise(edges))
    return kvquant.HostLengths(numbers("seq_lens") or (), numbers("seq_starts"), rows)


def _bound_alone(dice: Dice, args: Arguments) -> Any:
    return dice.integer(dice.number(1, 50)) if args.get("cu_seqlens_q") is None else NotImplemented


def _other_lengths(dice: Dice, args: Arguments) -> Any:
    return kvquant.HostLengths((1,) * (len(args["block_table"]) + 1))


SEQUENCES = Operation(
    "Sequences",
    kvquant.Sequences,
    _make_sequences,
    {
        **{name: kind for name, kind in WHERE_KINDS.items() if name != "view"},
        "block_table": TABLE,
        "cu_seqlens_q": MAYBE_INDEX,
        "max_seqlen_q": Integer(bad=(-1, -(2**40), 2**31)),
        "advance": Flag(),
    },
    (
        Relation("lengths of another batch", gives(on_host=_other_lengths), "on_host"),
        Relation("max_seqlen_q without cu_seqlens_q", gives(max_seqlen_q=_bound_alone)),
    ),
    compare=False,
    covers=("HostLengths",),
)
