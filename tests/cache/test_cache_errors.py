"""A call that fails changes nothing: bad arguments, no room, no memory."""

from __future__ import annotations

import pytest
import torch

from kvquant import CacheFormat, CacheFullError, CacheView, QuantizedKVCache, use_backend
from kvquant.backends import reference
from modelled import (
    DIM,
    HEADS,
    KINDS,
    V_DIM,
    Unchanged,
    append_dense,
    assert_same,
    make,
    rows,
)

K = torch.randn(3, 2, HEADS, DIM)
V = torch.randn(3, 2, HEADS, V_DIM)
Q = torch.randn(3, 2, 2 * HEADS, DIM)
CU = torch.tensor([0, 1, 2, 4], dtype=torch.int32)
BAD_APPENDS = {
    "not a tensor": (TypeError, "key: expected a tensor", ([1.0], V), {}),
    "dtype": (TypeError, "key: expected float16", (K.long(), V), {}),
    "dims": (ValueError, "key: expected 4 dimensions", (K[0], V[0]), {}),
    "packed dims": (ValueError, "key: expected 3 dimensions", (K, V), {"cu_seqlens": CU}),
    "batch": (ValueError, "key: batch 2, expected 3 sequences", (K[:2], V[:2]), {}),
    "heads": (ValueError, "key: 1 heads", (K[:, :, :1], V[:, :, :1]), {}),
    "head_dim": (ValueError, "head_dim 16, but the view's keys have 32", (K[..., :16], V), {}),
    "value's head_dim": (ValueError, "value: head_dim 32", (K, K), {}),
    "value's tokens": (ValueError, "value: expected key's", (K, V[:, :1]), {}),
    "value's dtype": (ValueError, "value: expected key's", (K, V.half()), {}),
    "stride": (
        ValueError,
        "key: the last dimension must be contiguous",
        (K.mT.contiguous().mT, V),
        {},
    ),
    "grad": (ValueError, "key: requires grad", (K.clone().requires_grad_(), V), {}),
    "cu dtype": (
        TypeError,
        "cu_seqlens: expected torch.int32",
        (K[0].repeat(2, 1, 1), V[0].repeat(2, 1, 1)),
        {"cu_seqlens": CU.long()},
    ),
    "cu length": (ValueError, "cu_seqlens: expected a", (K[0], V[0]), {"cu_seqlens": CU[:2]}),
    "cu past the rows": (ValueError, "cu_seqlens: expected offs", (K[0], V[0]), {"cu_seqlens": CU}),
    "max_seqlen": (
        ValueError,
        "max_seqlen: 1, but",
        (K[:2].flatten(0, 1), V[:2].flatten(0, 1)),
        {"cu_seqlens": CU, "max_seqlen": 1},
    ),
}


@pytest.mark.parametrize("case", BAD_APPENDS)
@pytest.mark.parametrize("kind", ["contiguous", "paged16"])
def test_bad_appends(kind, case):
    error, message, arguments, options = BAD_APPENDS[case]
    cache = make(kind)
    append_dense([cache], None, 20)
    with Unchanged(cache), pytest.raises(error, match=message):
        cache.append(0, *arguments, **options)
    with Unchanged(cache), pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        cache.append(2, K, V)


