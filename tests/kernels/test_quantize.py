"""quantize_cache_v and dequantize_cache_torch: every granularity against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvquant
import oracle
from kvquant import dequantize_cache_torch, quantize_cache_v, use_backend
from support import BF16, DTYPES, FP16, FP32, same_bits

GRANULARITIES = {
    "token": {"granularity": "token"},
    "head": {"granularity": "head"},
    "channel": {"granularity": "channel"},
    "channel32": {"granularity": "channel", "group_size": 32},
}
FP32_STEP = 2.0**-24


def params_shape(x, granularity, group_size=None):
    b, h, s, d = x.shape
    groups = -(-s // (group_size or max(1, s)))
    return {"token": (b, h, s, 1), "head": (b, h, 1, 1), "channel": (b, h, groups, d)}[granularity]


def check(x, options, qmin=0, qmax=255):
    """Quantizes ``x`` and holds the result to half a step everywhere."""
    q, scale, zero = quantize_cache_v(x, **options)
    granularity, group = options.get("granularity", "token"), options.get("group_size")
    assert q.dtype == torch.uint8
    assert q.is_contiguous()
    if options.get("bits") == 4:
        assert q.shape == (*x.shape[:3], x.shape[3] // 2)
        q = oracle.Int4.unpack(q)
    assert q.shape == x.shape
    assert scale.shape == zero.shape == params_shape(x, granularity, group)
    assert scale.dtype == zero.dtype == FP32
    assert (scale > 0).all()
    assert (zero.isfinite()).all()
    assert ((q >= qmin) & (q <= qmax)).all()
    back = oracle.dequantize(q, scale, zero, group)
    step = oracle.dequantize(torch.ones_like(q), scale, torch.zeros_like(zero), group)
    slack = 4 * FP32_STEP * (x.double().abs() + (step * qmax))  # zero is rounded to fp32
    assert ((back - x.double()).abs() <= step * (0.5 + 1e-3) + slack).all()
    return q, scale, zero


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_half_a_step(backend, device, dtype, granularity):
    x = (torch.randn(2, 3, 75, 64) * 3 + 1).to(DTYPES[dtype]).to(device)
    q, scale, _ = check(x, GRANULARITIES[granularity])
    y = x.double()
    if granularity == "token":  # the range is used up: no larger step than needed
        spread = y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)
        torch.testing.assert_close(scale.double(), spread / 255, rtol=1e-5, atol=0)
        assert (q.amax(-1) == 255).all()
        assert (q.amin(-1) == 0).all()


@pytest.mark.parametrize("dim", [1, 5, 16, 48, 80, 96, 128, 192, 256, 512, 520])
def test_any_head_dim(backend, device, dim):
    check(torch.randn(1, 2, 9, dim, device=device), {})


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 300])
def test_any_length(backend, device, tokens, granularity):
    x = torch.randn(2, 2, tokens, 32, device=device, dtype=BF16)
    options = GRANULARITIES[granularity]
    if tokens:
        check(x, options)
    else:
        q, scale, zero = quantize_cache_v(x, **options)
        assert q.shape == x.shape
        assert scale.shape == zero.shape == params_shape(x, **options)


@pytest.mark.parametrize(
    ("options", "qmin", "qmax"),
    [
        ({"bits": 8}, 0, 255),
        ({"bits": 4}, 0, 15),
        ({"bits": 1}, 0, 1),
        ({"qmax": 127}, 0, 127),
        ({"qmax": 200, "qmin": 10}, 10, 200),
        ({"bits": 4, "qmin": torch.tensor(1), "qmax": torch.tensor(14)}, 1, 14),
    ],
    ids=["bits8", "bits4", "bits1", "qmax127", "10to200", "tensors"],
)
def test_bits_and_limits(backend, device, options, qmin, qmax):
    x = torch.randn(1, 2, 20, 64, device=device)
    q, _, _ = check(x, options, qmin, qmax)
    assert q.min() == qmin
    assert q.max() == qmax


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_codes_in_a_byte_serve_as_one_each(backend, device, granularity):
    x = torch.randn(2, 2, 33, 64, device=device)
    query, probs = torch.randn(2, 4, 3, 64, device=device), torch.rand(2, 4, 3, 33, device=device)
    options = GRANULARITIES[granularity]
    q, *pair = quantize_cache_v(x, 4, **options)
    group = {"group_size": options.get("group_size")}
    for of, packed in (
        (partial(kvquant.dequantize_cache_torch, **group), q),
        (partial(kvquant.qk_matmul, query, **group), q),
        (partial(kvquant.pv_matmul, probs, **group), q),
    ):
        assert torch.equal(of(packed, *pair, bits=4), of(oracle.Int4.unpack(packed), *pair))
    wide, *same = quantize_cache_v(x, qmax=15, **options)
    assert torch.equal(oracle.Int4.unpack(q), wide)
    assert all(map(torch.equal, pair, same))


def test_four_bits_need_pairs_of_channels():
    with pytest.raises(ValueError, match=r"x: 4 bits need an even head_dim .* got 5 and 15"):
        quantize_cache_v(torch.zeros(1, 1, 1, 5), 4)
    with pytest.raises(ValueError, match="codes up to 15, got 6 and 16"):
        quantize_cache_v(torch.zeros(1, 1, 1, 6), 4, 16)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 6e4, -6e4, 1e-7, -1e-7, 65504.0])
def test_constants_come_back(backend, device, value, granularity):
    check(torch.full((1, 2, 40, 16), value, device=device), GRANULARITIES[granularity])


@pytest.mark.parametrize("size", [1e-7, 1e-30, 1e-3, 6e4])
def test_tiny_and_huge_rows(backend, device, size):
    check((torch.rand(1, 2, 8, 64, device=device) * 2 - 1) * size, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65505.0, 7e4, -1e30])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_row_that_is_not_finite_has_nan_params_and_nothing_else(
    backend, device, granularity, bad
):
    x = torch.randn(2, 2, 70, 16, device=device)
    options = GRANULARITIES[granularity]
    group = options.get("group_size")
    clean = quantize_cache_v(x, **options)
    x[1, 0, 40, 3] = bad
    dirty = quantize_cache_v(x, **options)
    hit = torch.zeros_like(dirty[1], dtype=torch.bool)
    row, column = {"token": (40, 0), "head": (0, 0), "channel": (40 // (group or 70), 3)}[
        options["granularity"]
    ]
    hit[1, 0, row, column] = True
    for old, new in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(new.isnan(), hit)
        assert torch.equal(new[~hit], old[~hit])
    touched = oracle.dequantize(torch.ones_like(x), hit.double(), hit.double() * 0, group) > 0
    assert torch.equal(clean[0][~touched], dirty[0][~touched])
    back = dequantize_cache_torch(*dirty, group_size=group)
    assert torch.equal(back.isnan(), touched)


def views(device):
    x = torch.randn(3, 40, 4, 64, device=device)
    return {
        "bshd": x.transpose(1, 2),
        "sliced": torch.randn(3, 4, 80, 128, device=device)[:, 1:, ::2, 16:80],
        "expanded": x[:1].expand(3, 40, 4, 64).transpose(1, 2),
        "misaligned": torch.randn(3 * 40 * 4 * 64 + 1, device=device)[1:].view(3, 4, 40, 64),
    }


@pytest.mark.parametrize("view", ["bshd", "sliced", "expanded", "misaligned"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides(backend, device, granularity, view):
    x, options = views(device)[view], GRANULARITIES[granularity]
    for a, b in zip(
        quantize_cache_v(x, **options), quantize_cache_v(x.contiguous(), **options), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_formula(backend, device, dtype, granularity):
    options = GRANULARITIES[granularity]
    q, scale, zero = quantize_cache_v(torch.randn(2, 3, 75, 48, device=device) + 2, **options)
    group = options.get("group_size")
    back = dequantize_cache_torch(q, scale, zero, DTYPES[dtype], group_size=group)
    assert back.dtype == DTYPES[dtype]
    wanted = oracle.dequantize(q, scale, zero, group)
    unit = torch.finfo(DTYPES[dtype]).eps / 2 + 4 * FP32_STEP
    span = oracle.dequantize(torch.full_like(q, 255), scale, torch.zeros_like(zero), group)
    assert ((back.double() - wanted).abs() <= unit * wanted.abs() + 4 * FP32_STEP * span).all()


def test_dequantize_takes_the_dtype_of_scale(backend, device):
    q, scale, zero = quantize_cache_v(torch.randn(1, 1, 4, 16, device=device))
    for dtype in (FP16, BF16, FP32):
        assert dequantize_cache_torch(q, scale.to(dtype), zero.to(dtype)).dtype == dtype


def test_dequantize_of_strided_codes_and_params(backend, device):
    q, scale, zero = quantize_cache_v(torch.randn(2, 4, 33, 64, device=device))
    wanted = dequantize_cache_torch(q, scale, zero)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    pair = torch.stack([scale, zero], -1)
    assert torch.equal(dequantize_cache_torch(q2, pair[..., 0], pair[..., 1]), wanted)
    assert torch.equal(dequantize_cache_torch(q2, scale, pair[..., 1]), wanted)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_reference_agree_bit_for_bit(native, dtype, granularity):
    x = (torch.randn(2, 3, 75, 80) * 2 + 1).to(DTYPES[dtype]).to(native)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2, 5] = 0, 3.5, torch.nan
    options = GRANULARITIES[granularity]
    ours = quantize_cache_v(x, **options)
    with use_backend("reference"):
        theirs = quantize_cache_v(x, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert same_bits(a, b)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 70, 40))),
    granularity=st.sampled_from(["token", "head", "channel"]),
    group=st.one_of(st.none(), st.integers(1, 80)),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from([FP16, BF16, FP32]),
    scale=st.sampled_from([1e-7, 1e-2, 1.0, 1e3]),
)
def test_any_shape_and_stride(backend, device, shape, granularity, group, order, dtype, scale):
    x = torch.randn([shape[i] for i in order] + [shape[3]], device=device) * scale
    x = x.to(dtype).permute(*(order.index(i) for i in range(3)), 3)
    assert x.shape == shape
    options = {"granularity": granularity}
    if granularity == "channel":
        options["group_size"] = group
    check(x, options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dim", [128, 144])
def test_more_than_a_cache_holds(native, dim, granularity):
    """The CPU's kernels write many codes past the cache, where rows are aligned so."""
    x = torch.randn(1, 8, 2100, dim, device=native).to(BF16)
    got = quantize_cache_v(x, **GRANULARITIES[granularity])
    with use_backend("reference"):
        expected = quantize_cache_v(x, **GRANULARITIES[granularity])
    for mine, theirs in zip(got, expected, strict=True):
        assert same_bits(mine, theirs)
