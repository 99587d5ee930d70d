"""Forks of one paged cache, each in a thread of its own: what they do one after another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from kvquant import QuantizedKVCache
from modelled import LAYERS, append_dense, make, rows

THREADS, STEPS = 8, 12


def run(cache: QuantizedKVCache, seed: int, calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    outs = []
    for i, (query, key, value) in enumerate(calls):
        outs += [cache.attend(layer, query, key, value) for layer in range(LAYERS)]
        if i % 4 == seed % 4:
            other = cache.fork()
            outs.append(other.attend(0, query))
            other.append(1, key, value)
            del other
        if i % 5 == 4:
            cache.crop(-3)
    return [*outs, *cache.state_dict().values()]


@pytest.mark.parametrize("kind", ["paged16", "paged-growing", "paged-pool"])
def test_eight_threads_on_eight_forks(kind):
    calls = []
    for seed in range(THREADS):
        torch.manual_seed(seed)
        calls.append(
            [(torch.randn(2, n, 4, 32), *rows(2, n)) for n in ([1, 7, 1, 20, 33] * 3)[:STEPS]]
        )
    results = []
    for threads in (1, THREADS):
        torch.manual_seed(99)
        cache = make(kind, batch=2, dtype=torch.float32)
        append_dense([cache], None, 40)
        forks = [cache.fork() for _ in range(THREADS)]
        begin = Barrier(threads)

        def work(seed: int, forks=forks, begin=begin) -> list[Tensor]:
            begin.wait()
            return run(forks[seed], seed, calls[seed])

        with ThreadPoolExecutor(threads) as pool:
            results.append(list(pool.map(work, range(THREADS))))
        before = cache.state_dict()
        append_dense([cache], None, 3)
        cache.crop(40)
        for name, tensor in cache.state_dict().items():
            assert torch.equal(tensor, before[name])
    for one, other in zip(*results, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
