"""What `pieces` has run on a device, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..view import CacheView, Sequences
from .base import Prepared, Problem
from .dense import Dense

__all__ = ["MOST_READS", "History", "Read", "Result", "Steps"]

MOST_READS = 4  # in one launch


class History(NamedTuple):
    """Where the tokens of neighbouring sequences are.

    Attributes:
        table: Their rows of the block table.
        young: With a format by age, their slabs.
        young_from: The first token that is read from these, behind the first group.
    """

    table: Tensor
    young: Tensor | None = None
    young_from: int = 0


class Read(NamedTuple):
    """Tokens of a history that are dequantized together.

    Attributes:
        first: The first token.
        stored: Tokens [low, high) that may be read.
        is_backwards: They come in reverse order.
        key: Where they go, ``(n, kv_heads, tokens, head_dim)``.
        value: Likewise.
    """

    first: int
    stored: tuple[int, int]
    is_backwards: bool
    key: Tensor
    value: Tensor


class Result(NamedTuple):
    """What a piece gives.

    Attributes:
        out: ``(n, rows, heads, v_head_dim)``.
        lse: float32 ``(n, rows, heads)``.
        is_backwards: The rows are in reverse order.
    """

    out: Tensor
    lse: Tensor
    is_backwards: bool = False


@dataclass(frozen=True)
class Steps:
    """What runs on the device.

    Attributes:
        read: ``(view, history, reads)``: dequantizes tokens of each sequence, at most `MOST_READS`
            times. A token that is not finite, has no place, or is not of the range ``stored``
            becomes a NaN key and a zero value, so that attention is NaN for those who see it, and
            for no one else.
        kernels: Dense attentions, the fastest first; none: pieces do not serve here. Waits for the
            device when it is first called.
        merge: ``(results, sinks, out, lse)``: the softmax over all results, and sinks (heads,).
        append: The backend's.
        prepare: Makes the kernel that reads codes ready for a part of the call.
        is_capturing: Whether launches on a tensor's device are being captured in a graph.
    """

    read: Callable[[CacheView, History, list[Read]], None]
    kernels: Callable[[Problem], tuple[Dense, ...]]
    merge: Callable[[list[Result], Tensor | None, Tensor, Tensor | None], None]
    append: Callable[[Tensor, Tensor, CacheView, Sequences, None], None]
    prepare: Callable[[Problem], Prepared]
    is_capturing: Callable[[Tensor], bool]
