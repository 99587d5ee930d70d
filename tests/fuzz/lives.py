"""Lives of a cache: random operations on it and, by the reference, on its twin."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant import QuantizedKVCache

from .caches import ATTEND, CONSTRUCTOR
from .calls import Outcome, Plan, Report, check_outcome, make_plan, plain, synchronize
from .compare import LOOSE, Memory, attention_difference, difference, equal
from .dice import Dice
from .methods import METHODS
from .moving import elsewhere, moved

_PROPERTIES = (
    "num_layers", "batch_size", "num_kv_heads", "formats", "device", "block_size", "capacity",
    "max_length", "seq_lens", "seq_starts", "dtype", "head_dim", "v_head_dim",
)  # fmt: skip  # which blocks are taken follows from when dead forks are collected


def state_of(cache: QuantizedKVCache, moves: bool = False) -> dict[str, Any]:
    """All that a refused call must leave as it is; ``moves``: as copies on the CPU."""
    layers = range(cache.num_layers)
    state = {
        **cache.state_dict(),
        "lengths": [cache.seq_lens_of(layer) for layer in layers],
        "bounds": [cache.max_length_of(layer) for layer in layers],
        "batch_size": cache.batch_size,
        "starts": cache.seq_starts,
    }
    if moves:
        return moved(state, "cpu")
    state["lengths"] = [x.clone() for x in state["lengths"]]
    state["starts"] = None if state["starts"] is None else state["starts"].clone()
    return state


def other_part(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """What differs between two states."""
    if a.keys() != b.keys():
        return "other names"
    for name, x in a.items():
        if isinstance(x, Tensor):
            if not equal(x, b[name]):
                return name
        elif difference(x, b[name]):
            return name
    return None


@dataclass
class Pair:
    """A cache, its twin, and the state that the cache was in when last seen.

    Attributes:
        target: As of `Dice`, if tensors are copied there: then the twin is on the CPU.
        ahead: The twin's host knew lengths that the cache's did not: it may hold fewer blocks.
    """

    cache: QuantizedKVCache
    twin: QuantizedKVCache
    target: str | None
    ahead: bool = False
    state: dict[str, Any] = field(init=False)
    same_bits: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.state = self.state_now()

    def state_now(self) -> dict[str, Any]:
        return state_of(self.cache, self.target is not None)

    def look(self) -> str | None:
        """Take note of the state; says how cache and twin differ."""
        self.state = self.state_now()
        with kvquant.use_backend("reference"):
            theirs = state_of(self.twin)
        part = other_part(self.state, theirs)
        self.same_bits = part is None
        if part is not None and not part.endswith(("k_data", "k_params", "k_mean")):
            return f"{part} differs"
        if part is not None and self.cache.formats[int(part.split(".")[1])].key_mean is None:
            return f"{part} differs"
        for name in _PROPERTIES:
            ours, wanted = getattr(self.cache, name), getattr(self.twin, name)
            if self.target and name == "device":
                ours, wanted = ours.type, torch.device(self.target).type
            elif self.target:
                ours = moved(ours, "cpu")
            if why := difference(ours, wanted):
                return f"{name}: {why}"
        for layer in range(self.cache.num_layers):
            rows = self.cache.dequantize(layer, torch.float32)
            if self.target:
                rows = moved(rows, "cpu")
            with kvquant.use_backend("reference"):
                wanted = self.twin.dequantize(layer, torch.float32)
            steps = [theirs[f"layers.{layer}.{x}_params"][..., :1].float() for x in "kv"]
            for name, a, b, step in zip(("keys", "values"), rows, wanted, steps, strict=True):
                if why := _rows_differ(a, b, step):
                    return f"dequantized {name}: {why}"
        return None


def _rows_differ(got: Tensor, wanted: Tensor, step: Tensor) -> str | None:
    """Rows ``(batch, tokens, heads, dim)`` and the steps of their codes, heads before tokens."""
    if got.shape != wanted.shape:
        return f"shape {list(got.shape)} instead of {list(wanted.shape)}"
    if equal(got, wanted):
        return None
    if not torch.equal(got.isfinite(), wanted.isfinite()):
        return "other elements are NaN or infinite"
    off = (got - wanted).nan_to_num(nan=0, posinf=0, neginf=0).norm(dim=-1)
    size = wanted.nan_to_num(nan=0, posinf=0, neginf=0).norm(dim=-1)
    most = 1.1 * got.shape[-1] ** 0.5 * step[..., 0].transpose(1, 2).nan_to_num(nan=0)
    return "off by more than a step" if (off > most + 1e-5 * size).any() else None


def run_life(dice: Dice, report: Report) -> None:
    """One cache from its beginning."""
    usual, dice.spelling = dice.spelling, 0.02
    plan = make_plan(dice, CONSTRUCTOR)
    dice.spelling = usual
    report.begin(plan.describe())
    outcome = Outcome.of(CONSTRUCTOR.call, **plan.arguments)
    check_outcome(report, plan, outcome, False)
    if outcome.error is not None:
        return
    with kvquant.use_backend("reference"):
        twin = QuantizedKVCache(**{**plan.arguments, "device": "cpu"})
    pairs = [Pair(outcome.result, twin, dice.target if dice.moves else None)]
    for _ in range(dice.number(5, 15)):
        pair = dice.among(pairs)
        if not _one_operation(dice, report, pair, pairs):
            return  # what comes after a failure says nothing


def _one_operation(dice: Dice, report: Report, pair: Pair, pairs: list[Pair]) -> bool:
    """Run one and check it; False after a failure."""
    failures = len(report.failures)
    operation = dice.among(METHODS)
    mistakes = dice.number(1, 3) if dice.chance(0.4) and operation.kinds else 0
    model = pair.twin if dice.moves else pair.cache  # with all that arguments depend on
    plan = make_plan(dice, operation, model, mistakes)
    report.begin(f"{plan.describe()} on {pair.cache}")
    must = None
    if not plan.mistakes and not plan.unsure and not plan.unseen:
        must = operation.refused(plan.arguments, model)
    blind = _blind(plan, model)
    pair.ahead |= blind
    if must is False and blind:
        must = None
    arguments = plan.arguments_on(dice.target) if dice.moves else plan.arguments
    memory, theirs, held = Memory(arguments), dict(plan.arguments), None
    if "out" in theirs:
        theirs["out"], held = (moved(theirs["out"], "cpu") for _ in range(2))
    outcome = Outcome.of(operation.call, pair.cache, **arguments)
    if isinstance(outcome.error, kvquant.CacheFullError) and gc.collect():
        # Forks that errors of earlier calls held have given back their blocks.
        outcome = Outcome.of(operation.call, pair.cache, **arguments)
    synchronize(dice)
    check_outcome(report, plan, outcome, must)
    if name := memory.changed(operation.written(arguments) if outcome.error is None else []):
        report.fail(plan, "written", f"{name} is not as it was")
    refused = outcome.error is not None
    if refused and (part := other_part(pair.state, pair.state_now())):
        report.fail(plan, "written though refused", f"{part} is not as it was")
    if outcome.error is None and (plan.mistakes or plan.unsure or plan.unseen):
        return False  # nobody knows what the twin should be
    if dice.moves and (plan.mistakes or plan.unsure or plan.unseen):
        return len(report.failures) == failures  # on the CPU they may be others, or none
    with kvquant.use_backend("reference"):
        wanted = Outcome.of(operation.call, pair.twin, **theirs)
    full = isinstance(outcome.error, kvquant.CacheFullError) and wanted.error is None
    if full and any(x.ahead for x in pairs):
        return False  # blocks are taken by tokens that there might have been
    if type(outcome.error) is not type(wanted.error):
        errors = plain(repr(outcome.error)), plain(repr(wanted.error))
        report.fail(plan, "not as the reference", f"{errors[0]}, but there {errors[1]}")
        return False
    if len(report.failures) > failures:
        return False
    if outcome.error is None and isinstance(outcome.result, QuantizedKVCache):
        new = Pair(outcome.result, wanted.result, pair.target, pair.ahead)
        if part := other_part(pair.state, new.state):
            report.fail(plan, "another cache", f"{part} is not the old one's")
        if why := new.look():
            report.fail(plan, "not as the reference", plain(why))
        pairs[:] = [*pairs[-2:], new]
    elif outcome.error is None and (
        why := _difference(dice, plan, pair, outcome.result, wanted.result, held)
    ):
        report.fail(plan, "not as the reference", plain(why))
    other = dice.among(pairs)
    if other is not pair and (part := other_part(other.state, other.state_now())):
        report.fail(plan, "another cache was written", part)
    return len(report.failures) == failures


def _blind(plan: Plan, cache: QuantizedKVCache) -> bool:
    """Whether the host is not told how many rows a sequence has: the twin's host is."""
    names = [name for name in plan.arguments if name.startswith("cu_seqlens")]
    there = [name for name in names if plan.places.get(name)]
    return bool(there) and cache.capacity is not None


