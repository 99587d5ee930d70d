"""Calls at the edges of what is allowed: served or refused by name, never a crash or a leftover."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import kvquant
from kvquant import CacheView, QuantizedKVCache
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
