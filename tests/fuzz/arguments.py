"""Random arguments of every kind, and what would be a mistake in the place of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

import kvquant

from .dice import Dice

T = TypeVar("T")

HUGE = (2**31, 2**40, 2**70)  # more than any count of rows, and than int32 or int64 holds
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

# What is a mistake.


@dataclass(frozen=True)
class Wrong:
    """One way for an argument to be wrong.

    Attributes:
        label: What it is, for reports.
        make: The wrong argument.
        group: Mistakes of one group might make each other good (a batch that is too large in all
            arguments is no mistake), so a call has one of them at most.
        unsure: No rule says whether it is a mistake: the call may be accepted.
        host: It stays where it is made when other arguments are copied to a device.
    """

    label: str
    make: Callable[[], Any]
    group: str = ""
    unsure: bool = False
    host: bool = False


def _same(x: T) -> T:
    return x


_TYPES: dict[str, Any] = {
    "text": "text",
    "list": [1],
    "None": None,
    "complex": 1j,
    "object": object(),
    "dict": {},
    "tuple": (),
    "type": int,
    "int": 3,
    "zero": 0,
    "float": 2.0,
    "bool": True,
    "array": np.ones(3),
    "numpy float": np.float64(2),
    "float tensor": torch.tensor(2.5),
}


@dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Attributes:
        optional: None is no mistake.
        fine: Names of `_TYPES` that are of this kind.
        on_device: Its tensors belong on the device of the call.
    """

    on_device: ClassVar[bool] = False
    optional: bool = False
    fine: tuple[str, ...] = ()

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        """What would be a mistake in the place of ``x``, which is good."""
        for name, value in _TYPES.items():
            if name not in self.fine and not (self.optional and value is None):
                yield Wrong(f"type {name}", partial(_same, value), host=True)


@dataclass(frozen=True)
class Tensors(Kind):
    """A tensor.

    Attributes:
        dtypes: Those that are wrong.
        most_dims: More dimensions than any that is right, less one.
        least_dims: The fewest that are right.
        sized: Dimensions whose size the other arguments fix.
        step: By how much a wrong size differs.
        strided: The last dimension has to be contiguous.
        alone: No other tensor in the call: it may be anywhere.
        no_grad: It must not require a gradient.
        anywhere: It may be on the host where the others are on a device.
    """

    on_device = True
    dtypes: tuple[torch.dtype, ...] = ()
    most_dims: int = 4
    least_dims: int = 4
    sized: tuple[int, ...] = ()
    step: int = 1
    strided: bool = True
    alone: bool = False
    no_grad: bool = False
    anywhere: bool = False

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        if not isinstance(x, Tensor):
            return
        for dtype in self.dtypes:
            yield Wrong(f"dtype {dtype}", partial(x.to, dtype))
        more = (None,) * (self.most_dims + 1 - x.dim())
        yield Wrong("more dimensions", partial(x.__getitem__, (*more, ...)))
        yield Wrong("0 dimensions", partial(x.new_zeros, ()))
        for dims in range(1, self.least_dims):
            yield Wrong(f"{dims} dimensions", partial(x.new_zeros, (*x.shape[x.dim() - dims :],)))
        for dim in self.sized:
            for change in (self.step, -self.step):
                size = list(x.shape)
                size[dim] += change
                if size[dim] >= 0:
                    make = partial(x.new_zeros, size)
                    yield Wrong(f"size {change:+} in dimension {dim}", make, "size")
        if self.strided and x.numel() and x.shape[-1] > 1:
            yield Wrong("strided", lambda: torch.stack([x, x], -1)[..., 0])
        if not self.alone:
            yield Wrong("meta device", partial(x.to, "meta"), "meta")
            if dice.moves and not self.anywhere:
                unsure = dice.target == "cpu"
                yield Wrong("on the host", partial(_same, x), "meta", unsure, host=True)
        if self.no_grad:
            yield Wrong("requires grad", lambda: x.detach().clone().requires_grad_())
        if x.dim():
            yield Wrong("sparse", x.to_sparse, unsure=True)


_NO_ROWS = (torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64)
ROWS = Tensors(dtypes=_NO_ROWS, least_dims=3, sized=(-1,), step=16, no_grad=True)
ODD_ROWS = Tensors(dtypes=_NO_ROWS, least_dims=3, sized=(-1,), step=1, no_grad=True)
INDEX = Tensors(
    dtypes=(torch.int64, torch.int16, torch.float32, torch.bool),
    most_dims=1,
    least_dims=1,
    sized=(0,),
)
MAYBE_ROWS = replace(ROWS, optional=True)
MAYBE_INDEX = replace(INDEX, optional=True)


@dataclass(frozen=True)
class Integer(Kind):
    """An integer; ``bad``: those that are out of range in every call."""

    fine: tuple[str, ...] = ("int", "zero")
    bad: tuple[int, ...] = ()
    unsure: tuple[int, ...] = ()

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        for number in self.bad:
            yield Wrong(f"number {number}", partial(dice.integer, number))
        for number in self.unsure:
            yield Wrong(f"number {number}", partial(_same, number), unsure=True)
        yield Wrong("True in a tensor", partial(torch.tensor, True), unsure=True)


