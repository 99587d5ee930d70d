"""How an attention call is cut into pieces on a GPU: a pure function, tested on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.backends import build_info

SMS, SHARED = 132, 227 << 10


@pytest.fixture(scope="module")
def plan():
    if not build_info().get("cuda"):
        pytest.skip("built without CUDA")
    from kvquant import _C

    return _C.attention_plan


def rows_of(query_rows: int, dim: int, float32: bool) -> int:
    most = 8 if float32 else 32 if dim <= 128 else 16
    return next(rows for rows in (8, 16, 32) if rows >= min(query_rows, most))


@given(
    batch=st.integers(1, 300),
    tokens=st.integers(1, 3000),
    kv_heads=st.integers(1, 16),
    share=st.integers(1, 16),
    dim=st.sampled_from([16, 64, 80, 128, 192, 256]),
    float32=st.booleans(),
    capacity=st.integers(16, 200_000),
)
def test_scratch_is_what_the_pieces_need(
    plan, batch, tokens, kv_heads, share, dim, float32, capacity
):
    splits, floats, counters = plan(
        batch, tokens, kv_heads * share, kv_heads, dim, dim, float32, capacity, SMS, SHARED
    )
    width = -(-dim // 64) * 64
    rows = rows_of(tokens * share, width, float32)
    units = batch * kv_heads * -(-tokens * share // rows)
    assert 1 <= splits <= min(256, max(1, -(-capacity // 256)))
    assert counters == units + 1
    assert floats == (units * splits * rows * (width + 2) if splits > 1 else 0)


def test_one_sequence_is_split_until_the_chip_is_full(plan):
    splits = [
        plan(1, 1, 32, 8, 128, 128, False, tokens, SMS, SHARED)[0] for tokens in (256, 4096, 131072)
    ]
    assert splits[0] == 1
    assert splits[1] == 16  # no shorter than 256 tokens
    assert 8 * splits[2] >= SMS


def test_a_full_chip_is_not_split(plan):
    assert plan(256, 1, 32, 8, 128, 128, False, 1024, SMS, SHARED)[0] == 1
    assert plan(8, 2048, 32, 8, 128, 128, False, 4096, SMS, SHARED)[0] == 1


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
def test_old_gpus_have_an_instance(plan, dim, float32, tokens):
    """64 KB of shared memory (sm_75) hold at least eight query rows."""
    assert plan(1, tokens, 8, 2, dim, dim, float32, 4096, 40, 64 << 10)[0] >= 1


def test_old_gpus_refuse_what_does_not_fit(plan):
    assert plan(1, 1, 8, 2, 256, 256, False, 4096, 40, 64 << 10)[0] == 0
    for float32 in (False, True):  # sm_86, 89 and 120 have 99 KB
        assert plan(1, 9, 8, 2, 256, 256, float32, 4096, 40, 99 << 10)[0] >= 1
