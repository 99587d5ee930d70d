"""A cache on torch's meta device: no data, and the sizes that a real one has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant import QuantizedKVCache

LAYOUTS = {
    "growing": {},
    "growing-paged": {"block_size": 32},
    "fixed": {"max_seq_len": 500},
    "fixed-paged": {"max_seq_len": 500, "block_size": 64},
}


def lived(device: str, steps: int, **layout: Any) -> QuantizedKVCache:
    """A cache after a prompt, some steps, a crop and a step more."""
    cache = QuantizedKVCache(2, 3, 2, 64, dtype=torch.float32, device=device, **layout)
    x = torch.zeros(3, 100, 2, 64, device=device)
    query = torch.zeros(3, 100, 4, 64, device=device)
    for tokens in (100, *[1] * steps):
        for layer in range(2):
            out = cache.attend(layer, query[:, :tokens], x[:, :tokens], x[:, :tokens])
            assert isinstance(out, torch.Tensor)
            assert out.shape == (3, tokens, 4, 64)
    cache.crop(-20)
    cache.append(0, x[:, :1], x[:, :1])
    return cache


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_grows_as_a_real_one_does(layout: str) -> None:
    real, meta = (lived(device, 70, **LAYOUTS[layout]) for device in ("cpu", "meta"))
    assert meta.nbytes == real.nbytes
    assert meta.max_length == real.max_length == 151
    assert meta.dequantize(0)[0].shape == real.dequantize(0)[0].shape


def test_a_window_gives_back_the_same_blocks() -> None:
    sizes = []
    for device in ("cpu", "meta"):
        cache = lived(device, 400, block_size=32)
        cache.slide(64)
        cache.compact()
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]


def test_nothing_is_said_of_a_slow_reference(caplog: pytest.LogCaptureFixture) -> None:
    lived("meta", 1)
    assert not caplog.records
