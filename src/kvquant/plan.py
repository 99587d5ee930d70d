"""Which kernels serve an attention call, decided once, and run on other tensors at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeAlias, TypedDict, cast, overload

import torch
from torch import Tensor
from typing_extensions import TypeVar, Unpack

from . import backends, ops
from .arguments import check_flag, check_tensor
from .backends import Prepared, Problem
from .backends.base import is_contiguous
from .backends.exact import refuses as refuses_exact
from .calls import check_out, problem_of
from .checks import check_index
from .view import CacheView, Options, Sequences

__all__ = ["AnyPlan", "AttentionOptions", "Plan", "dispatch", "options_of", "plan", "planned"]

_MOST = 1 << 12
_plans: dict[tuple[Problem, str], AnyPlan] = {}  # by numbers and the forced backend

Result = TypeVar("Result", covariant=True, default=Tensor)  # (Tensor, Tensor) with return_lse
AnyPlan: TypeAlias = "Plan[Tensor | tuple[Tensor, Tensor]]"


class AttentionOptions(TypedDict, total=False):
    """The numbers of an attention call.

    Attributes:
        softmax_scale: ``head_dim**-0.5`` by default.
        causal: A query sees no token behind its own position.
        sliding_window: A query at ``i`` sees tokens ``j > i - sliding_window``.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        split_size: On CUDA, tokens of every split: see `attention`.
    """

    softmax_scale: float | None
    causal: bool
    sliding_window: int | None
    softcap: float | None
    split_size: int | None


class _Rows:
    """How a tensor of rows has to look."""

    __slots__ = ("contiguous", "device", "dtype", "rest", "shape", "strides")

    def __init__(self, look: backends.Look) -> None:
        shape, self.strides, self.dtype, self.device = look
        self.shape, self.rest = shape, shape[1:] if shape[0] == -1 else None
        self.contiguous = is_contiguous(look)

    def is_of(self, x: Tensor) -> bool:
        """Whether an eager tensor looks so. A contiguous one is told by a flag, which is faster."""
        return (
            type(x) is Tensor
            and (x.shape == self.shape or (self.rest is not None and x.shape[1:] == self.rest))
            and (x.is_contiguous() if self.contiguous else x.stride() == self.strides)
            and x.dtype is self.dtype
            and x.device == self.device
        )


class Plan(Generic[Result]):
    """An attention call, and the append of its keys and values, that is ready to run.

    Made by `plan`. It holds no tensor: layers whose memory looks alike share it, and it stays valid
    as lengths grow. ``print`` shows what it does. To type checkers ``Plan`` is one whose `run`
    returns the output; with ``return_lse`` it is ``Plan[tuple[Tensor, Tensor]]``.

    Attributes:
        options: The numbers of the call.
        backend: "cuda", "cpu", "reference", or "torch" for an exact prompt.
        regime: Which of the backend's kernels.
        details: More to know about it, by name.
        reads_lengths: It takes the batch's lengths from `Sequences.on_host`, or reads them back.
    """

    def __init__(self, problem: Problem, prepared: Prepared) -> None:
        self._problem = problem
        self._query = _Rows(problem.query)
        self._key, self._value = (
            None if look is None else _Rows(look) for look in (problem.key, problem.value)
        )
        self._view, self._seqs, self._lse = problem.view, problem.seqs, problem.lse
        self._sinks, self._slopes = problem.sinks, problem.alibi_slopes
        self._v_head_dim = problem.view.v_head_dim
        # `run` on arguments that are known to fit
        self.launch = cast("Callable[..., Result]", prepared.launch)
        self.options = problem.options
        self.backend, self.regime = prepared.backend, prepared.regime
        self.details, self.reads_lengths = dict(prepared.details), prepared.reads_lengths

    def mismatch(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> str | None:
        """None, or which argument does not look like the planned one, and how."""
        problem = self._problem
        found = problem_of(query, view, seqs, key, value, self.options)
        for name in ("query", "key", "value", "view", "seqs"):
            expected, got = getattr(problem, name), getattr(found, name)
            if expected != got:
                return f"{name}: planned for {expected}, got {got}"
        return None

    def fits(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
    ) -> bool:
        """Whether these eager tensors look like the planned ones."""
        if view.spec is not self._view and view.spec != self._view:
            return False
        if seqs.spec is not self._seqs and seqs.spec != self._seqs:
            return False
        if self._key is None or self._value is None:
            if key is not None or value is not None or not self._query.is_of(query):
                return False
        elif (
            key is None
            or value is None
            or not self._query.is_of(query)
            or not self._key.is_of(key)
            or not self._value.is_of(value)
            or (self._seqs.is_packed and not len(query) == len(key) == len(value))
        ):
            return False
        return not (
            torch.is_grad_enabled()
            and (
                query.requires_grad
                or (key is not None and key.requires_grad)
                or (value is not None and value.requires_grad)
            )
        )

    def run(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Result:
        """Append key and value if given, and attend: one call below Python.

        Rows that the block table has no place for are dropped, on every device.

        Args:
            query: Like the planned one, packed rows in any number.
            view: The layer's memory.
            seqs: The step's batch, with lengths before the call.
            key: New keys, if planned.
            value: New values, if planned.
            sinks: float32 ``(q_heads,)``, if planned: a logit a head that joins the softmax with
                no value.
            alibi_slopes: float32 ``(q_heads,)``, if planned: scores lose ``slope * |i - j|``.
            out: Where the output goes; by default a new tensor. Packed rows of no sequence keep
                what they held.
            lse: Where the log-sum-exp goes, if planned, likewise.

        Returns:
            The output, ``query.shape[:-1]`` with the values' head_dim, in query's dtype; with
            ``return_lse`` planned also the float32 log-sum-exp.

        Raises:
            TypeError: An argument of another type, a dtype that is not supported.
            ValueError: An argument that does not look as planned; nothing was written.
        """
        check_tensor("query", query)
        if not ops.is_plain(query):
            if not torch.compiler.is_compiling() and (
                problem := self.mismatch(query, view, seqs, key, value)
            ):
                raise ValueError(problem)
            self._check_extra(query, sinks, alibi_slopes, out, lse)
            result = dispatch(
                query, view, seqs, key, value, self.options, sinks, alibi_slopes, out, lse,
                self._lse,
            )  # fmt: skip
            return cast("Result", result)
        if (
            type(view) is not CacheView
            or type(seqs) is not Sequences
            or not self.fits(query, view, seqs, key, value)
        ):
            raise ValueError(
                self.mismatch(query, view, seqs, key, value)
                or "query, key, value: expected plain tensors without gradients"
            )
        if self._sinks or self._slopes or not (sinks is alibi_slopes is out is lse is None):
            self._check_extra(query, sinks, alibi_slopes, out, lse)
            return self.launch(query, view, seqs, key, value, sinks, alibi_slopes, out, lse)
        return self.launch(query, view, seqs, key, value)

    def _check_extra(
        self,
        query: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        for name, x, planned in (
            ("sinks", sinks, self._sinks),
            ("alibi_slopes", alibi_slopes, self._slopes),
        ):
            if planned is not (x is not None):
                raise ValueError(f"{name}: planned {'with' if planned else 'without'} it")
            check_index(name, x, query.shape[-2], query.device, torch.float32)
        if lse is not None and not self._lse:
            raise ValueError("lse: planned without return_lse")
        check_out(out, lse, query, self._v_head_dim)

    def __str__(self) -> str:
        problem = self._problem
        heads = problem.query.shape[-2]
        per_head = heads // problem.view.num_kv_heads
        does = "append and attend" if problem.key is not None else "attend"
        call = f"{problem.max_seqlen_q} query tokens, {per_head} query heads a KV head"
        lines = [f"{does}: {self.backend}, {self.regime} ({call})"]
        lines += [f"  {name:<10} {value}" for name, value in self.details.items()]
        return "\n".join(lines)

    __repr__ = __str__


@overload
def plan(
    query: Tensor, view: CacheView, seqs: Sequences, key: Tensor | None = None,
    value: Tensor | None = None, *, sinks: bool = False, alibi_slopes: bool = False,
    return_lse: Literal[False] = False, exact: bool = False, **options: Unpack[AttentionOptions],
) -> Plan[Tensor]: ...  # fmt: skip


@overload
def plan(
    query: Tensor, view: CacheView, seqs: Sequences, key: Tensor | None = None,
    value: Tensor | None = None, *, sinks: bool = False, alibi_slopes: bool = False,
    return_lse: Literal[True], exact: bool = False, **options: Unpack[AttentionOptions],
) -> Plan[tuple[Tensor, Tensor]]: ...  # fmt: skip


@overload
def plan(
    query: Tensor, view: CacheView, seqs: Sequences, key: Tensor | None = None,
    value: Tensor | None = None, *, sinks: bool = False, alibi_slopes: bool = False,
    return_lse: bool, exact: bool = False, **options: Unpack[AttentionOptions],
) -> Plan[Tensor | tuple[Tensor, Tensor]]: ...  # fmt: skip
def plan(
    query: Tensor,
    view: CacheView,
    seqs: Sequences,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    sinks: bool = False,
    alibi_slopes: bool = False,
    return_lse: bool = False,
    exact: bool = False,
    **options: Unpack[AttentionOptions],
) -> Plan[Any]:
    """Choose the kernels of an attention call, for `Plan.run` at every step that looks alike.

    Takes what `Plan.run` takes and reads no element. It is remembered by its numbers: to ask again
    costs a look-up. A plan holds as lengths grow; it has to be asked for again where the view's or
    the batch's sizes change (of packed rows, their number does not count if ``max_seqlen_q`` is
    given).

    Args:
        query: ``(batch, tokens, q_heads, head_dim)``, or packed ``(total, q_heads, head_dim)`` with
            ``seqs.cu_seqlens_q``; float16, bfloat16 or float32, last dimension contiguous.
        view: A layer's memory; its heads divide q_heads.
        seqs: The step's batch; ``seq_lens`` are without the new rows, if there are any.
        key: New keys, ``(batch, tokens, kv_heads, head_dim)``, or packed with as many rows as
            queries.
        value: New values, likewise.
        sinks: `Plan.run` will be given sinks.
        alibi_slopes: `Plan.run` will be given ALiBi slopes.
        return_lse: `Plan.run` also returns the log-sum-exp.
        exact: The sequences are empty: torch attends to the new rows as they are given, where no
            other option asks for more than that.
        **options: See `AttentionOptions`.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Arguments that do not fit together, or that no kernel can honour.
    """
    for name, flag in (
        ("sinks", sinks), ("alibi_slopes", alibi_slopes), ("return_lse", return_lse),
        ("exact", exact),
    ):  # fmt: skip
        check_flag(name, flag)
    check_tensor("query", query)
    numbers = options_of(query.shape[-1] if query.dim() else 1, options)
    return planned(
        query, view, seqs, key, value, numbers,
        sinks=sinks, alibi_slopes=alibi_slopes, lse=return_lse, exact=exact,
    )  # fmt: skip


def options_of(head_dim: int, options: AttentionOptions | dict[str, Any]) -> Options:
    """The kernels' numbers of a caller's options."""
    return Options.of(max(1, head_dim), **options)


def dispatch(
    query: Tensor,
    view: CacheView,
    seqs: Sequences,
    key: Tensor | None,
    value: Tensor | None,
    options: Options,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    wants_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`Plan.run` in compiled code, or on tensors that are not plain: the operator plans."""
    if out is None:
        shape = (*query.shape[:-1], view.v.head_dim)
        out = query.new_zeros(shape) if seqs.cu_seqlens_q is not None else query.new_empty(shape)
    if wants_lse and lse is None:
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    ops.attend(query, view, seqs, key, value, options, sinks, alibi_slopes, out, lse)
    return (out, lse) if lse is not None else out


def planned(
    query: Tensor,
    view: CacheView,
    seqs: Sequences,
    key: Tensor | None,
    value: Tensor | None,
    options: Options,
    **asked: bool,
) -> AnyPlan:
    """The remembered plan of a call, or a new one."""
    problem = problem_of(query, view, seqs, key, value, options, **asked)
    if problem.exact and refuses_exact(problem):
        problem = problem._replace(exact=False)
    at = problem, backends.forced()
    found = _plans.get(at)
    if found is None:
        if len(_plans) >= _MOST:
            _plans.clear()
        found = _plans[at] = Plan(problem, backends.prepare(problem))
    return found
