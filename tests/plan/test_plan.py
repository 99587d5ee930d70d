"""A plan: made once, run at every step, on whatever memory looks as planned."""

from __future__ import annotations

import pytest
import torch

import kvquant
from kvquant import CacheView, Plan, Sequences, plan
from support import (
    BF16,
    DTYPES,
    FORMATS,
    LAYOUTS,
    Cache,
    assert_unchanged,
    empty_cache,
    filled_cache,
    foreign,
    index,
    parts,
    random_rows,
    rebuilt,
    same_bits,
    snapshot,
)

LENS = (70, 3, 130)
ROOM = (120, 60, 190)


def new(cache: Cache, tokens: int, *, heads: int = 4, packed: bool = False, dtype=BF16):
    batch, view = len(cache.lengths), cache.view
    lead = (batch * tokens,) if packed else (batch, tokens)
    query = torch.randn(*lead, heads, view.k.head_dim).to(dtype).to(cache.device)
    key = random_rows(*lead, view.num_kv_heads, view.k.head_dim, dtype=dtype, device=cache.device)
    value = torch.randn(*lead, view.num_kv_heads, view.v.head_dim).to(dtype).to(cache.device)
    return query, key, value


def seqs_of(cache: Cache, **options) -> Sequences:
    return Sequences(cache.table, cache.lens, cache.starts, **options)


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_run_is_an_append_and_an_attention(backend, device, tokens, form, advance):
    options = {"sliding_window": 60, "softcap": 30.0}
    cache = filled_cache(LENS, room=ROOM, block=16, v_dim=48, device=device)
    apart, lens = rebuilt(cache.view, snapshot(cache.view)), cache.lens.clone()
    query, key, value = new(cache, tokens, packed=form == "packed")
    extra, where = {}, {"block_table": cache.table}
    if form == "packed":
        cu = index([tokens * b for b in range(4)], device)
        extra = {"cu_seqlens_q": cu, "max_seqlen_q": tokens}
    kvquant.append_(
        key, value, apart, **where, seq_lens=lens,
        cu_seqlens=extra.get("cu_seqlens_q"), max_seqlen=extra.get("max_seqlen_q"),
    )  # fmt: skip
    sinks = torch.randn(4, device=device)
    wanted = kvquant.attention(
        query, apart, **where, seq_lens=lens + tokens, sinks=sinks, return_lse=True, **extra,
        **options,
    )  # fmt: skip
    seqs = seqs_of(cache, advance=advance, **extra)
    step = plan(query, cache.view, seqs, key, value, sinks=True, return_lse=True, **options)
    got = step.run(query, cache.view, seqs, key, value, sinks=sinks)
    assert all(map(same_bits, got, wanted))
    assert cache.lens.tolist() == [n + tokens * advance for n in lens.tolist()]
    for name, tensor in parts(apart).items():
        assert same_bits(parts(cache.view)[name], tensor), name


def test_a_plan_is_remembered_and_lasts(native):
    cache = filled_cache((20, 30), room=(200, 200), block=16, device=native)
    query, key, value = new(cache, 1)
    seqs = seqs_of(cache, advance=True)
    step = plan(query, cache.view, seqs, key, value)
    assert isinstance(step, Plan)
    assert step is plan(*(x.clone() for x in (query,)), cache.view, seqs, key, value)
    assert step is not plan(query, cache.view, seqs)
    assert step is not plan(query, cache.view, seqs, key, value, causal=False)
    larger = CacheView.allocate(99, 2, 16, 64, device=native)  # more blocks: the same plan
    assert step is plan(query, larger, seqs, key, value)
    assert step.mismatch(query, larger, seqs, key, value) is None
    for _ in range(100):
        step.run(query, cache.view, seqs, key, value)
    assert cache.lens.tolist() == [120, 130]
    with kvquant.use_backend("reference"):
        assert plan(query, cache.view, seqs, key, value).backend == "reference"


def test_packed_rows_in_any_number(backend, device):
    cache = filled_cache(LENS, room=ROOM, block=16, device=device)
    plans = set()
    for counts in ([1, 1, 1], [4, 0, 1], [0, 2, 2]):
        cu = index([0, *torch.tensor(counts).cumsum(0).tolist()], device)
        seqs = seqs_of(cache, cu_seqlens_q=cu, max_seqlen_q=4)
        query, key, value = (x[: sum(counts)] for x in new(cache, 4, packed=True))
        plans.add(plan(query, cache.view, seqs, key, value))
        got = next(iter(plans)).run(query, cache.view, seqs, key, value)
        after = {"block_table": cache.table, "seq_lens": cache.lens + cu.diff()}
        wanted = kvquant.attention(query, cache.view, **after, cu_seqlens_q=cu, max_seqlen_q=4)
        assert same_bits(got, wanted)
    assert len(plans) == 1


