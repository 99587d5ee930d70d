"""Views, sequences and calls as `kvquant._C` has them; shared by its CPU and CUDA kernels."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..fields import flatten, names_of
from ..formats import GROUP_TOKENS
from ..view import CacheView, Sequences, ViewSpec
from . import native
from .affine import DTYPES, AffineBackend
from .base import Outputs, Prepared, Problem

__all__ = ["Compiled"]

_MOST_FLOATS = 1 << 30  # of partial results that a bound on packed rows may ask for by itself
_MIN_BOUND = 256  # rows; the kernels for more are the same


def view_twin(view: CacheView) -> Any:
    """The extension's view, which is made once."""
    if view._twin is None:
        blocks, heads, size, _ = view.k.codes.shape
        fields = dict(zip(names_of(CacheView), map(_field, flatten(view)), strict=True))
        if view.mean is None:
            fields["mean"] = (0, 0, 0)
        twin = native.module.CacheView(
            **fields, num_blocks=blocks, num_kv_heads=heads, block_size=size
        )
        object.__setattr__(view, "_twin", twin)
    return view._twin


def seqs_twin(seqs: Sequences) -> Any:
    """Likewise of a step's batch."""
    if seqs._twin is None:
        table, starts, cu = seqs.block_table, seqs.seq_starts, seqs.cu_seqlens_q
        twin = native.module.Sequences(
            block_table=table.data_ptr(),
            seq_lens=seqs.seq_lens.data_ptr(),
            seq_starts=0 if starts is None else starts.data_ptr(),
            cu_seqlens_q=0 if cu is None else cu.data_ptr(),
            max_seqlen_q=seqs.max_seqlen_q,
            advance=seqs.advance,
            young=young_field(seqs.young),
            table_stride=table.stride(0),
            batch=table.shape[0],
            max_blocks=table.shape[1],
        )
        object.__setattr__(seqs, "_twin", twin)
    return seqs._twin


def young_field(young: Tensor | None) -> tuple[int, int, int]:
    """Address of the slabs, bytes between sequences and between heads."""
    return (0, 0, 0) if young is None else (young.data_ptr(), young.stride(0), young.stride(1))


def _field(x: Any) -> Any:
    return (x.data_ptr(), x.stride(0), x.stride(1)) if isinstance(x, Tensor) else x


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, token, head) of dense or packed rows."""
    batch = 0 if x.dim() == 3 else x.stride(0)
    return batch, x.stride(-3), x.stride(-2)


def _sizes(x: Tensor) -> tuple[int, int]:
    """(rows there are, those of each sequence if dense)."""
    return (x.shape[0], x.shape[0]) if x.dim() == 3 else (x.shape[0] * x.shape[1], x.shape[1])


def called_rows(query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which rows (.., 1) are a sequence's."""
    if cu_seqlens is None:
        return torch.ones(1, dtype=torch.bool, device=query.device)
    row = torch.arange(query.shape[0], device=query.device)[:, None, None]
    return ((row >= cu_seqlens[:-1]) & (row < cu_seqlens[1:])).any(-1)


def numbers_of(problem: Problem, multiprocessors: int, capability: int) -> dict[str, Any]:
    """A problem as the extension's choice of kernels takes it."""
    query, key, _, view, seqs = problem[:5]
    alike = key is not None and key.dtype == query.dtype and key.shape[:-2] == query.shape[:-2]
    return {
        "batch": seqs.batch,
        "max_seqlen_q": problem.max_seqlen_q,
        "num_q_heads": query.shape[-2],
        "num_kv_heads": view.num_kv_heads,
        "head_dim": view.head_dim,
        "v_head_dim": view.v_head_dim,
        "capacity": seqs.max_blocks * view.block_size,
        "split_size": problem.options.split_size,
        "k_format": view.k_format.name,
        "v_format": view.v_format.name,
        "mean_group": view.mean_group,
        "age_group": (view.mean_group or GROUP_TOKENS) if seqs.by_age else 0,
        "float32": query.dtype == torch.float32,
        "packed": seqs.is_packed,
        "appends": alike,
        "multiprocessors": multiprocessors,
        "capability": capability,
    }


