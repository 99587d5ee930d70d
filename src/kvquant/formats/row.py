"""What a stored row is: the only place that turns channels of a head into bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["RowFormat", "half_down", "rotation_length"]


def rotation_length(head_dim: int) -> int:
    """Length of the Hadamard blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def half_down(x: Tensor) -> Tensor:
    """The largest float16 <= x: -inf or the largest finite one beyond the range."""
    half = x.half()
    bits = half.view(torch.int16)
    lower = torch.where(bits < 0, bits + 1, bits - 1).view(torch.float16)
    return torch.where(half.float() > x, lower, half)


@dataclass(frozen=True)
class RowFormat(ABC):
    """Rows of keys, or of values: how many bytes they take, and what these mean.

    Attributes:
        rotated: Rows are stored rotated by an orthonormal Hadamard matrix, in blocks.
        name: By which a `CacheFormat` selects it.
        tag: Its number in saved caches; once given, it never changes.
        bits: Bits of a code.
        tolerance: Largest error in the stored basis, in steps of the row's scale.
    """

    rotated: bool = False
    name: ClassVar[str]
    tag: ClassVar[int]
    bits: ClassVar[int]
    tolerance: ClassVar[float]

    @abstractmethod
    def code_bytes(self, head_dim: int) -> int:
        """Bytes of a row's codes."""

    @abstractmethod
    def params_bytes(self, head_dim: int) -> int:
        """Bytes of a row's parameters."""

    @abstractmethod
    def encode(self, rows: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, params) as bytes, of float32 rows ``(.., head_dim)`` in the stored basis.

        ``finite`` (.., 1): whether the row as it came can be stored; others come back as NaN.
        """

    @abstractmethod
    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        """Rows ``(.., head_dim)`` in the stored basis, float32."""

    def rotation(self, head_dim: int) -> int:
        """Length of the Hadamard blocks, 1 without a rotation."""
        return rotation_length(head_dim) if self.rotated else 1
