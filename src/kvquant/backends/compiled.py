"""Tensors to the integers that `kvquant._C` takes; shared by its CPU and CUDA kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import Backend
from . import native

__all__ = ["Compiled"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GRANULARITIES = {"token": 0, "head": 1, "channel": 2}
_NO_SLAB = (0, 0, 0)
_MAX_DIM = 256  # of the kernels
_STORAGE_AT = {"append_": 2, "attention": 1, "gather": 0}  # where k_data stands, v_data 3 behind it


def _slab(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return _NO_SLAB
    size = x.element_size()
    return x.data_ptr(), x.stride(0) * size, x.stride(1) * size


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides (batch, token, head) of dense or packed rows."""
    if x.dim() == 3:
        return x.data_ptr(), 0, x.stride(0), x.stride(1)
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _packed(x: Tensor, max_tokens: int) -> tuple[int, int]:
    """(packed rows there are, most of a sequence); of dense rows (0, those of each sequence)."""
    return (x.shape[0], min(max_tokens, x.shape[0])) if x.dim() == 3 else (0, x.shape[1])


def _called(query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which rows (.., 1) are a sequence's."""
    if cu_seqlens is None:
        return torch.ones(1, dtype=torch.bool, device=query.device)
    row = torch.arange(query.shape[0], device=query.device)[:, None, None]
    return ((row >= cu_seqlens[:-1]) & (row < cu_seqlens[1:])).any(-1)


def _affine(scale: Tensor, zero: Tensor, group: int) -> tuple[int, int, tuple[int, ...], int]:
    strides = [0 if n == 1 else s for n, s in zip(scale.shape, scale.stride(), strict=True)]
    return scale.data_ptr(), zero.data_ptr(), tuple(strides), max(1, group)


class CompiledStep:
    """An append and an attention on dense tensors that look alike every time.

    Strides and options are turned into the kernels' parameters once, a layer's tensors once a
    layer: a step then passes addresses only.
    """

    def __init__(
        self,
        compiled: Compiled,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: tuple[int, int, int],
        softmax_scale: float,
        causal: bool,
        sliding_window: int,
        softcap: float,
        split_size: int = 0,
    ) -> None:
        self._compiled = compiled
        self._rotation, self._split_size = rotation, split_size
        self._shape = (*query.shape[:-1], value.shape[-1])
        self._dtype, self._device = query.dtype, query.device
        # Like query, the fastest of torch's ways to the right tensor, where that is what it gives.
        self._alike = query.is_contiguous() and query.shape == self._shape
        _, tokens, heads, v_dim = self._shape
        out = (tokens * heads * v_dim, heads * v_dim, v_dim)
        self._native = native.module.Step(
            query.stride()[:3], key.stride()[:3], value.stride()[:3], out, _DTYPES[query.dtype],
            heads, softmax_scale, causal, sliding_window, softcap, split_size,
        )  # fmt: skip
        self._bound: dict[int, tuple[Any, ...]] = {}
        self._kept: tuple[Any, ...] | None = None  # queue, sizes and addresses of a workspace

    def __call__(
        self,
        layer: int,
        storage: tuple[Any, ...],
        table: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Append to a layer, whose tensors may have been replaced, and attend."""
        bound = self._bound.get(layer)
        if (
            bound is None
            or bound[0] is not storage
            or bound[1] is not table
            or bound[2] is not seq_lens
            or bound[3] is not seq_starts
        ):
            bound = self._bind(layer, storage, table, seq_lens, seq_starts, query)
        if self._alike:
            out = torch.empty_like(query)
        else:
            out = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        device, stream = queue = self._compiled.queue(query)
        twin, floats, counters = bound[4:]
        call = (twin, query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr())
        kept = self._kept
        if (
            kept is None
            or kept[0] != queue
            or kept[1] < floats
            or kept[2] < counters
            or not self._native.run(*call, kept[3], kept[4], True, device, stream)
        ):
            workspace = self._compiled.workspace(queue, floats, counters)
            self._native.run(*call, workspace[0], workspace[1], False, device, stream)
            if not self._compiled.is_capturing(queue):
                self._kept = (queue, floats, counters, *workspace)
        return out

    def _bind(
        self,
        layer: int,
        storage: tuple[Any, ...],
        table: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        query: Tensor,
    ) -> tuple[Any, ...]:
        k_data, k_params, k_mean, v_data, v_params = storage
        (batch, max_blocks), (_, tokens, heads, k_dim) = table.shape, query.shape
        splits, floats, counters = self._compiled.plan(
            query, batch, tokens, heads, k_data.shape[1], k_dim, v_data.shape[3],
            max_blocks * k_data.shape[2], self._split_size,
        )  # fmt: skip
        twin = native.module.Layer(
            _view(k_data, k_params, k_mean, v_data, v_params, *self._rotation),
            table.data_ptr(), table.stride(0), batch, max_blocks, seq_lens.data_ptr(),
            _pointer(seq_starts), tokens, splits,
        )  # fmt: skip
        bound = (storage, table, seq_lens, seq_starts, twin, floats, counters)
        self._bound[layer] = bound
        return bound


class Compiled(ABC):
    """The operations by the extension, on one kind of device."""

    name: ClassVar[str]
    max_splits: ClassVar[int | None] = None

    @abstractmethod
    def queue(self, x: Tensor) -> tuple[int, int]:
        """(device, stream) of a CUDA tensor, (-1, threads) on a CPU."""

    @abstractmethod
    def unavailable(self, x: Tensor) -> str | None:
        """Why this backend cannot run on ``x``'s device, or None."""

    def plan(self, query: Tensor, *shape: int) -> tuple[int, int, int]:
        """(splits, floats of partial results, counters) of an attention call.

        ``shape``: batch, tokens, q_heads, kv_heads, k_dim, v_dim, capacity, split_size.
        """
        return 1, 0, 0

    def is_capturing(self, queue: tuple[int, int]) -> bool:
        """Whether launches are being captured in a graph."""
        return False

    def workspace(self, queue: tuple[int, int], floats: int, counters: int) -> tuple[int, int, Any]:
        """Addresses of partial results and of counters, and what keeps them alive."""
        return 0, 0, None

    def backend(self) -> Backend:
        """As the registry takes it."""
        implementations: dict[str, Callable[..., Any]] = {
            "quantize": self.quantize,
            "dequantize": self.dequantize,
            "qk_matmul": self.qk_matmul,
            "pv_matmul": self.pv_matmul,
            "append_": self.append_,
            "gather": self.gather,
            "attention": self.attention,
        }
        return Backend(
            name=self.name,
            implementations=implementations,
            refuses=self.refuses,
            step=partial(CompiledStep, self),
            max_splits=self.max_splits,
        )

    def refuses(self, op: str, args: Sequence[Any]) -> str | None:
        """Why a call cannot be served, or None."""
        if reason := self.unavailable(args[0]):
            return reason
        if (first := _STORAGE_AT.get(op)) is not None:
            for of, data in (("keys'", args[first]), ("values'", args[first + 3])):
                dim = data.shape[-1]
                if dim > _MAX_DIM or dim % 16:
                    return f"the {of} head_dim {dim} is no multiple of 16 up to {_MAX_DIM}"
        return None

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
                x.data_ptr(), x.stride()[:3], b, h, s, d, _DTYPES[x.dtype], q.data_ptr(),
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
                out.data_ptr(), _DTYPES[dtype], *self.queue(q),
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
            *_affine(scale, zero, group), out.data_ptr(), _DTYPES[x.dtype],
            x.shape[0], x.shape[1], q.shape[1], x.shape[2], q.shape[2], q.shape[3],
        )  # fmt: skip
        getattr(native.module, op)(params, *self.queue(x))
        return out

    def append_(
        self,
        key: Tensor,
        value: Tensor,
        k_data: Tensor,
        k_params: Tensor,
        k_mean: Tensor | None,
        v_data: Tensor,
        v_params: Tensor,
        block_table: Tensor | None,
        seq_lens: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_starts: Tensor | None,
        slot_mapping: Tensor | None,
        mean_group: int,
        k_rotation: int,
        v_rotation: int,
        max_tokens: int,
        advance: bool,
    ) -> None:
        if not key.numel():
            return
        _, counter, _alive = self.workspace(self.queue(key), 0, 1) if advance else (0, 0, None)
        if block_table is None:  # by slots alone: one sequence of all rows, or dense ones
            table = (0, 0, 1 if key.dim() == 3 else key.shape[0], 0)
        else:
            table = (block_table.data_ptr(), block_table.stride(0), *block_table.shape)
        native.module.append(
            _view(k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation),
            *table, _pointer(seq_lens), _pointer(seq_starts), _pointer(cu_seqlens),
            *_packed(key, max_tokens), *_rows(key), *_rows(value), _DTYPES[key.dtype],
            _pointer(slot_mapping), advance, counter, *self.queue(key),
        )  # fmt: skip

    def gather(
        self,
        k_data: Tensor,
        k_params: Tensor,
        k_mean: Tensor | None,
        v_data: Tensor,
        v_params: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        mean_group: int,
        k_rotation: int,
        v_rotation: int,
        tokens: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        batch, heads = block_table.shape[0], k_data.shape[1]
        key, value = (
            torch.empty(batch, tokens, heads, x.shape[3], dtype=dtype, device=x.device)
            for x in (k_data, v_data)
        )
        if key.numel():
            native.module.gather(
                _view(
                    k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation
                ),
                block_table.data_ptr(), block_table.stride(0), *block_table.shape,
                seq_lens.data_ptr(), _pointer(seq_starts), tokens, *_rows(key), *_rows(value),
                _DTYPES[dtype], *self.queue(k_data),
            )  # fmt: skip
        return key, value

    def attention(
        self,
        query: Tensor,
        k_data: Tensor,
        k_params: Tensor,
        k_mean: Tensor | None,
        v_data: Tensor,
        v_params: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens: Tensor | None,
        seq_starts: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        mean_group: int,
        k_rotation: int,
        v_rotation: int,
        max_tokens: int,
        softmax_scale: float,
        causal: bool,
        sliding_window: int,
        softcap: float,
        split_size: int,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        lead, v_dim, device = query.shape[:-1], v_data.shape[3], query.device
        out = torch.empty(*lead, v_dim, dtype=query.dtype, device=device)
        lse = torch.empty(lead if return_lse else 0, dtype=torch.float32, device=device)
        if cu_seqlens is not None:  # rows of no sequence
            out.zero_()
            lse.fill_(-torch.inf)
        if not out.numel():
            return out, lse
        batch, max_blocks = block_table.shape
        kv_heads, block_size = k_data.shape[1:3]
        if not max_blocks or not k_data.numel():  # nothing is stored, whatever lengths say
            lse.fill_(-torch.inf)
            if sinks is not None and return_lse:
                lse.copy_(sinks.expand_as(lse).where(_called(query, cu_seqlens), -torch.inf))
            return out.zero_(), lse
        splits, floats, counts = self.plan(
            query, batch, max_tokens, lead[-1], kv_heads, query.shape[-1], v_dim,
            max_blocks * block_size, split_size,
        )  # fmt: skip
        partials, counters, _alive = self.workspace(self.queue(query), floats, counts)
        native.module.attention(
            _view(k_data, k_params, k_mean, v_data, v_params, mean_group, k_rotation, v_rotation),
            block_table.data_ptr(), block_table.stride(0), batch, max_blocks, seq_lens.data_ptr(),
            _pointer(seq_starts), _pointer(cu_seqlens), *_packed(query, max_tokens),
            *_rows(query), *_rows(out),
            _DTYPES[query.dtype], lse.data_ptr() if return_lse else 0, lead[-1], softmax_scale,
            causal, sliding_window, softcap, _pointer(sinks), _pointer(alibi_slopes), partials,
            counters, splits, split_size, *self.queue(query),
        )  # fmt: skip
        return out, lse


def _view(
    k_data: Tensor,
    k_params: Tensor,
    k_mean: Tensor | None,
    v_data: Tensor,
    v_params: Tensor,
    mean_group: int,
    k_rotation: int,
    v_rotation: int,
) -> Any:
    return native.module.CacheView(
        _slab(k_data), _slab(v_data), _slab(k_params), _slab(v_params), _slab(k_mean),
        *k_data.shape[:3], k_data.shape[3], v_data.shape[3], mean_group, k_rotation, v_rotation,
    )  # fmt: skip
