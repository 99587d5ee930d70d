"""One random call, or one random life of a cache: made, run and checked.

What is checked: no crash (the parent process sees it); a refused call raises a ValueError or
TypeError that names an argument, and leaves every tensor as it was; a call with a mistake is
refused, one without is not; what an accepted call gives and writes is what the reference does.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant import QuantizedKVCache

from .compare import (
    LOOSE,
    Memory,
    attention_difference,
    difference,
    own_fields,
    parts,
    stored_difference,
    tensors_in,
)
from .dice import Dice
from .moving import elsewhere, moved
from .operations import Arguments, Operation


@dataclass(frozen=True)
class Failure:
    """Something that must not be."""

    operation: str
    kind: str
    message: str
    details: str = ""


@dataclass
class Report:
    """What some calls came to.

    Attributes:
        begin: Told what each call is before it runs.
        trace: Told of each call after it ran; for a single one.
    """

    begin: Callable[[str], None] = lambda what: None
    trace: Callable[[str], None] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, plan: Plan, kind: str, message: str) -> None:
        self.failures.append(Failure(plan.operation.name, kind, message, plan.describe()))


@dataclass
class Plan:
    """A call and what is known to be wrong with it.

    Attributes:
        mistakes: Labels of what was planted, each of which has to be refused.
        unsure: Of what no rule is about.
        unseen: Of bad contents on a device: nobody looks at them, and they do no harm.
        error: The type that the error has to be of, if that is known.
        places: As of `Dice`.
    """

    operation: Operation
    arguments: Arguments
    mistakes: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    error: type[Exception] | None = None
    places: dict[str, bool] = field(default_factory=dict)

    def on_device(self, name: str) -> bool:
        """Whether an argument is copied to a device that the call is on."""
        kind = self.operation.kinds.get(name)
        return self.places.get(name, kind is None or kind.on_device)

    def arguments_on(self, device: str) -> Arguments:
        """Copies there, but for what callers have on the host."""
        there = {name: x for name, x in self.arguments.items() if self.on_device(name)}
        return self.arguments | moved(there, device)

    def describe(self) -> str:
        host = {name: "host " for name, there in self.places.items() if not there}
        parts = (f"{name}={host.get(name, '')}{show(x)}" for name, x in self.arguments.items())
        shown = ", ".join(parts)
        perhaps = [f"perhaps {label}" for label in self.unsure]
        wrong = "; ".join([*self.mistakes, *perhaps, *(f"unseen: {x}" for x in self.unseen)])
        return f"{self.operation.name}({shown})" + (f"  # {wrong}" if wrong else "")


def show(x: Any) -> str:
    """An argument in a line."""
    if isinstance(x, Tensor):
        text = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if x.layout is torch.strided and not x.is_contiguous():
            text += f" strides {list(x.stride())}"
        if x.device.type != "cpu":
            return f"{text} on {x.device}"
        small = x.numel() <= 8 and x.dim() < 3 and x.layout is torch.strided
        return f"{text} {x.tolist()}" if small else text
    if isinstance(x, kvquant.CacheView):
        shown = (f"{name}: {show(part)}" for name, part in parts(x).items())
        return f"CacheView({', '.join(shown)}, {x.format})"
    if isinstance(x, (kvquant.RowsView, kvquant.Sequences)):
        shown = (f"{name}={show(value)}" for name, value in own_fields(x))
        return f"{type(x).__name__}({', '.join(shown)})"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{key}: {show(value)}" for key, value in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return f"{type(x).__name__}({', '.join(map(show, x))})"
    if type(x) is object:
        return "object()"
    if isinstance(x, QuantizedKVCache):
        return repr(x)
    return repr(x) if type(x) in (int, float, bool, str, type(None)) else f"{type(x).__name__} {x}"


def make_plan(dice: Dice, operation: Operation, cache: Any = None, mistakes: int = 0) -> Plan:
    """A call with up to so many mistakes."""
    dice.places = {}
    plan = Plan(operation, operation.make(dice, cache))
    if dice.moves:
        plan.places = dice.places
    groups: set[str] = set()
    touched: set[str] = set()
    for _ in range(mistakes):
        if operation.relations and dice.chance(0.4 if operation.kinds else 1):
            _relate(dice, plan, cache, groups)
    spoilt, related = len(groups), bool(plan.mistakes)
    for _ in range(mistakes - spoilt if operation.kinds else 0):
        name = dice.among(list(operation.kinds))
        if name in touched:
            continue
        touched.add(name)
        wrongs = list(operation.kinds[name].wrong(plan.arguments.get(name), dice))
        wrongs = [wrong for wrong in wrongs if not wrong.group or wrong.group not in groups]
        if related:  # which an argument that may be good could undo
            wrongs = [wrong for wrong in wrongs if not wrong.unsure]
        wrong = dice.among(wrongs)
        groups.add(wrong.group)
        plan.arguments[name] = wrong.make()
        if wrong.host:
            dice.places[name] = False
        (plan.unsure if wrong.unsure else plan.mistakes).append(f"{name}: {wrong.label}")
    if len(plan.mistakes) != 1 or plan.unsure or plan.unseen:
        plan.error = None
    return plan


def _relate(dice: Dice, plan: Plan, cache: Any, groups: set[str]) -> None:
    relation = dice.among(plan.operation.relations)
    if relation.group in groups or not relation.apply(dice, plan.arguments, cache):
        return
    groups.add(relation.group)
    looked_at = plan.arguments.get(relation.of)
    unseen = dice.moves and isinstance(looked_at, Tensor) and plan.on_device(relation.of)
    unsure = relation.unsure or (unseen and dice.target == "cpu")
    unseen = unseen or relation.unseen
    plan.error = relation.error
    labels = plan.unsure if unsure else plan.unseen if unseen else plan.mistakes
    labels.append(relation.label)


@dataclass
class Outcome:
    """What a call came to: a result, or an error."""

    result: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[..., Any], *args: Any, **arguments: Any) -> Outcome:
        try:
            return cls(call(*args, **arguments))
        except Exception as error:
            return cls(error=error)


def names_of(operation: Operation) -> set[str]:
    parameters = inspect.signature(operation.call).parameters
    return {*parameters, *operation.names} - {"self", "cls"}


def names_an_argument(message: str, names: set[str]) -> bool:
    """Whether it begins with arguments' names: ``a: ..``, ``a, b: ..`` or ``a[0].c: ..``."""
    found = re.match(r"^((?:[A-Za-z_]\w*)(?:\[[^\]]*\]|\.\w+)*(?:, )?)+: ", message)
    if not found:
        return False
    parts = re.sub(r"\[[^\]]*\]", "", found[0][:-2]).split(", ")
    return all(part.split(".")[0] in names for part in parts)


