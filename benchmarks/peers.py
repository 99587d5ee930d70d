"""Attention kernels of other libraries on 16-bit and fp8 caches, as calls for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Call, buffers_for

__all__ = ["decode_peers"]

PAGE = 16
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLASHINFER = {  # by name: the cache's dtype, and whether tensor cores serve single tokens
    "fi16": (torch.float16, False),
    "fi16_tc": (torch.float16, True),
    "fi8": (torch.float8_e4m3fn, False),
    "fi8_tc": (torch.float8_e4m3fn, True),
}


def decode_peers(
    b: int, hq: int, hk: int, s: int, d: int, tq: int
) -> dict[str, Callable[[], list[Call]]]:
    """What makes the calls of each peer that is installed, on caches larger than the L2 cache."""
    shape = b, hq, hk, s, d, tq
    found = {name: partial(_sdpa, backend, *shape) for name, backend in SDPA.items()}
    try:
        import flashinfer
    except ImportError:
        print("FlashInfer is not installed", flush=True)
        return found
    serves = _flashinfer_decode if tq == 1 else _flashinfer_chunk
    for name, (dtype, tensor_cores) in FLASHINFER.items():
        if tq == 1 or tensor_cores:  # of chunks there is one kernel a dtype
            found[name] = partial(serves, flashinfer, dtype, tensor_cores, *shape)
    return found


def _sdpa(backend: SDPBackend, b: int, hq: int, hk: int, s: int, d: int, tq: int) -> list[Call]:
    """A causal mask of several query tokens against a longer cache costs torch its fast kernels:
    they run without a mask, which flatters them."""
    query = torch.randn(b, hq, tq, d, device="cuda", dtype=torch.float16)
    caches = [
        torch.randn(2, b, hk, s, d, device="cuda", dtype=torch.float16)
        for _ in range(buffers_for(b * hk * s * 4 * d, most=4))
    ]

    def attend(cache: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, *cache, enable_gqa=hq != hk)

    return [partial(attend, cache) for cache in caches]


def _blocks(dtype: torch.dtype, b: int, hk: int, s: int, d: int) -> list[Tensor]:
    return [
        torch.randn(b * s // PAGE, 2, PAGE, hk, d, device="cuda", dtype=torch.float16).to(dtype)
        for _ in range(buffers_for(b * hk * s * 2 * d * dtype.itemsize, most=4))
    ]


def _table(b: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's blocks begin, the blocks, and the tokens in the last one."""
    return (
        torch.arange(b + 1, dtype=torch.int32, device="cuda") * (s // PAGE),
        torch.arange(b * s // PAGE, dtype=torch.int32, device="cuda"),
        torch.full((b,), PAGE, dtype=torch.int32, device="cuda"),
    )


def _flashinfer_decode(
    flashinfer: Any, dtype: torch.dtype, tensor_cores: bool,
    b: int, hq: int, hk: int, s: int, d: int, tq: int,
) -> list[Call]:  # fmt: skip
    begins, blocks, last = _table(b, s)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_cuda_graph=True,
        use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=begins.clone(),
        paged_kv_indices_buffer=blocks.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        begins, blocks, last, hq, hk, d, PAGE, q_data_type=torch.float16, kv_data_type=dtype
    )
    query = torch.randn(b, hq, d, device="cuda", dtype=torch.float16)
    return [partial(wrapper.run, query, cache) for cache in _blocks(dtype, b, hk, s, d)]


def _flashinfer_chunk(
    flashinfer: Any, dtype: torch.dtype, tensor_cores: bool,
    b: int, hq: int, hk: int, s: int, d: int, tq: int,
) -> list[Call]:  # fmt: skip
    begins, blocks, last = _table(b, s)
    rows = torch.arange(b + 1, dtype=torch.int32, device="cuda") * tq
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_cuda_graph=True,
        backend="fa2", qo_indptr_buf=rows.clone(), paged_kv_indptr_buf=begins.clone(),
        paged_kv_indices_buf=blocks.clone(), paged_kv_last_page_len_buf=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        rows, begins, blocks, last, hq, hk, d, PAGE, causal=True, q_data_type=torch.float16,
        kv_data_type=dtype,
    )  # fmt: skip
    query = torch.randn(b * tq, hq, d, device="cuda", dtype=torch.float16)
    return [partial(wrapper.run, query, cache) for cache in _blocks(dtype, b, hk, s, d)]
