"""4-bit rows: two codes in a byte, and a float16 scale and offset a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .affine import AffineRows

__all__ = ["Int4", "pack", "unpack"]


def pack(codes: Tensor) -> Tensor:
    """Two codes in a byte: the first of each pair of channels in the low four bits."""
    low, high = codes.unflatten(-1, (codes.shape[-1] // 2, 2)).unbind(-1)
    packed: Tensor = low | high << 4
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The codes again, a byte each."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


@dataclass(frozen=True)
class Int4(AffineRows):
    """Byte ``j`` has channel ``2 j`` in its low four bits and ``2 j + 1`` in its high ones.

    The range is cut into 16 steps, and codes stand for their middles.
    """

    name: ClassVar[str] = "int4"
    tag: ClassVar[int] = 1
    bits: ClassVar[int] = 4
    steps: ClassVar[float] = 15.5
    below: ClassVar[float] = 2.0**-5
    tolerance: ClassVar[float] = 0.5

    def pack(self, codes: Tensor) -> Tensor:
        """See `AffineRows.pack`."""
        return pack(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        """See `AffineRows.unpack`."""
        return unpack(packed)
