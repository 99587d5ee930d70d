"""split_size: a sequence's result is the same bits whatever else is in the call."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor

from kvquant import QuantizedKVCache, attention, backends, use_backend
from kvquant.backends.compiled import numbers_of
from kvquant.backends.cpu import CPU
from modelled import Unchanged, append_dense, make
from support import (
    BF16,
    DTYPES,
    FORMATS,
    LAYOUTS,
    Cache,
    assert_unchanged,
    empty_cache,
    filled_cache,
    index,
    random_rows,
    same_bits,
    snapshot,
)

SIZE = 512
FEW = (4000, 1, 21000, 700)
MANY = (9000, *[1 + n % 40 for n in range(250)])  # more units than a device holds blocks
MATES = {"few": (FEW, 2), "many": (MANY, 0)}  # lengths, and which of them is also taken alone

CASES = [  # dtype, (q_heads, kv_heads), (k_dim, v_dim), layout, format
    ("bf16", (8, 2), (64, 64), "paged16", "default"),
    ("fp16", (8, 2), (128, 128), "contiguous", "default"),
    ("bf16", (14, 2), (128, 128), "paged64", "mean64"),
    ("fp16", (4, 2), (192, 80), "paged256", "rotated"),
    ("bf16", (2, 2), (256, 256), "contiguous", "plain"),
    ("fp32", (8, 2), (96, 96), "paged32", "default"),
]


def name_of(case) -> str:
    dtype, heads, dims, layout, fmt = case
    return f"{dtype}-{heads[0]}of{heads[1]}-d{dims[0]}v{dims[1]}-{layout}-{fmt}"


def dense(cache: Cache, query: Tensor, **options):
    return attention(query, cache.view, block_table=cache.table, seq_lens=cache.lens, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("mates", MATES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_sequence_alone_and_in_a_batch(cuda, case, mates, tokens):
    dtype, (heads, kv_heads), (k_dim, v_dim), layout, fmt = case
    lens, b = MATES[mates]
    kind = {
        "kv_heads": kv_heads, "k_dim": k_dim, "v_dim": v_dim, "block": LAYOUTS[layout],
        "fmt": FORMATS[fmt], "device": cuda,
    }  # fmt: skip
    cache = filled_cache(lens, dtype=DTYPES[dtype], **kind)
    query = torch.randn(len(lens), tokens, heads, k_dim, device=cuda).to(DTYPES[dtype])
    for options in ({}, {"sliding_window": 900}, {"causal": False, "softcap": 20.0}):
        out, lse = dense(cache, query, split_size=SIZE, return_lse=True, **options)
        for room in (lens[b], 30_000):  # alone, with as much room as it needs and with more
            alone = empty_cache([room], **kind)
            alone.append([cache.keys[b]], [cache.values[b]])
            found, found_lse = dense(
                alone, query[b : b + 1], split_size=SIZE, return_lse=True, **options
            )
            assert same_bits(found[0], out[b])
            assert same_bits(found_lse[0], lse[b])
            # Without the log-sum-exp other kernels may serve the call.
            usual = dense(alone, query[b : b + 1], split_size=SIZE, **options)
            assert same_bits(usual[0], dense(cache, query, split_size=SIZE, **options)[b])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("mates", MATES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_steps_of_a_sequence_alone_and_in_a_batch(cuda, case, mates, tokens):
    """The second step and those behind it may be one launch; they cross the edge of a split."""
    dtype, (heads, kv_heads), (k_dim, v_dim), layout, fmt = case
    lens, b = MATES[mates]
    lens = [2040 if i == b else n for i, n in enumerate(lens)]
    rows = [
        (random_rows(n, kv_heads, k_dim, dtype=DTYPES[dtype], device=cuda),
         torch.randn(n, kv_heads, v_dim, device=cuda).to(DTYPES[dtype]))
        for n in lens
    ]  # fmt: skip
    caches = []
    for kept in (range(len(lens)), [b]):
        cache = QuantizedKVCache(
            1, len(kept), kv_heads, k_dim, v_head_dim=v_dim, format=FORMATS[fmt],
            max_seq_len=max(lens[i] for i in kept) + 20 * tokens, block_size=LAYOUTS[layout],
            device=cuda,
        )  # fmt: skip
        cu = [0, *torch.tensor([lens[i] for i in kept]).cumsum(0).tolist()]
        key, value = (torch.cat([rows[i][part] for i in kept]) for part in (0, 1))
        cache.append(0, key, value, cu_seqlens=index(cu, "cpu"))
        caches.append(cache)
    for _ in range(20):
        query, key, value = (
            torch.randn(len(lens), tokens, n, dim, device=cuda).to(DTYPES[dtype])
            for n, dim in ((heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
        )
        out = caches[0].attend(0, query, key, value, split_size=SIZE)
        one = (x[b : b + 1] for x in (query, key, value))
        assert same_bits(caches[1].attend(0, *one, split_size=SIZE)[0], out[b])


@pytest.mark.parametrize("forced", ["auto", "reference"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_on_a_cpu_it_changes_nothing(packed, forced):
    cache = filled_cache((1300, 17, 600), block=64, k_dim=64, v_dim=80)
    query = torch.randn(3, 4, 4, 64).to(BF16)
    options = {}
    if packed:
        query, options = query.flatten(0, 1), {"cu_seqlens_q": index([0, 5, 6, 12], "cpu")}
    with use_backend(forced):
        for more in ({}, {"sliding_window": 300, "sinks": torch.randn(4)}):
            without = dense(cache, query, return_lse=True, **options, **more)
            for size in (256, 512, 2**30):
                within = dense(cache, query, return_lse=True, split_size=size, **options, **more)
                assert all(map(torch.equal, within, without))


@pytest.mark.parametrize("kind", ["contiguous", "growing", "paged16", "paged-growing"])
def test_on_a_cpu_it_changes_no_step(kind):
    caches = [make(kind), make(kind)]
    append_dense(caches, None, 300)
    for tokens in (20, 1, 1, 1):
        query, key, value = (
            torch.randn(3, tokens, n, dim) for n, dim in ((4, 32), (2, 32), (2, 16))
        )
        found = [
            cache.attend(0, query, key, value, split_size=size)
            for cache, size in zip(caches, (None, 256), strict=True)
        ]
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("size", "most", "least"), [(256, 65536, 512), (512, 131072, 768), (1024, 262144, 1280)]
)
def test_more_splits_than_can_be_merged(choose, size, most, least):
    assert choose(most, 0)["regime"]
    assert choose(most, size)["regime"]
    refused = choose(most + 1, size)
    assert refused["regime"] is None
    ((argument, why),) = refused["refusals"]
    assert argument == "split_size"
    assert re.match(f"{size}, .* {most + 1} tokens .* least {least}$", why)
    assert choose(most + 1, least)["regime"]
    assert choose(2**31 - 1, 2**30)["regime"]


@pytest.fixture
def choose():
    _C = pytest.importorskip("kvquant._C")
    sizes = {
        "batch": 1, "max_seqlen_q": 1, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64,
        "v_head_dim": 64, "float32": False, "packed": False, "appends": False,
        "multiprocessors": 132, "capability": 90, "mean_group": 0, "age_group": 0,
        "k_format": "int8", "v_format": "int8",
    }  # fmt: skip
    return lambda capacity, split: _C.choose(sizes | {"capacity": capacity, "split_size": split})


@pytest.fixture
def merging_few(monkeypatch):
    """The CPU's backend where CUDA's would refuse."""
    _C = pytest.importorskip("kvquant._C")
    prepare = CPU.prepare

    def bounded(problem):
        for argument, why in _C.choose(numbers_of(problem, 132, 90))["refusals"]:
            if argument:
                raise ValueError(f"{argument}: {why}")
        return prepare(problem)

    monkeypatch.setattr(CPU, "prepare", bounded)
    monkeypatch.setattr(sys.modules["kvquant.plan"], "_plans", {})
    monkeypatch.setattr(backends, "_prepared", {})


def check_refused_with_new_keys(device: str, attend=dense) -> None:
    cache = filled_cache([30], room=[70_000], block=16, device=device)
    before = snapshot(cache.view)
    rows = {name: torch.randn(1, 1, 2, 64, device=device).to(BF16) for name in ("key", "value")}
    query = torch.randn(1, 1, 4, 64, device=device).to(BF16)
    with pytest.raises(ValueError, match=r"split_size: 256, .* 70000 tokens .* at least 512"):
        attend(cache, query, split_size=256, **rows)
    assert_unchanged(cache.view, before)
    with use_backend("reference"):
        dense(cache, query, split_size=256, **rows)


def check_cache_refuses(kind: str, device: str) -> None:
    cache = make(kind, batch=1, device=device)
    query, key, value = (
        torch.randn(1, 1, n, dim, device=device) for n, dim in ((4, 32), (2, 32), (2, 16))
    )
    for _ in range(3):
        cache.attend(0, query, key, value, split_size=256)
    cache.reserve(70_000)
    with (
        Unchanged(cache),
        pytest.raises(ValueError, match=r"split_size: 256, .* 7\d+ .* at least 512"),
    ):
        cache.attend(0, query, key, value, split_size=256)
    cache.attend(0, query, key, value, split_size=512)
    cache.attend(0, query, key, value)


def test_too_many_splits_with_new_keys(merging_few):
    check_refused_with_new_keys("cpu")


@pytest.mark.slow
def test_too_many_splits_with_new_keys_compiled(merging_few):
    torch._dynamo.reset()
    check_refused_with_new_keys("cpu", torch.compile(dense, backend="aot_eager", fullgraph=True))


@pytest.mark.gpu
def test_too_many_splits_with_new_keys_on_a_gpu(cuda):
    check_refused_with_new_keys(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["growing", "paged-growing"])
def test_a_cache_that_has_become_too_long(cuda, kind):
    check_cache_refuses(kind, cuda)


def test_a_cache_that_grows_too_long(merging_few):
    cache = make("growing", batch=1)
    append_dense([cache], None, 65_536)
    query, key, value = (torch.randn(1, 1, n, dim) for n, dim in ((4, 32), (2, 32), (2, 16)))
    cache.attend(0, query, split_size=256)
    with Unchanged(cache), pytest.raises(ValueError, match=r"split_size: 256, .* at least 512"):
        cache.attend(0, query, key, value, split_size=256)
    cache.attend(0, query, key, value, split_size=512)
