"""Every check: the error names the argument, and nothing was written."""

from __future__ import annotations

import pytest
import torch

import kvquant
from kvquant import CacheFullError
from support import (
    BF16,
    FORMATS,
    FP16,
    Cache,
    assert_unchanged,
    empty_cache,
    filled_cache,
    index,
    snapshot,
)


@pytest.fixture(scope="module")
def cache() -> Cache:
    """Two sequences of 20 and 5 tokens with room for 64, blocks of 16, heads of 64 and 80."""
    cache = empty_cache([64, 64], block=16, k_dim=64, v_dim=80)
    rows = [torch.randn(2, n, 2, 80, dtype=BF16) for n in (20, 5)]
    cache.append([k[..., :64].contiguous() for k, _ in rows], [v for _, v in rows])
    return cache


def rows(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


def last_dim_strided(*shape):
    return rows(*shape, 2)[..., 0]


def good(function, cache):
    """Valid arguments of a function on the cache."""
    where = {"view": cache.view, "block_table": cache.table, "seq_lens": cache.lens.clone()}
    return {
        "append_": where | {"key": rows(2, 3, 2, 64), "value": rows(2, 3, 2, 80)},
        "attention": where | {"query": rows(2, 1, 4, 64)},
        "gather": where,
    }[function]


META = torch.device("meta")
THREE = rows(3, 4, 64)
PACKED = {"key": rows(5, 2, 64), "value": rows(5, 2, 80), "cu_seqlens": index([0, 3, 5], "cpu")}

APPEND = [
    ({"key": [1.0]}, TypeError, "key: expected a tensor, got list"),
    ({"key": rows(2, 3, 2, 64).int()}, TypeError, "key: expected float16, bfloat16 or float32,"),
    ({"key": rows(2, 3, 2, 64).double()}, TypeError, "key: .* got torch.float64"),
    ({"key": rows(3, 2, 64)}, ValueError, "key: expected 4 dimensions, got shape"),
    ({"key": last_dim_strided(2, 3, 2, 64)}, ValueError, "key: the last dimension must be contig"),
    ({"key": rows(2, 3, 2, 100)}, ValueError, "key: head_dim 100 is not a multiple of 16"),
    ({"key": rows(2, 3, 2, 0)}, ValueError, "key: head_dim 0 is not a multiple of 16"),
    ({"key": rows(2, 3, 2, 48)}, ValueError, "key: head_dim 48, but the view's keys have 64"),
    ({"value": rows(2, 3, 2, 81)}, ValueError, "value: head_dim 81 is not a multiple of 16"),
    ({"value": rows(2, 3, 2, 64)}, ValueError, "value: head_dim 64, but the view's values have"),
    ({"value": rows(2, 4, 2, 80)}, ValueError, "value: expected key's dtype and shape"),
    ({"value": rows(2, 3, 2, 80, dtype=FP16)}, ValueError, "value: expected key's dtype and shape"),
    ({"value": last_dim_strided(2, 3, 2, 80)}, ValueError, "value: the last dimension must be"),
    ({"key": rows(2, 3, 4, 64), "value": rows(2, 3, 4, 80)}, ValueError, "key: 4 heads, but the"),
    ({"key": rows(1, 3, 2, 64), "value": rows(1, 3, 2, 80)}, ValueError, "key: batch 1, e"),
    ({"view": {}}, TypeError, "view: expected a CacheView, got dict"),
    ({"block_table": None}, ValueError, "block_table, seq_lens: needed"),
    ({"seq_lens": None}, ValueError, "block_table, seq_lens: needed"),
    ({"block_table": None, "seq_lens": None}, ValueError, "block_table, seq_lens: needed"),
    ({"slot_mapping": torch.arange(6), "seq_lens": None}, ValueError, "block_table, seq_lens: ne"),
    ({**PACKED, "cu_seqlens": index([0, 5], "cpu")}, ValueError, "cu_seqlens: expected a contig"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 3, 5])}, TypeError, "cu_seqlens: expected"),
    ({**PACKED, "cu_seqlens": index([0, 9, 3, 9, 5], "cpu")[::2]}, ValueError, "cu_seqlens:"),
    ({**PACKED, "cu_seqlens": None, "slot_mapping": torch.arange(5)}, ValueError,
     "cu_seqlens: needed for packed rows"),
    ({**PACKED, "cu_seqlens": index([0, 3, 6], "cpu")}, ValueError, "cu_seqlens: "),
    ({**PACKED, "cu_seqlens": index([3, 0, 5], "cpu")}, ValueError, "cu_seqlens: "),
    ({**PACKED, "cu_seqlens": index([-1, 3, 5], "cpu")}, ValueError, "cu_seqlens: "),
    ({"seq_starts": index([0], "cpu")}, ValueError, "seq_starts: expected a contiguous vector"),
    ({"seq_starts": torch.tensor([0, 0])}, TypeError, "seq_starts: expected torch.int32, got"),
    ({"slot_mapping": torch.arange(6, dtype=torch.int32)}, TypeError, "slot_mapping: expected"),
    ({"slot_mapping": torch.arange(5)}, ValueError, "slot_mapping: expected a contiguous vector"),
    ({"slot_mapping": torch.tensor([0, 1, 2, 3, 4, -2])}, ValueError, "slot_mapping: expected"),
    ({"slot_mapping": torch.tensor([0, 1, 2, 3, 4, 10**6])}, ValueError, "slot_mapping:"),
    ({"slot_mapping": torch.tensor([0, 1, 2, -1, -1, 1])}, ValueError, "slot_mapping: a slot is"),
    ({"slot_mapping": torch.arange(6), "advance": True}, ValueError, "advance: needs seq_lens,"),
    ({"key": rows(2, 45, 2, 64), "value": rows(2, 45, 2, 80)}, CacheFullError,
     r"seq_lens: \[65, 50\] tokens, but there is room for 64"),
]  # fmt: skip

