"""The compiled CUDA kernels: current stream, no synchronization, capturable in a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..view import CacheView
from . import dense, native, pieces
from .affine import DTYPES
from .base import Prepared, Problem
from .compiled import Compiled, view_twin, young_field
from .cuts import MIN_ROWS, Rates
from .steps import History, Read, Result, Steps

__all__ = ["CUDA", "MANY_ROWS_RATE", "SPLIT_KV_RATE"]

_MIN_CAPABILITY = (7, 5)
_MIN_COUNTERS, _MIN_FLOATS = 1 << 12, 1 << 20
_MOST_PARTS = 1 << 10
# Floating-point operations a second of many query rows on an H200, by what reads codes.
MANY_ROWS_RATE, SPLIT_KV_RATE = 3.9e14, 2e14
# Private, hence guarded: they take a tenth of what the public ones do.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda d: torch.cuda.current_stream(d).cuda_stream
)


def _chunk_memory() -> int:
    """Bytes that attention of a long chunk may take beside its output."""
    text = os.environ.get("KVQUANT_CHUNK_MEMORY", "256")
    if not text.isdecimal():
        raise ValueError(f"KVQUANT_CHUNK_MEMORY: expected MiB, 0 or more, got {text!r}")
    return int(text) << 20


CHUNK_MEMORY = _chunk_memory()


class _Cuda(Compiled):
    name = "cuda"

    def __init__(self) -> None:
        self._workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by device and stream
        self._parts: dict[Problem, Prepared] = {}
        self.steps = Steps(
            self._read, _dense_kernels, self._merge, self.append, self._prepare_codes,
            lambda x: self.is_capturing(self.queue(x)),
        )  # fmt: skip

    def prepare(self, problem: Problem) -> Prepared | str:
        prepared = super().prepare(problem)
        if isinstance(prepared, str) or problem.max_seqlen_q < MIN_ROWS:
            return prepared
        device = _index(problem.query.device)
        dims = problem.view.head_dim, problem.view.v_head_dim
        names = dense.candidates(*dims, torch.cuda.get_device_capability(device))
        if isinstance(names, str):
            reason: str | None = names
        else:
            codes = MANY_ROWS_RATE if prepared.regime == "many_rows" else SPLIT_KV_RATE
            rates = Rates(_device_numbers(device)[0], dense.rate_of(names), codes)
            reason = pieces.refuses(problem, CHUNK_MEMORY, rates)
            if reason is None:
                return pieces.Pieces(problem, self.steps, prepared, CHUNK_MEMORY, rates, names)
        prepared.details["pieces"] = f"not of this call: {reason}"
        return prepared

    def _prepare_codes(self, problem: Problem) -> Prepared:
        """The kernel that reads codes, for a part of a call that it serves as a whole, too."""
        found = self._parts.get(problem)
        if found is None:
            prepared = super().prepare(problem)
            assert not isinstance(prepared, str), prepared
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            found = self._parts[problem] = prepared
        return found

    def _read(self, view: CacheView, history: History, reads: list[Read]) -> None:
        table, key = history.table, reads[0].key
        native.module.read_pieces(
            view_twin(view), table.data_ptr(), table.stride(0), *table.shape,
            young_field(history.young), history.young_from,
            [(x.key.data_ptr(), x.value.data_ptr(), x.first, x.key.shape[2], *x.stored,
              x.is_backwards) for x in reads],
            DTYPES[key.dtype], *self.queue(key),
        )  # fmt: skip

    def _merge(
        self, results: list[Result], sinks: Tensor | None, out: Tensor, lse: Tensor | None
    ) -> None:
        sources = [
            (_place(x.out), _place(x.lse), x.out.dtype == torch.float32, x.is_backwards)
            for x in results
        ]
        dtype = next((x.out.dtype for x in results if x.out.dtype != torch.float32), out.dtype)
        native.module.merge(
            sources, tuple(out.shape), DTYPES[dtype], _place(out), out.dtype == torch.float32,
            None if lse is None else _place(lse), 0 if sinks is None else sinks.data_ptr(),
            *self.queue(out),
        )  # fmt: skip

    def queue(self, x: Tensor) -> tuple[int, int]:
        device = x.get_device()
        return device, _raw_stream(device)

    def unavailable(self, device: torch.device) -> str | None:
        return _unavailable(_index(device))

    def device_numbers(self, device: torch.device) -> tuple[int, int]:
        return _device_numbers(_index(device))

    def is_capturing(self, queue: tuple[int, int]) -> bool:
        return bool(native.module.capture_id(queue[1]))

    def workspace(self, queue: tuple[int, int], floats: int, counters: int) -> tuple[int, int, Any]:
        """Room for partial results, of bytes of 255, and zeroed counters; kernels leave them so.

        Launches on one stream follow one another, so they share. A captured graph may be replayed
        on any stream: it gets its own.
        """
        if native.module.capture_id(queue[1]):
            return (*native.module.graph_workspace(*queue, floats, counters), None)
        kept = self._workspaces.get(queue)
        if kept is None or kept[0].numel() < counters or kept[1].numel() < floats:
            kept = self._workspaces[queue] = _workspace(
                queue[0], max(_MIN_COUNTERS, counters), max(_MIN_FLOATS, floats)
            )
        return kept[1].data_ptr(), kept[0].data_ptr(), kept


def _dense_kernels(problem: Problem) -> tuple[dense.Dense, ...]:
    query, view = problem.query, problem.view
    heads = query.shape[-2], view.num_kv_heads
    return dense.find(_index(query.device), query.dtype, heads, (view.head_dim, view.v_head_dim))


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a sequence, a row and a head."""
    sequence, row, head = x.stride()[:3]
    return x.data_ptr(), sequence, row, head


def _workspace(device: int, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    """Memory that stays, for the current stream; made in a thread of its own.

    While code that torch compiled with "reduce-overhead" warms up, its thread and stream allocate
    from the pool of a CUDA graph, in which nothing may outlive the call.
    """

    def make() -> tuple[Tensor, Tensor, torch.cuda.Event]:
        with torch.cuda.device(device):
            zeros = torch.zeros(counters, dtype=torch.int32, device=device)
            ones = torch.full((floats,), -1, dtype=torch.int32, device=device)
            ready = torch.cuda.Event()
            ready.record()
        return zeros, ones, ready

    with ThreadPoolExecutor(1) as executor:
        zeros, ones, ready = executor.submit(make).result()
    stream = torch.cuda.current_stream(device)
    stream.wait_event(ready)
    for x in (zeros, ones):
        x.record_stream(stream)
    return zeros, ones


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _unavailable(device: int) -> str | None:
    if native.module is None:
        return f"the extension is not there ({native.error})"
    info = native.module.build_info()
    if not info["cuda"]:
        return "this build of kvquant has no CUDA kernels: install a wheel, or build with nvcc"
    if info["cuda_error"]:
        return f"the CUDA driver does not serve this build: {info['cuda_error']}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return None


@cache
def _device_numbers(device: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, 10 * found.major + found.minor


CUDA = _Cuda()
