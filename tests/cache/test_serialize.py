"""Caches as files and state dicts: round trips, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from kvquant import CacheFormat, CacheFullError, QuantizedKVCache
from modelled import (
    DIM,
    HEADS,
    KINDS,
    Rows,
    Unchanged,
    append_dense,
    append_ragged,
    assert_same,
    make,
)
from support import same_bits

files = pytest.importorskip("safetensors.torch")
DATA = Path(__file__).parents[1] / "data"

FORMATS = {
    "default": CacheFormat(),
    "means": CacheFormat(key_mean=64, value_rotation=True),
    "plain": CacheFormat.plain(),
    "k8v4": CacheFormat.named("k8v4"),
    "k4v4": CacheFormat.named("k4v4"),
    "by-layer": (CacheFormat(), CacheFormat(value="int4", key_mean=32, by_age=True)),
}


def filled(kind: str, device: str = "cpu", **options) -> tuple[QuantizedKVCache, Rows]:
    cache, model = make(kind, device=device, **options), Rows(3)
    append_dense([cache], model, 70)
    append_ragged([cache], model, [10, 0, 31])
    return cache, model


# ------------------------------------------------------------------------------------- state dicts


def test_the_first_version_that_can_say_a_format_is_written():
    """So packages that know int8 alone read its caches."""
    versions = {name: int(filled("growing", format=fmt)[0].state_dict()["format"].view(-1)[0])
                for name, fmt in FORMATS.items()}  # fmt: skip
    assert versions == {"default": 1, "means": 1, "plain": 1, "k8v4": 2, "k4v4": 2,
                        "by-layer": 3}  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", ["contiguous", "paged16"])
def test_state_dict_is_the_same_in_every_layout(source, target, fmt, device):
    cache, model = filled(source, device, format=FORMATS[fmt])
    cache.set_seq_starts(torch.tensor([1, 0, 2], dtype=torch.int32, device=device))
    other = make(target, device=device, format=FORMATS[fmt])
    append_dense([other], None, 5)
    other.load_state_dict(cache.state_dict())
    assert_same(other, cache)
    assert other.seq_starts.tolist() == [1, 0, 2]
    for one in (cache, other):
        one.set_seq_starts(None)
    model.check(other)
    append_dense([cache, other], model, 40)
    assert_same(other, cache)
    model.check(other)


def test_rows_that_are_nowhere_are_zero():
    cache, _ = filled("paged16")
    state = cache.state_dict()
    assert state["layers.0.k_data"].shape == (
        3,
        HEADS,
        101,
        cache.formats[0].rows[0].code_bytes(DIM),
    )
    assert not state["layers.0.k_data"][1, :, 70:].any()
    assert not state["layers.1.v_params"][0, :, 80:].any()


BAD_STATES = {
    "missing": (ValueError, "layers.1.v_data: missing", lambda s: s.pop("layers.1.v_data")),
    "no lengths": (ValueError, "seq_lens: missing", lambda s: s.pop("seq_lens")),
    "unknown": (ValueError, "unexpected tensors: more", lambda s: s.update(more=torch.ones(1))),
    "dtype": (
        TypeError,
        "layers.0.k_params: expected torch.float16",
        lambda s: s.update({"layers.0.k_params": s["layers.0.k_params"].float()}),
    ),
    "shape": (
        ValueError,
        "layers.0.k_data: expected shape",
        lambda s: s.update({"layers.0.k_data": s["layers.0.k_data"][:, :, 1:]}),
    ),
    "lengths": (ValueError, "negative length", lambda s: s["seq_lens"].fill_(-1)),
    "other lengths": (ValueError, "expected shape", lambda s: s["seq_lens"].add_(1)),
    "format": (ValueError, "format: expected", lambda s: s["format"].fill_(0)),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_state_dicts(case):
    error, message, spoil = BAD_STATES[case]
    cache, _ = filled("contiguous")
    state = filled("paged16")[0].state_dict()
    spoil(state)
    with Unchanged(cache), pytest.raises(error, match=message):
        cache.load_state_dict(state)


def test_a_state_dict_that_does_not_fit():
    cache = make("paged16", max_seq_len=64)
    append_dense([cache], None, 10)
    with Unchanged(cache), pytest.raises(CacheFullError):
        cache.load_state_dict(filled("paged16")[0].state_dict())
    with Unchanged(cache), pytest.raises(ValueError, match="seq_lens: expected shape"):
        cache.load_state_dict(make("paged16", batch=2).state_dict())


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, fmt, device, tmp_path):
    cache, model = filled(kind, device, format=FORMATS[fmt], dtype=torch.bfloat16)
    cache.save(tmp_path / "cache.safetensors")
    loaded = QuantizedKVCache.load(tmp_path / "cache.safetensors", device=device)
    assert_same(loaded, cache)
    assert loaded.formats == cache.formats == CacheFormat.of_layers(FORMATS[fmt], 2)
    assert loaded.device == cache.device
    assert loaded.capacity == cache.capacity
    assert loaded.block_size == cache.block_size
    assert loaded.dequantize(0)[0].dtype == torch.bfloat16
    append_dense([cache, loaded], model, 20)
    assert_same(loaded, cache)
    model.check(loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.fixture
def path(tmp_path):
    cache, _ = filled("contiguous")
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        QuantizedKVCache.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("part", [0.0, 1e-5, 0.001, 0.01, 0.3, 0.9, 0.99999])
def test_a_file_that_is_cut_off(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path, "cut off, or no safetensors file")


def rewrite(path, header=None, tensors=None, metadata=None) -> None:
    with files.safe_open(path, framework="pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        fields = file.metadata()
    spoiled = {**json.loads(fields["cache"]), **(header or {})}
    fields["cache"] = json.dumps({key: x for key, x in spoiled.items() if x != "drop"})
    files.save_file({**old, **(tensors or {})}, path, {**fields, **(metadata or {})})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 4}, "file version 4, but this kvquant reads 1, 2, 3"),
        ({"version": 3}, "format: expected a list"),
        ({"format": [{"bits": 8}]}, "format: expected an object"),
        ({"version": 2}, r"missing \['by_age', 'key', 'value'\]"),
        ({"version": "drop"}, "the header does not hold together"),
        ({"format": {"bits": 4, "key_rotation": True, "key_mean": None, "value_rotation": True}},
         "bits: expected 8, got 4"),
        ({"format": {"bits": 8}}, r"missing \['key_mean'"),
        ({"format": {"colour": 1}}, "the header does not hold together"),
        ({"format": 8}, "the header does not hold together"),
        ({"dtype": "int8"}, "the header does not hold together"),
        ({"colour": 1}, "colour"),
        ({"head_dim": 48}, "expected shape"),
        ({"head_dim": "64"}, "head_dim: expected an integer, got '64'"),
        ({"batch_size": 10**12}, "batch_size: expected 1 to 2147483647"),
        ({"batch_size": 10**9}, "seq_lens: expected shape"),
        ({"key_rotation": True}, "unknown"),
        ({"num_layers": 3}, "seq_lens: expected shape"),
        ({"num_layers": "drop"}, "num_layers"),
        ({"max_seq_len": 50}, "would take 64"),
        ({"block_size": 24}, "block_size: expected None or a power of two"),
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_lie(tmp_path, header, message):
    """Of version 1, which int8 caches have."""
    path = tmp_path / "cache"
    filled("contiguous", format=CacheFormat(key_mean=16))[0].save(path)
    rewrite(path, header)
    refused(path, message)


V2 = {
    "key": "int8", "value": "int4", "key_rotation": True, "key_mean": 16, "value_rotation": True,
    "by_age": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 1}, r"missing \['bits'\]"),
        ({"format": V2 | {"key": "int3"}}, "key: expected one of int8, int4, got 'int3'"),
        ({"format": V2 | {"key": "int4"}}, "format: expected"),
        (
            {"format": V2 | {"value": "int8", "by_age": False}},
            "file version 2, but a cache",
        ),
        ({"format": V2 | {"value": "int8"}}, "by_age: expected False"),
        ({"format": V2 | {"by_age": False}}, "format: expected"),
        ({"format": V2 | {"by_age": 1}}, "by_age: expected True or False"),
        ({"format": V2 | {"value_rotation": None}}, "value_rotation: expected a flag"),
        ({"format": V2 | {"key_mean": 2**20}}, "by_age: expected a key_mean of at most 4096"),
        ({"format": V2 | {"key_mean": 4096}}, "format: expected"),
    ],
    ids=str,
)
def test_headers_of_version_2_that_lie(tmp_path, header, message):
    path = tmp_path / "cache"
    filled("contiguous", format=CacheFormat(**V2))[0].save(path)
    assert QuantizedKVCache.load(path).format == CacheFormat(**V2)
    rewrite(path, header)
    refused(path, message)


V3 = [V2 | {"value": "int8", "by_age": False}, V2]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "format: expected an object"),
        ({"format": V3[:1]}, "format: expected one for each of 2 layers, got 1"),
        ({"format": V3 * 2}, "format: expected one for each of 2 layers, got 4"),
        ({"format": [V2, V2]}, "file version 3, but a cache of int8 and int4 has 2"),
        ({"format": V3[::-1]}, "format: expected"),
        ({"format": [V3[0], 8]}, "format is no object"),
        ({"format": [V3[0], {"bits": 8}]}, r"missing \['by_age'"),
        ({"format": [V3[0], V2 | {"key": "int3"}]}, "key: expected one of int8, int4, got 'int3'"),
        ({"num_layers": 3}, "format: expected one for each of 3 layers, got 2"),
        ({"num_layers": 10**9}, "num_layers: expected 1 to 65536"),
    ],
    ids=str,
)
def test_headers_of_version_3_that_lie(tmp_path, header, message):
    """Which has a format per layer."""
    path, formats = tmp_path / "cache", tuple(CacheFormat(**of) for of in V3)
    filled("contiguous", format=formats)[0].save(path)
    assert QuantizedKVCache.load(path).formats == formats
    rewrite(path, header)
    refused(path, message)


def test_other_files(path, tmp_path):
    rewrite(path, metadata={"magic": "other"})
    refused(path, "not a file of kvquant's")
    rewrite(path, metadata={"magic": "kvquant", "cache": "{"})
    refused(path, "the header does not hold together")
    rows = {"x": torch.zeros(3)}
    files.save_file(rows, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not a file of kvquant's")
    (tmp_path / "text").write_text("what is this? " * 100)
    refused(tmp_path / "text", "cut off, or no safetensors file")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        QuantizedKVCache.load(tmp_path / "nowhere")


def test_tensors_that_lie(path):
    rewrite(path, tensors={"layers.0.k_data": torch.zeros(3, dtype=torch.uint8)})
    refused(path, "layers.0.k_data: expected shape")


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    content = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        filled("paged16")[0].save(path)
    assert path.read_bytes() == content
    assert len(list(path.parent.iterdir())) == 1


def test_without_safetensors(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        make("contiguous").save(path)
    with pytest.raises(ImportError, match="pip install safetensors"):
        QuantizedKVCache.load(path)


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(DATA)) for path in DATA.glob("*/cache-*.safetensors"))
)
def test_files_of_every_released_version_load(name, device):
    """One of each layout, written by `saved.py` and never again."""
    loaded = QuantizedKVCache.load(DATA / name, device=device)
    stored = files.load_file(DATA / name)
    state = loaded.state_dict()
    assert state.keys() == stored.keys()
    for key, tensor in state.items():
        assert same_bits(tensor.cpu(), stored[key]), key
    assert loaded.dequantize(1)[0].isfinite().all()
    loaded.append(0, *(torch.randn(3, 2, 1, n, device=device) for n in (16, 32)))
    assert loaded.max_length_of(0) == 22
