"""gather: what attention sees, against the formula on the stored tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import oracle
from kvquant import gather
from support import (
    BF16,
    DTYPES,
    FORMATS,
    FP16,
    FP32,
    LAYOUTS,
    RAGGED,
    filled_cache,
    foreign,
    index,
    relocated,
)


def gathered(cache, **options):
    return gather(
        cache.view,
        block_table=cache.table,
        seq_lens=cache.lens,
        seq_starts=cache.starts,
        **options,
    )


def check(cache, dtype, tokens=None):
    result = gathered(cache, dtype=dtype, tokens=tokens)
    capacity = cache.table.shape[1] * cache.view.block_size
    tokens = capacity if tokens is None else tokens
    starts = [0] * len(cache.lengths) if cache.starts is None else cache.starts.tolist()
    unit = torch.finfo(dtype).eps / 2
    for name, out, which in zip(("k", "v"), result, (0, 1), strict=True):
        data = getattr(cache.view, name).codes
        assert out.shape == (len(cache.lengths), tokens, data.shape[1], data.shape[3])
        assert out.dtype == dtype
        assert out.is_contiguous()
        for b, (start, length) in enumerate(zip(starts, cache.lengths, strict=True)):
            wanted = torch.zeros(out.shape[1:], dtype=torch.float64, device=out.device)
            rows = slice(min(start, tokens), max(min(start, tokens), min(length, tokens)))
            wanted[rows] = cache.decode(b)[which][rows]
            limit = unit * wanted.abs() + 2.0**-21 * wanted.abs().amax(-1, keepdim=True)
            assert ((out[b].double() - wanted).abs() <= limit + 1e-30).all()


@pytest.mark.parametrize(
    ("dtype", "fmt", "layout", "k_dim", "v_dim"),
    [
        ("fp32", "default", "paged16", 128, 128),
        ("bf16", "default", "contiguous", 64, 80),
        ("fp16", "plain", "paged256", 80, 64),
        ("fp32", "rotated", "contiguous", 48, 96),
        ("bf16", "rotated", "paged64", 256, 16),
        ("fp16", "mean64", "paged32", 96, 192),
        ("fp32", "mean16", "contiguous", 16, 256),
        ("bf16", "mean16", "paged32", 192, 48),
    ],
    ids=str,
)
def test_gather_is_the_formula(backend, device, dtype, fmt, layout, k_dim, v_dim):
    cache = filled_cache(
        RAGGED, fmt=FORMATS[fmt], block=LAYOUTS[layout], k_dim=k_dim, v_dim=v_dim, device=device
    )
    check(cache, DTYPES[dtype])


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_of_a_round_trip_is_half_a_step(backend, device, fmt):
    cache = filled_cache([300, 40], dtype=FP32, fmt=FORMATS[fmt], block=32, device=device)
    for out, exact, name in zip(
        gathered(cache), (cache.keys, cache.values), ("k", "v"), strict=True
    ):
        on = getattr(cache.view.format, {"k": "key", "v": "value"}[name] + "_rotation")
        for b, x in enumerate(exact):
            turn = oracle.rotation(on, x.shape[-1], x.device)
            error = ((out[b, : len(x)].double() - x.double()) @ turn).abs().amax(-1)
            step = cache.rows(b)[f"{name}_params"][..., 0].double()
            assert (error <= step * (0.5 + 1e-3) + 2.0**-19).all()


@pytest.mark.parametrize("tokens", [0, 1, 16, 100, 257, 512])
def test_tokens_of_the_result(backend, device, tokens):
    check(filled_cache([512, 0, 1, 257], block=256, device=device), FP32, tokens)


@pytest.mark.parametrize("layout", ["contiguous", "paged16"])
def test_rows_outside_are_zero(backend, device, layout):
    cache = filled_cache(
        [60, 60, 60, 5], block=LAYOUTS[layout], device=device, starts=[0, 17, 60, 9]
    )
    check(cache, BF16)
    key, _ = gathered(cache)
    assert (key[1, :17] == 0).all()
    assert (key[1, 17:60] != 0).any(-1).all()
    assert (key[2:] == 0).all()


def test_shorter_lengths_hide_rows(backend, device):
    cache = filled_cache([300, 20], block=16, device=device)
    check(replace(cache, lens=index([299, 0], device)), FP16)


def test_order_of_sequences(backend, device):
    cache = filled_cache(RAGGED, block=16, device=device)
    order = [3, 8, 0, 1, 8]
    for a, b in zip(gathered(cache), gathered(relocated(cache, order)), strict=True):
        assert torch.equal(a[order], b)


def test_nan_stays_in_its_row(backend, device):
    cache = filled_cache([40], fmt=FORMATS["rotated"], block=16, device=device)
    block, row = oracle.places(cache.view, cache.table, 0, 40)
    cache.view.k.params.view(torch.float16)[block[7], 1, row[7]] = torch.nan
    cache.view.v.params.view(torch.float16)[block[9], 0, row[9]] = torch.nan
    key, value = gathered(cache)
    for out, token, head in ((key, 7, 1), (value, 9, 0)):
        hit = torch.zeros(out.shape[1:3], dtype=torch.bool, device=device)
        hit[token, head] = True
        assert torch.equal(out[0].isnan().any(-1), hit)
        assert torch.equal(out[0].isnan().all(-1), hit)


def test_foreign_strides(backend, device):
    cache = filled_cache(RAGGED, block=64, fmt=FORMATS["mean64"], v_dim=96, device=device)
    view = replace(cache, view=foreign(cache.view))
    for a, b in zip(gathered(cache), gathered(view), strict=True):
        assert torch.equal(a, b)


def test_no_sequences(backend, device):
    cache = relocated(filled_cache([20], device=device), [])
    key, value = gathered(cache)
    assert key.shape == value.shape == (0, 32, 2, 64)
