"""The kernel for many query rows (Hopper): against the oracle, and the same bits every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import kvquant
from attending import attend, check_attention, expected
from support import (
    BF16,
    DTYPES,
    FORMATS,
    FP16,
    LAYOUTS,
    Cache,
    empty_cache,
    filled_cache,
    foreign,
    index,
    parts,
    rebuilt,
    same_bits,
    snapshot,
)

pytestmark = pytest.mark.gpu

HEADS = (8, 2)
TOKENS = 9  # of four heads each: more than one block of 32 rows


@pytest.fixture(autouse=True)
def hopper(cuda):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


def regime_of(query: torch.Tensor, cache: Cache) -> str:
    return kvquant.plan(query, cache.view, kvquant.Sequences(cache.table, cache.lens)).regime


def dense(cache: Cache, query: torch.Tensor, **options: Any) -> Any:
    assert regime_of(query, cache) == "many_rows"
    where = {"block_table": cache.table, "seq_lens": cache.lens, "seq_starts": cache.starts}
    return kvquant.attention(query, cache.view, **where, **options)


def make(lens=(1000, 64, 129, 2049), dim=128, dtype="fp16", kv_heads=2, **options: Any) -> Cache:
    return filled_cache(
        lens, dtype=DTYPES[dtype], kv_heads=kv_heads, k_dim=dim, device="cuda",
        block=LAYOUTS[options.pop("layout", "contiguous")],
        fmt=FORMATS[options.pop("fmt", "default")], **options,
    )  # fmt: skip


def queries(cache: Cache, count: int, heads: int, dtype: str = "fp16") -> list[torch.Tensor]:
    dim = cache.view.k.head_dim
    return [
        torch.randn(min(count, n), heads, dim, device="cuda").to(DTYPES[dtype])
        for n in cache.lengths
    ]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("layout", "fmt", "dtype"),
    [
        ("contiguous", "default", "fp16"),
        ("paged16", "default", "bf16"),
        ("paged32", "rotated", "fp16"),
        ("paged64", "plain", "fp16"),
        ("paged256", "mean64", "bf16"),
        ("contiguous", "k8v4", "fp16"),
        ("paged16", "k8v4", "bf16"),
        ("paged32", "k4v4", "fp16"),
        ("paged64", "k4v4", "bf16"),
    ],
)
@pytest.mark.parametrize(
    ("count", "heads"),
    [(5, HEADS), (8, HEADS), (3, (7, 1)), (TOKENS, HEADS), (16, HEADS), (100, (7, 1))],
)
def test_shapes(dim, layout, fmt, dtype, count, heads):
    cache = make(dim=dim, dtype=dtype, kv_heads=heads[1], layout=layout, fmt=fmt)
    check_attention(cache, queries(cache, count, heads[0], dtype), max_seqlen_q=count)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 100},
        {"softcap": 30.0},
        {"sinks": 3.0},
        {"alibi_slopes": 0.1},
        {"causal": False},
        {"split_size": 256},
        {"softmax_scale": 0.3, "sliding_window": 300, "softcap": 20.0, "sinks": 3.0},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("starts", [None, (9, 0, 64, 290)])
@pytest.mark.parametrize("count", [7, 40])
@pytest.mark.parametrize("fmt", ["default", "k4v4"])
def test_features(options, starts, count, fmt):
    cache = make(dtype="bf16", layout="paged16", fmt=fmt, starts=starts)
    vectors = {
        name: torch.rand(HEADS[0], device="cuda") * options[name]
        for name in ("sinks", "alibi_slopes")
        if name in options
    }
    given = queries(cache, count, HEADS[0], "bf16")
    check_attention(cache, given, max_seqlen_q=count, **{**options, **vectors})


def test_scores_that_jump():
    """Nearly one-hot weights, and keys whose lengths jump: bases must follow."""
    cache = make((3000,), room=(4000,))
    key, value = torch.randn(2, 1000, 2, 128, device="cuda", dtype=FP16)
    key *= 2.0 ** torch.randint(-3, 5, (1000, 1, 1), device="cuda")
    cache.append([key], [value])
    for scale in (1, 4, 40):
        for count in (8, 40):
            check_attention(cache, [scale * torch.randn(count, 8, 128, device="cuda").to(FP16)])


def test_the_largest_values():
    """Codes of such rows stand for numbers beyond fp16, which count as the largest."""
    cache = empty_cache((640,), k_dim=128, device="cuda")
    key, value = torch.randn(2, 640, 2, 128, device="cuda", dtype=FP16)
    value[::3] = 65504 * torch.sign(value[::3])
    cache.append([key], [value])
    given = [torch.randn(40, 8, 128, device="cuda", dtype=FP16)]
    out, ref = attend(cache, given), expected(cache, given)[0]
    assert (out - ref).norm() <= 1e-2 * ref.norm()


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize("sign", [-1, 1])
def test_values_at_the_end_of_fp16(sign, count):
    """The middles of such rows round to halves that leave less room than the range."""
    cache = empty_cache((640,), k_dim=128, device="cuda")
    key, value = torch.randn(2, 640, 2, 128, device="cuda", dtype=FP16)
    value[::2] = sign * torch.empty_like(value[::2]).uniform_(-65504, -14432)
    value[::2, :, 0], value[::2, :, 1] = sign * -65504, sign * -14432
    cache.append([key], [value])
    given = [8 * torch.randn(count, 8, 128, device="cuda", dtype=FP16)]
    out, ref = attend(cache, given), expected(cache, given)[0]
    assert out.isfinite().all()
    assert (out - ref).norm() <= 1e-2 * ref.norm()


@pytest.mark.parametrize("scale", [-0.3, -2.0])
@pytest.mark.parametrize("count", [8, 40])
def test_negative_scales(scale, count):
    cache = make((1000,))
    given = queries(cache, count, HEADS[0])
    check_attention(cache, given, max_seqlen_q=count, softmax_scale=scale)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("fmt", ["default", "k4v4"])
def test_who_sees_a_row_that_is_not_finite(part, fmt):
    """NaN for the rows that see it, and for no one else."""
    cache = make((500,), layout="paged64", fmt=fmt)
    query = torch.randn(1, 32, 8, 128, device="cuda", dtype=FP16)
    before = dense(cache, query)
    position, head = 490, 1
    block = int(cache.table[0, position // 64])
    getattr(cache.view, part).params[block, head, position % 64] = 0xFF
    out = dense(cache, query)
    sees = torch.arange(500 - 32, 500, device="cuda") >= position
    assert out[0, sees, 4:].isnan().all()
    torch.testing.assert_close(out[0, ~sees], before[0, ~sees], rtol=2e-3, atol=2e-3)
    assert torch.equal(out[0, :, :4], before[0, :, :4])


def test_tokens_whose_block_is_lost_are_left_out():
    cache = make((500,), layout="paged16", fmt="plain")
    lost = range(10, 14)
    left = [i for i in range(-(-500 // 16)) if i not in lost]
    shorter = Cache(cache.view, cache.table[:, left].contiguous(), cache.lens - 16 * len(lost))
    query = torch.randn(1, 16, 8, 128, device="cuda", dtype=FP16)
    wanted = dense(shorter, query)
    cache.table[0, 10:14] = index([-1, 2**30, -1, 2**30], "cuda")
    torch.testing.assert_close(dense(cache, query), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("count", [5, 8, TOKENS, 16, 100])
@pytest.mark.parametrize("fmt", ["default", "k8v4", "k4v4"])
def test_the_same_bits(count, fmt):
    """Every run, in every layout, of rows at any address."""
    cache = make((9000, 300, 4000), kv_heads=4, layout="paged64", fmt=fmt)
    query = torch.randn(3, count, 16, 128, device="cuda", dtype=FP16)
    first = dense(cache, query)
    for _ in range(50):
        assert torch.equal(dense(cache, query), first)
    slab = Cache(foreign(cache.view), cache.table, cache.lens)
    assert torch.equal(dense(slab, query), first)
    odd = torch.empty(query.numel() + 1, device="cuda", dtype=query.dtype)[1:].view_as(query)
    assert torch.equal(dense(cache, odd.copy_(query)), first)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_are_as_good_as_one(block):
    lens = (1000, 257)
    whole = make(lens)
    paged = empty_cache(lens, k_dim=128, block=block, device="cuda")
    paged.append(whole.keys, whole.values)
    query = torch.randn(2, 40, 8, 128, device="cuda", dtype=FP16)
    options = {"split_size": 256}  # splits do not depend on the capacity then
    assert torch.equal(dense(whole, query, **options), dense(paged, query, **options))


def test_a_captured_chunk_while_lengths_grow():
    cache = make((700, 300), dtype="bf16", layout="paged16", room=(900, 500))
    query = torch.randn(2, 40, 8, 128, device="cuda", dtype=BF16)
    dense(cache, query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dense(cache, query)
    for lens in ([700, 300], [650, 41], [40, 1]):
        cache.lens.copy_(index(lens, "cuda"))
        graph.replay()
        assert torch.equal(out, dense(cache, query))


AGES = ["k8v4", "k4v4"]
BY_AGE_LENGTHS = (40, 250, 256, 300, 512, 700, 1040, 3000)


def by_age(
    name: str, dim: int, dtype: torch.dtype, **layout: Any
) -> tuple[kvquant.QuantizedKVCache, torch.Tensor]:
    """A cache by age, longer than any call, and keys and values for it."""
    cache = kvquant.QuantizedKVCache(
        1, 2, HEADS[1], dim, format=kvquant.CacheFormat.named(name), device="cuda", **layout
    )
    return cache, torch.randn(2, 2, 3200, HEADS[1], dim, device="cuda").to(dtype)


@pytest.mark.parametrize("name", AGES)
@pytest.mark.parametrize("layout", [{"max_seq_len": 3200}, {"block_size": 16}, {"block_size": 64}])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rows_by_age(name, layout, dim, dtype):
    """Calls of a few tokens and of many, at every place of a group and of the ring."""
    cache, rows = by_age(name, dim, DTYPES[dtype], **layout)
    for end in BY_AGE_LENGTHS:
        begin = cache.max_length
        cache.append(0, *rows[:, :, begin:end])
        for count in (3, 9, 33):
            query = torch.randn(2, count, HEADS[0], dim, device="cuda").to(DTYPES[dtype])
            for options in ({}, {"sliding_window": 100}):
                out = cache.attend(0, query, **options)
                with kvquant.use_backend("reference"):
                    ref = cache.attend(0, query, **options).double()
                assert out.isfinite().all()
                assert (out - ref).norm() <= (4e-3 if dtype == "fp16" else 2e-2) * ref.norm()
                assert torch.equal(cache.attend(0, query, **options), out)


@pytest.mark.parametrize("name", AGES)
def test_captured_steps_of_several_tokens_by_age(name):
    """A graph of append and attention across the edges of groups, as eager calls."""
    cache, rows = by_age(name, 128, FP16, block_size=64)
    other = by_age(name, 128, FP16, block_size=64)[0]
    for x in (cache, other):
        x.reserve(3000)
        x.append(0, *rows[:, :, :500])
    query, key, value = (
        torch.randn(2, 4, n, 128, device="cuda").to(FP16) for n in (HEADS[0], 2, 2)
    )
    graph = torch.cuda.CUDAGraph()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        cache.attend(0, query)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = cache.attend(0, query, key, value)
    for i in range(80):
        query.normal_(), key.normal_(), value.normal_()
        graph.replay()
        expected = other.attend(0, query, key, value)
        assert torch.equal(out, expected), i


STEPS = {  # lengths, and room for more
    # More sequences than a GPU takes at once, whose new rows are in the first tile or the last.
    "many": ([7, 60, 250, 640, 2000, 31, 129, 1021] * 8, 400),
    "short": ([3, 300, 1000], 9000),  # splits that have no tokens
}


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("fmt", ["default", "k4v4"])
@pytest.mark.parametrize("which", STEPS)
def test_steps_while_their_append_still_runs(which, fmt, advance):
    lens, more = STEPS[which]
    batch = len(lens)
    cache = make(lens, kv_heads=8, layout="paged64", fmt=fmt, room=[n + more for n in lens])
    other = Cache(rebuilt(cache.view, snapshot(cache.view)), cache.table, cache.lens.clone())
    seqs = kvquant.Sequences(cache.table, cache.lens, advance=advance)
    for i in range(40):
        query = torch.randn(batch, 8, 32, 128, device="cuda", dtype=FP16)
        key, value = torch.randn(2, batch, 8, 8, 128, device="cuda", dtype=FP16)
        step = kvquant.plan(query, cache.view, seqs, key, value)
        assert step.regime == "many_rows"
        out = step.run(query, cache.view, seqs, key, value)
        if not advance:
            cache.lens += 8
        where = {"block_table": other.table, "seq_lens": other.lens}
        kvquant.append_(key, value, other.view, **where, advance=True)
        assert torch.equal(out, kvquant.attention(query, other.view, **where)), i
        assert torch.equal(cache.lens, other.lens)
    for name, rows in parts(other.view).items():
        assert same_bits(parts(cache.view)[name], rows), name


def test_threads_that_step_on_one_stream():
    """Launches of one thread may come between an append of another and its attention."""
    lens, steps, threads = [20, 700, 90], 60, 3
    given = [
        (torch.randn(steps, 3, 8, 32, 128, device="cuda", dtype=FP16),
         *torch.randn(2, steps, 3, 8, 8, 128, device="cuda", dtype=FP16))
        for _ in range(threads)
    ]  # fmt: skip
    ours = [make(lens, kv_heads=8, room=[9000] * 3) for _ in range(threads)]
    others = [
        Cache(rebuilt(cache.view, snapshot(cache.view)), cache.table, cache.lens.clone())
        for cache in ours
    ]

    def run(cache: Cache, rows: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        seqs = kvquant.Sequences(cache.table, cache.lens, advance=True)
        found = []
        for query, key, value in zip(*rows, strict=True):
            step = kvquant.plan(query, cache.view, seqs, key, value)
            found.append(step.run(query, cache.view, seqs, key, value))
        return found

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(run, ours, given))
    for i, cache in enumerate(others):
        expected = run(cache, given[i])
        assert torch.equal(ours[i].lens, cache.lens)
        assert all(torch.equal(a, b) for a, b in zip(found[i], expected, strict=True)), i


@pytest.mark.parametrize("name", AGES)
def test_steps_by_age_while_their_append_still_runs(name):
    """Groups open and close in some of the sequences at every step."""
    lens = torch.arange(64) * 9 + 200
    caches = [
        kvquant.QuantizedKVCache(
            1, 64, 2, 128, format=kvquant.CacheFormat.named(name), device="cuda", max_seq_len=1400
        )
        for _ in range(2)
    ]  # fmt: skip
    edges = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).to(torch.int32)
    rows = torch.randn(2, int(edges[-1]), 2, 128, device="cuda", dtype=FP16)
    for cache in caches:
        cache.append(0, *rows, cu_seqlens=edges)
    for i in range(60):
        query = torch.randn(64, 7, 8, 128, device="cuda", dtype=FP16)
        key, value = torch.randn(2, 64, 7, 2, 128, device="cuda", dtype=FP16)
        out = caches[0].attend(0, query, key, value)
        caches[1].append(0, key, value)
        assert torch.equal(out, caches[1].attend(0, query)), i
    ours, theirs = (cache.state_dict() for cache in caches)
    for at, x in ours.items():
        assert same_bits(x, theirs[at]), at
