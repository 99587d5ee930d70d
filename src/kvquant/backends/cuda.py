"""The compiled CUDA kernels: current stream, no synchronization, capturable in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..view import ViewSpec
from . import native
from .compiled import Compiled

__all__ = ["CUDA"]

_MIN_CAPABILITY = (7, 5)
_MIN_COUNTERS, _MIN_FLOATS = 1 << 12, 1 << 20
# Private, hence guarded: they take a tenth of what the public ones do.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda d: torch.cuda.current_stream(d).cuda_stream
)


class _Cuda(Compiled):
    name = "cuda"

    def __init__(self) -> None:
        self._workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by device and stream

    def queue(self, x: Tensor) -> tuple[int, int]:
        device = x.get_device()
        return device, _raw_stream(device)

    def refuses(
        self, device: torch.device, view: ViewSpec | None = None, by_age: bool = False
    ) -> str | None:
        if by_age:
            return "CUDA's kernels do not read young rows (formats by age) yet"
        return super().refuses(device, view)

    def unavailable(self, device: torch.device) -> str | None:
        return _unavailable(_index(device))

    def multiprocessors(self, device: torch.device) -> int:
        return _multiprocessors(_index(device))

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
            kept = self._workspaces[queue] = (
                torch.zeros(max(_MIN_COUNTERS, counters), dtype=torch.int32, device=queue[0]),
                torch.full((max(_MIN_FLOATS, floats),), -1, dtype=torch.int32, device=queue[0]),
            )
        return kept[1].data_ptr(), kept[0].data_ptr(), kept


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
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


CUDA = _Cuda()