@dataclass(frozen=True)
class Number(Kind):
    """A real number, for a kernel that computes in float32."""

    fine: tuple[str, ...] = ("int", "zero", "float", "numpy float")
    bad: tuple[float, ...] = ()
    unsure: tuple[float, ...] = ()

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        infinite = float("nan"), float("inf"), float("-inf")
        for number in (*infinite, *self.bad):
            yield Wrong(f"number {number:.3g}", partial(_same, number))
        for number in self.unsure:
            yield Wrong(f"number {number:.3g}", partial(_same, number), unsure=True)


SCALE = Number(optional=True, bad=(1e39, -1e39), unsure=(1e-50,))
CAP = Number(
    optional=True,
    fine=("int", "float", "numpy float"),
    bad=(-1.0, 0.0, -0.0, 1e39),
    unsure=(1e-50, 3e-46),
)
WINDOW = Number(
    optional=True,
    fine=("int", "float", "numpy float"),
    bad=(-1.0, 0.0, 0.5, 3.25),
    unsure=(1e39, 1e300),
)


@dataclass(frozen=True)
class Flag(Kind):
    """True or False, and nothing that would be taken for one."""

    fine: tuple[str, ...] = ("bool",)

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        yield Wrong("numpy bool", partial(np.bool_, True))
        yield Wrong("bool tensor", partial(torch.tensor, True))


@dataclass(frozen=True)
class Dtype(Kind):
    """float16, bfloat16 or float32."""

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        for dtype in ("float16", np.float16, torch.float64, torch.int8, torch.bool):
            yield Wrong(f"dtype {dtype!r}", partial(_same, dtype))


@dataclass(frozen=True)
class Device(Kind):
    """A device of torch's; ``bad``: those that are none here."""

    optional: bool = True
    fine: tuple[str, ...] = ("int", "zero", "bool")  # which torch takes for indices
    bad: tuple[str, ...] = ("nonsense", "", "cuda:99")

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        absent = [] if torch.cuda.is_available() else ["cuda", 0, torch.device("cuda")]
        for device in (*self.bad, *absent):
            yield Wrong(f"device {device!r}", partial(_same, device))


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        yield Wrong("no such word", partial(_same, "nonsense"))
        yield Wrong("empty", partial(_same, ""))


@dataclass(frozen=True)
class View(Kind):
    """A layer; ``sized``: the other arguments fix its head_dims and heads."""

    on_device = True
    sized: bool = True

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        blocks, heads, size, _ = x.k.codes.shape
        k_dim, v_dim = x.k.head_dim, x.v.head_dim
        allocate = partial(kvquant.CacheView.allocate, format=x.format, device="cpu")
        yield Wrong("tensor", partial(_same, x.k.codes))
        meta = partial(allocate, blocks, heads, size, k_dim, v_dim, device="meta")
        yield Wrong("on meta", meta, "meta")
        if self.sized:
            for change in ((heads, size, k_dim + 16, v_dim), (4 * heads + 1, size, k_dim, v_dim)):
                yield Wrong("of another shape", partial(allocate, blocks, *change), "size")


class Pair(Kind):
    """A tensor for keys, and one for values."""

    on_device = True

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        if x is None:
            return
        for i in range(2):
            for wrong in ROWS.wrong(x[i], dice):
                yield replace(wrong, label=f"[{i}] {wrong.label}", make=_with(x, i, wrong.make))


def _with(pair: tuple[Any, Any], i: int, make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (make(), pair[1]) if i == 0 else (pair[0], make())


@dataclass(frozen=True)
class Indices(Kind):
    """Sequences by number, of ``batch`` that there are."""

    fine: tuple[str, ...] = ("list",)  # [1], which `bad` has in other forms

    def wrong(self, x: Any, dice: Dice) -> Iterator[Wrong]:
        yield from super().wrong(x, dice)
        first = [int(i) for i in x]
        rest = first[1:]
        for name, bad in (
            ("negative", [-1, *rest]),
            ("too large", [99, *rest]),
            ("huge", [2**40, *rest]),
            ("floats", [0.0, *rest]),
            ("bools", [False, *rest]),
            ("texts", ["0", *rest]),
            ("None inside", [None, *rest]),
            ("list inside", [[0], *rest]),
            ("empty", []),
            ("empty tensor", torch.zeros(0, dtype=torch.int64)),
            ("float tensor", torch.zeros(len(first))),
            ("bool tensor", torch.zeros(len(first), dtype=torch.bool)),
            ("2-D tensor", torch.zeros(len(first), 1, dtype=torch.int64)),
            ("0-D tensor", torch.tensor(0)),
            ("negative tensor", torch.tensor([-1, *rest])),
            ("meta tensor", torch.tensor(first, device="meta")),
        ):
            yield Wrong(name, partial(_same, bad), host=True)
