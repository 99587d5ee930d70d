"""`slide`: memory behind a sliding window is given back, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant

HEADS, DIM = 2, 64
FORMATS = {
    "default": kvquant.CacheFormat(),
    "plain": kvquant.CacheFormat.plain(),
    "mean64": kvquant.CacheFormat(key_mean=64),
    "k4v4": kvquant.CacheFormat(key="int4", value="int4", key_mean=64),
}


def made(fmt: str, device: str, batch: int = 2, **options: Any) -> kvquant.QuantizedKVCache:
    settings = {"block_size": 16, "format": FORMATS[fmt], "dtype": torch.float32, **options}
    return kvquant.QuantizedKVCache(1, batch, HEADS, DIM, device=device, **settings)


def rows(batch: int, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, batch, tokens, HEADS, DIM, device=device)
    return torch.randn(batch, tokens, 4, DIM, device=device), key, value


def step(cache: kvquant.QuantizedKVCache, new: tuple[Tensor, ...], window: int) -> Tensor:
    out = cache.attend(0, *new, sliding_window=window, exact_prompt=False)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("window", [48, 100, 512])
@pytest.mark.parametrize("fmt", FORMATS)
def test_results_are_those_of_a_whole_cache(fmt: str, window: int, device: str) -> None:
    whole, slid = made(fmt, device), made(fmt, device)
    most = 0
    for tokens in [200, 1, 1, 130, *[1] * 300, 64, 400, *[1] * 20]:
        new = rows(2, tokens, device)
        assert torch.equal(step(slid, new, window), step(whole, new, window))
        slid.slide(window)
        held = [sum(block >= 0 for block in of) for of in slid.block_table.tolist()]
        most = max(most, *held)
        group = FORMATS[fmt].mean_group
        assert max(held) * 16 <= max(window, group) + group + 32
    assert whole.max_length == slid.max_length == 1116
    assert most


def test_memory_grows_with_the_window(device: str) -> None:
    cache = made("default", device, batch=1)
    for _ in range(40):
        step(cache, rows(1, 256, device), 512)
        cache.slide(512)
    assert cache.max_length == 10240
    assert cache.layer(0)[0].num_blocks <= (512 + 256 + 256) // 16 * 9 // 8 + 2


def test_a_prompt_at_once_leaves_memory_that_compact_gives_back(device: str) -> None:
    caches = [made("default", device, batch=2) for _ in range(2)]
    new = rows(2, 3000, device)
    for cache in caches:
        step(cache, new, 300)
    before = caches[1].nbytes
    caches[1].slide(300)
    assert caches[1].nbytes == before
    caches[1].compact()
    assert caches[1].nbytes < before / 4
    for _ in range(40):
        new = rows(2, 1, device)
        assert torch.equal(step(caches[1], new, 300), step(caches[0], new, 300))
        caches[1].slide(300)
        caches[1].compact()


def test_sequences_move_with_their_windows(device: str) -> None:
    caches = [made("mean64", device, batch=3) for _ in range(2)]
    new = rows(3, 500, device)
    for cache in caches:
        step(cache, new, 100)
    caches[1].slide(100)
    for cache in caches:
        cache.reorder([2, 0, 0])
        cache.select([1, 2])
    forks = [cache.fork() for cache in caches]
    forks.append(copy.deepcopy(caches[1]))
    for _ in range(70):
        new = rows(2, 1, device)
        expected = step(forks[0], new, 100)
        for cache in forks[1:]:
            assert torch.equal(step(cache, new, 100), expected)
            cache.slide(100)
    new = rows(2, 3, device)
    assert torch.equal(step(caches[1], new, 100), step(caches[0], new, 100))


def test_crop_within_the_slack_and_not_beyond(device: str) -> None:
    caches = [made("plain", device, batch=2) for _ in range(2)]
    new = rows(2, 400, device)
    for cache in caches:
        step(cache, new, 64)
    caches[1].slide(64, slack=20)
    for cache in caches:
        cache.crop(-20)
    new = rows(2, 7, device)
    assert torch.equal(step(caches[1], new, 64), step(caches[0], new, 64))
    table, lens = caches[1].block_table.clone(), caches[1].seq_lens.clone()
    with pytest.raises(ValueError, match="max_length: the window of 64 tokens before token 300"):
        caches[1].crop(300)
    assert torch.equal(caches[1].block_table, table)
    assert torch.equal(caches[1].seq_lens, lens)
    caches[1].crop(0)
    assert caches[1].max_length == 0
    caches[0].reset()
    new = rows(2, 90, device)
    assert torch.equal(step(caches[1], new, 64), step(caches[0], new, 64))


def test_what_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="slide: only a paged cache"):
        made("plain", device, block_size=None).slide(16)
    cache = made("default", device)
    query, key, value = rows(2, 900, device)
    cache.attend(0, query[:, :1], sliding_window=None)
    cache.append(0, key, value)
    with pytest.raises(ValueError, match="sliding_window: expected"):
        cache.slide(0)
    with pytest.raises(ValueError, match="slack: expected"):
        cache.slide(16, slack=-1)
    cache.slide(300)
    for window in (None, 301):
        with pytest.raises(ValueError, match="sliding_window: the cache keeps a window of 300"):
            cache.attend(0, query[:, :1], sliding_window=window)
    for refused in (cache.state_dict, lambda: pickle.dumps(cache)):
        with pytest.raises(ValueError, match="only whole caches can be saved"):
            refused()
    key, value = cache.dequantize(0)
    assert not key[:, :512].any()
    assert key[:, 600:].any(-1).all()
    cache.reset()  # and it is whole again
    assert cache.state_dict()["seq_lens"].tolist() == [[0, 0]]


def test_left_padding(device: str) -> None:
    caches = [made("default", device, batch=2) for _ in range(2)]
    new = rows(2, 700, device)
    for cache in caches:
        cache.set_seq_starts(torch.tensor([0, 650], dtype=torch.int32, device=device))
        step(cache, new, 64)
    caches[1].slide(64)
    for _ in range(80):
        new = rows(2, 1, device)
        assert torch.equal(step(caches[1], new, 64), step(caches[0], new, 64))
        caches[1].slide(64)
