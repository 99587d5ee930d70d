"""An interrupt at any Python line of a call leaves a cache that can be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import kvquant
from kvquant import QuantizedKVCache
from modelled import LAYERS, Rows, append_dense, append_ragged, make, rows

PACKAGE = str(Path(kvquant.__file__).parent)


class Interrupt:
    """Within it, the n-th line of the package that is reached raises KeyboardInterrupt."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *raised: Any) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


def append(cache: QuantizedKVCache, tokens: int) -> None:
    cache.append(0, *rows(cache.batch_size, tokens))


def attend(cache: QuantizedKVCache, tokens: int) -> None:
    query = torch.randn(cache.batch_size, tokens, 4, 32)
    cache.attend(0, query, *rows(cache.batch_size, tokens), exact_prompt=False)


CALLS: dict[str, tuple[Callable[[QuantizedKVCache, int], object], int]] = {
    "append": (append, 3),
    "attend": (attend, 1),
    "growth in append": (append, 300),
    "growth in attend": (attend, 300),
    "fork": (lambda cache, _: cache.fork(), 0),
    "reserve": (lambda cache, _: cache.reserve(380), 0),
}


def check_call(kind: str, name: str, line: int, *, forked: bool, repeated: bool) -> bool:
    """Whether line ``line`` was reached; the cache and its fork hold what they should, and go on.

    ``repeated``: the call has been made before, so that it takes the way of a decode step.
    """
    torch.manual_seed(0)
    call, tokens = CALLS[name]
    cache, model = make(kind, batch=2, dtype=torch.float32), Rows(2)
    append_dense([cache], model, 21)
    if repeated:
        for layer in range(LAYERS):
            query, (key, value) = torch.randn(2, tokens or 1, 4, 32), rows(2, tokens or 1)
            cache.attend(layer, query, key, value)
            model.append(layer, list(zip(key, value, strict=True)))
    fork, before = (cache.fork(), model.fork()) if forked else (None, None)
    state = torch.get_rng_state()
    reached = False
    with Interrupt(line):
        try:
            call(cache, tokens)
        except KeyboardInterrupt:
            reached = True
    torch.set_rng_state(state)
    assert cache.max_length_of(0) >= max(cache.seq_lens_of(0).tolist())
    if cache.seq_lens_of(0).tolist() != model.lengths:  # the call had come as far as its kernels
        if "attend" in name:
            torch.randn(2, tokens, 4, 32)
        new = rows(2, tokens)
        stored = cache.seq_lens_of(0).tolist()[0] - model.lengths[0]
        assert stored == tokens
        model.append(0, list(zip(*(x[:, :stored] for x in new), strict=True)))
    for layer in range(LAYERS):  # the layers of a step are of one length again
        missing = len(model.layers[0][0][0]) - len(model.layers[layer][0][0])
        if missing:
            new = rows(2, missing)
            cache.append(layer, *new)
            model.append(layer, list(zip(*new, strict=True)))
    append_dense([cache], model, 17)
    if fork is not None:
        append_dense([fork], before, 5)
        before.check(fork)
    model.check(cache)
    return reached


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("kind", "forked"),
    [("growing", False), ("paged16", True), ("paged-growing", False), ("paged-growing", True)],
    ids=["contiguous", "paged", "growing", "forked"],
)
def test_an_interrupt_at_any_line(kind, name, forked):
    is_long = name == "growth in attend" and make(kind).formats[-1].by_age  # fed group by group
    for repeated in (False, True) if name == "attend" else (False,):
        line = 1
        while check_call(kind, name, line, forked=forked, repeated=repeated):
            line += 37 if is_long else 1
        assert line > 5


CHANGES: dict[str, tuple[Callable[[QuantizedKVCache], None], Callable[[Rows], None]]] = {
    "crop": (lambda cache: cache.crop(5), lambda model: model.crop(5)),
    "crop from the end": (lambda cache: cache.crop(-17), lambda model: model.crop(-17)),
    "reorder": (lambda cache: cache.reorder([2, 2, 0]), lambda model: model.select([2, 2, 0])),
    "select": (lambda cache: cache.select([1, 1, 2]), lambda model: model.select([1, 1, 2])),
    "reset": (lambda cache: cache.reset(), lambda model: model.reset()),
}


def check_change(kind: str, name: str, line: int, *, forked: bool) -> bool:
    """Whether line ``line`` was reached; the change is made as a whole or not at all."""
    torch.manual_seed(0)
    change, wanted = CHANGES[name]
    cache, model = make(kind, dtype=torch.float32), Rows(3)
    append_ragged([cache], model, [40, 23, 37])
    starts = torch.tensor([3, 0, 1], dtype=torch.int32)
    cache.set_seq_starts(starts)
    for layer in model.layers:
        for (key, value), start in zip(layer, starts.tolist(), strict=True):
            key[:start] = value[:start] = 0
    fork, before = (cache.fork(), model.fork()) if forked else (None, None)
    reached = False
    with Interrupt(line):
        try:
            change(cache)
        except KeyboardInterrupt:
            reached = True
    after = model.fork()
    wanted(after)
    found = cache.seq_lens_of(0).tolist()
    assert found in (model.lengths, after.lengths)
    assert reached or found == after.lengths
    for layer in range(LAYERS):
        bounds = cache._state.lengths.bounds(layer)
        assert all(n <= bound for n, bound in zip(cache.seq_lens_of(layer), bounds, strict=True))
    if found == after.lengths:
        model = after
    model.check(cache)
    append_dense([cache], model, 30)
    model.check(cache)
    if fork is not None and before is not None:
        append_dense([fork], before, 30)
        before.check(fork)
        del fork
        model.check(cache)
    if cache.block_size is not None:
        pool = cache._state.pool
        assert pool.num_blocks - pool.num_free == len(set(chain(*cache._state.blocks.ids)))
    return reached


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    ("kind", "forked"),
    [("contiguous", False), ("paged16", True), ("paged-growing", True)],
    ids=["contiguous", "forked", "growing"],
)
def test_a_change_is_made_as_a_whole_or_not_at_all(kind, name, forked):
    line = 1
    while check_change(kind, name, line, forked=forked):
        line += 1
    assert line > 20