@pytest.mark.parametrize("layout", ["contiguous", "paged16", "paged64"])
@pytest.mark.parametrize("fmt", ["default", "mean64", "plain"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_foreign_slab_is_as_good_as_our_own_memory(backend, device, dtype, fmt, layout):
    kind = {"block": LAYOUTS[layout], "fmt": FORMATS[fmt], "v_dim": 96, "device": device}
    cache = filled_cache(LENS, room=ROOM, dtype=DTYPES[dtype], **kind)
    slab, lens = foreign(cache.view), cache.lens.clone()
    query, key, value = new(cache, 2, dtype=DTYPES[dtype])
    ours, theirs = seqs_of(cache, advance=True), Sequences(cache.table, lens, advance=True)
    step = plan(query, cache.view, ours, key, value)
    for _ in range(4):
        query, key, value = new(cache, 2, dtype=DTYPES[dtype])
        a = step.run(query, cache.view, ours, key, value)
        b = step.run(query, slab, theirs, key, value)
        assert same_bits(a, b)
    for name, tensor in parts(cache.view).items():
        assert same_bits(parts(slab)[name], tensor), name


def test_compiled_on_a_slab_as_lengths_grow(backend, device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = filled_cache(LENS, room=ROOM, block=16, device=device)
    slab, lens = foreign(cache.view), cache.lens.clone()
    ours, theirs = seqs_of(cache, advance=True), Sequences(cache.table, lens, advance=True)
    step = plan(new(cache, 1)[0], cache.view, ours, *new(cache, 1)[1:])

    def run(query, key, value):
        return step.run(query * 2, slab, theirs, key, value) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(20):
        query, key, value = new(cache, 1)
        wanted = step.run(query * 2, cache.view, ours, key, value) + 1
        assert same_bits(compiled(query, key, value), wanted)
    assert torch.equal(lens, cache.lens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, tensor in parts(cache.view).items():
        assert same_bits(parts(slab)[name], tensor), name


@pytest.mark.gpu
def test_captured_on_a_slab_as_lengths_grow(cuda):
    cache = filled_cache(LENS, room=ROOM, block=16, device=cuda)
    slab, lens = foreign(cache.view), cache.lens.clone()
    ours, theirs = seqs_of(cache, advance=True), Sequences(cache.table, lens, advance=True)
    static = new(cache, 1)
    step = plan(static[0], slab, theirs, *static[1:])
    out = torch.empty_like(static[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(static[0], slab, theirs, *static[1:], out=out)
    for _ in range(30):
        query, key, value = new(cache, 1)
        for to, x in zip(static, (query, key, value), strict=True):
            to.copy_(x)
        graph.replay()
        assert same_bits(out, step.run(query, cache.view, ours, key, value))
    assert torch.equal(lens, cache.lens)


@pytest.mark.parametrize("strided", [False, True])
def test_out_and_lse_of_the_caller(backend, device, strided):
    cache = filled_cache(LENS, room=ROOM, block=16, device=device)
    query, *_ = new(cache, 3, packed=True)
    cu = index([1, 3, 3, 6], device)
    seqs = seqs_of(cache, cu_seqlens_q=cu, max_seqlen_q=3)
    step = plan(query, cache.view, seqs, return_lse=True)
    wanted = step.run(query, cache.view, seqs)
    base = torch.full((9, 8, 64) if strided else (9, 4, 64), 7.0, device=device, dtype=BF16)
    out, lse = base[:, ::2] if strided else base, torch.full((9, 4), 7.0, device=device)
    got = step.run(query, cache.view, seqs, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    for x, y in zip(got, wanted, strict=True):
        assert same_bits(x[1:6], y[1:6])
        assert (x[[0, 6, 7, 8]] == 7).all()  # rows of no sequence keep what they held
    if strided:
        assert (base[:, 1::2] == 7).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("causal", [True, False])
def test_an_exact_prompt_sees_its_own_rows(backend, device, causal, dtype):
    cache = empty_cache((40, 40), device=device)
    query, key, value = new(cache, 40, dtype=DTYPES[dtype])
    seqs = seqs_of(cache, advance=True)
    exact = plan(query, cache.view, seqs, key, value, exact=True, causal=causal)
    assert exact.backend == "torch"
    got = exact.run(query, cache.view, seqs, key, value)
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=causal
    )
    torch.testing.assert_close(got.float(), wanted.transpose(1, 2), atol=2e-2, rtol=2e-2)
    assert cache.lens.tolist() == [40, 40]
    for options in ({"sliding_window": 9}, {"softcap": 3.0}, {"return_lse": True}):
        assert plan(query, cache.view, seqs, key, value, exact=True, **options).backend != "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["at odd addresses", "expanded", "in a wide row"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_an_exact_prompt_in_any_strides(cuda, name, dtype, form):
    """Torch's kernels take some of these for what they are not."""
    cache = empty_cache((150, 150), k_dim=64, device=cuda)
    rows = dict(zip(("query", "key", "value"), new(cache, 150, dtype=DTYPES[dtype]), strict=True))
    x = rows[name]
    if form == "expanded":
        strange = x[:1].expand(2, -1, -1, -1)
        rows[name] = strange.contiguous()
    else:
        width = x.shape[-1] + 5
        wide = x.new_empty(x.numel() // x.shape[-1] * width + 1)
        if form == "in a wide row":
            strange = wide[:-1].view(*x.shape[:-1], width)[..., : x.shape[-1]]
        else:
            strange = wide[1 : x.numel() + 1].view(x.shape)
        strange.copy_(x)
    results = []
    for given in (rows, rows | {name: strange}):
        seqs = seqs_of(cache)
        step = plan(given["query"], cache.view, seqs, given["key"], given["value"], exact=True)
        assert step.backend == "torch"
        results.append(step.run(given["query"], cache.view, seqs, given["key"], given["value"]))
    torch.testing.assert_close(*results, atol=1e-3, rtol=0.02)


def test_a_bound_on_rows_that_is_far_too_high(native):
    """Room for partial results is made for the rows that there are."""
    cache = filled_cache((600, 700), block=16, device=native)
    query, *_ = new(cache, 24, packed=True)
    results = []
    for bound in (40, 2**30):
        seqs = seqs_of(cache, cu_seqlens_q=index([0, 8, 48], native), max_seqlen_q=bound)
        results.append(plan(query, cache.view, seqs, split_size=256).run(query, cache.view, seqs))
    assert same_bits(*results)


def _case(change):
    def made(cache):
        query, key, value = new(cache, 2)
        good = {
            "query": query, "view": cache.view, "seqs": seqs_of(cache), "key": key, "value": value,
        }  # fmt: skip
        return good | change(good, cache)

    return made


MISFITS = {
    "query": _case(lambda good, _: {"query": good["query"][:, :1]}),
    "query: planned": _case(lambda good, _: {"query": good["query"].half()}),
    "key": _case(lambda good, _: {"key": good["key"][:, :1], "value": good["value"][:, :1]}),
    "value: on cpu": _case(lambda good, _: {"key": good["key"].to("meta")}),
    "value": _case(lambda good, _: {"value": None}),
    "view": _case(lambda good, _: {"view": CacheView.allocate(9, 2, 32, 64)}),
    "view: expected": _case(lambda good, _: {"view": good["view"].k}),
    "seqs": _case(lambda good, cache: {"seqs": seqs_of(cache, advance=True)}),
    "block_table: on meta": _case(
        lambda good, cache: {"seqs": Sequences(cache.table.to("meta"), cache.lens.to("meta"))}
    ),
    "seqs: expected": _case(lambda good, cache: {"seqs": cache.table}),
    "out": _case(lambda good, _: {"out": good["query"][:1].clone()}),
    "lse": _case(lambda good, _: {"lse": torch.zeros(3, 2, 4)}),
    "sinks": _case(lambda good, _: {"sinks": torch.zeros(4)}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_look_as_planned_is_refused_by_name(name):
    cache = filled_cache(LENS, room=ROOM, block=16)
    query, key, value = new(cache, 2)
    step = plan(query, cache.view, seqs_of(cache), key, value)
    before, arguments = snapshot(cache.view), MISFITS[name](cache)
    with pytest.raises((TypeError, ValueError), match=f"({name.split(':')[0]}|key).*: "):
        step.run(**arguments)
    assert_unchanged(cache.view, before)


def test_it_prints_what_it_does(native):
    cache = filled_cache(LENS, room=ROOM, block=16, device=native)
    query, key, value = new(cache, 1)
    text = str(plan(query, cache.view, seqs_of(cache), key, value))
    assert text.startswith(f"append and attend: {native}, ")
    assert "2 query heads a KV head" in text
    assert str(plan(query, cache.view, seqs_of(cache))).startswith(f"attend: {native}, ")
