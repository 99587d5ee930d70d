"""A user's module: `test_typing.py` has ``mypy --strict`` read it, and runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import kvquant


def decode(cache: kvquant.QuantizedKVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One step of a model's layer."""
    out = cache.attend(0, query, key, value, softcap=30.0)
    return out.flatten(-2)


def with_lse(cache: kvquant.QuantizedKVCache, query: Tensor, wants: bool) -> Tensor:
    """The same function with and without the log-sum-exp."""
    out, lse = cache.attend(0, query, return_lse=True)
    assert_type(lse, Tensor)
    assert_type(cache.attend(0, query, return_lse=wants), Tensor | tuple[Tensor, Tensor])
    view, seqs = cache.layer(0)
    where = seqs.block_table, seqs.seq_lens
    again = kvquant.attention(query, view, block_table=where[0], seq_lens=where[1])
    assert_type(again, Tensor)
    pair = kvquant.attention(query, view, block_table=where[0], seq_lens=where[1], return_lse=True)
    assert_type(pair, tuple[Tensor, Tensor])
    return out - again + pair[0]


def planned(cache: kvquant.QuantizedKVCache, query: Tensor) -> Tensor:
    """A plan, kept by a class of the user's with a plain annotation."""
    view, seqs = cache.layer(0)
    plan: kvquant.Plan = kvquant.plan(query, view, seqs)
    assert_type(plan.run(query, view, seqs), Tensor)
    both = kvquant.plan(query, view, seqs, return_lse=True)
    out, lse = both.run(query, view, seqs)
    return out + lse.unsqueeze(-1)


def main() -> None:
    format = kvquant.CacheFormat()
    cache = kvquant.QuantizedKVCache(1, 1, 2, 64, format=format, dtype=torch.float32)
    query, (key, value) = torch.randn(1, 3, 4, 64), torch.randn(2, 1, 3, 2, 64)
    assert decode(cache, query, key, value).shape == (1, 3, 256)
    assert with_lse(cache, query, False).shape == query.shape
    assert planned(cache, query).shape == query.shape
    key, value = cache.dequantize(0)
    report: str = kvquant.explain().backend
    print(key.shape, value.shape, report, kvquant.__version__)


if __name__ == "__main__":
    main()
