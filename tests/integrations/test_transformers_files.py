"""A model's cache in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant import CacheFormat, CacheFullError, QuantizedKVCache

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("safetensors.torch")

from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # noqa: E402
from tiny import COMMON, ids_of, logits, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


K4V4 = CacheFormat(key="int4", value="int4", key_mean=16, by_age=True)
WAYS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 16},
        {"max_cache_len": 200, "format": CacheFormat.plain()},
        {"format": K4V4},
        {"format": ["int8", K4V4, "plain"]},
    ],
    ids=["grows", "paged", "fixed-plain", "k4v4", "by-layer"],
)


@WAYS
def test_a_loaded_cache_goes_on_as_the_saved_one(
    options: dict[str, Any], tmp_path: Path, device: str
) -> None:
    model, ids = make("llama", device), ids_of(2, 90, device)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cache = KVQuantCache(model, **options)
    logits(model, cache, ids[:, :80], attention_mask=mask[:, :80])
    cache.save(tmp_path / "cache")
    sizes = {name: x for name, x in options.items() if name != "format"}
    again = KVQuantCache.load(tmp_path / "cache", model, **sizes)
    assert again.get_seq_length() == 80
    for one, other in zip(again.layers, cache.layers, strict=True):
        assert one.storage.format == other.storage.format
    for end in range(81, 91):
        new, part = ids[:, end - 1 : end], mask[:, :end]
        expected = logits(model, cache, new, attention_mask=part)
        assert torch.equal(logits(model, again, new, attention_mask=part), expected)


def test_windows(tmp_path: Path, device: str) -> None:
    model, ids = make("gemma3", device), ids_of(1, 700, device)
    for limit in (None, 800):
        cache = KVQuantCache(model, max_cache_len=limit)
        logits(model, cache, ids[:, :60])
        cache.save(tmp_path / "cache")
        again = KVQuantCache.load(tmp_path / "cache", model, max_cache_len=limit)
        for part in ids[:, 60:].split([500, *[1] * 140], dim=1):
            assert torch.equal(logits(model, again, part), logits(model, cache, part))
        assert again.nbytes == cache.nbytes
        if limit is None:
            with pytest.raises(ValueError, match="given back tokens behind its sliding window"):
                cache.save(tmp_path / "other")
            assert not (tmp_path / "other").exists()


def test_the_file_is_one_of_a_cache(tmp_path: Path, device: str) -> None:
    model, ids = make("llama", device), ids_of(2, 40, device)
    cache = KVQuantCache(model)
    logits(model, cache, ids)
    cache.save(tmp_path / "cache")
    whole = QuantizedKVCache.load(tmp_path / "cache", device)
    for index in range(3):
        for found, expected in zip(
            whole.dequantize(index, torch.float32), cache.layers[index].dequantize(40), strict=True
        ):
            assert torch.equal(found.transpose(1, 2), expected)


def test_what_cannot_be_saved_or_loaded(tmp_path: Path, device: str) -> None:
    model, ids = make("llama", device), ids_of(1, 40, device)
    cache = KVQuantCache(model)
    with pytest.raises(ValueError, match="layer 0 holds nothing yet"):
        cache.save(tmp_path / "cache")
    logits(model, cache, ids)
    cache.save(tmp_path / "cache")
    with pytest.raises(CacheFullError, match=r"max_cache_len: 39 tokens .* 40 are stored"):
        KVQuantCache.load(tmp_path / "cache", model, max_cache_len=39)
    with pytest.raises(TypeError, match="format: is the file's"):
        KVQuantCache.load(tmp_path / "cache", model, format=CacheFormat())
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        KVQuantCache.load(tmp_path / "nothing", model)
    other = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="3 layers, but the model has 2"):
        KVQuantCache.load(tmp_path / "cache", other)
    mask = torch.ones(1, 44, dtype=torch.long, device=device)
    mask[0, 20] = 0
    logits(model, cache, ids[:, :4], attention_mask=mask)
    with pytest.raises(ValueError, match="mask hid more than left padding"):
        cache.save(tmp_path / "cache")
    ragged = QuantizedKVCache(3, 2, 2, 32, dtype=torch.float32, device=device)
    rows = torch.randn(13, 2, 32, device=device)
    lens = torch.tensor([0, 9, 13], dtype=torch.int32, device=device)
    for layer in range(3):
        ragged.append(layer, rows, rows, cu_seqlens=lens)
    ragged.save(tmp_path / "ragged")
    with pytest.raises(ValueError, match="unlike lengths"):
        KVQuantCache.load(tmp_path / "ragged", model)


def test_heads_that_are_padded_cannot_be_saved(tmp_path: Path, device: str) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "head_dim": 24})
    config._attn_implementation = "kvquant"
    model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    cache = KVQuantCache(model)
    with torch.no_grad():
        model(input_ids=ids_of(1, 5, device), use_cache=True, **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="head_dim of layer 0 is no multiple of 16"):
        cache.save(tmp_path / "cache")


@WAYS
def test_rows_wait_in_host_memory(options: dict[str, Any], device: str) -> None:
    model, ids = make("llama", device), ids_of(2, 90, device)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    caches = [KVQuantCache(model, **options) for _ in range(2)]
    for cache in caches:
        logits(model, cache, ids[:, :80], attention_mask=mask[:, :80])
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    size = caches[0].nbytes
    caches[0].offload()
    assert caches[0].nbytes == 0
    if device == "cuda":
        assert before - torch.cuda.memory_allocated() >= size
    assert caches[0].get_seq_length() == 80
    copy = caches[0].fork()
    assert copy.nbytes == 0
    for end in range(81, 86):
        if end == 83:
            caches[0].offload(1)
            assert 0 < caches[0].nbytes < size
            caches[0].prefetch()
            assert all(layer.nbytes for layer in caches[0].layers)
        step = {"attention_mask": mask[:, :end]}
        found = [logits(model, cache, ids[:, end - 1 : end], **step) for cache in (*caches, copy)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[1])


def test_rows_that_find_no_room_stay_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("llama", "cpu"), ids_of(1, 20, "cpu")
    caches = [KVQuantCache(model) for _ in range(2)]
    for cache in caches:
        logits(model, cache, ids[:, :19])
    caches[0].offload()
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedKVCache, "load_state_dict", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            caches[0].prefetch()
    assert torch.equal(*(logits(model, cache, ids[:, 19:]) for cache in caches))


def no_room(*args: Any) -> None:
    raise torch.OutOfMemoryError("as a GPU says it")
