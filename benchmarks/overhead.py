"""Host time of an eager decode step at batch 1, and where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

import kvquant
from benchmarks.common import Report, host_us
from kvquant import ops


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print microseconds of host time of each part.

    Example: python -m benchmarks overhead --json overhead.json
    """
    torch.set_grad_enabled(False)
    heads, kv_heads, dim = 32, 8, 128
    cache = kvquant.QuantizedKVCache(
        1, 1, kv_heads, dim, max_seq_len=65536, dtype=torch.float16, device="cuda"
    )
    new = {"device": "cuda", "dtype": torch.float16}
    cache.append(0, *(torch.randn(1, 16, kv_heads, dim, **new) for _ in range(2)))
    query = torch.randn(1, 1, heads, dim, **new)
    key, value = (torch.randn(1, 1, kv_heads, dim, **new) for _ in range(2))
    dense = torch.randn(2, 1, heads, 16, dim, **new)
    view = kvquant.CacheView.allocate(1, kv_heads, 65536, dim, device="cuda")
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    lens = torch.full((1,), 16, dtype=torch.int32, device="cuda")
    seqs = kvquant.Sequences(table, lens)
    planned = kvquant.plan(query, view, seqs)
    appending = kvquant.plan(query, view, seqs, key, value)
    out = torch.empty_like(query)
    options = planned.options
    report = Report("Host time of an eager decode step, batch 1")
    parts = {
        "cache.attend with the new token (append included)": lambda: cache.attend(
            0, query, key, value
        ),
        "cache.attend alone": lambda: cache.attend(0, query),
        "cache.append alone": lambda: cache.append(0, key, value),
        "plan.run": lambda: planned.run(query, view, seqs),
        "plan.run with the new token": lambda: appending.run(query, view, seqs, key, value),
        "plan.run with the new token and out=": lambda: appending.run(
            query, view, seqs, key, value, out=out
        ),
        "plan, remembered": lambda: kvquant.plan(query, view, seqs, key, value),
        "Sequences, once a step": lambda: kvquant.Sequences(table, lens),
        "the operator, through torch's dispatcher": lambda: ops.attend(
            query, view, seqs, None, None, options, None, None, out, None
        ),
        "functional attention, every argument checked": lambda: kvquant.attention(
            query, view, block_table=table, seq_lens=lens
        ),
        "torch.empty of the output": lambda: torch.empty(
            1, 1, heads, dim, dtype=torch.float16, device="cuda"
        ),
        "torch SDPA fp16": lambda: F.scaled_dot_product_attention(
            query.transpose(1, 2), dense[0], dense[1]
        ),
    }
    for name, call in parts.items():
        report.add(part=name, us=host_us(call))
    report.finish(json)
