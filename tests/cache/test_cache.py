"""The cache object: appending, attending, and errors that leave it as it was."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import kvquant
from kvquant import CacheFormat, use_backend
from modelled import (
    DIM,
    HEADS,
    KINDS,
    LAYERS,
    V_DIM,
    Rows,
    append_dense,
    append_ragged,
    assert_rows,
    assert_same,
    attend_all,
    make,
    row_error,
    rows,
)

FIXED = ["contiguous", "paged16", "paged64"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def queries(batch: int, tokens: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(batch, tokens, 2 * HEADS, DIM, device=device)


def test_a_new_cache_is_empty(kind, device):
    cache = make(kind, device=device)
    assert cache.max_length == 0
    assert cache.seq_lens.tolist() == [0, 0, 0]
    assert cache.seq_lens.dtype == torch.int32
    assert cache.nbytes > 0
    assert "3 sequences" in repr(cache)
    key, value = cache.dequantize(0)
    assert key.shape == (3, 0, HEADS, DIM)
    assert value.shape == (3, 0, HEADS, V_DIM)
    out = cache.attend(1, queries(3, 1, device))
    assert not out.any()


def test_capacity():
    assert make("contiguous", max_seq_len=100).capacity == 112
    assert make("paged64", max_seq_len=100).capacity == 128
    assert make("paged-pool").capacity == 6400
    assert make("growing").capacity is None
    assert make("paged-growing").capacity is None


def test_appends_and_growth(kind, device):
    cache, model = make(kind, device=device), Rows(3)
    for tokens in (17, 1, 1, 300, 2, 15):
        append_dense([cache], model, tokens)
    append_ragged([cache], model, [0, 5, 33])
    append_ragged([cache], model, [1, 0, 0])
    append_dense([cache], model, 1)
    model.check(cache)


def test_every_kind_holds_the_same_bits(device):
    caches = [make(kind, device=device) for kind in KINDS]
    for tokens in (70, 1, 200):
        append_dense(caches, None, tokens)
    append_ragged(caches, None, [3, 0, 41])
    query = queries(3, 2, device)
    out = attend_all(caches[0], query, sliding_window=90, return_lse=False)
    for cache in caches[1:]:
        assert_same(cache, caches[0])
        torch.testing.assert_close(attend_all(cache, query, sliding_window=90), out)


@pytest.mark.parametrize("fmt", [CacheFormat(), CacheFormat.plain()], ids=["default", "plain"])
def test_attend_is_attention_on_the_storage(kind, device, fmt):
    cache = make(kind, device=device, format=fmt)
    append_dense([cache], None, 40)
    query, (key, value) = queries(3, 4, device), rows(3, 4, device=device)
    sinks = torch.randn(2 * HEADS, device=device)
    slopes = torch.rand(2 * HEADS, device=device)
    options = {"softcap": 9.0, "sliding_window": 20, "sinks": sinks, "alibi_slopes": slopes}
    out, lse = cache.attend(1, query, key, value, return_lse=True, softmax_scale=0.3, **options)
    expected, expected_lse = kvquant.attention(
        query,
        cache.layer(1)[0],
        block_table=cache.block_table,
        seq_lens=cache.seq_lens_of(1),
        softmax_scale=0.3,
        return_lse=True,
        **options,
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert cache.seq_lens_of(1).tolist() == [44] * 3
    assert cache.max_length_of(0) == 40


def test_packed_attend_equals_a_sequence_alone(device):
    cache, counts = make("paged16", device=device), [3, 0, 20]
    append_ragged([cache], None, [30, 10, 0])
    alone = [deepcopy(cache) for _ in counts]
    cu = torch.tensor([0, 3, 3, 23], dtype=torch.int32)
    query, (key, value) = queries(1, 23, device)[0], rows(23, device=device)
    out = cache.attend(0, query, key, value, cu_seqlens_q=cu)  # cu on the host: exact bounds
    assert cache.max_length_of(0) == 33
    assert cache.seq_lens.tolist() == [33, 10, 20]
    for b, (other, n) in enumerate(zip(alone, counts, strict=True)):
        other.select([b])
        at = slice(int(cu[b]), int(cu[b + 1]))
        if n:
            own = other.attend(
                0, query[at][None], key[at][None], value[at][None], exact_prompt=False
            )
            torch.testing.assert_close(out[at], own[0])


def test_padding_is_never_seen(device):
    padded = make("contiguous", batch=2, device=device, format=CacheFormat.plain())
    padded.set_seq_starts(torch.tensor([7, 0], dtype=torch.int32, device=device))
    key, value = rows(2, 30, device=device)
    query = queries(2, 30, device)
    out = padded.attend(0, query, key, value)
    alone = make("contiguous", batch=1, device=device, format=CacheFormat.plain())
    own = alone.attend(0, query[:1, 7:], key[:1, 7:], value[:1, 7:], exact_prompt=False)
    torch.testing.assert_close(out[:1, 7:], own)
    assert not out[0, :7].any()
    padded.reset()
    assert padded.seq_starts is None


def test_the_first_prompt_sees_exact_rows(kind, device):
    cache = make(kind, device=device)
    query, (key, value) = queries(3, 50, device), rows(3, 50, device=device)
    out = cache.attend(0, query, key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2).repeat_interleave(2, 1),
        value.transpose(1, 2).repeat_interleave(2, 1),
        is_causal=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    quantized = cache.attend(1, query, key, value, exact_prompt=False)
    assert not torch.allclose(quantized, exact, atol=1e-5)
    fewest = min(rows_of.bits for rows_of in cache.formats[1].rows)
    assert (quantized - exact).norm() <= row_error(fewest) * exact.norm()
    assert cache.seq_lens_of(0).tolist() == cache.seq_lens_of(1).tolist() == [50] * 3
    later = cache.attend(0, query, key, value)  # not empty any more
    assert later.shape == out.shape
    for _ in range(2):  # of calls that are known by now
        cache.reset()
        assert torch.equal(cache.attend(0, query, key, value), out)
        assert torch.equal(cache.attend(0, query, key, value), later)
        assert torch.equal(cache.attend(1, query, key, value, exact_prompt=False), quantized)
        cache.reset()
        assert torch.equal(cache.attend(1, query, key, value), out)
        assert not torch.allclose(cache.attend(0, query, key, value, exact_prompt=False), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_strides(dtype, device):
    cache = make("contiguous", device=device, dtype=dtype)
    key, value = (x.to(dtype).transpose(1, 2).contiguous() for x in rows(3, 20, device=device))
    query = queries(3, 20, device).to(dtype)
    out = cache.attend(0, query, key.transpose(1, 2), value.transpose(1, 2))
    assert out.dtype == dtype
    assert out.shape == (3, 20, 2 * HEADS, V_DIM)
    assert cache.dequantize(0)[0].dtype == dtype
    assert_rows(cache.dequantize(0)[0], key.transpose(1, 2), cache.formats[0].rows[0].bits)


def test_tokens_that_come_one_by_one(device):
    """A plain format knows no difference between one append and many."""
    once, steps = (make("paged16", device=device, format=CacheFormat.plain()) for _ in range(2))
    key, value = rows(3, 40, device=device)
    for layer in range(LAYERS):
        once.append(layer, key, value)
        for i in range(40):
            steps.append(layer, key[:, i : i + 1], value[:, i : i + 1])
    assert_same(once, steps)


def test_what_inference_mode_made_is_written_outside(kind, device):
    with use_backend("reference"), torch.inference_mode():
        cache, model = make(kind, device=device), Rows(3)
        append_dense([cache], model, 20)
        cache.set_seq_starts(torch.zeros(3, dtype=torch.int32, device=device))
        append_dense([cache], model, 300)
    with use_backend("reference"):
        cache.set_seq_starts(torch.zeros(3, dtype=torch.int32, device=device))
        append_dense([cache], model, 7)
        cache.crop(-2)
        model.crop(-2)
        cache.reorder([1, 1, 0])
        model.select([1, 1, 0])
        append_dense([cache], model, 7)
        model.check(cache)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["contiguous", "paged16", "growing", "paged-growing"])
def test_decode_steps_replay_in_a_graph(kind, cuda):
    cache, eager = make(kind, device=cuda), make(kind, device=cuda)
    append_dense([cache, eager], None, 20)
    cache.reserve(200)
    query, (key, value) = queries(3, 1, cuda), rows(3, 1, device=cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # warm up, then take it back
            cache.attend(0, query, key, value)
    torch.cuda.synchronize()
    cache.crop(20)
    cache.reserve(200)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(0, query, key, value)
    for _ in range(150):
        for x in (query, key, value):
            x.normal_()
        graph.replay()
        torch.testing.assert_close(out, eager.attend(0, query, key, value))
    cache.sync_lengths()
    assert cache.max_length == 170
    torch.testing.assert_close(cache.dequantize(0), eager.dequantize(0))
    if kind != "contiguous":  # which has no more to make room with
        more = rows(3, 200, device=cuda)
        with (  # noqa: PT012  a captured graph must not be empty
            pytest.raises(RuntimeError, match="call reserve"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            more[0].neg_()
            cache.append(0, *more)
