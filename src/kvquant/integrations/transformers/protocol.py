"""What handles and the batch know of a cache's layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BatchState", "CacheLayer"]


class BatchState(Protocol):
    """What a call's tokens have in common over all layers."""

    masked: bool
    starts: Tensor | None


class CacheLayer(Protocol):
    """A layer of the cache: see `kvquant.integrations.transformers.layer.KVQuantLayer`."""

    length: int
    leads: bool
    sliding_window: int | None
    slides: bool

    @property
    def batch(self) -> BatchState:
        """The batch that the layers share."""
        ...

    def dequantize(self, length: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The first ``length`` rows."""

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Attention on the 8-bit rows."""

    def follow(self, positions: Any) -> None:
        """Refuse a call of another text."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end."""

    def reset(self) -> None:
        """Forget all tokens."""

    def drop_call(self) -> None:
        """Forget the tokens of a call that failed."""
