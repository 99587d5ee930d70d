"""Append, quantize and dequantize against the same formulas in eager torch, in one run.

Bytes are what must be read and written once; % is of the measured read ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import kvquant
from benchmarks.caches import RandomCache
from benchmarks.common import Report, buffers_for, graph_ms, read_ceiling


def eager_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The per-token formula as a user would write it."""
    y = x.float()
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = (high - low) / 255
    zero = -low / scale
    return (y / scale + zero).round().clamp(0, 255).to(torch.uint8), scale, zero


def eager_dequantize(q: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Its inverse."""
    return (scale * (q.float() - zero)).to(dtype)


def appends(
    batch: int, tokens: int, kv_heads: int = 8, head_dim: int = 128
) -> tuple[list[Callable[[], object]], list[Callable[[], object]], int]:
    """Ours, torch's copy into a bf16 cache, and our bytes, for an append behind 1,024 tokens."""
    shape = (batch, tokens, kv_heads, head_dim)
    nbytes = batch * tokens * kv_heads * 2 * (head_dim * 3 + 4)
    ours: list[Callable[[], object]] = []
    peers: list[Callable[[], object]] = []
    for _ in range(buffers_for(nbytes)):
        cache = RandomCache.make(batch, kv_heads, 1024, head_dim, spare=tokens)
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        dense = torch.empty(
            2, batch, kv_heads, 1024 + tokens, head_dim, device="cuda", dtype=torch.bfloat16
        )

        def append(cache: RandomCache = cache, key: Tensor = key, value: Tensor = value) -> None:
            kvquant.append_(
                key,
                value,
                cache.view,
                block_table=cache.block_table,
                seq_lens=cache.seq_lens,
            )

        def copy(dense: Tensor = dense, key: Tensor = key, value: Tensor = value) -> None:
            dense[0, :, :, 1024:].copy_(key.transpose(1, 2))
            dense[1, :, :, 1024:].copy_(value.transpose(1, 2))

        ours.append(append)
        peers.append(copy)
    return ours, peers, nbytes


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print time, bytes, TB/s, % of the read ceiling and the ratio to torch.

    Example: python -m benchmarks rows --json rows.json
    """
    ceiling = read_ceiling()
    report = Report("Rows in and out", read_ceiling_tbs=round(ceiling, 3))

    def add(name: str, shape: str, nbytes: int, ms: float, peer: str, peer_ms: float) -> None:
        report.add(
            op=name,
            shape=shape,
            mbytes=nbytes / 1e6,
            ms=ms,
            tbs=nbytes / ms / 1e9,
            percent=nbytes / ms / 1e9 / ceiling * 100,
            peer=peer,
            peer_ms=peer_ms,
            ratio=peer_ms / ms,
        )

    shape = (64, 8, 2048, 128)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    rows = x.numel() // x.shape[-1]
    q, scale, zero = kvquant.quantize_cache_v(x)
    nbytes = x.nbytes + q.nbytes + rows * 8
    label = "x".join(map(str, shape))
    add(
        "quantize", label, nbytes, graph_ms([lambda: kvquant.quantize_cache_v(x)]),
        "eager torch", graph_ms([lambda: eager_quantize(x)], per_graph=2),
    )  # fmt: skip
    add(
        "dequantize", label, nbytes,
        graph_ms([lambda: kvquant.dequantize_cache_torch(q, scale, zero, torch.bfloat16)]),
        "eager torch",
        graph_ms([lambda: eager_dequantize(q, scale, zero, torch.bfloat16)], per_graph=2),
    )  # fmt: skip
    torch.cuda.empty_cache()
    for batch, tokens in ((1, 1), (64, 1), (1, 8192), (16, 4096)):
        ours, peers, nbytes = appends(batch, tokens)
        add(
            "append", f"{batch}x{tokens}x8x128", nbytes, graph_ms(ours),
            "copy to bf16 cache", graph_ms(peers),
        )  # fmt: skip
        del ours, peers
        torch.cuda.empty_cache()
    report.finish(json)