WHERE = [  # of every function with a table
    ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "block_table: expected"),
    ({"block_table": torch.zeros(2, dtype=torch.int32)}, ValueError, "block_table: expected"),
    ({"block_table": torch.zeros(2, 8, dtype=torch.int32)[:, ::2]}, ValueError, "block_table:"),
    ({"block_table": torch.zeros(2, 4, dtype=torch.int32, device=META)}, ValueError, "block_table"),
    ({"block_table": torch.full((2, 4), -1, dtype=torch.int32)}, ValueError, "block_table:"),
    ({"block_table": torch.full((2, 4), 99, dtype=torch.int32)}, ValueError, "block_table:"),
    ({"block_table": None}, (TypeError, ValueError), "block_table"),
    ({"block_table": torch.tensor(1, dtype=torch.int32)}, ValueError, "block_table: expected"),
    ({"seq_lens": None}, (TypeError, ValueError), "seq_lens"),
    ({"seq_lens": torch.tensor([20, 5])}, TypeError, "seq_lens: expected torch.int32, got"),
    ({"seq_lens": index([20], "cpu")}, ValueError, "seq_lens: expected a contiguous vector of 2"),
    ({"seq_lens": index([20, -1], "cpu")}, ValueError, r"seq_lens: expected no negative length"),
    ({"seq_lens": index([65, 5], "cpu")}, ValueError, r"seq_lens: \[6.* but there is room for 64"),
    ({"seq_lens": index([20, 5], META)}, ValueError, "seq_lens: on meta, but the call is on cpu"),
    ({"seq_starts": index([0, 0], META)}, ValueError, "seq_starts: on meta, but the call is on"),
]  # fmt: skip

