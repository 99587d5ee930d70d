"""Attention of long chunks by dense pieces: its logic on any device, its kernels on CUDA."""

from __future__ import annotations

import logging

import pytest
import torch

import kvquant
from attending import (
    assert_as_good,
    assert_lse,
    attend,
    check_attention,
    expected,
    torch_own,
)
from kvquant import HostLengths, QuantizedKVCache, Sequences, attention, plan
from kvquant.backends import cuts, pieces
from kvquant.backends.dense import Dense
from kvquant.backends.steps import MOST_READS
from pieced import RATES, dense, steps, take_pieces, through_pieces
from support import BF16, FORMATS, FP16, FP32, LAYOUTS, filled_cache, foreign, index

FEATURES = {
    "usual": {},
    "window": {"sliding_window": 520},
    "all": {"causal": False},
    "all, window": {"causal": False, "sliding_window": 600},
    "scale": {"softmax_scale": 0.3},
    "sinks": {"sinks": True},
}


def queries_of(rows, heads, dim, dtype, device):
    return [torch.randn(n, heads, dim).to(dtype).to(device) for n in rows]


@pytest.fixture
def used(monkeypatch, device):
    """Pieces serve whatever they can; on the CPU by steps in torch. Which plans did."""
    if device == "cpu":
        return through_pieces(monkeypatch)
    take_pieces(monkeypatch)
    return None


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", ["contiguous", "paged16", "paged64"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_ragged_chunks(device, used, feature, layout, dtype):
    lens, rows = (900, 700, 700, 260, 66, 300), (100, 64, 64, 260, 3, 0)
    cache = filled_cache(
        lens, dtype=dtype, kv_heads=2, k_dim=64, block=LAYOUTS[layout], device=device
    )
    options = dict(FEATURES[feature])
    if options.get("sinks"):
        options["sinks"] = torch.randn(8, device=device)
    check_attention(cache, queries_of(rows, 8, 64, dtype, device), **options)
    assert used is None or used()


@pytest.mark.parametrize(
    ("dims", "heads", "fmt"),
    [
        ((64, 64), (8, 2), "mean64"), ((80, 80), (7, 1), "default"), ((96, 96), (3, 3), "plain"),
        ((128, 128), (28, 4), "default"), ((192, 192), (4, 2), "rotated"),
        ((256, 256), (4, 1), "default"), ((128, 128), (5, 5), "mean16"),
        ((128, 128), (4, 2), "k8v4"), ((128, 128), (4, 2), "k4v4"), ((256, 256), (2, 1), "k4v4"),
    ],
    ids=str,
)  # fmt: skip
def test_shapes(device, used, dims, heads, fmt):
    cache = filled_cache(
        (401, 1500), dtype=BF16, kv_heads=heads[1], k_dim=dims[0], v_dim=dims[1],
        fmt=FORMATS[fmt], block=64, device=device,
    )  # fmt: skip
    check_attention(cache, queries_of((129, 77), heads[0], dims[0], BF16, device))


def test_left_padding(device, used):
    lens, starts = (600, 600, 300, 200), (0, 130, 250, 200)
    cache = filled_cache(
        lens, kv_heads=2, k_dim=64, block=32, device=device, starts=starts, dtype=FP16
    )
    for options in ({}, {"sliding_window": 512}, {"causal": False}):
        check_attention(cache, queries_of((100, 100, 100, 100), 4, 64, FP16, device), **options)
        check_attention(cache, queries_of((600, 600, 300, 200), 4, 64, FP16, device), **options)


@pytest.mark.parametrize("layout", [{"max_seq_len": 1200}, {"block_size": 16}])
@pytest.mark.parametrize("name", ["k8v4", "k4v4"])
@pytest.mark.parametrize("dim", [64, 128])
def test_by_age(device, used, name, layout, dim):
    """Of three groups the first is young, and so is the open one; the rest are old."""
    cache = QuantizedKVCache(
        1, 2, 2, dim, format=kvquant.CacheFormat.named(name), device=device, **layout
    )
    rows = torch.randn(2, 2, 1100, 2, dim, device=device).to(FP16)
    cache.append(0, *rows[:, :, :600])
    for begin, end in ((600, 768), (768, 868), (868, 1100)):
        query = torch.randn(2, end - begin, 8, dim, device=device).to(FP16)
        out = cache.attend(0, query, *rows[:, :, begin:end], exact_prompt=False)
        if end == 1100:  # fed to the group's end, and from there
            query, out = (x[:, 1024 - begin :] for x in (query, out))
        with kvquant.use_backend("reference"):
            ref = cache.attend(0, query)
        error = (out.double() - ref.double()).norm() / ref.double().norm()
        assert error < 2e-3, float(error)
    assert used is None or used()


