"""Calls at the edges of what is allowed: served or refused by name, never a crash or a leftover."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import kvquant
from kvquant import CacheFullError, CacheView, QuantizedKVCache
from modelled import LAYERS, Rows, Unchanged, append_dense, assert_same, make, rows
from support import (
    BF16,
    FORMATS,
    FP32,
    assert_unchanged,
    empty_cache,
    filled_cache,
    index,
    snapshot,
)


def run_in_child(code: str, device: str) -> str:
    """What a program printed; a crash fails the test, not the run."""
    done = subprocess.run(
        [sys.executable, "-c", f"device = {device!r}\n" + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize(("k_dim", "v_dim"), [(272, 64), (64, 272)])
def test_rows_wider_than_the_kernels_are_gathered(native, k_dim, v_dim):
    code = f"""
        import torch, kvquant
        view = kvquant.CacheView.allocate(2, 2, 32, {k_dim}, {v_dim}, device=device)
        table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
        lens = torch.zeros(2, dtype=torch.int32, device=device)
        key, value = (torch.randn(2, 9, 2, n, device=device) for n in ({k_dim}, {v_dim}))
        where = dict(block_table=table, seq_lens=lens)
        kvquant.append_(key, value, view, **where, advance=True)
        for x, y in zip(kvquant.gather(view, **where, tokens=9), (key, value)):
            assert (x - y).abs().max() < 0.05
        print("gathered")
    """
    assert run_in_child(code, native) == "gathered\n"


BAD_CALLS = {
    "max_seqlen_q of dense queries": (
        "kvquant.attention(query, view, **where, max_seqlen_q=64)", "max_seqlen_q: only with"),
    "a small max_seqlen_q of dense queries": (
        "kvquant.attention(query, view, **where, max_seqlen_q=1)", "max_seqlen_q: only with"),
    "max_seqlen of dense keys": (
        "kvquant.append_(key, key, view, **where, max_seqlen=4000)", "max_seqlen: only with"),
    "a small max_seqlen of dense keys": (
        "kvquant.append_(key, key, view, **where, max_seqlen=1)", "max_seqlen: only with"),
    "offsets with slots alone": (
        "kvquant.append_(key[0], key[0], view, slot_mapping=slots, cu_seqlens=offsets)",
        "cu_seqlens: only with a block_table"),
    "max_seqlen with slots alone": (
        "kvquant.append_(key[0], key[0], view, slot_mapping=slots, max_seqlen=90)",
        "max_seqlen: only with a block_table"),
    "a table without lengths": (
        "kvquant.append_(key[0], key[0], view, slot_mapping=slots, block_table=table)",
        "block_table, seq_lens: needed"),
    "lengths without a table": (
        "kvquant.append_(key[0], key[0], view, slot_mapping=slots, seq_lens=lens)",
        "block_table, seq_lens: needed"),
    "a value elsewhere": (
        "kvquant.append_(key, key.to('meta'), view, **where)", "value: on meta, but key on"),
    "a flag that is none": (
        "kvquant.attention(query, view, **where, key=key, value=key, causal='x')",
        "causal: expected True or False, got 'x'"),
    "a softcap beyond float32": (
        "kvquant.attention(query, view, **where, key=key, value=key, softcap=1e39)",
        "softcap: expected a positive number within float32"),
    "a scale beyond float32": (
        "kvquant.attention(query, view, **where, softmax_scale=1e39)",
        "softmax_scale: expected a finite number within float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_before_anything_is_written(native, case):
    call, message = BAD_CALLS[case]
    code = f"""
        import torch, kvquant
        fmt = kvquant.CacheFormat.plain()
        view = kvquant.CacheView.allocate(4, 2, 16, 64, format=fmt, device=device)
        for tensor in view.tensors.values():
            tensor.fill_(1)
        table = torch.arange(4, dtype=torch.int32, device=device).view(1, 4)
        lens = torch.full((1,), 20, dtype=torch.int32, device=device)
        where = dict(block_table=table, seq_lens=lens)
        key = torch.randn(1, 5, 2, 64, device=device)
        query = torch.randn(1, 5, 4, 64, device=device)
        slots = torch.arange(5, device=device)
        offsets = torch.tensor([0, 90], dtype=torch.int32, device=device)
        try:
            {call}
        except (TypeError, ValueError) as error:
            print(error)
        else:
            print("served")
        assert all((tensor == 1).all() for tensor in view.tensors.values()), "written"
        assert lens.item() == 20
    """
    assert run_in_child(code, native).startswith(message)


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
def test_rows_of_no_sequence_are_zero(backend, device, sinks):
    cache = filled_cache([20, 7], block=16, device=device)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    options = {"sinks": torch.ones(4, device=device)} if sinks else {}
    query = torch.randn(9, 4, 64, device=device, dtype=BF16)
    torch.full((1 << 16,), torch.nan, device=device)  # what an allocator may hand out again
    out, lse = kvquant.attention(
        query, cache.view, **where, **options, return_lse=True,
        cu_seqlens_q=index([2, 5, 6], device),
    )  # fmt: skip
    outside = [0, 1, 6, 7, 8]
    assert not out[outside].any()
    assert lse[outside].isneginf().all()
    assert out[2:6].any(-1).all()
    assert lse[2:6].isfinite().all()
    empty = CacheView.allocate(0, 2, 16, 64, device=device)
    where = {"block_table": cache.table[:, :0], "seq_lens": torch.zeros_like(cache.lens)}
    out, lse = kvquant.attention(
        query, empty, **where, **options, return_lse=True, cu_seqlens_q=index([2, 5, 6], device)
    )
    assert not out.any()
    assert lse[outside].isneginf().all()
    assert (lse[2:6] == (1 if sinks else -torch.inf)).all()


@pytest.mark.gpu
def test_contents_on_the_device_lead_nowhere(cuda):
    """Offsets, lengths, slots and blocks may hold anything there."""
    cache = filled_cache([20, 7], block=16, device=cuda)
    before = snapshot(cache.view)
    query = torch.randn(9, 4, 64, device=cuda, dtype=BF16)
    key = torch.randn(9, 2, 64, device=cuda, dtype=BF16)
    for offsets in ([-9, 4, 2**30], [2**31 - 1, 0, -(2**31)], [8, 9, 400]):
        for lens in ([2**31 - 1, -(2**31)], [400, -1]):
            where = {"block_table": cache.table + 900, "seq_lens": index(lens, cuda)}
            kvquant.append_(key, key, cache.view, **where, cu_seqlens=index(offsets, cuda))
            kvquant.attention(query, cache.view, **where, cu_seqlens_q=index(offsets, cuda))
    torch.cuda.synchronize()
    assert_unchanged(cache.view, before)


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


@pytest.mark.parametrize("fmt", ["default", "rotated"])
def test_a_rotated_channel_beyond_float16_is_clamped(backend, device, fmt):
    cache = empty_cache([32], fmt=FORMATS[fmt], device=device)
    row = torch.full((1, 20, 2, 64), 60_000.0, device=device)  # the first channel: 480,000
    row[0, 3, 1, 5] = 65_505.0
    kvquant.append_(
        row, row, cache.view, block_table=cache.table, seq_lens=cache.lens, advance=True
    )
    lens = cache.lens
    key, value = kvquant.gather(cache.view, block_table=cache.table, seq_lens=lens, tokens=20)
    for x in (key, value) if FORMATS[fmt].value_rotation else (key,):
        assert x[0, 3, 1].isnan().all()
        x[0, 3, 1] = 0
        assert x.isfinite().all()
        assert x[0, 7].abs().max() > 8000


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


def test_bad_makings():
    for options, error, message in (
        ({"key_mean": 2**31}, ValueError, "key_mean: expected None or a power of two"),
        ({"key_mean": 64.0}, TypeError, "key_mean: expected an integer, got 64.0"),
        ({"key_rotation": "no"}, TypeError, "key_rotation: expected True or False, got 'no'"),
        ({"key": 8}, TypeError, "key: expected the name of a row format, got 8"),
    ):
        with pytest.raises(error, match=message):
            kvquant.CacheFormat(**options)
    for options, error, message in (
        ({"device": "meta"}, ValueError, "device: expected one that holds data, got meta"),
        ({"device": "nowhere"}, ValueError, "device: 'nowhere' is no device to be used here"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected a positive number, got 0"),
        ({"num_layers": 2.0}, TypeError, "num_layers: expected an integer, got 2.0"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float16"),
    ):
        arguments = {"num_layers": 1, "batch_size": 1, "num_kv_heads": 1, "head_dim": 64}
        with pytest.raises(error, match=message):
            QuantizedKVCache(**arguments | options)
    with pytest.raises(ValueError, match="kv_heads: expected a positive number, got 0"):
        CacheView.allocate(1, 0, 16, 64)
    q, pair = torch.zeros(1, 0, 4, 16, dtype=torch.uint8), torch.ones(1, 0, 4, 1)
    with pytest.raises(ValueError, match="qk: expected a head at least"):
        kvquant.qk_matmul(torch.randn(1, 4, 1, 16), q, pair, pair)


def test_numbers_of_numpy_are_numbers():
    cache = make("contiguous")
    append_dense([cache], None, 20)
    cache.reorder(np.array([2, 1, 0]))
    cache.crop(np.int64(12))
    cache.reserve(np.int32(30))
    query = torch.randn(3, 1, 4, 32)
    out = cache.attend(0, query, softmax_scale=np.float32(0.1), sliding_window=np.int64(9))
    assert torch.equal(out, cache.attend(0, query, softmax_scale=0.1, sliding_window=9))


def test_the_default_dtype_changes_nothing(backend):
    def outputs() -> list[torch.Tensor]:
        torch.manual_seed(1)
        cache = QuantizedKVCache(1, 2, 2, 64, dtype=FP32)
        x = torch.randn(2, 9, 2, 64, dtype=FP32)
        cache.append(0, x, x)
        q, scale, zero = kvquant.quantize_cache_v(x)
        return [
            *cache.attend(0, torch.randn(2, 1, 4, 64, dtype=FP32), return_lse=True),
            *cache.dequantize(0), q, scale, zero,
            kvquant.pv_matmul(torch.ones(2, 9, 3, 2, dtype=FP32), q, scale, zero),
            kvquant.quantize_cache_v(x[:, :0])[1],
        ]  # fmt: skip

    expected = outputs()
    try:
        torch.set_default_dtype(torch.float64)
        got = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_meta_tensors_have_shapes():
    x = torch.empty(1, 2, 8, 32, device="meta")
    q, scale, _ = kvquant.quantize_cache_v(x)
    assert (q.shape, scale.shape, q.device.type) == (x.shape, (1, 2, 8, 1), "meta")


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


def test_numbers_that_change_compile_whole(backend, device):
    torch._dynamo.reset()
    cache = filled_cache([40, 7], block=16, device=device)
    query = torch.randn(9, 4, 64, device=device, dtype=BF16)
    offsets = index([0, 4, 9], device)

    def attend(most: int) -> torch.Tensor:
        return kvquant.attention(
            query, cache.view, block_table=cache.table, seq_lens=cache.lens,
            cu_seqlens_q=offsets, max_seqlen_q=most,
        )  # fmt: skip

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for most in (5, 6, 9):
        assert torch.equal(compiled(most), attend(most))
