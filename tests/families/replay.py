"""A cache that answers with the rows another cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvquant.integrations.transformers import KVQuantCache

__all__ = ["ReplayCache", "StoredWrongly", "distance"]

ROUNDING = 0.05


class StoredWrongly(Exception):
    """The cache holds other rows than the model computed."""


class ReplayCache(DynamicCache):
    """Gives out the dequantized rows of ``stored``, after the same calls to it.

    Attributes:
        visible: Bool (batch, tokens): which tokens of the running call are not padding.
    """

    def __init__(self, stored: KVQuantCache, config: Any) -> None:
        layers = DynamicCache(config=config).layers
        keep = (DummyLayer, DynamicSlidingWindowLayer)
        Cache.__init__(
            self, layers=[layer if isinstance(layer, keep) else DynamicLayer() for layer in layers]
        )
        self.stored = stored
        self.visible: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Check the new rows and return the stored ones."""
        layer, stored = self.layers[layer_idx], self.stored.layers[layer_idx]
        kept = layer.update(key_states, value_states)[0].shape[2]
        length = layer.get_seq_length()
        if stored.get_seq_length() != length:
            raise StoredWrongly(
                f"layer {layer_idx} holds {stored.get_seq_length()} tokens, the model {length}"
            )
        rows = tuple(x[:, :, length - kept :] for x in stored.dequantize(length))
        pairs = zip(("keys", "values"), (key_states, value_states), rows, strict=True)
        for what, new, row in pairs:
            if row.shape[:2] + row.shape[3:] != new.shape[:2] + new.shape[3:]:
                raise StoredWrongly(
                    f"layer {layer_idx} holds {what} {tuple(row.shape)}, got {tuple(new.shape)}"
                )
            error = self._error(row[:, :, -new.shape[2] :], new)
            if not error < ROUNDING:
                raise StoredWrongly(f"layer {layer_idx}'s newest {what} are off by {error:.2g}")
        return rows

    def _error(self, row: Tensor, new: Tensor) -> float:
        if self.visible is not None and self.visible.shape == (new.shape[0], new.shape[2]):
            row, new = (x.transpose(1, 2)[self.visible] for x in (row, new))
        return distance(row, new)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two tensors, as a part of the norm of the second."""
    actual, expected = actual.double(), expected.double()
    norm = torch.linalg.vector_norm(expected).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(actual - expected) / norm)