BAD_ATTENDS = {
    "query heads": (ValueError, "query: 3 heads", (Q[:, :, :3], K, V), {}),
    "query dtype": (TypeError, "query: expected float16", (Q.int(), K, V), {}),
    "query batch": (ValueError, "query: batch 1", (Q[:1], K, V), {}),
    "query head_dim": (
        ValueError,
        "head_dim 16, but the view's keys have 32",
        (Q[..., :16], K, V),
        {},
    ),
    "value missing": (ValueError, "key, value: expected both", (Q, K), {}),
    "window": (ValueError, "sliding_window: expected a pos", (Q, K, V), {"sliding_window": 0}),
    "softcap": (ValueError, "softcap: expected a positive", (Q, K, V), {"softcap": -1.0}),
    "split size": (ValueError, "split_size: expected a pos", (Q, K, V), {"split_size": 100}),
    "scale": (ValueError, "softmax_scale: expected a fin", (Q, K, V), {"softmax_scale": torch.inf}),
    "sinks": (ValueError, "sinks: expected a contiguous", (Q, K, V), {"sinks": torch.ones(3)}),
    "offsets": (
        TypeError,
        "cu_seqlens_q: expected a tensor",
        (Q[0], K[0], V[0]),
        {"cu_seqlens_q": [0, 1]},
    ),
    "slopes": (
        TypeError,
        "alibi_slopes: expected torch.float32",
        (Q, K, V),
        {"alibi_slopes": torch.ones(4).half()},
    ),
}


@pytest.mark.parametrize("case", BAD_ATTENDS)
@pytest.mark.parametrize("kind", ["contiguous", "paged16"])
def test_bad_attends(kind, case):
    error, message, arguments, options = BAD_ATTENDS[case]
    cache = make(kind)
    append_dense([cache], None, 20)
    cache.attend(0, Q)  # what looks like an accepted call is still checked
    with Unchanged(cache), pytest.raises(error, match=message):
        cache.attend(0, *arguments, **options)


@pytest.mark.parametrize("kind", ["contiguous", "paged16", "paged64"])
def test_full(kind):
    cache = make(kind)
    append_dense([cache], None, cache.capacity - 1)
    with Unchanged(cache), pytest.raises(CacheFullError, match=f"takes {cache.capacity}"):
        cache.append(0, K, V)
    with Unchanged(cache), pytest.raises(CacheFullError):
        cache.append(0, K[0], V[0], cu_seqlens=torch.tensor([0, 2, 2, 2], dtype=torch.int32))
    with Unchanged(cache), pytest.raises(CacheFullError):
        cache.attend(1, Q, K, V)
    with Unchanged(cache), pytest.raises(CacheFullError):
        cache.reserve(cache.capacity + 1)
    append_dense([cache], None, 1)
    assert cache.max_length == cache.capacity


