"""What generation does with sequences, in every layout; and who holds which block."""

from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch

from kvquant import CacheFullError, CacheView, Sequences
from kvquant.cache import blocks
from kvquant.cache.blocks import BlockMap, BlockPool, Change
from kvquant.cache.memory import LayerMemory
from modelled import (
    KINDS,
    LAYERS,
    Rows,
    Unchanged,
    append_dense,
    append_ragged,
    assert_same,
    make,
    rows,
)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def filled(kind, device):
    """A cache with 40, 33 and 45 tokens, and its model."""
    cache, model = make(kind, device=device), Rows(3)
    append_dense([cache], model, 30)
    append_ragged([cache], model, [10, 3, 15])
    return cache, model


@pytest.mark.parametrize("length", [100, 45, 41, 34, 33, 32, 16, 1, 0, -1, -3, -12, -40, -100])
def test_crop(filled, length):
    cache, model = filled
    cache.crop(length)
    model.crop(length)
    model.check(cache)
    append_dense([cache], model, 19)
    model.check(cache)


def test_cropped_tokens_come_back_as_they_were(kind, device):
    """Groups that were opened keep their means: speculative decoding leaves no trace."""
    cache, twin = make(kind, device=device), make(kind, device=device)
    append_dense([cache, twin], None, 40)
    for _ in range(5):
        append_dense([cache], None, 4)
        cache.crop(-4)
        assert_same(cache, twin)
        append_dense([cache, twin], None, 2)
    assert_same(cache, twin)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0], [0, 0, 2]], ids=str)
def test_reorder(filled, order):
    cache, model = filled
    cache.set_seq_starts(torch.tensor([0, 0, 0], dtype=torch.int32, device=cache.device))
    where = cache.block_table.data_ptr(), cache.seq_lens.data_ptr()
    for _ in range(3):
        cache.reorder(torch.tensor(order))
        model.select(order)
        model.check(cache)
        append_dense([cache], model, 3)
        model.check(cache)
    assert where == (cache.block_table.data_ptr(), cache.seq_lens.data_ptr())


@pytest.mark.parametrize("chosen", [[1], [2, 0], [0, 1, 2], [2, 1, 1, 0, 2]], ids=str)
def test_select(filled, chosen):
    cache, model = filled
    starts = torch.tensor([3, 0, 5], dtype=torch.int32, device=cache.device)
    cache.set_seq_starts(starts)
    cache.select(chosen)
    model.select(chosen)
    assert cache.seq_starts.tolist() == starts[chosen].tolist()
    cache.set_seq_starts(None)
    model.check(cache)
    append_dense([cache], model, 21)
    model.check(cache)


def test_repeat_interleave(filled):
    cache, model = filled
    cache.repeat_interleave(3)
    model.select([b for b in range(3) for _ in range(3)])
    model.check(cache)
    append_dense([cache], model, 40)
    append_ragged([cache], model, [1, 0, 2, 0, 0, 0, 30, 0, 0])
    model.check(cache)


@pytest.mark.parametrize("copy", [lambda cache: cache.fork(), deepcopy], ids=["fork", "deepcopy"])
def test_forks_are_independent(filled, copy):
    cache, model = filled
    forks = [(copy(cache), model.fork()) for _ in range(3)]
    forks.append((copy(forks[0][0]), model.fork()))
    everyone = [(cache, model), *forks]
    for i, (one, its) in enumerate(everyone):
        if i % 2:
            one.crop(-3 * i)
            its.crop(-3 * i)
        append_dense([one], its, 1 + 7 * i)
    for one, its in everyone:
        its.check(one)
    forks[0][0].reset()
    forks[0][1].reset()
    append_dense([forks[0][0]], forks[0][1], 60)
    del forks[1:]
    gc.collect()
    append_dense([cache], model, 60)
    for one, its in ((cache, model), forks[0]):
        its.check(one)


@pytest.mark.parametrize("length", [79, 64, 49, 48, 47, 16, 1])
@pytest.mark.parametrize("kind", ["paged16", "paged64", "paged-growing"])
def test_what_a_fork_has_stored_never_changes(kind, device, length):
    """Nor what a forked cache has: whichever crops and goes on, the other keeps its bits.

    A crop makes a block the last one that was full before: it may still be shared, although the
    cache has had a last block of its own since.
    """
    cache, model = make(kind, device=device), Rows(3)
    append_dense([cache], model, 20)
    append_dense([cache], model, 59)  # by age, groups begin and end within the call
    fork, its = cache.fork(), model.fork()
    for one, of, other in ((cache, model, fork), (fork, its, cache)):
        with Unchanged(other):
            append_dense([one], of, 1)
            one.crop(length)
            of.crop(length)
            append_dense([one], of, 40)
    its.check(fork)
    model.check(cache)


