"""How an attention call is cut into pieces on a GPU: a pure function, tested on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

SMS = 132


@pytest.fixture(scope="module")
def choose():
    _C = pytest.importorskip("kvquant._C")
    names = (
        "batch", "max_seqlen_q", "num_q_heads", "num_kv_heads", "head_dim", "v_head_dim",
        "float32", "capacity", "multiprocessors",
    )  # fmt: skip

    def of(*sizes, **rest):
        problem = dict(zip(names, sizes, strict=True))
        usual = {
            "k_format": "int8", "v_format": "int4" if rest.get("age_group") else "int8",
            "mean_group": 256, "age_group": 0, "capability": 80, "split_size": 0,
            "packed": False, "appends": False,
        }  # fmt: skip
        return _C.choose({**usual, **problem, **rest})

    return of


@pytest.fixture(scope="module")
def plan(choose):
    def of(*sizes, split_size=0):
        found = choose(*sizes, split_size=split_size)
        return found["splits"], found["partial_floats"], found["counters"]

    return of


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
    assert counters == batch
    assert floats == (units * splits * rows * (width + 2) if splits > 1 else 0)


def test_rows_by_age_have_fewer_instances(choose):
    sizes = 8, 128, 128, False, 1024, SMS
    rows = [choose(8, tokens, 32, *sizes, age_group=256)["query_rows"] for tokens in (2, 4, 99)]
    assert rows == [8, 32, 32]


def test_groups_that_begin_and_end_in_a_step_are_appended_before_it(choose):
    sizes = 2, 20, 4, 4, 128, 128, False, 1024, SMS
    found = [choose(*sizes, appends=True, age_group=group)["appends"] for group in (0, 16, 32)]
    assert found == [True, False, True]


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
    assert plan(64, 1, 32, 8, 128, 128, False, 16384, SMS)[0] == 5
    assert plan(64, 1, 32, 8, 128, 128, False, 16384, 4 * SMS)[0] == 2  # here they do not


def test_smaller_rows_are_cut_into_longer_pieces(choose):
    sizes = 64, 1, 32, 8, 128, 128, False, 32768, SMS
    pairs = [("int8", "int8"), ("int8", "int4"), ("int4", "int4")]
    found = [choose(*sizes, k_format=k, v_format=v)["splits"] for k, v in pairs]
    assert found == [10, 8, 5]


@given(
    batch=st.integers(1, 300),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([64, 128, 192, 256]),
    capacity=st.integers(16, 200_000),
    split_size=st.integers(4, 2**22).map(lambda n: 256 * n),
)
def test_splits_of_a_given_size_depend_on_the_capacity_alone(
    plan, batch, tokens, dim, capacity, split_size
):
    splits, floats, counters = plan(
        batch, tokens, 8, 2, dim, dim, False, capacity, SMS, split_size=split_size
    )
    rows = rows_of(tokens * 4, dim, False)
    units = batch * 2 * -(-tokens * 4 // rows)
    assert splits == -(-capacity // split_size)
    assert counters == batch
    assert floats == (units * splits * rows * (dim + 2) if splits > 1 else 0)


@pytest.fixture(scope="module")
def instance(choose):
    names = ("head_dim", "query_rows", "warps", "blocks", "stages")

    def of(*sizes, split_size=0):
        found = choose(*sizes, SMS, split_size=split_size)
        return tuple(found[name] for name in names)

    return of


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim", "float32", "capacity", "expected"),
    [  # head_dim, query rows, warps, blocks of a multiprocessor, stages of a ring
        (1, 1, (32, 8), 128, False, 4096, (128, 8, 8, 1, 0)),
        (1, 1, (32, 8), 128, False, 32768, (128, 8, 8, 1, 0)),
        (2, 1, (32, 8), 128, False, 4096, (128, 8, 8, 1, 0)),
        (8, 1, (32, 8), 128, False, 4096, (128, 8, 8, 2, 0)),
        (1, 1, (32, 8), 128, False, 131072, (128, 8, 8, 2, 0)),
        (32, 1, (32, 32), 128, False, 2048, (128, 8, 4, 4, 0)),
        (64, 1, (32, 8), 128, False, 8192, (128, 8, 8, 2, 0)),
        (64, 1, (32, 8), 64, False, 4096, (64, 8, 8, 2, 0)),
        (256, 1, (32, 8), 128, False, 1024, (128, 8, 4, 4, 0)),
        (256, 1, (32, 8), 256, False, 512, (256, 8, 4, 2, 0)),
        (8, 4, (32, 8), 128, False, 8192, (128, 16, 8, 1, 2)),
        (64, 8, (32, 8), 128, False, 8192, (128, 32, 4, 2, 2)),
        (1, 1, (32, 8), 80, True, 4096, (128, 8, 8, 1, 2)),
        (1, 1, (8, 1), 256, False, 4096, (256, 8, 4, 2, 0)),
        (8, 1, (32, 8), 192, False, 4096, (192, 8, 4, 2, 0)),
        (8, 2, (64, 8), 256, False, 1024, (256, 16, 4, 2, 2)),
        (1, 512, (32, 8), 192, False, 4096, (192, 16, 4, 2, 2)),
    ],
)
def test_instance_of_a_call(instance, batch, tokens, heads, dim, float32, capacity, expected):
    assert instance(batch, tokens, *heads, dim, dim, float32, capacity) == expected


@given(
    dim=st.sampled_from([64, 128, 192, 256]),
    tokens=st.integers(1, 8),
    float32=st.booleans(),
    batches=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    capacities=st.tuples(st.integers(16, 200_000), st.integers(16, 200_000)),
)
def test_what_shares_tokens_out_does_not_depend_on_the_batch(
    instance, dim, tokens, float32, batches, capacities
):
    """Rows and warps decide in which order a split is summed."""
    a, b = (
        instance(batch, tokens, 32, 8, dim, dim, float32, capacity, split_size=1024)
        for batch, capacity in zip(batches, capacities, strict=True)
    )
    assert a[:3] == b[:3]


def test_a_row_refuses_by_name(choose):
    sizes = (1, 1, 32, 8, 128, 128, False, 4096)
    assert choose(*sizes, SMS)["regime"] == "split_kv"
    assert choose(*sizes, 0)["regime"] == "flash"
    for dims, name in (((272, 64), "head_dim 272"), ((64, 72), "v_head_dim 72")):
        for where in (SMS, 0):
            found = choose(1, 1, 32, 8, *dims, False, 4096, where)
            assert found["regime"] is None
            ((argument, why),) = found["refusals"]
            assert argument is None
            assert name in why
    ((argument, why),) = choose(70_000, *sizes[1:], SMS)["refusals"]
    assert "65535" in why


MANY = {"capability": 90}


@pytest.mark.parametrize(
    ("tokens", "dim", "expected"),
    [  # query rows of a block, warps, blocks of a multiprocessor
        (5, 128, (32, 4, 3)),
        (8, 64, (32, 4, 3)),
        (9, 128, (64, 4, 3)),
        (64, 64, (64, 4, 3)),
        (2000, 128, (64, 4, 3)),
    ],
)
def test_many_query_rows_on_hopper(choose, tokens, dim, expected):
    found = choose(8, tokens, 32, 8, dim, dim, False, 8192, SMS, **MANY)
    assert found["regime"] == "many_rows"
    assert (found["query_rows"], found["warps"], found["blocks"]) == expected
    step = choose(8, tokens, 32, 8, dim, dim, False, 8192, SMS, **MANY, appends=True)
    assert step["appends"] == (tokens <= 32)


def test_what_many_rows_refuses_by_name(choose):
    def why(dims=(128, 128), tokens=9, float32=False, **rest):
        found = choose(8, tokens, 32, 8, *dims, float32, 8192, SMS, **{**MANY, **rest})
        assert found["regime"] == "split_kv"
        ((argument, reason),) = found["refusals"]
        assert argument is None
        return reason

    assert why(capability=89) == "compute capability 8.9, not 9.0"
    assert why(capability=100) == "compute capability 10.0, not 9.0"
    assert why(tokens=4) == "16 query rows of a KV head, fewer than 17"
    assert why(dims=(128, 64)) == why(dims=(80, 80)) == "head_dims other than 64 and 128"
    assert why(float32=True) == "float32"
    assert why(mean_group=32) == "key means of fewer than 64 tokens"
    by_age = "rows by age in groups of fewer than 64 tokens"
    assert why(mean_group=0, age_group=32) == by_age


@pytest.mark.parametrize("key", ["int8", "int4"])
def test_many_rows_of_four_bits(choose, key):
    """By age already where the other kernel would take rows 32 at a time, but for decode steps."""
    four = {**MANY, "k_format": key, "v_format": "int4"}

    def regime(tokens, heads=32, **rest):
        return choose(8, tokens, heads, 8, 128, 128, False, 8192, SMS, **four, **rest)["regime"]

    assert [regime(tokens) for tokens in (4, 5, 100)] == ["split_kv", "many_rows", "many_rows"]
    by_age = {"age_group": 256}
    assert [regime(tokens, **by_age) for tokens in (1, 2, 3)] == [
        "split_kv", "split_kv", "many_rows",
    ]  # fmt: skip
    assert regime(1, heads=128, **by_age) == "split_kv"
    assert regime(1, heads=136, **by_age) == "many_rows"


def test_formats_are_refused_by_name():
    _C = pytest.importorskip("kvquant._C")
    assert _C.refuse_rows("int8", "int8", 128, 64) == ""
    assert "no row format nf4" in _C.refuse_rows("int8", "nf4", 128, 128)
    assert "no row format nf4" in _C.refuse_rows("nf4", "int8", 128, 128)
    assert "head_dim 24" in _C.refuse_rows("int8", "int8", 24, 128)


def test_what_the_launch_appends(choose):
    decode, chunk = (1, 1, 32, 8, 128, 128, False, 4096, SMS), (1, 64, 32, 8, 128, 128, False, 4096)
    assert choose(*decode, appends=True)["appends"]
    assert not choose(*decode)["appends"]
    assert not choose(*decode, appends=True, packed=True)["appends"]
    assert not choose(*chunk, SMS, appends=True)["appends"]  # blocks would wait for another's rows
    assert not choose(*decode[:-1], 0, appends=True)["appends"]  # on a CPU
