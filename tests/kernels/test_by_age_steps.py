"""Steps by age, in every shape of a kernel: against the reference, eager and in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant import CacheFormat, QuantizedKVCache, plan, use_backend
from support import BF16, DTYPES, FP16, FP32, same_bits

NAMED = {name: CacheFormat.named(name) for name in ("k8v4", "k4v4")}
SMALL = CacheFormat(key="int4", value="int4", by_age=True, key_mean=16, value_rotation=False)
SHAPES = {  # (heads, kv_heads), (head_dim, v_head_dim)
    "d64": ((4, 2), (64, 64)), "d128": ((8, 2), (128, 128)), "d256": ((4, 4), (256, 256)),
    "d80-48": ((6, 3), (80, 48)), "d192": ((7, 1), (192, 192)),
}  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "usual": {}, "window": {"sliding_window": 300}, "softcap": {"softcap": 20.0},
    "splits": {"split_size": 256}, "all": {"causal": False},
}  # fmt: skip
# Of rows that attention reads in the same codes, and whose weights it takes in the query's dtype.
CLOSE = {FP16: 4e-3, BF16: 2e-2, FP32: 1e-4}


def rows(
    shape: str, tokens: int, dtype: torch.dtype, device: str, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    (heads, kv_heads), dims = SHAPES[shape]
    sizes = ((heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    query, key, value = (torch.randn(batch, tokens, *size).to(dtype).to(device) for size in sizes)
    return query, key, value


def make(
    fmt: CacheFormat, shape: str, device: str, batch: int = 2, **options: Any
) -> QuantizedKVCache:
    (_, kv_heads), dims = SHAPES[shape]
    return QuantizedKVCache(
        1, batch, kv_heads, dims[0], v_head_dim=dims[1], format=fmt, device=device, **options
    )


def assert_same(a: QuantizedKVCache, b: QuantizedKVCache) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    for name, x in ours.items():
        assert same_bits(x, theirs[name]), name


def assert_close(out: Tensor, ref: Tensor) -> None:
    assert out.isfinite().all()
    error = (out.double() - ref.double()).abs().max() / ref.double().abs().max()
    assert error <= CLOSE[out.dtype], float(error)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMED)
def test_steps_across_the_edges_of_groups_read_what_the_reference_reads(
    native, name, shape, dtype, feature
):
    """Steps of 1, 3 and 20 tokens that begin groups, end them, or lie within one."""
    cache = make(NAMED[name], shape, native, max_seq_len=1024)
    start = [250, 505, 760]
    counts = [1, 3, 20, 1, 1]
    for begin in start:
        if begin > cache.max_length:
            more = rows(shape, begin - cache.max_length, DTYPES[dtype], native)
            cache.append(0, *more[1:])
        for count in counts:
            query, key, value = rows(shape, count, DTYPES[dtype], native)
            out = cache.attend(0, query, key, value, **FEATURES[feature])
            with use_backend("reference"):
                ref = cache.attend(0, query, **FEATURES[feature])
            assert_close(out, ref)


@pytest.mark.parametrize("layout", [{"max_seq_len": 2048}, {"block_size": 16}, {"block_size": 256}])
@pytest.mark.parametrize("name", NAMED)
def test_steps_store_what_the_reference_stores(native, name, layout):
    """Bit for bit, but for means, whose rows are summed in another order."""
    fmt = CacheFormat(
        key=NAMED[name].key, value=NAMED[name].value, by_age=True, key_mean=None
    )  # fmt: skip
    ours, reference = (make(fmt, "d128", native, **layout) for _ in range(2))
    cuts = [500, *[1] * 8, 7, 250, 33, 20, *[1] * 8]
    for count in cuts:
        query, key, value = rows("d128", count, FP16, native)
        ours.attend(0, query, key, value, exact_prompt=False)
        with use_backend("reference"):
            reference.append(0, key, value)
        assert_same(ours, reference)


@pytest.mark.parametrize("count", [1, 7, 32, 33])
def test_appends_of_a_few_tokens_store_what_the_reference_stores(native, count):
    """From an empty cache on: no group closes when the second one begins."""
    fmt = CacheFormat(value="int4", by_age=True, key_mean=None)
    ours, reference = (make(fmt, "d80-48", native, max_seq_len=1024) for _ in range(2))
    for _ in range(600 // count):
        _, key, value = rows("d80-48", count, FP16, native)
        ours.append(0, key, value)
        with use_backend("reference"):
            reference.append(0, key, value)
    assert_same(ours, reference)


@pytest.mark.parametrize("count", [1, 5, 16, 31])
def test_groups_of_16_are_as_they_are_in_the_reference(native, count):
    cache = make(SMALL, "d64", native, max_seq_len=400)
    for _ in range(200 // count):
        query, key, value = rows("d64", count, FP32, native)
        out = cache.attend(0, query, key, value, exact_prompt=False)
        with use_backend("reference"):
            ref = cache.attend(0, query)
        assert_close(out, ref)


@pytest.mark.parametrize("name", NAMED)
def test_a_step_is_an_append_and_an_attention(native, name):
    caches = [make(NAMED[name], "d128", native, block_size=64) for _ in range(2)]
    for count in (500, 1, 5, 3, 1, 3, 200, 32, 30, 1):
        query, key, value = rows("d128", count, BF16, native)
        caches[1].append(0, key, value)
        if count <= 32:
            out = caches[0].attend(0, query, key, value)
            assert torch.equal(out, caches[1].attend(0, query))
        else:
            caches[0].append(0, key, value)
        assert_same(*caches)


@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("name", NAMED)
def test_a_hundred_runs_are_the_same_bits(native, name, count):
    """Every split, more of them than are merged at once; a group opens in the last step."""
    cache = make(NAMED[name], "d128", native, batch=3, max_seq_len=9000)
    _, key, value = rows("d128", 7168 if count == 1 else 7166, FP16, native, batch=3)
    cache.append(0, key, value)
    query, key, value = rows("d128", count, FP16, native, batch=3)
    first, wanted = None, None
    for _ in range(100 if native == "cuda" else 3):
        fork = cache.fork()
        out = fork.attend(0, query, key, value)
        state = fork.state_dict()
        if first is None:
            first, wanted = out, state
        assert torch.equal(out, first)
        assert all(same_bits(x, wanted[at]) for at, x in state.items())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", NAMED)
def test_a_replayed_step_is_an_eager_one(cuda, name, count):
    """Lengths are on the device alone: the same graph opens groups and closes them."""
    steps, stored = 24, (500, 3, 250)
    caches = [make(NAMED[name], "d128", cuda, batch=3, max_seq_len=1024) for _ in range(2)]
    new = [rows("d128", count, FP16, cuda, batch=3) for _ in range(steps)]
    edges = torch.tensor([0, *torch.tensor(stored).cumsum(0)], dtype=torch.int32)
    prompt = [x[0] for x in rows("d128", sum(stored), FP16, cuda, batch=1)[1:]]
    for cache in caches:
        cache.reserve(1024)
        for x in cache._state.view(0).tensors.values():
            x.zero_()  # what is never written is compared, too
        cache.append(0, *prompt, cu_seqlens=edges)
    states = [cache._state for cache in caches]
    calls = [(state.view(0), state.seqs(0)) for state in states]
    static = [x.clone() for x in new[0]]
    query, *pair = static
    made = plan(query, *calls[0], *pair)

    def run(at: int, query: Tensor, pair: list[Tensor]) -> Tensor:
        out = made.run(query, *calls[at], *pair)
        assert isinstance(out, Tensor)
        return out

    view, seqs = calls[0]
    kept = [x.clone() for x in (*view.tensors.values(), seqs.seq_lens, seqs.young)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0, query, pair)  # warms up, and is undone below
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(0, query, pair)
    for x, before in zip((*view.tensors.values(), seqs.seq_lens, seqs.young), kept, strict=True):
        x.copy_(before)
    for step in new:
        for x, y in zip(static, step, strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out, run(1, step[0], list(step[1:])))
    for a, b in zip(*(view.tensors.values() for view, _ in calls), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(calls[0][1].young, calls[1][1].young)
    assert calls[0][1].seq_lens.tolist() == [n + steps * count for n in stored]
