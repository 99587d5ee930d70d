"""What only a GPU can show: long histories, graphs, streams, lengths that no host has checked."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest
import torch

from appending import assert_same_rows
from attending import attend, check_attention
from kvquant import (
    QuantizedKVCache,
    append_,
    attention,
    gather,
    quantize_cache_v,
    use_backend,
)
from support import (
    BF16,
    DTYPES,
    FORMATS,
    FP16,
    LAYOUTS,
    Cache,
    assert_unchanged,
    empty_cache,
    filled_cache,
    foreign,
    index,
    no_waiting,
    parts,
    snapshot,
)

pytestmark = pytest.mark.gpu


def dense(cache: Cache, query, **options):
    return attention(query, cache.view, block_table=cache.table, seq_lens=cache.lens, **options)


LONG = [
    ("bf16", (32, 8), 128, "paged256", "default", (32768, 4096, 1, 20000)),
    ("fp16", (28, 4), 128, "paged16", "default", (9000, 16384, 257)),
    ("bf16", (16, 1), 256, "contiguous", "plain", (8192, 5000)),
    ("fp32", (8, 8), 64, "paged64", "mean64", (4096, 4097)),
    ("fp16", (14, 2), 96, "contiguous", "rotated", (12345, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5, 200])
@pytest.mark.parametrize(
    "case", LONG, ids=lambda c: f"{c[0]}-{c[1][0]}of{c[1][1]}-d{c[2]}-{c[3]}-{c[4]}-{max(c[5])}"
)
def test_long_histories(cuda, case, count):
    dtype, (heads, kv_heads), dim, layout, fmt, lens = case
    cache = filled_cache(
        lens, dtype=DTYPES[dtype], kv_heads=kv_heads, k_dim=dim, block=LAYOUTS[layout],
        fmt=FORMATS[fmt], device=cuda,
    )  # fmt: skip
    queries = [torch.randn(count, heads, dim, device=cuda).to(DTYPES[dtype]) for _ in lens]
    check_attention(cache, queries)
    check_attention(cache, queries, sliding_window=1000, softcap=30.0)


@pytest.mark.slow
def test_many_sequences(cuda):
    lens = torch.randint(0, 700, (300,)).tolist()
    cache = filled_cache(lens, block=16, k_dim=128, device=cuda)
    check_attention(cache, [torch.randn(1, 8, 128, device=cuda).to(BF16) for _ in lens])


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_hundred_runs_are_the_same_bits(cuda, count):
    cache = filled_cache((9000, 300, 4000), block=64, k_dim=128, kv_heads=4, device=cuda)
    query = torch.randn(3, count, 16, 128, device=cuda, dtype=BF16)
    first = dense(cache, query)
    for _ in range(100):
        assert torch.equal(dense(cache, query), first)


@pytest.mark.parametrize("fmt", ["default", "mean16", "plain"])
def test_graph_replay_equals_eager_while_lengths_grow(cuda, fmt):
    steps, lens = 40, (240, 5, 0)
    room = [n + steps for n in lens]
    caches = [empty_cache(room, block=16, fmt=FORMATS[fmt], device=cuda) for _ in range(2)]
    prompt = [[torch.randn(n, 2, 64, device=cuda, dtype=BF16) for n in lens] for _ in range(2)]
    for cache in caches:
        cache.append(*prompt)
    rows = torch.randn(steps, 3, 1, 8, 64, device=cuda, dtype=BF16)
    static = torch.zeros_like(rows[0])

    def step(cache, x):
        key, value, query = x[:, :, :2], x[:, :, 2:4], x[:, :, 4:]
        where = {"block_table": cache.table, "seq_lens": cache.lens}
        append_(key, value, cache.view, **where, advance=True)
        return attention(query, cache.view, **where)

    before, start = snapshot(caches[0].view), caches[0].lens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(caches[0], static)  # warms up, and is undone below
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(caches[0], static)
    for name, tensor in parts(caches[0].view).items():
        tensor.copy_(before[name])
    caches[0].lens.copy_(start)
    for x in rows:
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, step(caches[1], x))
    assert caches[0].lengths == caches[1].lengths == room
    assert_same_rows(*caches)


def test_a_stream_of_its_own(cuda):
    """Everything runs behind what its stream holds: here, rows that are late."""
    caches = [filled_cache((5000, 64), block=64, device=cuda)]
    lens = caches[0].lens - 1
    caches.append(replace(caches[0], view=foreign(caches[0].view)))
    rows = torch.randn(2, 1, 12, 64, device=cuda, dtype=BF16)
    late = torch.zeros_like(rows)

    def step(cache, x):
        key, value, query = x[:, :, :2], x[:, :, 2:4], x[:, :, 4:]
        where = {"block_table": cache.table, "seq_lens": lens}
        return attention(query, cache.view, key=key, value=value, **where)

    wanted = step(caches[0], rows)
    step(caches[1], rows)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(rows)
        out = step(caches[1], late)
    stream.synchronize()
    assert torch.equal(out, wanted)
    assert_same_rows(*caches)


def test_no_call_waits_for_the_device(cuda):
    cache = filled_cache((40, 20), block=16, device=cuda)
    query = torch.randn(2, 1, 4, 64, device=cuda, dtype=BF16)
    where = {"block_table": cache.table, "seq_lens": cache.lens - 1}
    rows = torch.randn(2, 1, 2, 64, device=cuda, dtype=BF16)
    for _ in range(2):
        torch.cuda.synchronize()
        with no_waiting():
            append_(rows, rows, cache.view, **where)
            attention(query, cache.view, **where)
            attention(query, cache.view, **where, key=rows, value=rows)
            gather(cache.view, **where)


@pytest.mark.parametrize("block", [None, 16])
def test_rows_without_a_place_are_dropped(cuda, block):
    cache = filled_cache((60, 64, 3), block=block, device=cuda)
    capacity = cache.table.shape[1] * cache.view.block_size
    assert capacity == 64
    rows = torch.randn(3, 10, 2, 64, device=cuda, dtype=BF16)
    cache.table[2] = index([10**6] * cache.table.shape[1], cuda)
    before = snapshot(cache.view)
    append_(rows, rows, cache.view, block_table=cache.table, seq_lens=cache.lens)
    for name, tensor in parts(cache.view).items():  # four rows of the first sequence fit
        changed = (tensor != before[name]) & ~(tensor.isnan() & before[name].isnan())
        count = changed.any(-1).sum().item()
        assert count == 8 if name.endswith("params") else count <= 8
    slots = torch.tensor([-1, -5, 10**12, cache.view.k.codes.shape[0] * 64], device=cuda)
    plain = filled_cache((60,), fmt=FORMATS["plain"], device=cuda)
    before = snapshot(plain.view)
    append_(rows[0, :4], rows[0, :4], plain.view, slot_mapping=slots)
    assert_unchanged(plain.view, before)


def test_wild_lengths_and_ids_stay_in_bounds(cuda):
    cache = filled_cache((60, 64, 3), block=16, device=cuda)
    query = torch.randn(3, 2, 4, 64, device=cuda, dtype=BF16)
    wild = replace(
        cache,
        table=torch.where(cache.table % 2 == 0, cache.table, 2**31 - 1),
        lens=index([2**31 - 1, -7, 10**6], cuda),
    )
    dense(wild, query)
    gather(wild.view, block_table=wild.table, seq_lens=wild.lens)
    append_(query[:, :, :2], query[:, :, :2], wild.view, block_table=wild.table,
            seq_lens=wild.lens)  # fmt: skip
    torch.cuda.synchronize()


def test_foreign_slabs_decode(cuda):
    cache = filled_cache((5000, 300), block=256, k_dim=128, device=cuda)
    queries = [torch.randn(1, 8, 128, device=cuda, dtype=FP16) for _ in range(2)]
    view = replace(cache, view=foreign(cache.view))
    assert torch.equal(attend(view, queries), attend(cache, queries))


@pytest.mark.parametrize("lens", [(300, 17), (4096, 9000)], ids=["short", "long"])
def test_gpu_and_cpu_agree(cuda, lens):
    here = filled_cache(lens, block=64, k_dim=128, fmt=FORMATS["rotated"])
    there = replace(
        here,
        view=here.view.replaced({name: x.to(cuda) for name, x in here.view.tensors.items()}),
        table=here.table.to(cuda),
        lens=here.lens.to(cuda),
    )
    query = torch.randn(2, 2, 8, 128).to(BF16)
    torch.testing.assert_close(
        dense(there, query.to(cuda)).cpu(), dense(here, query), atol=1e-2, rtol=1e-2
    )
    x = torch.randn(2, 3, 100, 64)
    for a, b in zip(quantize_cache_v(x.to(cuda)), quantize_cache_v(x), strict=True):
        assert torch.equal(a.cpu(), b)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device or none")
    cache = filled_cache((300, 17), block=16, device="cuda:1")
    query = torch.randn(2, 1, 4, 64, device="cuda:1", dtype=BF16)
    assert torch.cuda.current_device() == 0
    out = dense(cache, query)
    assert out.device.index == 1
    check_attention(cache, list(query))
    with use_backend("reference"):
        torch.testing.assert_close(out, dense(cache, query), atol=1e-2, rtol=1e-2)


def test_a_captured_step_does_not_lend_its_scratch(cuda):
    """Eager steps go on where a graph was captured, before the graph has ever run."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    caches = [QuantizedKVCache(1, 1, 2, 64, max_seq_len=4096, device=cuda) for _ in range(2)]
    rows = torch.randn(3, 1, 1, 8, 64, device=cuda, dtype=FP16)
    with torch.cuda.stream(stream):
        for cache in caches:
            for row in rows[:2]:
                cache.attend(0, row, row[..., :2, :], row[..., :2, :])
        with torch.cuda.graph(graph, stream=stream):
            caches[1].attend(0, rows[0], rows[0][..., :2, :], rows[0][..., :2, :])
        found = caches[0].attend(0, rows[2], rows[2][..., :2, :], rows[2][..., :2, :])
    torch.cuda.synchronize()
    assert caches[0].seq_lens.tolist() == [3]
    whole = caches[0].attend(0, rows[2])
    assert torch.equal(found, whole)


