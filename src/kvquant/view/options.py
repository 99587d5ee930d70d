"""The numbers of an attention call."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import INT32_MAX, check_flag, check_integer, check_number
from ..checks import check_split_size, check_window

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The numbers of an attention call, as kernels have them.

    Attributes:
        softmax_scale: What scores are multiplied by.
        causal: A query sees no token behind its own position.
        sliding_window: A query at ``i`` sees tokens ``j > i - sliding_window``; 0: all.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
        split_size: Tokens of every split, a multiple of 256; 0: as the sizes ask for.

    Raises:
        TypeError: A number of another type.
        ValueError: One out of range.
    """

    softmax_scale: float
    causal: bool = True
    sliding_window: int = 0
    softcap: float = 0.0
    split_size: int = 0

    def __post_init__(self) -> None:
        check_number("softmax_scale", self.softmax_scale)
        check_flag("causal", self.causal)
        check_integer("sliding_window", self.sliding_window, 0, INT32_MAX)
        if self.softcap:
            check_number("softcap", self.softcap, positive=True)
        if self.split_size:
            check_split_size(self.split_size)

    @classmethod
    def of(
        cls,
        head_dim: int,
        softmax_scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        softcap: float | None = None,
        split_size: int | None = None,
    ) -> Options:
        """From a caller's keywords, where None stands for what a call without them does."""
        scale = head_dim**-0.5
        if softmax_scale is not None:
            scale = check_number("softmax_scale", softmax_scale)
        window = check_window(sliding_window)
        cap = 0.0 if softcap is None else check_number("softcap", softcap, positive=True)
        return cls(scale, causal, window, cap, check_split_size(split_size))
