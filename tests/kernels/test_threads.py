"""The CPU kernels' threads: any number gives the same bits; callers do not disturb one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kvquant import attention, quantize_cache_v
from support import BF16, FP32, Cache, filled_cache


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", ["kvquant", "kvquant.backends", "kvquant.backends.native"])
def test_the_threads_are_torchs_own_whatever_comes_first(first):
    code = f"import {first}; from kvquant.backends import build_info; print(build_info())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "'cpu_threads': 'OpenMP'" in found.stdout


def test_no_thread_is_started_for_a_call(threads):
    torch.set_num_threads(2)
    cache = filled_cache((3000,), dtype=BF16, kv_heads=2, k_dim=64, block=None, device="cpu")
    query = torch.randn(1, 1, 4, 64)
    torch.randn(512, 512).mm(torch.randn(512, 512))
    results(cache, query)
    before = set(os.listdir("/proc/self/task"))
    for _ in range(5):
        results(cache, query)
    assert set(os.listdir("/proc/self/task")) == before


def results(cache: Cache, query: Tensor) -> list[Tensor]:
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    out = attention(query, cache.view, **where)
    return [out, *quantize_cache_v(query.transpose(1, 2))]


@pytest.mark.parametrize("tokens", [1, 30])
def test_any_number_of_threads_gives_the_same_bits(threads, tokens):
    cache = filled_cache((3000, 17, 900), dtype=BF16, kv_heads=2, k_dim=64, block=64, device="cpu")
    query = torch.randn(3, tokens, 8, 64)
    torch.set_num_threads(1)
    expected = results(cache, query)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for mine, one in zip(results(cache, query), expected, strict=True):
            assert torch.equal(mine, one)


def test_callers_do_not_disturb_one_another(threads):
    torch.set_num_threads(2)
    cache = filled_cache((2000, 300), dtype=FP32, kv_heads=2, k_dim=64, block=None, device="cpu")
    queries = [torch.randn(2, 1, 4, 64) for _ in range(8)]
    expected = [results(cache, query) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = list(pool.map(lambda query: results(cache, query), queries))
            for mine, one in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, one, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same(threads):
    torch.set_num_threads(2)
    cache = filled_cache((2000, 300), dtype=FP32, kv_heads=2, k_dim=64, block=None, device="cpu")
    query = torch.randn(2, 1, 4, 64)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    expected = attention(query, cache.view, **where)
    child = os.fork()
    if child == 0:
        same = torch.equal(attention(query, cache.view, **where), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