def test_a_slab_gives_the_same_bits(device, used):
    cache = filled_cache((700, 900), kv_heads=2, k_dim=128, block=64, device=device)
    queries = queries_of((128, 128), 8, 128, BF16, device)
    out = attend(cache, queries)
    cache.view = foreign(cache.view)
    assert torch.equal(attend(cache, queries), out)


def test_hard_scores(device, used):
    """Keys whose norms jump from piece to piece, queries that pick nearly one token."""
    cache = filled_cache((50, 50), room=(3000, 2500), kv_heads=2, k_dim=64, device=device)
    for factor in (1.0, 8.0, 0.1, 20.0):
        rows = [torch.randn(n, 2, 64, device=device).to(BF16) * factor for n in (600, 500)]
        cache.append(rows, [torch.randn_like(x) for x in rows])
    queries = [x * 5 for x in queries_of((300, 300), 8, 64, BF16, device)]
    check_attention(cache, queries)
    check_attention(cache, queries, sliding_window=1000)


def test_rows_that_are_not_finite(device, used):
    """They reach who sees them, and no one else."""
    cache = filled_cache((200,), room=(1200,), kv_heads=2, k_dim=64, device=device)
    rows = torch.randn(2, 1000, 2, 64, device=device).to(BF16)
    rows[0, 100, 0, 3] = torch.inf  # a key of head 0: token 300
    rows[1, 950, 1, 5] = torch.nan  # a value of head 1: token 1150
    cache.append([rows[0]], [rows[1]])
    (query,) = queries_of((200,), 4, 64, BF16, device)
    out = attend(cache, [query])
    position = torch.arange(1000, 1200, device=device)
    assert torch.equal(out[:, :2].isnan().all(-1).all(-1), position >= 300)
    assert torch.equal(out[:, 2:].isnan().any(-1).any(-1), position >= 1150)
    assert torch.equal(out[:, 2:].isnan().all(-1).all(-1), position >= 1150)
    out = attend(cache, [query], sliding_window=800)
    seen = (position >= 300) & (position < 1100)
    assert torch.equal(out[:, :2].isnan().any(-1).any(-1), seen)


@pytest.mark.parametrize("advance", [False, True])
def test_new_rows_are_appended_first(device, used, advance):
    """Dense calls with their keys and values, in a loop of chunks."""
    cache = filled_cache((300, 300), room=(900, 900), kv_heads=2, k_dim=64, dtype=FP16,
                         device=device)  # fmt: skip
    for _ in range(3):
        query, key, value = (torch.randn(2, 200, h, 64, device=device).to(FP16) for h in (4, 2, 2))
        seqs = Sequences(cache.table, cache.lens, advance=advance)
        if cache.lengths[0] == 500:
            seqs = Sequences(
                cache.table, cache.lens, advance=advance, on_host=HostLengths((500, 500))
            )
        made = plan(query, cache.view, seqs, key, value)
        assert made.regime == "pieces"
        assert made.reads_lengths
        out = made.run(query, cache.view, seqs, key, value)
        if not advance:
            cache.lens += 200
        again = attention(query, cache.view, block_table=cache.table, seq_lens=cache.lens)
        assert torch.equal(out, again)


@pytest.mark.gpu
def test_queries_at_odd_addresses(cuda, monkeypatch):
    take_pieces(monkeypatch)
    cache = filled_cache((900, 900), dtype=FP16, kv_heads=2, k_dim=64, block=64, device=cuda)
    query = torch.randn(2, 100, 8, 64, dtype=FP16, device=cuda)
    strange = query.new_empty(query.numel() + 1)[1:].view(query.shape).copy_(query)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    wanted, got = (attention(x, cache.view, **where) for x in (query, strange))
    assert torch.equal(got, wanted)


