"""The operations on plain (q, scale, zero) tensors by the extension."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from . import native
from .base import Backend

__all__ = ["DTYPES", "AffineBackend"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GRANULARITIES = {"token": 0, "head": 1, "channel": 2}


class AffineBackend(Backend):
    """The part of a compiled backend that knows no cache."""

    @abstractmethod
    def queue(self, x: Tensor) -> tuple[int, int]:
        """(device, stream) of a CUDA tensor, (-1, threads) on a CPU."""

    def quantize(
        self, x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, h, s, d = x.shape
        rows, width = {"token": (s, 1), "head": (1, 1), "channel": (0, d)}[granularity]
        if granularity == "channel":
            rows = -(-s // group_size)
        q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        scale, zero = (
            torch.empty(b, h, rows, width, dtype=torch.float32, device=x.device) for _ in range(2)
        )
        if q.numel():
            native.module.quantize(
                x.data_ptr(), x.stride()[:3], b, h, s, d, DTYPES[x.dtype], q.data_ptr(),
                scale.data_ptr(), zero.data_ptr(), _GRANULARITIES[granularity], group_size, qmin,
                qmax, *self.queue(x),
            )  # fmt: skip
        else:
            scale.fill_(torch.nan)
            zero.fill_(torch.nan)
        return q, scale, zero

    def dequantize(
        self, q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        if out.numel():
            zero = zero if zero.stride() == scale.stride() else zero.contiguous()
            scale = scale if zero.stride() == scale.stride() else scale.contiguous()
            native.module.dequantize(
                q.data_ptr(), q.stride()[:3], *q.shape, *_affine(scale, zero, group_size),
                out.data_ptr(), DTYPES[dtype], *self.queue(q),
            )  # fmt: skip
        return out

    def qk_matmul(
        self, query: Tensor, qk: Tensor, scale: Tensor, zero: Tensor, group_size: int
    ) -> Tensor:
        out = torch.empty(*query.shape[:3], qk.shape[2], dtype=query.dtype, device=query.device)
        return self._matmul("qk_matmul", query, qk, scale, zero, group_size, out)

    def pv_matmul(
        self, probs: Tensor, qv: Tensor, scale: Tensor, zero: Tensor, group_size: int
    ) -> Tensor:
        out = torch.empty(*probs.shape[:3], qv.shape[3], dtype=probs.dtype, device=probs.device)
        return self._matmul("pv_matmul", probs, qv, scale, zero, group_size, out)

    def _matmul(
        self, op: str, x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, group: int, out: Tensor
    ) -> Tensor:
        if not out.numel():
            return out
        if not q.numel():
            return out.zero_()
        scale, zero = scale.contiguous(), zero.contiguous()
        params = native.module.MatmulParams(
            x.data_ptr(), x.stride()[:3], q.data_ptr(), q.stride()[:3],
            *_affine(scale, zero, group), out.data_ptr(), DTYPES[x.dtype],
            x.shape[0], x.shape[1], q.shape[1], x.shape[2], q.shape[2], q.shape[3],
        )  # fmt: skip
        getattr(native.module, op)(params, *self.queue(x))
        return out


def _affine(scale: Tensor, zero: Tensor, group: int) -> tuple[int, int, tuple[int, ...], int]:
    strides = [0 if n == 1 else s for n, s in zip(scale.shape, scale.stride(), strict=True)]
    return scale.data_ptr(), zero.data_ptr(), tuple(strides), max(1, group)