def plain(message: str) -> str:
    """Without what differs from call to call, so that alike failures are one."""
    message = re.sub(r"'[^']*'|\[[^\[\]]*\]|0x[0-9a-f]+", "..", message.split("\n")[0])
    return re.sub(r"-?\d[\d.e+-]*", "N", message)[:160]


def _kinds_of(labels: list[str]) -> str:
    """Mistakes without what differs between alike ones."""
    return " and ".join(sorted({re.sub(r"(type|dtype|number) .*", r"\1", x) for x in labels}))


def where_from(error: BaseException) -> str:
    """The library's innermost frame."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/kvquant/" in f.filename]
    return f"{frames[-1].filename.split('/kvquant/')[-1]}:{frames[-1].name}" if frames else "?"


def check_outcome(report: Report, plan: Plan, outcome: Outcome, must: bool | None) -> None:
    """Refused or accepted as it has to be, and with an error as it has to be.

    ``must``: whether good arguments have to be refused here; None: perhaps.
    """
    name, error = plan.operation.name, outcome.error
    report.calls[name] += 1
    report.accepted[name] += error is None
    if report.trace:
        report.trace(plan.describe())
        if error is None:
            report.trace(f"  accepted: {show(outcome.result)}")
        else:
            report.trace("  " + "".join(traceback.format_exception(error)).replace("\n", "\n  "))
    wrong = bool(plan.mistakes) or bool(must)
    if error is None:
        if wrong:
            report.fail(plan, "accepted", _kinds_of(plan.mistakes) or "the cache as it stands")
        return
    text = f"{type(error).__name__}: {plain(str(error))}"
    if not isinstance(error, (ValueError, TypeError)):
        report.fail(plan, "wrong type of error", f"{text} ({where_from(error)})")
    elif not wrong and not plan.unsure and must is False:
        report.fail(plan, "refused though good", f"{text} ({where_from(error)})")
    elif not names_an_argument(str(error), names_of(plan.operation)):
        report.fail(plan, "names no argument", f"{text} ({where_from(error)})")
    elif plan.error and type(error) is not plan.error:
        report.fail(plan, "wrong type of error", f"{text}, not {plan.error.__name__}")


_WRITTEN = ("view", "seq_lens", "seqs")  # arguments that hold what calls write


def run_function(dice: Dice, operation: Operation, report: Report, mistakes: int) -> None:
    """One call of a function."""
    plan = make_plan(dice, operation, None, mistakes)
    arguments = plan.arguments
    report.begin(plan.describe())
    if dice.moves:
        arguments, twin = plan.arguments_on(dice.target), plan.arguments
    else:
        twin = moved(arguments, "cpu")
    memory, before = Memory(arguments), moved(twin.get("view"), "cpu")
    held = moved((twin.get("out"), twin.get("lse")), "cpu")
    outcome = Outcome.of(operation.call, **arguments)
    synchronize(dice)
    check_outcome(report, plan, outcome, False)
    accepted = outcome.error is None
    if accepted and (plan.mistakes or plan.unsure):
        return
    written = operation.written(arguments) if accepted else []
    if name := memory.changed(written):
        kind = "written" if accepted else "written though refused"
        report.fail(plan, kind, f"{name} is not as it was")
    if not accepted or plan.unseen or not operation.compare:
        return
    with kvquant.use_backend("reference"):
        wanted = Outcome.of(operation.call, **twin)
    if wanted.error is not None:
        report.fail(plan, "the reference refused", plain(repr(wanted.error)))
        return
    result = outcome.result
    if dice.moves:
        if why := elsewhere(result, dice.target):
            report.fail(plan, "on another device", why)
        result = moved(result, "cpu")
        if written:
            arguments = moved({x: arguments.get(x) for x in _WRITTEN}, "cpu")
    tolerance = None
    if written and "view" in arguments:
        if why := stored_difference(arguments["view"], twin["view"], before):
            report.fail(plan, "not as the reference", f"view.{why}")
        for name in _WRITTEN[1:]:
            ours, theirs = (tensors_in(x.get(name), name) for x in (arguments, twin))
            for (part, a), (_, b) in zip(ours, theirs, strict=True):
                if why := difference(a, b):
                    report.fail(plan, "not as the reference", f"{part}: {why}")
        pairs = zip(tensors_in(arguments["view"]), tensors_in(twin["view"]), strict=True)
        if any(difference(a, b) for (_, a), (_, b) in pairs):
            tolerance = LOOSE  # another rounding of a mean, and codes a step away
    cu = getattr(twin.get("seqs"), "cu_seqlens_q", twin.get("cu_seqlens_q"))
    why = attention_difference(
        cu, result, wanted.result, tolerance, rounds_queries=dice.moves, held=held
    )
    if why:
        report.fail(plan, "not as the reference", plain(why))


def synchronize(dice: Dice) -> None:
    """Wait for what a call has launched: an error there is that call's."""
    if dice.target != "cpu":
        torch.cuda.synchronize()
