"""What a decode step is captured in."""

from __future__ import annotations

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
        graph = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), _stream_kept(), graph:
            return call()

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
