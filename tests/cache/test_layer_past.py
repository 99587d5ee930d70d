"""Caches as Qwen's triples (q, scale, zero): round trips, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kvquant import CacheFormat, QuantizedKVCache
from modelled import (
    DIM,
    HEADS,
    KINDS,
    LAYERS,
    V_DIM,
    append_dense,
    append_ragged,
    assert_same,
    make,
)
from support import same_bits


@pytest.mark.parametrize("target", [None, 16], ids=["contiguous", "paged16"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_past_round_trip(kind, target, device):
    cache = make(kind, device=device, format=CacheFormat.plain())
    append_dense([cache], None, 37)
    cache.reorder([1, 1, 2])
    past = [cache.layer_past(layer) for layer in range(LAYERS)]
    for (qk, ks, kz), (qv, vs, vz) in past:
        assert qk.shape == (3, HEADS, 37, DIM)
        assert qv.shape == (3, HEADS, 37, V_DIM)
        assert qk.dtype == qv.dtype == torch.uint8
        for x in (ks, kz, vs, vz):
            assert x.shape == (3, HEADS, 37, 1)
            assert x.dtype == torch.float32
    key, value = cache.dequantize(1, torch.float32)
    (qk, ks, kz), (qv, vs, vz) = past[1]
    torch.testing.assert_close((ks * (qk - kz)).transpose(1, 2), key, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((vs * (qv - vz)).transpose(1, 2), value, atol=1e-5, rtol=1e-5)
    back = QuantizedKVCache.from_layer_past(past, block_size=target)
    assert_same(back, cache)
    append_dense([back, cache], None, 3)
    assert_same(back, cache)


def test_layer_past_with_rows_that_are_not_finite():
    cache = make("contiguous", format=CacheFormat.plain())
    key, value = torch.randn(3, 5, HEADS, DIM), torch.randn(3, 5, HEADS, V_DIM)
    key[0, 2, 1, 3] = torch.nan
    key[1, 1] = 0.0
    value[2, 0, 0] = 7.25
    for layer in range(LAYERS):
        cache.append(layer, key, value)
    back = QuantizedKVCache.from_layer_past([cache.layer_past(i) for i in range(LAYERS)])
    for name, tensor in cache.state_dict().items():
        assert same_bits(back.state_dict()[name], tensor), name


def test_a_scale_of_a_whole_head():
    q = torch.randint(0, 256, (2, HEADS, 9, DIM), dtype=torch.uint8)
    scale, zero = torch.full((2, HEADS, 1, 1), 0.25), torch.full((2, HEADS, 1, 1), 128.0)
    cache = QuantizedKVCache.from_layer_past([((q, scale, zero), (q, scale, zero))])
    key, _ = cache.dequantize(0, torch.float32)
    assert torch.equal(key.transpose(1, 2), 0.25 * (q.float() - 128))


def triple(*shape: int, scale: float = 1.0):
    b, h, s, d = shape
    ones = torch.full((b, h, s, 1), scale)
    return torch.zeros(b, h, s, d, dtype=torch.uint8), ones, ones


GOOD = triple(1, 2, 3, 16)


@pytest.mark.parametrize(
    ("past", "error", "message"),
    [
        ([], ValueError, "past: expected at least one layer"),
        ([(GOOD, triple(1, 2, 4, 16))], ValueError, r"past\[0\]: v: expected shape"),
        ([(GOOD, GOOD), (triple(1, 2, 3, 32), GOOD)], ValueError, r"past\[1\]: k: expected shape"),
        ([((GOOD[0].float(), *GOOD[1:]), GOOD)], TypeError, "k: q: expected torch.uint8"),
        ([((GOOD[0], GOOD[1][0], GOOD[2]), GOOD)], ValueError, "scale, zero: expected shape"),
        ([(triple(1, 2, 3, 16, scale=1e6), GOOD)], ValueError, "beyond float16"),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_layer_pasts(past, error, message):
    with pytest.raises(error, match=message):
        QuantizedKVCache.from_layer_past(past)


def test_layer_past_needs_a_plain_format_and_one_length():
    with pytest.raises(ValueError, match=r"CacheFormat.plain\(\)"):
        make("contiguous").layer_past(0)
    append_ragged([cache := make("contiguous", format=CacheFormat.plain())], None, [80, 70, 101])
    with pytest.raises(ValueError, match=r"one length, got \[80, 70, 101\]"):
        cache.layer_past(0)
