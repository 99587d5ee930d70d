"""8-bit rows: a uint8 code a channel, and a float16 scale and offset a row.

Written to be read beside ``csrc/formats/int8.h``: a row is quantized in the same float32 steps, so
that codes are the same bit for bit on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .row import RowFormat, half_down

__all__ = ["MAX_ABS", "MIN_SCALE", "Int8"]

MAX_ABS = 65504.0  # larger inputs count as infinite, as in float16
MIN_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class Int8(RowFormat):
    """``x ~ scale * code + offset``."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    tolerance: ClassVar[float] = 0.5

    def code_bytes(self, head_dim: int) -> int:
        """A byte a channel."""
        return head_dim

    def params_bytes(self, head_dim: int) -> int:
        """Two float16."""
        return 4

    def encode(self, rows: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowFormat.encode`."""
        low, high = (x.clamp(-MAX_ABS, MAX_ABS) for x in rows.aminmax(dim=-1, keepdim=True))
        offset = half_down(low)
        span = high - offset.float()
        step = (span / torch.full_like(span, 255.0)).clamp_min(MIN_SCALE)
        scale = -half_down(-step)
        shift, factor = offset.float(), scale.float()
        codes = ((rows - shift) * (torch.ones_like(factor) / factor)).round().clamp(0, 255)
        params = torch.cat([scale, offset], -1).where(finite, torch.nan)
        return codes.where(finite, 0).to(torch.uint8), params.view(torch.uint8)

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        """See `RowFormat.decode`."""
        pair = params.contiguous().view(torch.float16).float()
        return pair[..., :1] * codes.float() + pair[..., 1:]