@pytest.mark.parametrize("exact", [False, True], ids=["cached", "exact"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_fails_takes_its_tokens_back(kind, packed, exact, monkeypatch):
    cache, twin = make(kind), make(kind)
    if not exact:
        torch.manual_seed(1)
        append_dense([cache, twin], None, 20)

    def fail(*_, **__):
        raise MemoryError("none left")

    query, key, value, cu = Q, K, V, None
    if packed:
        query, key, value, cu = (*(x[:2].flatten(0, 1) for x in (Q, K, V)), CU)
    with use_backend("reference"):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_attend", fail)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
            with Unchanged(cache), pytest.raises(MemoryError):
                cache.attend(0, query, key, value, cu_seqlens_q=cu)
        cache.append(0, key, value, cu_seqlens=cu)
        twin.append(0, key, value, cu_seqlens=cu)
        assert_same(cache, twin)


@pytest.mark.parametrize("kind", ["growing", "paged-growing"])
def test_growth_that_fails(kind, monkeypatch):
    cache = make(kind)
    append_dense([cache], None, 20)
    key, value = rows(3, 600)

    def fail(*_, **__):
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(CacheView, "allocate", fail)
        with Unchanged(cache), pytest.raises(MemoryError):
            cache.append(0, key, value)
    cache.append(0, key, value)
    assert cache.seq_lens.tolist() == [620] * 3


def test_growth_is_layer_by_layer_and_bounded():
    cache = make("growing", format=None)
    append_dense([cache], None, 2000)
    size = cache.layer(0)[0].block_size
    assert size == 2000
    cache.append(0, *rows(3, 1))
    assert cache.layer(0)[0].block_size == 2000 + 256
    assert cache.layer(1)[0].block_size == 2000


BAD_CACHES = [
    ({"head_dim": 40}, "head_dim: 40 is not a multiple of 16"),
    ({"v_head_dim": 8}, "v_head_dim: 8"),
    ({"num_layers": 0}, "num_layers: expected 1 to 65536"),
    ({"batch_size": 0}, "batch_size: expected a positive"),
    ({"max_seq_len": 0}, "max_seq_len: expected a positive"),
    ({"block_size": 24}, "block_size: expected None or a power of two"),
    ({"block_size": 8}, "block_size: expected None or a power of two"),
    ({"num_blocks": 4}, "num_blocks: only with a block_size"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CACHES, ids=lambda x: str(x)[:24])
def test_bad_caches(options, message):
    arguments = {"num_layers": 1, "batch_size": 1, "num_kv_heads": 1, "head_dim": 64, **options}
    with pytest.raises(ValueError, match=message):
        QuantizedKVCache(**arguments)
    with pytest.raises(TypeError, match="dtype: expected"):
        QuantizedKVCache(1, 1, 1, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("format", "error", "message"),
    [
        (8, TypeError, "format: expected a CacheFormat, the name of one, or a sequence"),
        ("int3", ValueError, "format: expected one of int8, plain, k8v4, k4v4, got 'int3'"),
        (["int8"], ValueError, "format: expected one for each of 2 layers, got 1"),
        ([], ValueError, "format: expected one for each of 2 layers, got 0"),
        (["int8", "k8"], ValueError, r"format\[1\]: expected one of int8, plain, k8v4, k4v4"),
        ([None, "int8"], TypeError, r"format\[0\]: expected a CacheFormat or the name of one"),
    ],
    ids=str,
)
def test_bad_formats(format, error, message):
    with pytest.raises(error, match=message):
        QuantizedKVCache(2, 1, 1, 64, format=format)


def test_formats_of_a_cache():
    cache = QuantizedKVCache(2, 1, 1, 64, format="k4v4")
    assert cache.format == CacheFormat.named("k4v4")
    cache = QuantizedKVCache(2, 1, 1, 64, format=("int8", CacheFormat.named("k4v4")))
    assert cache.formats == (CacheFormat(), CacheFormat.named("k4v4"))
    with pytest.raises(ValueError, match="format: the layers are of several"):
        cache.format  # noqa: B018


@pytest.mark.parametrize("block_size", [None, 16])
def test_bytes_by_layer_are_those_of_each_layers_format(block_size):
    def nbytes(layers, format):
        cache = QuantizedKVCache(
            layers, 2, 2, 64, max_seq_len=1000, block_size=block_size, format=format
        )
        return cache.nbytes - cache.block_table.nbytes

    several = nbytes(4, ["int8", "k8v4", "k4v4", "k4v4"])
    assert several == nbytes(1, "int8") + nbytes(1, "k8v4") + 2 * nbytes(1, "k4v4")


def test_crop_beyond_int32_is_all_or_nothing() -> None:
    for block_size in (None, 16):
        cache = QuantizedKVCache(1, 2, 2, 64, dtype=torch.float32, block_size=block_size)
        rows = torch.randn(2, 20, 2, 64)
        cache.append(0, rows, rows)
        cache.crop(2**63 - 1)
        assert cache.seq_lens.tolist() == [20, 20]
        cache.crop(-(2**63) + 1)
        assert cache.seq_lens.tolist() == [0, 0]
        assert cache.max_length == 0


def test_a_mask_is_no_list_of_indices() -> None:
    cache = QuantizedKVCache(1, 2, 2, 64, dtype=torch.float32)
    rows = torch.randn(2, 20, 2, 64)
    cache.append(0, rows, rows)
    with pytest.raises(
        ValueError, match=r"indices: expected a vector of integers, got torch\.bool"
    ):
        cache.select(torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"sliding_window: expected an integer, got 0\.5"):
        cache.attend(0, rows[:, :1], sliding_window=0.5)