def captured(cuda, body):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph, result


def test_graphs_beside_each_other_have_their_own_scratch(cuda):
    """Replays of two graphs on two streams, each of calls whose splits are merged."""
    caches = [filled_cache((4096, 3000), k_dim=128, device=cuda) for _ in range(2)]
    queries = torch.randn(2, 2, 1, 4, 128, device=cuda, dtype=BF16)
    expected = [dense(c, q) for c, q in zip(caches, queries, strict=True)]
    graphs = [
        captured(cuda, lambda c=c, q=q: [dense(c, q) for _ in range(20)])
        for c, q in zip(caches, queries, strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, results), wanted in zip(graphs, expected, strict=True):
        assert all(torch.equal(x, wanted) for x in results)


def test_scratch_is_lent_for_the_life_of_a_graph(cuda):
    from kvquant import _C

    def lend() -> list[tuple[int, int]]:
        torch.zeros(1, device=cuda)  # a graph must not be empty
        stream = torch.cuda.current_stream().cuda_stream
        return [_C.graph_workspace(0, stream, 100, 10) for _ in range(2)]

    first, (a, b) = captured(cuda, lend)
    assert a == b
    seen = set()
    for _ in range(20):  # the driver may take its time to end a graph
        other, (c, _) = captured(cuda, lend)
        assert c != a
        seen.add(c)
        del other
        gc.collect()
        torch.cuda.synchronize()
        time.sleep(0.05)
    assert len(seen) < 10
    first.replay()
    torch.cuda.synchronize()