ATTENTION = [
    ({"query": "q"}, TypeError, "query: expected a tensor, got str"),
    ({"query": rows(2, 1, 4, 64).long()}, TypeError, "query: expected float16, bfloat16 or"),
    ({"query": rows(8, 64)}, ValueError, "query: expected 4 dimensions, got shape"),
    ({"query": last_dim_strided(2, 1, 4, 64)}, ValueError, "query: the last dimension must be"),
    ({"query": rows(2, 1, 4, 72)}, ValueError, "query: head_dim 72 is not a multiple of 16"),
    ({"query": rows(2, 1, 4, 80)}, ValueError, "query: head_dim 80, but the view's keys have"),
    ({"query": rows(2, 1, 3, 64)}, ValueError, "query: 3 heads are no multiple of the view's 2"),
    ({"query": rows(3, 1, 4, 64)}, ValueError, "query: batch 3, expected 2 sequences"),
    ({"view": None}, TypeError, "view: expected a CacheView, got NoneType"),
    ({"cu_seqlens_q": index([0, 1, 2], "cpu")}, ValueError, "query: expected 3 dimensions"),
    ({"query": rows(2, 4, 64), "cu_seqlens_q": index([0, 2], "cpu")}, ValueError, "cu_seqlens_q"),
    ({"seq_starts": index([0, 0, 0], "cpu")}, ValueError, "seq_starts: expected a contiguous"),
    ({"sinks": torch.zeros(4, dtype=BF16)}, TypeError, "sinks: expected torch.float32, got"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks: expected a contiguous vector of 4"),
    ({"alibi_slopes": torch.zeros(4).double()}, TypeError, "alibi_slopes: expected torch.float32"),
    ({"alibi_slopes": torch.zeros(8)[::2]}, ValueError, "alibi_slopes: expected a contiguous"),
    ({"sliding_window": 0}, ValueError, "sliding_window: expected a positive number, got 0"),
    ({"sliding_window": -4}, ValueError, "sliding_window: expected a positive number, got -4"),
    ({"sliding_window": 0.5}, ValueError, "sliding_window: expected"),
    ({"query": THREE, "cu_seqlens_q": index([0, 1, 4], "cpu")}, ValueError, "cu_seqlens_q"),
    ({"query": THREE, "cu_seqlens_q": index([2, 0, 3], "cpu")}, ValueError, "cu_seqlens_q"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive number"),
    ({"softcap": float("nan")}, ValueError, "softcap: expected a positive number, got nan"),
    ({"split_size": 0}, ValueError, "split_size: expected a positive multiple of 256, .* got 0"),
    ({"split_size": -256}, ValueError, "split_size: expected a positive multiple .* got -256"),
    ({"split_size": 300}, ValueError, "split_size: expected a positive multiple .* got 300"),
    ({"split_size": 2**30 + 256}, ValueError, "split_size: .*, at most 1073741824, got 1073742080"),
    ({"split_size": 256.0}, TypeError, "split_size: expected an integer, got 256.0"),
    ({"split_size": True}, TypeError, "split_size: expected an integer, got True"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale: expected a finite number"),
    ({"key": rows(2, 1, 2, 64)}, ValueError, "key, value: expected both or neither"),
    ({"value": rows(2, 1, 2, 80)}, ValueError, "key, value: expected both or neither"),
    ({"key": rows(2, 60, 2, 64), "value": rows(2, 60, 2, 80)}, CacheFullError, "seq_lens: "),
    ({"key": rows(2, 1, 2, 64), "value": rows(2, 1, 2, 96)}, ValueError, "value: head_dim 96, but"),
]  # fmt: skip

GATHER = [
    ({"view": 3}, TypeError, "view: expected a CacheView, got int"),
    ({"tokens": -1}, ValueError, "tokens: expected 0 to 64, got -1"),
    ({"tokens": 65}, ValueError, "tokens: expected 0 to 64, got 65"),
    ({"dtype": torch.float64}, TypeError, "dtype: expected float16, bfloat16 or float32, got"),
    (
        {"seq_starts": index([0], "cpu")},
        ValueError,
        "seq_starts: expected a contiguous vector of 2",
    ),
]

CASES = [
    pytest.param(name, *row, id=f"{name}-{'-'.join(row[0])}-{i}")
    for name, table in (("append_", APPEND), ("attention", ATTENTION), ("gather", GATHER))
    for i, row in enumerate([*table, *WHERE])
]


@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_error_names_the_argument_and_nothing_is_written(cache, name, change, error, message):
    arguments = good(name, cache)
    before, lens = snapshot(cache.view), arguments["seq_lens"].clone()
    with pytest.raises(error, match=message) as raised, kvquant.use_backend("reference"):
        getattr(kvquant, name)(**arguments | change)
    assert isinstance(error, tuple) or type(raised.value) is error
    assert_unchanged(cache.view, before)
    assert torch.equal(arguments["seq_lens"], lens)


@pytest.mark.parametrize("name", ["append_", "attention", "gather"])
def test_the_unchanged_arguments_are_good(cache, name):
    view = cache.view.replaced({key: x.clone() for key, x in cache.view.tensors.items()})
    getattr(kvquant, name)(**good(name, cache) | {"view": view})


def test_block_sizes_that_cannot_be_paged():
    with pytest.raises(ValueError, match="block_size: 20 is not a multiple of 16"):
        kvquant.CacheView.allocate(4, 2, 20, 64)
    view = kvquant.CacheView.allocate(4, 2, 48, 64)
    where = {"block_table": torch.zeros(1, 2, dtype=torch.int32), "seq_lens": index([1], "cpu")}
    with pytest.raises(ValueError, match="view: block_size 48, expected a multiple of 16"):
        kvquant.gather(view, **where)


def test_storage_on_another_device(cache):
    view = kvquant.CacheView.allocate(12, 2, 16, 64, 80, device="meta")
    for name in ("append_", "attention"):
        with pytest.raises(ValueError, match=r"(key|query): on cpu, but the view is on meta"):
            getattr(kvquant, name)(**good(name, cache) | {"view": view})


def test_cache_full_is_a_value_error_and_writes_nothing():
    assert issubclass(CacheFullError, ValueError)
    full = filled_cache([32], block=16)
    before = snapshot(full.view)
    for advance in (False, True):
        with pytest.raises(CacheFullError, match=r"seq_lens: \[33\] tokens, but .* 32"):
            full.append([rows(1, 2, 64)], [rows(1, 2, 64)], advance=advance)
    assert_unchanged(full.view, before)
    assert full.lengths == [32]


def test_slots_without_a_mean_need_no_table():
    cache = empty_cache([16], fmt=FORMATS["plain"])
    kvquant.append_(rows(3, 2, 64), rows(3, 2, 64), cache.view, slot_mapping=torch.arange(3))


# Plain tensors.

X = torch.randn(1, 2, 8, 32)
Q, SCALE, ZERO = torch.zeros(1, 2, 8, 32, dtype=torch.uint8), *torch.ones(2, 1, 2, 8, 1)
PLAIN = [
    ("quantize_cache_v", (X.long(),), {}, TypeError, "x: expected float16, bfloat16 or float32"),
    ("quantize_cache_v", (X[0],), {}, ValueError, "x: expected 4 dimensions, got shape"),
    ("quantize_cache_v", (X.mT,), {}, ValueError, "x: the last dimension must be contiguous"),
    ("quantize_cache_v", (X, 9), {}, ValueError, "bits: expected 1 to 8, got 9"),
    ("quantize_cache_v", (X, 0), {}, ValueError, "bits: expected 1 to 8, got 0"),
    ("quantize_cache_v", (X, 8.0), {}, TypeError, "bits: expected an integer, got 8.0"),
    ("quantize_cache_v", (X, 8, 256), {}, ValueError, "qmin, qmax: expected .* got 0 and 256"),
    ("quantize_cache_v", (X, 8, 5, 5), {}, ValueError, "qmin, qmax: expected .* got 5 and 5"),
    ("quantize_cache_v", (X, 8, 5, -1), {}, ValueError, "qmin, qmax: expected .* got -1 and 5"),
    ("quantize_cache_v", (X,), {"granularity": "row"}, ValueError, "granularity: expected 'token'"),
    ("quantize_cache_v", (X,), {"group_size": 8}, ValueError, "group_size: only for 'channel'"),
    ("quantize_cache_v", (X,), {"granularity": "channel", "group_size": 0}, ValueError,
     "group_size: expected a positive number"),
    ("dequantize_cache_torch", (Q.int(), SCALE, ZERO), {}, TypeError, "q: expected torch.uint8"),
    ("dequantize_cache_torch", (Q[0], SCALE, ZERO), {}, ValueError, "q: expected .batch, heads"),
    ("dequantize_cache_torch", (Q.mT, SCALE, ZERO), {}, ValueError, "q: expected .batch, heads"),
    ("dequantize_cache_torch", (Q, SCALE.int(), ZERO), {}, TypeError, "scale: expected float16"),
    ("dequantize_cache_torch", (Q, SCALE, ZERO.to(META)), {}, ValueError, "zero: on meta, but q"),
    ("dequantize_cache_torch", (Q, SCALE[:, :, :3], ZERO), {}, ValueError, "scale, zero: expected"),
    ("dequantize_cache_torch", (Q, SCALE, ZERO, torch.int8), {}, TypeError, "dtype: expected"),
    ("dequantize_cache_torch", (Q, X, X), {"group_size": 3}, ValueError, "scale, zero: expected"),
    ("qk_matmul", (X, Q.int(), SCALE, ZERO), {}, TypeError, "qk: expected torch.uint8"),
    ("qk_matmul", (X.long(), Q, SCALE, ZERO), {}, TypeError, "query: expected float16"),
    ("qk_matmul", (X[..., :16], Q, SCALE, ZERO), {}, ValueError, "query: expected shape .1, a mul"),
    ("qk_matmul", (X[:, :1], Q, SCALE, ZERO), {}, ValueError, "query: expected shape .1, a multip"),
    ("qk_matmul", (X.mT, Q, SCALE, ZERO), {}, ValueError, "query: the last dimension must be"),
    ("pv_matmul", (X, Q, SCALE, ZERO), {}, ValueError, "probs: expected shape .1, a multiple of"),
    ("pv_matmul", (X[..., :8], Q[0], SCALE, ZERO), {}, ValueError, "qv: expected .batch, heads"),
    ("pv_matmul", (X[..., :8].to(META), Q, SCALE, ZERO), {}, ValueError, "probs: on meta, but"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "message"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(PLAIN)],
)
def test_plain_error_names_the_argument(name, arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        getattr(kvquant, name)(*arguments, **options)
    assert type(raised.value) is error
