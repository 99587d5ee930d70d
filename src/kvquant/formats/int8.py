"""8-bit rows: a uint8 code a channel, and a float16 scale and offset a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .affine import AffineRows

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8(AffineRows):
    """Byte ``c`` of a row is the code of channel ``c``."""

    name: ClassVar[str] = "int8"
    tag: ClassVar[int] = 0
    bits: ClassVar[int] = 8
    steps: ClassVar[float] = 255.0
    below: ClassVar[float] = 0.0
    tolerance: ClassVar[float] = 0.5

    def pack(self, codes: Tensor) -> Tensor:
        """See `AffineRows.pack`."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """See `AffineRows.unpack`."""
        return packed