def _difference(
    dice: Dice, plan: Plan, pair: Pair, got: Any, wanted: Any, held: Tensor | None
) -> str | None:
    """How cache and twin differ after a call, or the call's results."""
    if why := pair.look():
        return why
    if not plan.operation.compare:
        return None
    if dice.moves:
        if why := elsewhere(got, dice.target):
            return why
        got = moved(got, "cpu")
    tolerance = None if pair.same_bits else LOOSE
    if dice.moves and _by_torch(plan):
        if not all(plan.arguments[name].abs().lt(1e4).all() for name in ("key", "value")):
            return None  # what comes of NaN and of overflows is another thing on each device
        halves = plan.arguments["query"].dtype != torch.float32
        tolerance = max(tolerance or 0, 3e-2 if halves else 1e-4)  # torch's, on another device
    cu = plan.arguments.get("cu_seqlens_q")
    return attention_difference(
        cu, got, wanted, tolerance, rounds_queries=dice.moves, held=(held, None)
    )


def _by_torch(plan: Plan) -> bool:
    """Whether torch's own attention may have answered: see ``exact_prompt``."""
    key, exact = plan.arguments.get("key"), plan.arguments.get("exact_prompt", True)
    attends = plan.operation is ATTEND and isinstance(key, Tensor)
    return attends and exact and key.dim() == 4 and key.shape[1] > 1
