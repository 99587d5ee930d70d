"""What is fuzzed: an operation with good arguments, and mistakes that are about several of them.

A new function is one more `Operation` in `.others.FUNCTIONS`, a method one in `.caches.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    HUGE,
    INDEX,
    MAYBE_INDEX,
    ROWS,
    Integer,
    Kind,
    Tensors,
    View,
)
from .dice import FLOATS, Dice

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Relation:
    """A mistake that is about several arguments, or about what a tensor holds.

    Attributes:
        label: What it is, for reports.
        apply: Makes it in the arguments (of a cache or None); False: not possible here.
        group: As of `Wrong`.
        of: The tensor whose contents are wrong: they are looked at on the CPU only.
        unseen: They are looked at nowhere.
        error: The type that is to be raised where nothing else is wrong.
        unsure: As of `Wrong`.
    """

    label: str
    apply: Callable[[Dice, Arguments, Any], bool]
    group: str = "relation"
    of: str = ""
    error: type[Exception] | None = None
    unsure: bool = False
    unseen: bool = False


@dataclass(frozen=True)
class Operation:
    """A public function or method.

    Attributes:
        call: Takes the arguments by keyword; a method's cache comes first.
        make: Good arguments (of a cache or None).
        kinds: What each argument is; one without a kind is never a single mistake.
        relations: Further mistakes.
        written: The tensors that an accepted call may write.
        compare: Whether the result is to be the reference's.
        refused: Whether good arguments have to be refused by the cache as it stands; None: maybe.
        covers: Other public names that come with it.
        names: What an error may name beside the arguments.
    """

    name: str
    call: Callable[..., Any]
    make: Callable[[Dice, Any], Arguments]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()
    written: Callable[[Arguments], list[Tensor]] = lambda arguments: []
    compare: bool = True
    refused: Callable[[Arguments, Any], bool | None] = lambda arguments, cache: False
    covers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


# ------------------------------------------------------------------------------- relations at large


def gives(**changes: Any) -> Callable[[Dice, Arguments, Any], bool]:
    """Arguments to put in, as values or functions of (dice, arguments); needs none of them."""

    def apply(dice: Dice, args: Arguments, cache: Any) -> bool:
        new = {k: v(dice, args) if callable(v) else v for k, v in changes.items()}
        if any(v is NotImplemented for v in new.values()):
            return False
        args.update(new)
        return True

    return apply


def edited(name: str, edit: Callable[[Dice, Tensor, Arguments], Any]) -> Callable[..., bool]:
    """Other contents of a tensor: ``edit`` changes a copy, or returns False."""

    def apply(dice: Dice, args: Arguments, cache: Any) -> bool:
        x = args.get(name)
        if not isinstance(x, Tensor) or not x.numel() or x.device.type == "meta":
            return False
        new = x.clone()
        if edit(dice, new, args) is False:
            return False
        args[name] = new
        return True

    return apply


def offsets(name: str) -> tuple[Relation, ...]:
    """What offsets of packed rows must not be, and the ``max_seqlen`` that goes with them."""
    most, first = name.replace("cu_seqlens", "max_seqlen"), "query" if "_q" in name else "key"

    def beyond(dice: Dice, x: Tensor, args: Arguments) -> None:
        x[-1] = args[first].shape[0] + dice.among([1, 5, 2**30])

    def falling(dice: Dice, x: Tensor, args: Arguments) -> None:
        x[0] = x[-1] + 1

    def negative(dice: Dice, x: Tensor, args: Arguments) -> None:
        x[0] = dice.among([-1, -(2**31)])

    def too_few(dice: Dice, args: Arguments) -> Any:
        cu = args.get(name)
        longest = int(cu.diff().amax()) if isinstance(cu, Tensor) and cu.numel() > 1 else 0
        return dice.integer(dice.number(0, longest - 1)) if longest > 0 else NotImplemented

    def absent(dice: Dice, args: Arguments) -> Any:
        return dice.integer(dice.number(0, 50)) if args.get(name) is None else NotImplemented

    return (
        Relation(f"{name} beyond the rows", edited(name, beyond), of=name),
        Relation(f"{name} falls", edited(name, falling), of=name),
        Relation(f"{name} negative", edited(name, negative), of=name),
        Relation(f"{most} below the longest", gives(**{most: too_few}), of=name),
        Relation(f"{most} without {name}", gives(**{most: absent})),
    )


def capacity_of(args: Arguments) -> int:
    table, view = args.get("block_table"), args.get("view")
    if isinstance(table, Tensor) and table.dim() == 2 and hasattr(view, "block_size"):
        return table.shape[1] * view.block_size
    return 0


def by_slots(args: Arguments) -> bool:
    """Whether the table and the lengths say nothing that an append needs."""
    return args.get("slot_mapping") is not None and args["view"].format.key_mean is None


def _needed(dice: Dice, x: Tensor, args: Arguments) -> bool | None:
    """A block that is not there, where a token is: padding needs none."""
    lens, starts = args.get("seq_lens"), args.get("seq_starts")
    if (
        by_slots(args)
        or not isinstance(lens, Tensor)
        or lens.shape != x.shape[:1]
        or not (lens > 0).any()
    ):
        return False
    longest, blocks = int(lens.argmax()), args["view"].k.codes.shape[0]
    last = int(lens[longest]) - 1
    if isinstance(starts, Tensor) and starts.shape == lens.shape and starts[longest] > last:
        return False
    x[longest, min(last // args["view"].block_size, x.shape[1] - 1)] = dice.among(
        [-1, blocks, blocks + 7, 2**31 - 1, -(2**31)]
    )
    return None


def _too_long(dice: Dice, x: Tensor, args: Arguments) -> bool | None:
    if by_slots(args):
        return False
    x[0] = capacity_of(args) + dice.among([1, 1000, 2**30])
    return None


def _negative(dice: Dice, x: Tensor, args: Arguments) -> bool | None:
    if by_slots(args):
        return False
    x[0] = dice.among([-1, -(2**31)])
    return None


WHERE = (
    Relation("a block out of range", edited("block_table", _needed), "contents", of="block_table"),
    Relation("a negative length", edited("seq_lens", _negative), "contents", of="seq_lens"),
    Relation("a length beyond the table", edited("seq_lens", _too_long), "contents", of="seq_lens"),
)
TABLE = Tensors(
    dtypes=(torch.int64, torch.float32, torch.int16),
    most_dims=2,
    least_dims=2,
    sized=(0,),
)
WHERE_KINDS = {
    "view": View(),
    "block_table": TABLE,
    "seq_lens": INDEX,
    "seq_starts": MAYBE_INDEX,
}
OUT = replace(ROWS, optional=True, sized=(0, -1))
MAYBE_COUNT = Integer(optional=True, bad=(-1, -(2**40)), unsure=HUGE)


def other_dtype(name: str, of: str) -> Relation:
    def change(dice: Dice, args: Arguments) -> Any:
        x, y = args.get(name), args.get(of)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return NotImplemented
        return x.to(dice.among([dtype for dtype in FLOATS if dtype != y.dtype]))

    return Relation(f"{name} of another dtype than {of}", gives(**{name: change}))


def longer(name: str, dim: int, label: str) -> Relation:
    def change(dice: Dice, args: Arguments) -> Any:
        x = args.get(name)
        if not isinstance(x, Tensor) or x.dim() < 3 or x.device.type == "meta":
            return NotImplemented
        size = list(x.shape)
        size[dim] += 1
        return x.new_zeros(size)

    return Relation(label, gives(**{name: change}), "size")


def new_out(dice: Dice, query: Tensor, v_dim: int) -> Tensor:
    """Memory for an output, with other memory around that nobody may write."""
    guard = 16 if query.dim() == 3 else 1
    shape = (query.shape[0] + 2 * guard, *query.shape[1:-1], v_dim)
    layout = dice.number(0, 2)
    if layout == 1:
        out = query.new_empty(*shape[:-1], v_dim + 16)[..., :v_dim]
    elif layout == 2:  # heads in front of tokens
        out = query.new_empty(*shape[:-3], shape[-2], shape[-3], v_dim).transpose(-3, -2)
    else:
        out = query.new_empty(shape)
    return out.fill_(dice.among([torch.nan, 7.0]))[guard:-guard]


def new_lse(query: Tensor) -> Tensor:
    """Likewise for a log-sum-exp."""
    guard = 16 if query.dim() == 3 else 1
    shape = (query.shape[0] + 2 * guard, *query.shape[1:-1])
    return torch.full(shape, 7.0)[guard:-guard]