@pytest.mark.parametrize("kind", ["paged16", "paged-growing"])
def test_sequences_that_share_blocks_go_their_own_ways_after_compact(kind, device):
    cache, model = make(kind, device=device), Rows(3)
    append_dense([cache], model, 100)
    cache.crop(40)
    model.crop(40)
    cache.reorder([0, 0, 2])
    model.select([0, 0, 2])
    before = cache.nbytes
    cache.compact()
    assert cache.nbytes < before
    append_dense([cache], model, 30)
    model.check(cache)


def test_reset(filled):
    cache, model = filled
    cache.reset()
    model.reset()
    model.check(cache)
    append_dense([cache], model, 50)
    model.check(cache)


def test_layers_may_differ_in_the_middle_of_a_step(kind, device):
    cache, model = make(kind, device=device), Rows(3)
    limit = {8: 0.2, 4: 1.0}[min(of.rows[0].bits for of in cache.formats)]
    append_dense([cache], model, 20)
    for layer in (1, 0):
        key, value = rows(3, 20, device=device)
        cache.append(layer, key, value)
        model.append(layer, list(zip(key, value, strict=True)))
        fork, its = cache.fork(), model.fork()
        cache.append(layer, key, value)
        model.append(layer, list(zip(key, value, strict=True)))
        fork.crop(30)
        its.crop(30)
        for one, model_of in ((cache, model), (fork, its)):
            for b in range(3):
                for i in range(LAYERS):
                    n = len(model_of.layers[i][b][0])
                    assert one.seq_lens_of(i)[b].item() == n
                    error = one.dequantize(i, torch.float32)[0][b, :n].cpu()
                    assert (error - model_of.layers[i][b][0]).abs().max() < limit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.reorder([0, 1]), "indices: expected 3, got 2"),
        (lambda c: c.reorder([0, 1, 3]), "indices: expected 0 to 2, got 3"),
        (lambda c: c.reorder(torch.tensor([0, 1, -1])), "indices: expected 0 to 2, got -1"),
        (lambda c: c.select([]), "indices: expected at least one"),
        (lambda c: c.repeat_interleave(0), "repeats: expected a positive"),
        (lambda c: c.reserve(-1), "tokens: expected none or more"),
        (lambda c: c.set_seq_starts(torch.zeros(2, dtype=torch.int32)), "seq_starts: expected a"),
        (lambda c: c.dequantize(7), "layer: expected 0 to 1, got 7"),
        (lambda c: c.layer_past(0), "CacheFormat.plain"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
@pytest.mark.parametrize("kind", ["contiguous", "paged16"])
def test_bad_calls(kind, call, message):
    cache = make(kind)
    append_dense([cache], None, 20)
    with Unchanged(cache), pytest.raises(ValueError, match=message):
        call(cache)


def fail(*_, **__):
    raise MemoryError("none left")


CALLS = {
    "reorder": lambda cache: cache.reorder([1, 1, 0]),
    "select": lambda cache: cache.select([0, 2]),
    "repeat": lambda cache: cache.repeat_interleave(2),
    "fork": lambda cache: cache.fork(),
    "crop": lambda cache: cache.crop(3),
    "append": lambda cache: cache.append(0, *rows(3, 20)),
}
BROKEN = [
    (torch, "index_select"),
    (LayerMemory, "selected"),
    (LayerMemory, "copy_blocks"),
    (Change, "__init__"),
    (blocks, "_table"),
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["contiguous", "paged16", "paged-growing"])
def test_memory_errors(kind, name, monkeypatch):
    cache, model = make(kind), Rows(3)
    append_dense([cache], model, 40)
    fork = cache.fork()
    pool = cache._state.pool
    held = pool.num_blocks - pool.num_free
    for broken in BROKEN:
        before, one = Unchanged(cache), cache.fork()
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            try:
                CALLS[name](one)
            except MemoryError:
                with Unchanged(one):
                    assert_same(one, cache)
        with before:
            del one
            gc.collect()
        assert pool.num_blocks - pool.num_free == held
    model.check(fork)
    append_dense([cache], model, 20)
    model.check(cache)


def test_a_copy_on_write_that_fails(monkeypatch):
    cache, model = make("paged16"), Rows(3)
    append_dense([cache], model, 40)
    fork = cache.fork()
    for broken in ((LayerMemory, "copy_blocks"), (Change, "__init__"), (LayerMemory, "resize")):
        with monkeypatch.context() as patch, Unchanged(cache), Unchanged(fork):
            patch.setattr(*broken, fail)
            pool = fork._state.pool
            pool.grow(pool.size_for(pool.num_free + 1))
            with pytest.raises(MemoryError):
                fork.append(0, *rows(3, 20))
    append_dense([fork], None, 20)
    append_dense([cache], model, 20)
    model.check(cache)


# ------------------------------------------------------------------------------------- the blocks


def test_forks_share_blocks_until_one_writes():
    cache = make("paged16", format=None)
    append_dense([cache], None, 40)
    pool, before = cache._state.pool, cache.nbytes
    used = pool.num_blocks - pool.num_free
    fork = cache.fork()
    assert pool.num_blocks - pool.num_free == used
    assert fork.nbytes == before
    assert torch.equal(fork.block_table[:, :3], cache.block_table[:, :3])
    append_dense([fork], None, 1)
    assert torch.equal(fork.block_table[:, :2], cache.block_table[:, :2])
    assert not torch.isin(fork.block_table[:, 2], cache.block_table[:, 2]).any()
    assert pool.num_blocks - pool.num_free == used + 3
    append_dense([cache], None, 1)  # nobody else reads its last blocks any more
    assert pool.num_blocks - pool.num_free == used + 3
    del fork
    gc.collect()
    assert pool.num_blocks - pool.num_free == used
    cache.reset()
    assert pool.num_free == pool.num_blocks


def test_a_pool_that_is_too_small():
    cache = make("paged-pool", num_blocks=7)
    append_dense([cache], None, 32)
    with Unchanged(cache), pytest.raises(CacheFullError, match="key: 3 more blocks"):
        cache.append(0, *rows(3, 1))
    cu = torch.tensor([0, 16, 16, 16], dtype=torch.int32)
    cache.append(0, *rows(16), cu_seqlens=cu)
    cache.crop(16)
    append_dense([cache], None, 10)
    fork = cache.fork()
    with Unchanged(fork), Unchanged(cache), pytest.raises(CacheFullError):
        fork.append(0, *rows(3, 1))
    del cache
    gc.collect()
    fork.append(0, *rows(3, 1))


def test_a_growing_pool_grows_layer_by_layer():
    cache = make("paged-growing")
    append_dense([cache], None, 40)
    blocks = cache.layer(0)[0].k.codes.shape[0]
    cache.append(0, *rows(3, 400))
    assert cache.layer(0)[0].k.codes.shape[0] > blocks
    assert cache.layer(1)[0].k.codes.shape[0] == blocks


def test_reserved_blocks_are_there():
    for kind in KINDS:
        cache = make(kind)
        append_dense([cache], None, 10)
        cache.reserve(300)
        table, view = cache.block_table, cache.layer(1)[0]
        pointer = table.data_ptr(), view.k.codes.data_ptr()
        append_dense([cache], None, 290)
        assert pointer == (cache.block_table.data_ptr(), cache.layer(1)[0].k.codes.data_ptr())


def test_sequences_that_were_left_give_their_blocks_back_at_once():
    cache = make("paged16", num_blocks=4, max_seq_len=64, batch=2)
    append_dense([cache], None, 5)
    kept = cache._state  # as the traceback of an error may do
    cache.repeat_interleave(2)
    append_dense([cache], None, 1)
    assert cache._state.pool.num_free == 0
    assert kept.blocks.ids == ()


def test_the_pool():
    pool = BlockPool(4, 6)
    maps = [BlockMap(ids, 4, pool, torch.device("cpu")) for ids in (((0, 1), (2, 3)), ((0, 1),))]
    assert pool.is_shared
    assert [pool.count(block) for block in range(4)] == [2, 2, 1, 1]
    maps[0].release()
    assert pool.num_free == 2
    with pool.changing():
        assert pool.size_for(2) == 4
        pool.grow(pool.size_for(3))
        with pytest.raises(CacheFullError, match="5 more blocks are needed, but only 4 of 6"):
            pool.size_for(5)
        Change(maps[1], ((0, pool.take()),)).commit()
    assert maps[1].ids == ((0, 2),)
    assert maps[1].table.tolist() == [[0, 2, -1, -1]]
    assert pool.num_free == pool.num_blocks - 2
    with pool.changing():
        pool.shrink(1)
    assert pool.num_blocks == 3
    del maps[:]
    gc.collect()
    assert pool.num_free == 3


def test_a_change_that_breaks_off_is_made_good():
    pool = BlockPool(6, 6)
    one = BlockMap(((0, 1), (2,)), 4, pool, torch.device("cpu"))
    before = one.table.clone()

    def broken_off() -> None:
        with pool.changing():
            pool.take()
            one.table.fill_(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert pool.num_free == 3
    assert torch.equal(one.table, before)


def test_a_layer_is_what_the_functions_take():
    view, seqs = make("contiguous").layer(0)
    assert isinstance(view, CacheView)
    assert isinstance(seqs, Sequences)