def test_a_mixed_batch_is_split(device, used):
    """A long chunk beside sequences that decode, whose rows the kernel that reads codes takes."""
    lens, rows = (300, 41, 1, 900, 17, 64), (1, 1, 1, 300, 17, 2)
    cache = filled_cache(lens, kv_heads=2, k_dim=64, block=16, device=device)
    check_attention(cache, queries_of(rows, 8, 64, BF16, device))


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_mixed_batch_appends(device, used, advance, on_host):
    """Packed rows with their keys and values: decode steps, a long chunk, a short one."""
    lens, rows = (40, 41, 500, 600, 17, 500), (1, 1, 300, 300, 17, 2)
    room = [n + new for n, new in zip(lens, rows, strict=True)]
    cache = filled_cache(lens, room=room, kv_heads=2, k_dim=64, block=16, dtype=FP16,
                         device=device)  # fmt: skip
    total = sum(rows)
    query, key, value = (torch.randn(total, h, 64).to(FP16).to(device) for h in (8, 2, 2))
    cu = index([0, *torch.tensor(rows).cumsum(0).tolist()], device)
    seqs = Sequences(
        cache.table, cache.lens, cu_seqlens_q=cu, max_seqlen_q=300, advance=advance,
        on_host=HostLengths(lens, None, rows) if on_host else None,
    )  # fmt: skip
    made = plan(query, cache.view, seqs, key, value, return_lse=True)
    assert made.regime == "pieces"
    out, lse = made.run(query, cache.view, seqs, key, value)
    assert cache.lengths == (room if advance else list(lens))
    cache.lens = index(room, device)
    cache.keys = cache.values = []
    queries = list(query.split(rows))
    ref, ref_lse = expected(cache, queries)
    own, own_lse = torch_own(cache, queries)
    assert_as_good(out, ref, own)
    assert_lse(lse, ref_lse, own_lse, FP16)


def test_a_cache_tells_its_lengths(device, used, monkeypatch):
    """No length is read back where the host knows it; results are those of what is stored."""
    from kvquant.backends import runs

    def refuse(*_):
        raise AssertionError("read back")

    monkeypatch.setattr(runs, "_read_back", refuse)
    cache = QuantizedKVCache(1, 2, 2, 64, block_size=64, max_seq_len=1024, device=device)
    rows = lambda *lead: [torch.randn(*lead, h, 64, device=device).to(BF16) for h in (8, 2, 2)]  # noqa: E731
    cache.attend(0, *rows(2, 70))
    for _ in range(3):  # a new plan, then a remembered one
        cache.attend(0, *rows(2, 100))
    cu = torch.tensor([0, 80, 200], dtype=torch.int32)
    cache.attend(0, *rows(200), cu_seqlens_q=cu)
    assert cache.seq_lens.tolist() == [450, 490]
    query = rows(2, 64)[0]
    out = cache.attend(0, query)
    view, seqs = cache.layer(0)
    exact = attention(query.float(), view, block_table=seqs.block_table, seq_lens=seqs.seq_lens)
    assert torch.allclose(out.float(), exact, atol=2e-2)


@pytest.mark.parametrize("small_table", [True, False])
@pytest.mark.parametrize("what", ["a block", "a row"])
def test_odd_batches_are_left_to_the_kernel_that_reads_codes(
    device, used, monkeypatch, what, small_table
):
    """A block that is none, or a length that the rows do not fit: as that kernel has it."""
    from kvquant.backends import runs

    monkeypatch.setattr(runs, "_SMALL_TABLE", 4096 if small_table else 0)
    cache = filled_cache((700, 300), kv_heads=2, k_dim=64, block=16, dtype=FP16, device=device)
    seqs = Sequences(cache.table, cache.lens)
    query = torch.randn(2, 100, 8, 64).to(FP16).to(device)
    made = plan(query, cache.view, seqs)
    prepared = made.launch.__self__
    assert isinstance(prepared, pieces.Pieces)
    assert runs.runs_of_call(query, cache.view, seqs, False, 100)
    if what == "a block":
        cache.table[0, 3] = -1
    else:
        cache.lens[1] = 90
    assert not runs.runs_of_call(query, cache.view, seqs, False, 100)
    out = made.run(query, cache.view, seqs)
    own = prepared.otherwise.launch(query, cache.view, seqs, None, None)
    assert torch.equal(out, own)


@pytest.mark.parametrize("on_host", [None, HostLengths((), rows=())])
def test_packed_rows_of_no_sequence(device, used, on_host):
    cache = filled_cache((300,), kv_heads=2, k_dim=64, block=16, device=device)
    none = index([], device)
    seqs = Sequences(
        cache.table[:0], none, cu_seqlens_q=index([0], device), max_seqlen_q=100, on_host=on_host
    )
    query = torch.randn(100, 8, 64, device=device).to(FP16)
    made = plan(query, cache.view, seqs)
    out = made.run(query, cache.view, seqs)
    assert out.shape == query.shape
    assert not out.any()


