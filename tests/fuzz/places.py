"""Random layers with tables and lengths that fit: where the functions read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvquant

from .compare import parts, rebuilt
from .dice import Dice

MOST_TOKENS = 600  # of a sequence, so that groups of 256 open


def random_format(dice: Dice) -> kvquant.CacheFormat:
    key, value = dice.among([("int8", "int8"), ("int8", "int4"), ("int4", "int4")])
    return kvquant.CacheFormat(
        key=key,
        value=value,
        key_rotation=dice.chance(0.7),
        key_mean=dice.among([None, None, 16, 16, 64, 256]),
        value_rotation=dice.chance(0.3),
    )


def random_head_dims(dice: Dice) -> tuple[int, int]:
    k_dim = dice.head_dim()
    return k_dim, k_dim if dice.chance(0.6) else dice.head_dim()


def random_view(
    dice: Dice,
    blocks: int,
    heads: int,
    size: int,
    dims: tuple[int, int],
    fmt: kvquant.CacheFormat,
) -> kvquant.CacheView:
    """Plausible rows everywhere, sometimes with other things between the heads and blocks."""
    view = kvquant.CacheView.allocate(blocks, heads, size, *dims, format=fmt, device="cpu")
    if dice.chance(0.2):
        width = fmt.slab_bytes(*dims, size) + 16 * dice.number(0, 2)
        view = kvquant.CacheView.slab(
            dice.codes(blocks, heads, width), dims[0],
            block_size=size, v_head_dim=dims[1], format=fmt,
        )  # fmt: skip
    elif dice.chance(0.3):
        wider = {
            name: x.new_zeros(blocks, heads + 1, *x.shape[2:])[:, 1:]
            for name, x in parts(view).items()
        }
        view = rebuilt(view, wider)
    for name, x in parts(view).items():
        if name.endswith("data"):
            x.copy_(dice.codes(*x.shape))
        elif name == "k_mean":
            x.copy_(dice.normal(*x.shape))
        else:
            x[..., 0] = 0.002 + 0.01 * torch.rand(x.shape[:-1], generator=dice.generator)
            x[..., 1] = -1 + 0.3 * dice.normal(*x.shape[:-1])
    return view


@dataclass
class Place:
    """A layer, and the blocks and lengths of the sequences in it."""

    view: kvquant.CacheView
    table: Tensor
    lens: list[int]
    new: list[int]

    @property
    def capacity(self) -> int:
        return self.table.shape[1] * self.view.block_size


def random_place(dice: Dice, *, most_new: int = 0, ragged: bool = False) -> Place:
    """With room for up to ``most_new`` more tokens a sequence, as many for each or ``ragged``."""
    batch, heads = dice.number(1, 4), dice.number(1, 4)
    if dice.chance(0.5):
        size, width = 16 * dice.number(1, MOST_TOKENS // 16), 1
        size = min(size, dice.among([64, MOST_TOKENS]))
        size = size // 16 * 16
    else:
        size = dice.among([16, 16, 32, 64, 256])
        width = dice.number(1, min(MOST_TOKENS // size, 10))
    capacity = size * width
    most_new = min(most_new, capacity)
    new = [dice.number(0, most_new)] * batch
    if ragged:
        new = [dice.number(0, most_new) for _ in range(batch)]
    lens = [_length(dice, capacity - n) for n in new]
    blocks = batch * width + dice.number(0, 2)
    fmt = random_format(dice)
    view = random_view(dice, blocks, heads, size, random_head_dims(dice), fmt)
    order = torch.randperm(blocks, generator=dice.generator)[: batch * width].int()
    table = order.view(batch, width)
    used = torch.arange(width) * size < torch.tensor(lens).add(torch.tensor(new))[:, None]
    _forget(view, table, lens)
    table = table.where(used, dice.among([-1, 2**30, -(2**31)]))
    if dice.chance(0.3):  # rows of a wider table
        table = torch.cat([table, table], 1)[:, :width]
    return Place(view, table, lens, new)


def _length(dice: Dice, most: int) -> int:
    """Often near where a group or a block begins."""
    if dice.chance(0.4):
        return max(0, min(most, 16 * dice.number(0, most // 16) + dice.number(-1, 1)))
    return dice.number(0, most)


def _forget(view: kvquant.CacheView, table: Tensor, lens: list[int]) -> None:
    """NaN wherever no token is, so that reading what was never written shows."""
    blocks, _, size, _ = view.k.codes.shape
    token = torch.arange(table.shape[1] * size).view(1, -1, size)
    length = torch.tensor(lens)[:, None, None]
    held = torch.zeros(blocks, size, dtype=torch.bool)
    held[table.long()] = token < length
    empty = ~held[:, None, :, None]
    view.k.params.view(torch.float16).masked_fill_(empty, torch.nan)
    view.v.params.view(torch.float16).masked_fill_(empty, torch.nan)
    if view.mean is None:
        return
    group, slots = view.format.mean_group, view.mean.view(torch.float16).shape[2]
    first = token[..., ::group] if slots > 1 else token[..., :1]
    held = torch.zeros(blocks, slots, dtype=torch.bool)
    held[table.long()] = (first < length) & (first % group == 0)
    view.mean.view(torch.float16).masked_fill_(~held[:, None, :, None], torch.nan)


def options_of(place: Place, dice: Dice) -> dict[str, Any]:
    """A function's arguments that say where."""
    starts = None
    if dice.chance(0.4):
        anywhere = [-5, 0, 1, 15, 16, 17, 2**31 - 1, -(2**31)]
        starts = [
            dice.among([dice.number(0, n), dice.number(0, n), dice.among(anywhere)])
            for n in place.lens
        ]
    return {
        "view": place.view,
        "block_table": place.table,
        "seq_lens": dice.index(place.lens),
        "seq_starts": None if starts is None else dice.index(starts),
    }
