"""What attention must not depend on: order, batch mates, chunks, strides, unseen rows, layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import oracle
from attending import attend, check_attention
from kvquant import append_, attention
from support import (
    BF16,
    DTYPES,
    FORMATS,
    FP16,
    FP32,
    Cache,
    filled_cache,
    foreign,
    index,
    parts,
    relocated,
    same_bits,
)

LENS = (300, 17, 256, 64, 530)
CLOSE = {"atol": 1e-2, "rtol": 1e-2}  # of two bf16 results: a few roundings


def queries_of(cache: Cache, counts, heads: int = 4, dtype=BF16):
    dim = cache.view.k.head_dim
    return [torch.randn(n, heads, dim).to(dtype).to(cache.device) for n in counts]


def attend_dense(cache: Cache, query, **options):
    return attention(
        query,
        cache.view,
        block_table=cache.table,
        seq_lens=cache.lens,
        seq_starts=cache.starts,
        **options,
    )


@pytest.mark.parametrize("fmt", ["default", "mean16"])
def test_order_of_sequences(backend, device, fmt):
    cache = filled_cache(LENS, block=32, fmt=FORMATS[fmt], device=device)
    queries, order = queries_of(cache, [3] * 5), [4, 2, 0, 3, 1]
    out = torch.stack(attend(cache, queries).split(3))
    moved = attend(relocated(cache, order), [queries[i] for i in order])
    torch.testing.assert_close(torch.stack(moved.split(3)), out[order], **CLOSE)


@pytest.mark.parametrize("count", [1, 40])
def test_batch_mates_do_not_matter(backend, device, count):
    cache = filled_cache(LENS, block=64, device=device)
    queries = queries_of(cache, [count] * 5)
    out = attend(cache, queries).split(count)
    for b in range(5):
        alone = attend(relocated(cache, [b]), [queries[b]])
        torch.testing.assert_close(alone, out[b], **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5])
def test_dense_equals_packed(backend, device, dtype, count):
    cache = filled_cache(LENS, block=16, device=device)
    queries = queries_of(cache, [count] * 5, dtype=DTYPES[dtype])
    packed, packed_lse = attend(cache, queries, return_lse=True, max_seqlen_q=count)
    out, lse = attend_dense(cache, torch.stack(queries), return_lse=True)
    assert out.shape == (5, count, 4, 64)
    assert lse.shape == (5, count, 4)
    assert torch.equal(out.flatten(0, 1), packed)
    assert torch.equal(lse.flatten(0, 1), packed_lse)


@pytest.mark.parametrize("view", ["bhsd", "fused", "expanded"])
def test_strides_of_dense_queries(backend, device, view):
    cache = filled_cache(LENS, block=16, device=device)
    x = torch.randn(5, 3, 4, 64, device=device, dtype=FP16)
    query = {
        "bhsd": x.transpose(1, 2).contiguous().transpose(1, 2),
        "fused": torch.cat([x, x.neg()], -1)[..., :64],
        "expanded": x[:, :, :1].expand(5, 3, 4, 64),
    }[view]
    assert not query.is_contiguous()
    out = attend_dense(cache, query)
    assert out.is_contiguous()
    assert torch.equal(out, attend_dense(cache, query.contiguous()))


def test_strides_of_packed_queries(backend, device):
    cache = filled_cache((40, 50), block=16, device=device)
    x = torch.randn(12, 2, 8, 64, device=device, dtype=BF16)[:, 1, ::2]
    out = attend(cache, [x[:5], x[5:]])
    cu_seqlens = index([0, 5, 12], device)
    assert torch.equal(attend_dense(cache, x, cu_seqlens_q=cu_seqlens), out)


@pytest.mark.parametrize("fmt", FORMATS)
def test_layouts_agree(backend, device, fmt):
    torch.manual_seed(1)
    caches = []
    for block in (None, 16, 256):
        cache = filled_cache(LENS, block=block, fmt=FORMATS[fmt], device=device)
        caches.append(cache)
        if len(caches) > 1:  # the same rows
            cache.lens, cache.keys, cache.values = cache.lens * 0, [], []
            cache.append(caches[0].keys, caches[0].values)
    queries = queries_of(cache, [2] * 5)
    wanted = attend(caches[0], queries)
    for cache in caches[1:]:
        torch.testing.assert_close(attend(cache, queries), wanted, **CLOSE)


def test_foreign_strides(backend, device):
    cache = filled_cache(LENS, block=64, fmt=FORMATS["mean64"], v_dim=96, device=device)
    queries = queries_of(cache, [1, 2, 3, 4, 5])
    view = replace(cache, view=foreign(cache.view))
    assert torch.equal(attend(view, queries), attend(cache, queries))


def test_a_table_of_wider_rows(backend, device):
    cache = filled_cache(LENS, block=16, device=device)
    queries = queries_of(cache, [2] * 5)
    wide = torch.full((5, cache.table.shape[1] + 7), -1, dtype=torch.int32, device=device)
    wide[:, : cache.table.shape[1]] = cache.table
    strided = replace(cache, table=wide[:, : cache.table.shape[1]])
    assert torch.equal(attend(strided, queries), attend(cache, queries))
    torch.testing.assert_close(
        attend(replace(cache, table=wide), queries), attend(cache, queries), **CLOSE
    )


def test_prefill_in_chunks_equals_at_once(backend, device):
    cache = filled_cache((300,), block=32, device=device)
    (query,) = queries_of(cache, [300])
    whole = attend(cache, [query])
    parts = [
        attend(replace(cache, lens=index([end], device)), [query[begin:end]])
        for begin, end in ((0, 1), (1, 130), (130, 131), (131, 300))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)


def test_two_halves_merge_by_lse(backend, device):
    cache = filled_cache((530, 300), block=16, dtype=FP32, device=device)
    queries = queries_of(cache, [1, 1], dtype=FP32)
    whole, lse = attend(cache, queries, return_lse=True)
    cut = index([200, 257], device)
    halves = [
        attend(part, queries, causal=False, return_lse=True)
        for part in (replace(cache, lens=cut), replace(cache, starts=cut))
    ]
    merged = torch.logaddexp(halves[0][1], halves[1][1])
    weights = [(part - merged).exp()[..., None] for _, part in halves]
    out = weights[0] * halves[0][0] + weights[1] * halves[1][0]
    torch.testing.assert_close(merged, lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("fmt", ["default", "mean16"])
def test_new_keys_are_appended_and_seen(backend, device, fmt, packed):
    counts = (3, 1, 20, 0, 7) if packed else (5,) * 5
    caches = [filled_cache(LENS, block=16, fmt=FORMATS[fmt], device=device)]
    short = [n - count for n, count in zip(LENS, counts, strict=True)]
    caches.append(replace(caches[0], view=foreign(caches[0].view)))
    queries = queries_of(caches[0], counts)
    rows = [torch.randn(2, n, 2, 64, device=device, dtype=BF16) for n in counts]
    keys, values = zip(*rows, strict=True)
    join = torch.cat if packed else torch.stack
    cu_seqlens = index([0, *torch.tensor(counts).cumsum(0).tolist()], device) if packed else None
    call = {"cu_seqlens_q": cu_seqlens, "query": join(queries)}
    new = {"key": join(keys), "value": join(values)}

    lens = index(short, device)
    table, view = caches[0].table, caches[0].view
    fused = attention(view=view, block_table=table, seq_lens=lens, **call, **new)
    assert lens.tolist() == short

    view = caches[1].view
    append_(**new, view=view, block_table=table, seq_lens=lens, cu_seqlens=cu_seqlens)
    after = caches[1].lens
    apart = attention(view=view, block_table=table, seq_lens=after, **call)
    assert torch.equal(fused, apart)
    for name, tensor in parts(caches[0].view).items():
        assert same_bits(tensor, parts(view)[name])


def poison_row(cache: Cache, sequence: int, token: int, head: int, name: str) -> None:
    block, row = oracle.places(cache.view, cache.table, sequence, token + 1)
    parts(cache.view)[f"{name}_params"][block[-1], head, row[-1]] = torch.nan


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("count", [1, 20])
def test_nan_is_seen_by_its_head_only(backend, device, count, name):
    cache = filled_cache((300, 40), block=16, device=device)
    queries = queries_of(cache, [count, count])
    clean = attend(cache, queries)
    poison_row(cache, 0, 25, 1, name)
    out = attend(cache, queries)
    hit = torch.zeros(2 * count, 4, dtype=torch.bool, device=device)
    hit[:count, 2:] = True
    assert torch.equal(out.isnan().all(-1), hit)
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("token", [25, 700, 2989], ids=["first", "full tile", "last tile"])
@pytest.mark.parametrize("count", [1, 20])
def test_nan_is_seen_whatever_its_weight(backend, device, count, token):
    """One token takes all the weight; the others', in its split or in another, are exactly zero."""
    cache = filled_cache((2990,), block=16, device=device)
    query = queries_of(cache, [count])
    poison_row(cache, 0, token, 1, "v")
    out = attend(cache, query, softmax_scale=1e3, causal=False)
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_that_is_not_seen_does_not_matter(backend, device, name):
    cache = filled_cache((300, 300, 300), block=16, starts=(100, 0, 0), device=device)
    queries = queries_of(cache, [20, 20, 20])
    cases = {  # (sequence, token): queries that see it, of the last twenty, window 150
        (0, 99): [],
        (1, 131): [0],
        (2, 290): list(range(10, 20)),
    }
    clean = attend(cache, queries, sliding_window=150)
    hit = torch.zeros(60, 4, dtype=torch.bool, device=device)
    for (sequence, token), seen in cases.items():
        poison_row(cache, sequence, token, 0, name)
        hit[[20 * sequence + i for i in seen], :2] = True
    out = attend(cache, queries, sliding_window=150)
    assert torch.equal(out.isnan().all(-1), hit)
    torch.testing.assert_close(out[~hit], clean[~hit], **CLOSE)


