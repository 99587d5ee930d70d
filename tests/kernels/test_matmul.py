"""qk_matmul and pv_matmul: the unfused products against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from attending import assert_as_good
from kvquant import pv_matmul, qk_matmul, quantize_cache_v
from support import DTYPES, FP16, FP32

GRANULARITIES = {
    "token": {},
    "head": {"granularity": "head"},
    "channel": {"granularity": "channel"},
    "channel32": {"granularity": "channel", "group_size": 32},
}


def operands(kind, batch, heads, kv_heads, rows, tokens, dim, dtype, device, **options):
    """(x, codes and params): queries or probabilities, and what they meet."""
    cached = (torch.randn(batch, kv_heads, tokens, dim) + 1).to(device)
    if kind == "qk":
        x = torch.randn(batch, heads, rows, dim)
    else:
        x = torch.randn(batch, heads, rows, tokens).softmax(-1)
    return x.to(dtype).to(device), quantize_cache_v(cached, **options)


def check(kind, x, quantized, group=None):
    function = {"qk": qk_matmul, "pv": pv_matmul}[kind]
    out = function(x, *quantized, group_size=group)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    cached = oracle.dequantize(*quantized, group).repeat_interleave(
        x.shape[1] // quantized[0].shape[1], 1
    )
    cached = cached.mT if kind == "qk" else cached
    own = x.float() @ cached.to(x.dtype).float()
    assert_as_good(out, x.double() @ cached, own.to(x.dtype))
    return out


@pytest.mark.parametrize("kind", ["qk", "pv"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_granularity(backend, device, dtype, granularity, kind):
    options = GRANULARITIES[granularity]
    x, quantized = operands(kind, 2, 4, 2, 3, 75, 64, DTYPES[dtype], device, **options)
    check(kind, x, quantized, options.get("group_size"))


@pytest.mark.parametrize("kind", ["qk", "pv"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tokens", "dim"),
    [
        (1, 1, 1, 1, 16),
        (4, 4, 1, 17, 128),
        (7, 1, 1, 300, 80),
        (14, 2, 5, 33, 96),
        (8, 2, 40, 257, 256),
        (2, 2, 1, 1100, 192),
        (3, 3, 2, 31, 40),
        (2, 1, 2, 9, 7),
    ],
)
def test_shapes(backend, device, kind, heads, kv_heads, rows, tokens, dim):
    x, quantized = operands(kind, 2, heads, kv_heads, rows, tokens, dim, FP16, device)
    check(kind, x, quantized)


@pytest.mark.parametrize("kind", ["qk", "pv"])
def test_strides(backend, device, kind):
    x, (q, scale, zero) = operands(kind, 2, 4, 2, 3, 40, 64, FP32, device)
    wanted = check(kind, x, (q, scale, zero))
    x2, q2 = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, q))
    pair = torch.stack([scale, zero], -1)
    out = check(kind, x2, (q2, pair[..., 0], pair[..., 1]))
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("kind", ["qk", "pv"])
def test_params_in_another_dtype(backend, device, kind):
    x, (q, scale, zero) = operands(kind, 1, 2, 2, 3, 40, 64, FP32, device)
    check(kind, x, (q, scale.bfloat16(), zero.bfloat16()))


def test_nothing_to_multiply(backend, device):
    x, quantized = operands("qk", 1, 2, 2, 3, 0, 64, FP32, device)
    assert qk_matmul(x, *quantized).shape == (1, 2, 3, 0)
    out = pv_matmul(torch.empty(1, 2, 3, 0, device=device), *quantized)
    assert torch.equal(out, torch.zeros(1, 2, 3, 64, device=device))
    assert qk_matmul(x[:, :, :0], *quantized).shape == (1, 2, 0, 0)


def test_nan_row_reaches_its_score_only(backend, device):
    x, (q, scale, zero) = operands("qk", 1, 2, 2, 3, 40, 64, FP32, device)
    scale[0, 1, 5] = zero[0, 1, 5] = torch.nan
    out = qk_matmul(x, q, scale, zero)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 1, :, 5] = True
    assert torch.equal(out.isnan(), hit)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["qk", "pv"]),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 5),
    rows=st.integers(1, 9),
    tokens=st.integers(1, 150),
    dim=st.integers(1, 130),
    granularity=st.sampled_from(list(GRANULARITIES)),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_shape(
    backend, device, kind, batch, kv_heads, share, rows, tokens, dim, granularity, dtype
):
    options = GRANULARITIES[granularity]
    x, quantized = operands(
        kind, batch, share * kv_heads, kv_heads, rows, tokens, dim, DTYPES[dtype], device, **options
    )
    check(kind, x, quantized, options.get("group_size"))
