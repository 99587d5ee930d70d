"""Rows of codes with a float16 scale and offset a row.

Written to be read beside ``csrc/formats/affine.h``: a row is quantized in the same float32 steps,
so that codes are the same bit for bit on every backend.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .row import RowFormat, half_down

__all__ = ["MAX_ABS", "MIN_SCALE", "AffineRows"]

MAX_ABS = 65504.0  # larger inputs count as infinite, as in float16
MIN_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class AffineRows(RowFormat):
    """``x ~ scale * code + offset``.

    Attributes:
        steps: Scales from the offset to the row's maximum, at most half a one above the last code.
        below: Share of the range by which the offset is above the row's minimum.
    """

    steps: ClassVar[float]
    below: ClassVar[float]

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Bytes ``(.., code_bytes)`` of codes ``(.., head_dim)``."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Tensor:
        """Codes ``(.., head_dim)`` of bytes ``(.., code_bytes)``."""

    def code_bytes(self, head_dim: int) -> int:
        """See `RowFormat.code_bytes`."""
        return head_dim * self.bits // 8

    def params_bytes(self, head_dim: int) -> int:
        """Two float16."""
        return 4

    def encode(self, rows: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowFormat.encode`."""
        low, high = (x.clamp(-MAX_ABS, MAX_ABS) for x in rows.aminmax(dim=-1, keepdim=True))
        offset = half_down((high - low) * self.below + low if self.below else low)
        span = high - offset.float()
        step = (span / torch.full_like(span, self.steps)).clamp_min(MIN_SCALE)
        scale = -half_down(-step)
        shift, factor = offset.float(), scale.float()
        codes = (rows - shift) * (torch.ones_like(factor) / factor)
        codes = codes.round().clamp(0, 2**self.bits - 1).where(finite, 0)
        params = torch.cat([scale, offset], -1).where(finite, torch.nan)
        return self.pack(codes.to(torch.uint8)), params.view(torch.uint8)

    def narrow(self, other: AffineRows, codes: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``other`` in this format; one that needs no larger codes stays as it is."""
        most, found = 2**self.bits - 1, other.unpack(codes)
        fits = found.amax(-1, keepdim=True) <= most
        rows = other.decode(codes, params)
        data, of_rows = self.encode(rows, rows.isfinite().all(-1, keepdim=True))
        same = self.pack(found.clamp(max=most))
        return same.where(fits, data), params.where(fits, of_rows)

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        """See `RowFormat.decode`."""
        pair = params.contiguous().view(torch.float16).float()
        return pair[..., :1] * self.unpack(codes).float() + pair[..., 1:]
