"""What handles, the batch and captured steps know of a cache and its layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BatchState", "CacheLayer", "StepBatch", "StepCache", "StepLayer"]


class BatchState(Protocol):
    """What a call's tokens have in common over all layers."""

    is_captured: bool
    is_plain: bool
    masked: bool
    starts: Tensor | None


class CacheLayer(Protocol):
    """A layer of the cache: see `kvquant.integrations.transformers.layer.KVQuantLayer`."""

    leads: bool
    sliding_window: int | None
    slides: bool

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        ...

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


class StepBatch(Protocol):
    """A cache's batch: see `kvquant.integrations.transformers.batch.Batch`."""

    is_settled: bool
    replays: int

    def steps_alike(self, mask: Tensor | None, kv_length: int) -> bool:
        """Whether a decode step with this mask leaves things as they are."""
        ...

    def captured(self) -> AbstractContextManager[None]:
        """While a decode step is being captured."""
        ...

    def note(self, positions: Tensor | None) -> None:
        """Keep the positions of the last call."""


class StepLayer(Protocol):
    """A layer whose decode steps may be captured."""

    max_cache_len: int | None

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        ...

    @property
    def stays(self) -> bool:
        """Whether a step needs nothing of the host but to be counted."""
        ...

    @property
    def batch_size(self) -> int:
        """Sequences."""
        ...

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than ``max_cache_len``."""

    def make_ready(self) -> None:
        """See to room for a token, and to the padding."""

    def parts(self) -> tuple[Any, Any]:
        """Its memory and its batch, the same objects while they stay where they are."""
        ...

    def restore(self, length: int) -> None:
        """Forget what a capture told the host."""


class StepCache(Protocol):
    """A cache: see `kvquant.integrations.transformers.cache.KVQuantCache`."""

    step: Any

    @property
    def batch(self) -> StepBatch:
        """What its layers have in common."""
        ...

    @property
    def layers(self) -> Any:
        """One `StepLayer` a layer of the model."""
        ...
