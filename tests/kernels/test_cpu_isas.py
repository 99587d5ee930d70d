"""Attention by each instruction set of this machine: what is rounded to integers, and what not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kvquant
from attending import check_attention
from kvquant.backends import build_info, native
from support import DTYPES, FORMATS, empty_cache, filled_cache

ISAS = build_info().get("cpu_isas", [])


@pytest.fixture(params=["avx512", "avx2", "neon", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; those that are not here skip."""
    if request.param not in ISAS:
        pytest.skip(f"no {request.param} here")
    before = build_info()["cpu_isa"]
    native.module.force_cpu_isa(request.param)
    yield request.param
    native.module.force_cpu_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ["default", "plain"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 48), (256, 80)], ids=lambda d: "d{}v{}".format(*d))
@pytest.mark.parametrize("queries", [1, 6])
def test_sizes_apart_by_powers_of_ten(isa, dtype, fmt, dims, queries):
    """Numbers that are rounded by the largest of their row or tile must not spoil the smaller."""
    lens, kv_heads = (700, 290), 2
    cache = empty_cache(
        lens, kv_heads=kv_heads, k_dim=dims[0], v_dim=dims[1], block=16, fmt=FORMATS[fmt]
    )
    rows = [[torch.randn(n, kv_heads, dim) for n in lens] for dim in dims]
    for key, value in zip(*rows, strict=True):
        key[..., 3] *= 10
        value *= 10.0 ** (torch.arange(len(value)) % 4 - 2).view(-1, 1, 1)
    cache.append(*([x.to(DTYPES[dtype]) for x in part] for part in rows))
    query = torch.randn(2, queries, 6, dims[0])
    query[..., 5] *= 20
    query[:, :, 1] *= 1e-6
    query[:, :, 2] = 0
    check_attention(cache, list(query.to(DTYPES[dtype])))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("fmt", ["default", "plain", "k4v4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_is_not_finite(isa, dtype, fmt, number):
    """Its result is NaN, and the query rows beside it are what they are without it."""
    cache = filled_cache((300,), kv_heads=1, k_dim=64, fmt=FORMATS[fmt])
    query = torch.randn(1, 2, 3, 64).to(DTYPES[dtype])
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    clean = kvquant.attention(query, cache.view, **where)
    query[0, 1, 1, 7] = number
    out = kvquant.attention(query, cache.view, **where)
    hit = torch.zeros(1, 2, 3, dtype=torch.bool)
    hit[0, 1, 1] = True
    assert torch.equal(out.isnan().all(-1), hit)
    assert torch.equal(out[~hit], clean[~hit])
