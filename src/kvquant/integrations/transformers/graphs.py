"""What a decode step is captured in."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = ["CUDAGraph", "Graph"]


class Graph(Protocol):
    """Device work that is recorded once and replayed, at the same addresses."""

    def capture(self, call: Callable[[], Any]) -> Any:
        """Run the host's part of ``call`` and keep the device's; returns what ``call`` does."""

    def replay(self) -> None:
        """Do what was kept."""


class CUDAGraph:
    """A graph on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, call: Callable[[], Any]) -> Any:
        """See `Graph`.

        Raises:
            RuntimeError: Something in ``call`` cannot be captured. Nothing of it was done.
        """
        with torch.cuda.device(self._device):
            graph = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
            try:
                with _stream_kept(), _garbage_kept(), graph:
                    return call()
            except Exception:
                _end_capture()
                raise

    def replay(self) -> None:
        """See `Graph`."""
        if torch.cuda.current_device() == self._device.index:
            self._graph.replay()
        else:
            with torch.cuda.device(self._device):
                self._graph.replay()


@contextmanager
def _stream_kept() -> Iterator[None]:
    """The current stream is that from before, whatever becomes of a capture."""
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """No garbage is collected: a graph among it, freed during a capture, would end that."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_capture() -> None:
    """After a capture that failed: torch's generator draws again, once another has succeeded."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