def test_outputs_are_zero_where_nothing_is_seen(backend, device):
    cache = filled_cache((0, 3, 40), block=16, starts=(0, 3, 20), device=device)
    queries = queries_of(cache, [2, 2, 40])
    out, lse = attend(cache, queries, return_lse=True)
    blind = torch.zeros(44, dtype=torch.bool, device=device)
    blind[:24] = True
    assert torch.equal((out == 0).flatten(1).all(1), blind)
    assert torch.equal(lse.isneginf().all(-1), blind)
    check_attention(cache, queries)


@pytest.mark.parametrize("shape", [(0, 1), (3, 0)], ids=["no-sequences", "no-queries"])
def test_no_work(backend, device, shape):
    cache = relocated(filled_cache((20, 20, 20), v_dim=96, device=device), range(shape[0]))
    out, lse = attend_dense(cache, torch.randn(*shape, 4, 64, device=device), return_lse=True)
    assert out.shape == (*shape, 4, 96)
    assert lse.shape == (*shape, 4)


def test_runs_repeat_bit_for_bit(backend, device):
    cache = filled_cache(LENS, block=16, device=device)
    queries = queries_of(cache, [1, 40, 2, 0, 3])
    first = attend(cache, queries)
    for _ in range(3):
        assert torch.equal(attend(cache, queries), first)


def test_large_scores(backend, device):
    """Softmax of scores in the hundreds: no overflow, and one token may take it all."""
    cache = filled_cache((300, 17), block=16, device=device)
    queries = [20 * q for q in queries_of(cache, [1, 1], dtype=FP32)]
    check_attention(cache, queries)
