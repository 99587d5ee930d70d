"""How an attention call is cut into pieces on a GPU: a pure function, tested on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.backends import build_info

SMS = 132


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
        batch, tokens, kv_heads * share, kv_heads, dim, dim, float32, capacity, SMS
    )
    width = -(-dim // 64) * 64
    rows = rows_of(tokens * share, width, float32)
    units = batch * kv_heads * -(-tokens * share // rows)
    assert 1 <= splits <= min(256, max(1, -(-capacity // 256)))
    assert counters == units + batch
    assert floats == (units * splits * rows * (width + 2) if splits > 1 else 0)


def test_one_sequence_is_split_until_the_chip_is_full(plan):
    splits = [plan(1, 1, 32, 8, 128, 128, False, tokens, SMS)[0] for tokens in (256, 4096, 131072)]
    assert splits[0] == 1
    assert splits[1] == 16  # no shorter than 256 tokens
    assert 8 * splits[2] >= SMS


def test_a_full_chip_is_not_split(plan):
    assert plan(256, 1, 32, 8, 128, 128, False, 1024, SMS)[0] == 1
    assert plan(8, 2048, 32, 8, 128, 128, False, 4096, SMS)[0] == 1


def test_longer_sequences_are_cut_where_they_fill_the_chip(plan):
    """64 sequences of 8 heads are over two waves: long ones among short ones would end last."""
    assert plan(64, 1, 32, 8, 128, 128, False, 8192, SMS)[0] == 1
    assert plan(64, 1, 32, 8, 128, 128, False, 16384, SMS)[0] == 4
    assert plan(64, 1, 32, 8, 128, 128, False, 16384, 4 * SMS)[0] == 2  # here they do not
