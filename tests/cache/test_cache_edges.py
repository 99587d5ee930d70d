"""A cache at the edges of what is allowed: served or refused by name, never half changed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from kvquant import CacheFullError, CacheView, QuantizedKVCache
from modelled import LAYERS, Rows, Unchanged, append_dense, assert_same, make, rows


@pytest.mark.parametrize("kind", ["contiguous", "growing", "paged16", "paged-pool"])
def test_pickled_and_copied_caches_are_whole(kind, device):
    cache, model = make(kind, device=device, max_seq_len=None if "grow" in kind else 300), Rows(3)
    append_dense([cache], model, 40)
    cache.reorder([1, 1, 0])
    model.select([1, 1, 0])
    for twin in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache), copy.copy(cache)):
        follows = model.fork()
        assert_same(twin, cache)
        assert (twin.device, twin.capacity) == (cache.device, cache.capacity)
        append_dense([twin], follows, 3)
        twin.crop(-1)
        follows.crop(-1)
        assert twin.seq_lens_of(1).tolist() == twin._state.lengths.seq_lens[1].tolist() == [42] * 3
        follows.check(twin)
    model.check(cache)


def test_crop_takes_the_number_not_the_tensor():
    cache = make("contiguous")
    append_dense([cache], None, 30)
    length = torch.tensor(10)
    cache.crop(length)
    length.fill_(25)
    assert type(cache.max_length) is int
    assert cache.max_length == 10
    assert cache.seq_lens.tolist() == [10] * 3


@pytest.mark.parametrize("by", ["append", "reserve"])
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_growth_that_failed_asks_for_less_the_next_time(monkeypatch, fails_at, by):
    cache, model = make("paged-growing", batch=2), Rows(2)
    append_dense([cache], model, 20)
    allocate, asked, limit = CacheView.allocate, [], 40
    begun = []

    def bounded(num_blocks, *args, **kwargs):
        asked.append(num_blocks)
        if num_blocks > limit:
            begun.append(num_blocks)
            if len(begun) > fails_at:
                raise MemoryError("none left")
        return allocate(num_blocks, *args, **kwargs)

    monkeypatch.setattr(CacheView, "allocate", bounded)

    def grow() -> None:
        if by == "reserve":
            cache.reserve(5000)
        else:
            for layer in range(LAYERS):
                cache.append(layer, *rows(2, 5000))

    with pytest.raises(MemoryError):
        grow()
    cache.crop(20)
    asked.clear()
    append_dense([cache], model, 60)
    assert all(blocks <= limit for blocks in asked)
    model.check(cache)


def test_a_layer_left_behind_grows_by_its_own_tokens(monkeypatch):
    cache = make("paged-growing", batch=1)
    cache.append(0, *rows(1, 3000))
    allocate, asked = CacheView.allocate, []

    def counted(num_blocks, *args, **kwargs):
        asked.append(num_blocks)
        return allocate(num_blocks, *args, **kwargs)

    monkeypatch.setattr(CacheView, "allocate", counted)
    cache.append(1, *rows(1, 3))
    assert sum(asked) <= 2


def test_a_cache_made_for_inference_works_outside(tmp_path):
    with torch.inference_mode():
        cache = make("paged16")
        append_dense([cache], None, 20)
        cache.set_seq_starts(torch.tensor([1, 0, 2], dtype=torch.int32))
        cache.save(tmp_path / "cache")
        loaded = QuantizedKVCache.load(tmp_path / "cache")
        copies = [loaded, pickle.loads(pickle.dumps(cache)), cache.fork()]
        other = make("contiguous")
        other.load_state_dict(cache.state_dict())
    for one in (*copies, other):
        one.reorder([2, 0, 0])
        append_dense([one], None, 3)
        one.crop(-1)
        assert one.seq_starts.tolist() == [2, 1, 1]
        assert one.seq_lens.tolist() == [22] * 3


def test_a_saved_cache_with_shared_blocks_loads(tmp_path):
    cache = make("paged16", num_blocks=14, max_seq_len=64)  # three sequences of 60 need 12
    append_dense([cache], None, 60)
    many = make("paged16", num_blocks=6, max_seq_len=64, batch=1)
    append_dense([many], None, 60)
    many.repeat_interleave(5)
    for one in (cache, many):
        one.save(tmp_path / "cache")
        assert_same(QuantizedKVCache.load(tmp_path / "cache"), one)
        assert_same(pickle.loads(pickle.dumps(one)), one)


def test_a_file_reserves_nothing_on_its_own_word(tmp_path):
    cache = QuantizedKVCache(2, 1, 2, 64, max_seq_len=30_000)
    append_dense_rows = torch.randn(1, 5, 2, 64)
    for layer in range(2):
        cache.append(layer, append_dense_rows, append_dense_rows)
    cache.save(tmp_path / "cache")
    loaded = QuantizedKVCache.load(tmp_path / "cache")
    assert loaded.nbytes < cache.nbytes / 1000
    assert loaded.capacity == cache.capacity
    at_once = QuantizedKVCache.load(tmp_path / "cache", max_seq_len=1000)
    assert at_once.capacity == 1008
    assert at_once.layer(0)[0].block_size == 1008
    with pytest.raises(CacheFullError, match="key: layer 0 would hold 30001"):
        loaded.append(0, *torch.randn(2, 1, 29_996, 2, 64))
    loaded.append(0, *torch.randn(2, 1, 29_995, 2, 64))
    assert loaded.layer(0)[0].block_size == 30_000
    with pytest.raises(TypeError, match="max_seq_len: expected an integer, got 'much'"):
        QuantizedKVCache.load(tmp_path / "cache", max_seq_len="much")
    with pytest.raises(ValueError, match="max_seq_len: expected a positive number, got 0"):
        QuantizedKVCache.load(tmp_path / "cache", max_seq_len=0)


def test_blocks_too_large_for_a_file_are_refused(tmp_path):
    cache = QuantizedKVCache(1, 1, 4, 256, block_size=2**17, num_blocks=1)
    row = torch.randn(1, 1, 4, 256)
    cache.append(0, row, row)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="block_size: blocks of 131072 tokens would take"):
        QuantizedKVCache.load(tmp_path / "cache")
    smaller = QuantizedKVCache.load(tmp_path / "cache", block_size=256)
    assert torch.equal(smaller.dequantize(0)[0], cache.dequantize(0)[0])


BAD_TYPES = [
    (lambda c: c.crop(float("nan")), TypeError, "max_length: expected an integer, got nan"),
    (lambda c: c.crop("3"), TypeError, "max_length: expected an integer, got '3'"),
    (lambda c: c.crop(True), TypeError, "max_length: expected an integer, got True"),
    (lambda c: c.reserve(2.0), TypeError, "tokens: expected an integer, got 2.0"),
    (lambda c: c.reorder([0, 1, 1.5]), TypeError, "indices: expected an integer, got 1.5"),
    (lambda c: c.select(7), TypeError, "indices: expected integers, got int"),
    (lambda c: c.seq_lens_of("0"), TypeError, "layer: expected an integer, got '0'"),
    (lambda c: c.layer(2), ValueError, "layer: expected 0 to 1, got 2"),
    (lambda c: c.attend(0, torch.randn(3, 1, 4, 32), causal="x"), TypeError, "causal: expected"),
    (lambda c: c.attend(0, torch.randn(3, 1, 4, 32), exact_prompt=1), TypeError, "exact_prompt: "),
    (lambda c: c.attend(0, torch.randn(3, 1, 4, 32), max_seqlen_q=4), ValueError,
     "max_seqlen_q: only with cu_seqlens_q, got 4"),
    (lambda c: c.append(0, *rows(3, 1), max_seqlen=4), ValueError, "max_seqlen: only with"),
    (lambda c: c.attend(0, torch.randn(3, 1, 4, 32).to_sparse()), TypeError,
     "query: expected a dense tensor, got one of layout torch.sparse_coo"),
    (lambda c: c.attend(0, torch.randn(3, 1, 4, 32), softcap=torch.ones(3)), TypeError,
     "softcap: expected a number, got Tensor"),
    (lambda c: c.load_state_dict([1]), TypeError, "state: expected a mapping of tensors, got list"),
    (lambda c: c.load_state_dict({}), ValueError, "state: format: missing"),
    (lambda c: c.dequantize(0, "half"), TypeError, "dtype: expected float16, bfloat16 or float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD_TYPES)))
def test_bad_types_change_nothing(case):
    call, error, message = BAD_TYPES[case]
    cache = make("paged16")
    append_dense([cache], None, 20)
    cache.attend(0, torch.randn(3, 1, 4, 32), *rows(3, 1))
    cache.attend(1, torch.randn(3, 1, 4, 32), *rows(3, 1))
    with Unchanged(cache), pytest.raises(error, match=message) as raised:
        call(cache)
    assert type(raised.value) is error


def test_numbers_of_numpy_are_numbers():
    cache = make("contiguous")
    append_dense([cache], None, 20)
    cache.reorder(np.array([2, 1, 0]))
    cache.crop(np.int64(12))
    cache.reserve(np.int32(30))
    query = torch.randn(3, 1, 4, 32)
    out = cache.attend(0, query, softmax_scale=np.float32(0.1), sliding_window=np.int64(9))
    assert torch.equal(out, cache.attend(0, query, softmax_scale=0.1, sliding_window=9))


def test_sizes_given_to_load_are_kept_or_refused(tmp_path):
    cache = make("paged16", batch=2, num_blocks=8, max_seq_len=None)
    append_dense([cache], None, 40)
    cache.save(tmp_path / "cache")
    with pytest.raises(CacheFullError, match="num_blocks: the stored tokens take 6 blocks, got 3"):
        QuantizedKVCache.load(tmp_path / "cache", num_blocks=3)
    with pytest.raises(
        CacheFullError, match="max_seq_len: 40 tokens are stored, but it would take"
    ):
        QuantizedKVCache.load(tmp_path / "cache", max_seq_len=16)
    wider = QuantizedKVCache.load(tmp_path / "cache", block_size=32)
    assert (wider.capacity, wider.block_size) == (cache.capacity, 32)
    assert QuantizedKVCache.load(tmp_path / "cache", num_blocks=9).capacity == 9 * 16


def test_a_state_with_a_history_leaves_none():
    cache, other = make("contiguous"), make("contiguous")
    append_dense([cache], None, 20)
    state = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in cache.state_dict().items()
    }
    with torch.enable_grad():
        other.load_state_dict(state)
    assert not other.layer(0)[0].k.params.requires_grad
    state["layers.0.k_params"] = state["layers.0.k_params"].detach().to("meta")
    with (
        Unchanged(other),
        pytest.raises(ValueError, match=r"state: layers\.0\.k_params: expected data"),
    ):
        other.load_state_dict(state)
