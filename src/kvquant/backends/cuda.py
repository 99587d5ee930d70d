"""The compiled CUDA kernels: current stream, no synchronisation, capturable in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import check_splits
from ..ops import Backend
from . import native
from .compiled import Compiled

__all__ = ["BACKEND"]

_MIN_CAPABILITY = (7, 5)
_MIN_COUNTERS, _MIN_FLOATS = 1 << 12, 1 << 20
# Private, hence guarded: they take a tenth of what the public ones do.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda d: torch.cuda.current_stream(d).cuda_stream
)


class _Cuda(Compiled):
    name = "cuda"
    max_splits = 256  # kMaxSplits of csrc/kernels/attention/config.h

    def __init__(self) -> None:
        self._workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by device and stream

    def queue(self, x: Tensor) -> tuple[int, int]:
        device = x.get_device()
        return device, _raw_stream(device)

    def unavailable(self, x: Tensor) -> str | None:
        return _unavailable(x.get_device())

    def plan(self, query: Tensor, *shape: int) -> tuple[int, int, int]:
        capacity, split_size = shape[-2:]
        check_splits(split_size, capacity, self.max_splits)
        return _plan(query.dtype == torch.float32, _multiprocessors(query.get_device()), *shape)

    def is_capturing(self, queue: tuple[int, int]) -> bool:
        return bool(native.module.capture_id(queue[1]))

    def workspace(self, queue: tuple[int, int], floats: int, counters: int) -> tuple[int, int, Any]:
        """Room for partial results, of bytes of 255, and zeroed counters; kernels leave them so.

        Launches on one stream follow one another, so they share. A captured graph may be replayed
        on any stream: it gets its own.
        """
        if native.module.capture_id(queue[1]):
            return (*native.module.lend_scratch(*queue, floats, counters), None)
        kept = self._workspaces.get(queue)
        if kept is None or kept[0].numel() < counters or kept[1].numel() < floats:
            kept = self._workspaces[queue] = (
                torch.zeros(max(_MIN_COUNTERS, counters), dtype=torch.int32, device=queue[0]),
                torch.full((max(_MIN_FLOATS, floats),), -1, dtype=torch.int32, device=queue[0]),
            )
        return kept[1].data_ptr(), kept[0].data_ptr(), kept


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
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def _plan(
    float32: bool,
    multiprocessors: int,
    batch: int,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int,
    capacity: int,
    split_size: int,
) -> tuple[int, int, int]:
    """Most splits of a sequence, floats of partial results, counters."""
    plan: tuple[int, int, int] = native.module.attention_plan(
        batch,
        tokens,
        q_heads,
        kv_heads,
        k_dim,
        v_dim,
        float32,
        capacity,
        multiprocessors,
        split_size,
    )
    return plan


BACKEND: Backend = _Cuda().backend()