@cache
def _refusal(k_format: str, v_format: str, head_dim: int, v_head_dim: int) -> str | None:
    """Why no kernel serves such rows, or None."""
    return native.module.refuse_rows(k_format, v_format, head_dim, v_head_dim) or None


class CompiledCall(Prepared):
    """An attention, and the append before it, on tensors that look alike every time."""

    def __init__(self, backend: Compiled, problem: Problem) -> None:
        query, key, value, view, seqs = problem[:5]
        self.backend, self._backend = backend.name, backend
        self._new_tokens = 0 if key is None or seqs.is_packed else key.shape[1]
        numbers = numbers_of(problem, *backend.device_numbers(query.device))
        options = dict(zip(names_of(type(problem.options)), flatten(problem.options), strict=True))
        lead = [(0, *x.strides) if len(x.strides) == 3 else x.strides
                for x in (query, key, value) if x is not None]  # fmt: skip
        strides = [x[:3] for x in lead] + [()] * (3 - len(lead))
        self._native = native.module.Call(
            numbers, options, DTYPES[query.dtype], DTYPES[(key or query).dtype],
            problem.max_seqlen_q, self._new_tokens, *strides,
        )  # fmt: skip
        choice = self._native.choice()
        self.refusals: list[tuple[str | None, str]] = choice.pop("refusals")
        self.regime: str = choice.pop("regime") or ""
        self._floats, self._counters = choice.pop("partial_floats"), choice.pop("counters")
        if key is not None:
            rows = max(problem.max_seqlen_q, self._new_tokens)
            self._floats = max(self._floats, native.module.append_floats(rows))
        # A bound on packed rows may be far above their number; partial results have room for it.
        self._bound = problem if seqs.is_packed and self._floats > _MOST_FLOATS else None
        # Lengths with the call's own tokens, where the launch does not count them itself.
        self._needs_after = key is not None and not seqs.advance and not choice["appends"]
        self._capacity = min(seqs.max_blocks * view.block_size, 2**30)
        self._is_nothing = view.is_empty or not seqs.max_blocks
        self._is_usual = not (
            seqs.is_packed or self._is_nothing or self._needs_after or problem.lse
            or problem.sinks or problem.alibi_slopes
        )  # fmt: skip
        self._outputs = Outputs(problem)
        self._kept: tuple[tuple[int, int], Any, Any] | None = None  # queue, place, its workspace
        self.details = {"workspace": f"{4 * (self._floats + self._counters)} bytes"}
        if backend.name == "cuda":
            self.details["schedule"] = ", ".join(f"{name} {x}" for name, x in choice.items())

    def launch(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        queue, kept = self._backend.queue(query), self._kept
        if (
            self._is_usual
            and kept is not None
            and kept[0] == queue
            and (out is None or out.is_contiguous())
        ):
            if out is None:
                out = self._outputs.new_out(query)
            if self._native.run(
                view._twin or view_twin(view),
                seqs._twin or seqs_twin(seqs),
                query.data_ptr(),
                0 if key is None else key.data_ptr(),
                0 if value is None else value.data_ptr(),
                out.data_ptr(),
                kept[1],
            ):
                return out
        out, lse = self._outputs.of(query, out, lse)
        if self._is_nothing or not query.numel():
            self._see_nothing(query, view, seqs, key, value, sinks, out, lse)
        elif self._bound is not None and (rows := max(query.shape[0], _MIN_BOUND)) < (
            self._bound.max_seqlen_q
        ):
            call = CompiledCall(self._backend, self._bound._replace(max_seqlen_q=rows))
            call.launch(query, view, seqs, key, value, sinks, alibi_slopes, out, lse)
        else:
            self._run_all(queue, query, view, seqs, key, value, sinks, alibi_slopes, out, lse)
        return out if lse is None else (out, lse)

    def _run_all(
        self,
        queue: tuple[int, int],
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        after, cu = None, seqs.cu_seqlens_q
        if self._needs_after:  # clamped as the kernels do
            new: int | Tensor = self._new_tokens
            if cu is not None:
                rows = query.shape[0]
                new = cu.clamp(0, rows).diff().clamp(0, min(rows, seqs.max_seqlen_q or rows))
            after = seqs.seq_lens.clamp(0, self._capacity) + new
        optional = [0 if x is None else x.data_ptr() for x in (lse, sinks, alibi_slopes, after)]
        partial, counters, alive = self._backend.workspace(queue, self._floats, self._counters)
        place = native.module.Place(*queue, partial, counters)
        self._native.run_all(
            view_twin(view), seqs_twin(seqs), 0 if cu is None else query.shape[0],
            query.data_ptr(), 0 if key is None else key.data_ptr(),
            0 if value is None else value.data_ptr(), out.data_ptr(), _strides(out), *optional,
            place,
        )  # fmt: skip
        if not self._backend.is_capturing(queue):
            self._kept = queue, place, alive

    def _see_nothing(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """No query, or a cache without a row, whatever lengths say."""
        if key is not None and value is not None:
            self._backend.append(key, value, view, seqs, None)
        if not query.numel():
            return
        called = called_rows(query, seqs.cu_seqlens_q)
        out.masked_fill_(called.unsqueeze(-1), 0)
        if lse is not None:
            alone = lse.new_tensor(-torch.inf) if sinks is None else sinks
            lse.copy_(torch.where(called, alone, lse))


class Compiled(AffineBackend):
    """The operations by the extension, on one kind of device."""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``, or None."""

    def device_numbers(self, device: torch.device) -> tuple[int, int]:
        """Multiprocessors and compute capability (90: 9.0) of a CUDA device; zeros: a CPU."""
        return 0, 0

    def is_capturing(self, queue: tuple[int, int]) -> bool:
        """Whether launches are being captured in a graph."""
        return False

    def workspace(self, queue: tuple[int, int], floats: int, counters: int) -> tuple[int, int, Any]:
        """Addresses of partial results and of counters, and what keeps them alive."""
        return 0, 0, None

    def refuses(self, device: torch.device, view: ViewSpec | None = None) -> str | None:
        if reason := self.unavailable(device):
            return reason
        if view is None:
            return None
        return _refusal(view.k_format.name, view.v_format.name, view.head_dim, view.v_head_dim)

    def prepare(self, problem: Problem) -> Prepared | str:
        if reason := self.refuses(problem.query.device, problem.view):
            return reason
        call = CompiledCall(self, problem)
        for argument, why in call.refusals:
            if argument and not call.regime:
                raise ValueError(f"{argument}: {why}")
        return call if call.regime else "; ".join(why for _, why in call.refusals)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        view: CacheView,
        seqs: Sequences | None,
        slot_mapping: Tensor | None,
    ) -> None:
        if not key.numel():
            return
        queue, alive = self.queue(key), None
        partial = counter = 0
        tokens = key.shape[1] if key.dim() == 4 else key.shape[0]
        floats = native.module.append_floats(tokens)
        if floats or (seqs is not None and seqs.advance):
            partial, counter, alive = self.workspace(queue, floats, 1)
        native.module.append(
            view_twin(view), None if seqs is None else seqs_twin(seqs), *_sizes(key),
            key.data_ptr(), _strides(key), value.data_ptr(), _strides(value), DTYPES[key.dtype],
            0 if slot_mapping is None else slot_mapping.data_ptr(), partial, counter,
            *queue,
        )  # fmt: skip
        del alive

    def gather(self, view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
        if key.numel():
            native.module.gather(
                view_twin(view), seqs_twin(seqs), key.shape[1], key.data_ptr(), _strides(key),
                value.data_ptr(), _strides(value), DTYPES[key.dtype], *self.queue(view.k.codes),
            )  # fmt: skip
