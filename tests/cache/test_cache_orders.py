"""Any order of operations on a cache, in every layout at once."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from modelled import (
    DIM,
    HEADS,
    KINDS,
    Rows,
    append_dense,
    append_ragged,
    assert_same,
    assert_state,
    attend_all,
    make,
)


class AnyOrder(RuleBasedStateMachine):
    """The same operations on every kind of cache: the same bits, and the rows of the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.caches = [make(kind, batch=2) for kind in KINDS]
        self.model = Rows(2)
        self.left: list[tuple[list, Rows, dict]] = []  # and the bits that they hold

    def leave(self, caches: list, model: Rows) -> None:
        self.left.append((caches, model, caches[0].state_dict()))

    def fits(self, tokens: int) -> bool:
        return max(self.model.lengths) + tokens <= 400

    @rule(tokens=st.sampled_from([1, 1, 2, 15, 16, 17, 33]))
    def dense(self, tokens):
        if self.fits(tokens):
            append_dense(self.caches, self.model, tokens)

    @rule(data=st.data())
    def ragged(self, data):
        size = self.model.batch
        counts = data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
        if self.fits(max(counts)):
            append_ragged(self.caches, self.model, counts)

    @rule(length=st.integers(-40, 60))
    def crop(self, length):
        for cache in self.caches:
            cache.crop(length)
        self.model.crop(length)

    @rule(data=st.data())
    def reorder(self, data):
        last = st.integers(0, self.model.batch - 1)
        size = self.model.batch
        order = data.draw(st.lists(last, min_size=size, max_size=size))
        for cache in self.caches:
            cache.reorder(order)
        self.model.select(order)

    @rule(data=st.data())
    def select(self, data):
        last = st.integers(0, self.model.batch - 1)
        chosen = data.draw(st.lists(last, min_size=1, max_size=4))
        for cache in self.caches:
            cache.select(chosen)
        self.model.select(chosen)

    @rule(forget=st.booleans())
    def fork(self, forget):
        self.left = [] if forget else self.left[-1:]
        self.leave([cache.fork() for cache in self.caches], self.model.fork())

    @rule()
    def go_on_with_a_fork(self):
        if self.left:
            here = self.caches, self.model
            self.caches, self.model, _ = self.left.pop()
            self.leave(*here)

    @rule()
    def reset(self):
        for cache in self.caches:
            cache.reset()
        self.model.reset()

    @rule()
    def state_dict(self):
        for cache, other in zip(self.caches, reversed(self.caches), strict=True):
            fresh = cache.fork()
            fresh.load_state_dict(other.state_dict())
            assert_same(fresh, cache)

    @invariant()
    def all_alike(self):
        self.model.check(self.caches[0])
        for cache in self.caches[1:]:
            assert_same(cache, self.caches[0])
        query = torch.ones(self.model.batch, 1, HEADS, DIM)
        out = attend_all(self.caches[0], query)
        for cache in self.caches[1:]:
            torch.testing.assert_close(attend_all(cache, query), out)

    def teardown(self):
        for caches, model, bits in self.left:
            for cache in caches:
                model.check(cache)
                assert_state(cache, bits)
        for cache in self.caches:
            state = cache._state
            assert state.pool.num_free <= state.pool.num_blocks


def test_any_order() -> None:
    few = settings(
        max_examples=6,
        stateful_step_count=10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(AnyOrder, settings=few)
