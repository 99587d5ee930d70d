"""Which implementation serves a call, told before it is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvquant import CacheFormat, QuantizedKVCache, backends, explain, use_backend
from modelled import append_dense, make

OPS = (
    "quantize", "dequantize", "qk_matmul", "pv_matmul", "append_", "attention", "gather",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_every_operation(op, device):
    found = explain(op=op, device=device)
    assert found.op == op
    assert found.backend in ("cpu", "cuda", "reference")
    text = str(found)
    assert text.startswith(f"{op}: {found.backend} (")
    assert all(name in text for name in found.details)
    with use_backend("reference"):
        forced = explain(op=op, device=device)
    assert forced.backend == "reference"
    assert "forced" in forced.reason


def test_it_tells_what_would_happen(backend, device):
    cache = make("contiguous", device=device)
    chosen, reason = backends.choose(torch.empty(0, device=device).device)
    found = explain(cache)
    assert (found.backend, found.reason) == (chosen.name, reason)
    assert (backend == "reference") == (found.backend == "reference")


def test_a_refused_call(native):
    found = explain(device=native, head_dim=512)
    assert found.backend == "reference"
    assert "512" in found.reason


def test_prompts():
    cache = make("paged16")
    assert cache.__repr__() in explain(cache).details["cache"]
    assert explain(cache).details["prompt"].startswith("empty: a first dense prompt")
    cache.set_seq_starts(torch.zeros(3, dtype=torch.int32))
    assert explain(cache).details["prompt"].startswith("left-padded")
    append_dense([cache], None, 3)
    assert explain(cache).details["prompt"].startswith("not empty")
    assert "prompt" not in explain(cache, op="gather").details


def test_the_bytes():
    found = explain(head_dim=128, device="cpu", format=CacheFormat.plain())
    assert found.details["bytes of a token and head"] == "264, 1.94x less than float16"
    found = explain(QuantizedKVCache(1, 1, 1, 64, v_head_dim=128), op="append_")
    assert found.details["bytes of a token and head"].startswith("200,")


def test_a_layer_of_a_cache_is_explained_by_its_own_format():
    cache = QuantizedKVCache(2, 1, 1, 128, format=["int8", "k4v4"])
    assert explain(cache).details["format"] == CacheFormat()
    assert explain(cache, layer=1).details["format"] == CacheFormat.named("k4v4")
    assert explain(format="k4v4").details["bytes of a token and head"].startswith("136,")
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        explain(cache, layer=2)


def test_an_unknown_operation():
    with pytest.raises(ValueError, match="op: expected one of quantize"):
        explain(op="multiply")
    with pytest.raises(dataclasses.FrozenInstanceError):
        explain(device="cpu").op = "x"


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"op": "attend"}, ValueError, "op: "),
        ({"dtype": torch.float64}, TypeError, "dtype: "),
        ({"head_dim": 100}, ValueError, "head_dim: 100"),
        ({"v_head_dim": 0}, ValueError, "v_head_dim: 0"),
        ({"format": 8}, TypeError, "format: expected a CacheFormat"),
        ({"format": "int3"}, ValueError, "format: expected one of int8, plain, k8v4, k4v4"),
    ],
)
def test_nothing_is_promised_that_a_call_refuses(options, error, named):
    with pytest.raises(error, match=named):
        explain(device="cpu", **options)


def test_young_rows_are_explained():
    found = explain(head_dim=128, device="cpu", format=CacheFormat.named("k4v4"))
    assert found.details["young rows"].startswith("143616 bytes more")
    assert found.details["bytes of a token and head"].startswith("136, ")
