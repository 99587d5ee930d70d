"""How many tokens each sequence has: exactly on the device, by upper bounds on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Lengths", "is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are being captured in a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Lengths:
    """The lengths of all layers; the host asks the device nothing in a step.

    A call raises the bound before it launches, so that an interrupt leaves it too high, never too
    low.

    Attributes:
        seq_lens: int32 ``(num_layers, batch)`` on the device.
        lens: Its rows.
        high: The largest bound of each layer.
        stale: A bound may be above its length.
    """

    def __init__(self, seq_lens: Tensor, bounds: list[list[int]]) -> None:
        self.seq_lens, self.lens = seq_lens, list(seq_lens.unbind(0))
        self.stale = False
        self.high: list[int] = []
        self._lag: list[list[int]] = []
        self.set_bounds(bounds)

    def bounds(self, layer: int) -> list[int]:
        """No sequence of the layer is longer."""
        high = self.high[layer]
        return [high - lag for lag in self._lag[layer]]

    def set_bounds(self, bounds: list[list[int]]) -> None:
        """Replace the bounds of every layer; at no point is one below the new one."""
        self._lag = [[0] * len(of_layer) for of_layer in bounds]
        self.high = [max(of_layer) for of_layer in bounds]
        self._lag = [[max(of_layer) - n for n in of_layer] for of_layer in bounds]

    def raise_bounds(self, layer: int, counts: Sequence[int]) -> None:
        """Count the new tokens of a ragged call; at no point is a bound too low."""
        bounds = [n + new for n, new in zip(self.bounds(layer), counts, strict=True)]
        high = max(bounds)
        self._lag[layer] = [0] * len(bounds)
        self.high[layer] = high
        self._lag[layer] = [high - n for n in bounds]

    def longest(self) -> list[int]:
        """The bound of each sequence over all layers."""
        return [max(of) for of in zip(*map(self.bounds, range(len(self.high))), strict=True)]

    def shortest(self, sequence: int) -> int:
        """The least bound of a sequence over all layers."""
        return min(high - lag[sequence] for high, lag in zip(self.high, self._lag, strict=True))

    def sync(self) -> None:
        """Read the lengths back: the bounds are exact then. On meta they are all there is."""
        if not self.seq_lens.is_meta:
            self.set_bounds(self.seq_lens.tolist())
        self.stale = False