def test_limits_are_the_kernels():
    _C = pytest.importorskip("kvquant._C")
    assert (_C.most_pieces, _C.most_merged) == (MOST_READS, cuts.FOLD)


def test_little_memory_gives_the_same(monkeypatch):
    """More pieces than are kept before they are merged, and few."""
    cache = filled_cache((7000, 7000), kv_heads=1, k_dim=64, dtype=FP16)
    queries = queries_of((100, 100), 2, 64, FP16, "cpu")
    outs = []
    for memory in (540_000, 256 << 20):
        with monkeypatch.context() as patch:
            used = through_pieces(patch, memory=memory)
            check_attention(cache, queries)
            outs.append(attend(cache, queries).double())
            assert used()
    assert (outs[0] - outs[1]).abs().max() < 2e-3


def test_a_size_that_a_kernel_does_not_take(monkeypatch, caplog):
    """The next kernel takes it, in the end the one that reads codes; it is said once."""
    kvquant_logger = logging.getLogger("kvquant")
    caplog.set_level(logging.WARNING, kvquant_logger.name)

    def picky(query, *_):
        raise RuntimeError("no plan for these sizes")

    cache = filled_cache((1300,), kv_heads=2, k_dim=64, dtype=FP16)
    queries = queries_of((192,), 8, 64, FP16, "cpu")
    good = Dense("good", False, 1e12, dense)
    for kernels in (
        (Dense("picky", True, 1e12, picky), good),
        (Dense("fussy", True, 1e12, picky),),
    ):
        with monkeypatch.context() as patch:
            used = through_pieces(patch, using=steps(kernels))
            check_attention(cache, queries)
            check_attention(cache, queries)
            assert used()
    said = [x.getMessage() for x in caplog.records if "does not take" in x.getMessage()]
    assert any("picky" in x for x in said)
    assert len(said) == len(set(said))


def test_captured_calls_are_left_to_the_kernel_that_reads_codes(monkeypatch):
    def refuse(*_):
        raise AssertionError("a dense kernel was called")

    used = through_pieces(
        monkeypatch, using=steps((Dense("x", False, 1e12, refuse),), capturing=True)
    )
    cache = filled_cache((700,), kv_heads=2, k_dim=64, dtype=FP16)
    check_attention(cache, queries_of((200,), 8, 64, FP16, "cpu"))
    assert used()


def problem(**changes):
    options = changes.pop("options", {})
    dtype, rows = changes.pop("dtype", FP16), changes.pop("rows", 256)
    cache = filled_cache((300,), kv_heads=2, k_dim=64)
    seqs = Sequences(cache.table, cache.lens)
    query = torch.zeros(1, rows, 8, 64, dtype=dtype)
    from kvquant.calls import problem_of

    return problem_of(
        query, cache.view, seqs, None, None, kvquant.view.Options.of(64, **options), **changes
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"options": {"softcap": 30.0}}, "softcap"),
        ({"alibi_slopes": True}, "ALiBi"),
        ({"options": {"split_size": 256}}, "split_size"),
        ({"options": {"softmax_scale": -1.0}}, "softmax_scale"),
        ({"options": {"sliding_window": 100}}, "sliding_window"),
        ({"dtype": FP32}, "float32"),
        ({"rows": 16}, "fewer than"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals_are_named(monkeypatch, changes, why):
    assert "whatever the lengths" in pieces.refuses(problem(), 256 << 20, RATES)
    take_pieces(monkeypatch)
    assert pieces.refuses(problem(), 256 << 20, RATES) is None
    assert why in pieces.refuses(problem(**changes), 256 << 20, RATES)
    assert "KVQUANT_CHUNK_MEMORY" in pieces.refuses(problem(), 1 << 20, RATES)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ((1, 2), TypeError, "on_host"),
        (HostLengths((1,)), ValueError, "on_host.seq_lens: expected 2"),
        (HostLengths((1, -1)), ValueError, "on_host.seq_lens"),
        (HostLengths([1, 1]), TypeError, "on_host.seq_lens"),
        (HostLengths((1, 1.0)), TypeError, "on_host.seq_lens"),
        (HostLengths((1, 1), (0, 0)), ValueError, "on_host.seq_starts"),
        (HostLengths((1, 1), None, (1, 1)), ValueError, "on_host.rows"),
    ],
)
def test_lengths_on_the_host_are_checked(bad, error, match):
    table = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(error, match=match):
        Sequences(table, index((1, 1), "cpu"), on_host=bad)
