"""Decode steps under torch.compile: no graph break, one compilation, whatever the length."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import kvquant

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
    graph_step,
)
from tiny import COMMON, CONFIGS, assert_close, generate, ids_of, logits, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore:.*TensorFloat32:UserWarning"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def whole(model: Any) -> Any:
    """The model, compiled or an error, and never twice."""
    return torch.compile(model, fullgraph=True, backend="eager")


def assert_compiled_once() -> None:
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def small(device: str, attention: str = "kvquant") -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 2})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device).eval().requires_grad_(False)


def test_one_compilation_for_lengths_1_to_4096(device: str) -> None:
    model = small(device)
    step, cache = whole(model), KVQuantCache(model, max_cache_len=4096)
    other = KVQuantCache(model, max_cache_len=4096)
    ids, at = ids_of(1, 4096, device), 0
    for length in (1, 2, 3, 15, 16, 17, 255, 256, 257, 1023, 1024, 2500, 4094, 4095):
        for used in (cache, other) if length > at else ():
            logits(model, used, ids[:, at:length])
        token = ids[:, length : length + 1]
        assert_close(logits(step, cache, token), logits(model, other, token), 1e-4)
        at = length + 1
        if length in (1, 2, 255, 4095):
            assert cache.get_seq_length() == length + 1
    assert_compiled_once()
    assert [layer.length for layer in cache.layers] == [4096, 4096]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model(name: str, device: str) -> None:
    model, ids = make(name, device), ids_of(2, 24, device)
    step, cache = whole(model), KVQuantCache(model, max_cache_len=64)
    other = KVQuantCache(model)
    for part in ids.split([10, *[1] * 14], dim=1):  # past the window of 16
        forward = model if part.shape[1] > 1 else step
        assert_close(logits(forward, cache, part), logits(model, other, part), 1e-4)
    assert_compiled_once()


def test_rows_that_no_attention_took_are_stored_first(device: str) -> None:
    model, ids = small(device), ids_of(2, 3, device)
    caches = [KVQuantCache(model, max_cache_len=64) for _ in range(3)]
    for index in range(2):
        rows = [torch.randn(2, 2, 9, 32, device=device) for _ in range(2)]
        for cache in caches:
            cache.update(*rows, index)
    step = torch.compile(model, backend="eager")
    for token in ids.split(1, dim=1):
        assert_close(logits(step, caches[0], token), logits(model, caches[1], token), 1e-4)
    assert caches[0].get_seq_length() == 12
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits(whole(model), caches[2], ids[:, :1])


def test_padding_and_changes_between_steps(device: str) -> None:
    model = make("llama", device)
    step, cache = whole(model), KVQuantCache(model, max_cache_len=64)
    other = KVQuantCache(model)
    mask = torch.ones(3, 12, dtype=torch.long, device=device)
    mask[1, :6] = 0
    ids = ids_of(3, 12, device)
    options = {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
    for used in (cache, other):
        logits(model, used, ids, **options)
    index = torch.tensor([1, 1, 0], device=device)
    for at in range(9):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        positions, ids = mask.sum(-1, keepdim=True) - 1, ids_of(3, 1, device)
        mine = logits(step, cache, ids, position_ids=positions)
        theirs = logits(model, other, ids, position_ids=positions, attention_mask=mask)
        assert_close(mine, theirs, 1e-4)
        if at in (3, 5):
            for used in (cache, other):
                used.reorder_cache(index)
            mask = mask[index]
        if at == 6:
            for used in (cache, other):
                used.crop(-2)
            mask = mask[:, :-2]
    assert_compiled_once()


def settings(**options: Any) -> dict[str, Any]:
    """What lets generate compile on any device, with a backend that is quick."""
    config = transformers.CompileConfig(backend="eager", mode="default", **options)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_compiles_by_itself(name: str, options: dict[str, Any], device: str) -> None:
    model, ids, found = make(name, device), ids_of(2, 12, device), []
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for how in ({"disable_compile": True}, settings(fullgraph=True)):
        cache = KVQuantCache(model, max_cache_len=64, compileable=True)
        assert cache.is_compileable
        torch.manual_seed(5)
        found.append(generate(model, cache, ids, 14, attention_mask=mask, **how, **options))
    assert torch.equal(*found)
    if "num_beams" not in options:  # which transformers does not compile
        assert_compiled_once()
    assert cache.layers[1].length == 25


def test_formats_by_layer(device: str) -> None:
    model, ids, found = make("llama", device), ids_of(2, 12, device), []
    formats = [
        "int8",
        kvquant.CacheFormat(key="int4", value="int4", key_mean=16, by_age=True),
        "plain",
    ]
    for how in ({"disable_compile": True}, settings(fullgraph=True)):
        cache = KVQuantCache(model, max_cache_len=64, compileable=True, format=formats)
        found.append(generate(model, cache, ids, 30, **how))
    assert torch.equal(*found)
    assert_compiled_once()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch captures nothing at first
def test_generate_replays_cuda_graphs(cuda: str) -> None:
    """As transformers compiles without being asked to: reduce-overhead, no graph skipped."""
    model, ids = make("llama", cuda), ids_of(4, 12, cuda)
    expected = generate(model, KVQuantCache(model, max_cache_len=64), ids, 30, disable_compile=True)
    for _ in range(2):  # another cache, other addresses, the same code
        cache = KVQuantCache(model, max_cache_len=64, compileable=True)
        assert torch.equal(generate(model, cache, ids, 30), expected)
    assert_compiled_once()
    assert not counters["inductor"]["cudagraph_skips"]


def test_a_full_cache(device: str) -> None:
    model, ids = small(device), ids_of(1, 16, device)
    cache = KVQuantCache(model, max_cache_len=16, compileable=True)
    with pytest.raises(kvquant.CacheFullError, match="16 tokens a sequence, but 16 are stored"):
        generate(model, cache, ids[:, :10], 12, **settings())
    assert cache.layers[0].length == 16
    cache.reset()
    step = whole(model)
    logits(model, cache, ids[:, :15])
    for _ in range(3):
        logits(step, cache, ids[:, :1])
    with pytest.raises(kvquant.CacheFullError, match="compiled steps have brought 1"):
        cache.crop(-1)


def test_what_else_is_done_to_a_cache_after_compiled_steps(device: str, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    model, ids = small(device), ids_of(2, 20, device)
    step, other = whole(model), KVQuantCache(model)
    cache = KVQuantCache(model, max_cache_len=64)

    def start(used: KVQuantCache, forward: Any) -> None:
        used.reset()
        logits(model, used, ids[:, :16])
        for at in range(16, 20):
            logits(forward, used, ids[:, at : at + 1])

    def restart() -> None:
        start(cache, step)

    start(other, model)

    restart()
    copies = [cache.fork(), copy.deepcopy(cache)]
    restart()
    cache.save(tmp_path / "cache")
    copies.append(KVQuantCache.load(tmp_path / "cache", model, max_cache_len=64))
    restart()
    assert cache.layers[0].keys.shape[2] == 20
    restart()
    chunk = ids[:, :3]
    expected = logits(model, other, chunk)
    for used in (cache, *copies):
        assert_close(logits(model, used, chunk), expected, 1e-4)
    token = ids[:, :1]
    expected = logits(model, other, token)
    for used in (cache, *copies):
        assert_close(logits(step, used, token), expected, 1e-4)


def test_what_is_not_compiled(device: str) -> None:
    model = small(device)
    assert not KVQuantCache(model).is_compileable
    assert not KVQuantCache(model, max_cache_len=64).is_compileable
    for options in ({}, {"max_cache_len": 64, "block_size": 16}):
        with pytest.raises(ValueError, match="compileable: needs a max_cache_len and no block"):
            KVQuantCache(model, compileable=True, **options)
    stepped = KVQuantCache(model, max_cache_len=64, compileable=True)
    graph_step(model, stepped)
    assert not stepped.is_compileable


def test_a_mask_with_holes_breaks_the_graph_and_is_right(device: str) -> None:
    model, peer, ids = small(device), small(device, "sdpa"), ids_of(1, 20, device)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    plain = kvquant.CacheFormat(key_mean=None)
    cache = KVQuantCache(model, max_cache_len=64, format=plain, compileable=True)
    tokens = generate(model, cache, ids, 6, attention_mask=mask, **settings())
    full = transformers.DynamicCache(config=peer.config)
    assert tokens.shape == generate(peer, full, ids, 6, attention_mask=mask).shape
    cache.reset()
    eager = generate(model, cache, ids, 6, attention_mask=mask, disable_compile=True)
    assert torch.equal(tokens, eager)


@pytest.mark.parametrize("attention", ["sdpa", "kvquant"])
def test_models_that_read_what_the_cache_gives_out(
    attention: str, device: str, warnings_of: pytest.LogCaptureFixture
) -> None:
    """Another attention, or a model that computes with keys: handles, compiled or not."""
    if attention == "kvquant":
        pytest.importorskip("transformers", minversion="5.24")  # in 5.5 refused: its own classes
        config = transformers.DiffLlamaConfig(**{**COMMON, "num_hidden_layers": 2})
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = model.to(device).eval().requires_grad_(False)
    else:
        model = small(device, attention)
    ids = ids_of(2, 12, device)
    found: list[Tensor] = []
    for how in ({"disable_compile": True}, settings()):
        cache = KVQuantCache(model, max_cache_len=64, compileable=True)
        found.append(generate(model, cache, ids, 4, **how))
    assert torch.equal(*found)
    assert "dequantized" in warnings_of.text


def test_no_cache_is_left_behind(device: str) -> None:
    """What a cache leaves for the attention function is gone after each trace."""
    from kvquant.integrations.transformers.compiled import HANDOFF

    model, ids = small(device), ids_of(1, 12, device)
    cache = KVQuantCache(model, max_cache_len=64)
    logits(model, cache, ids)
    logits(whole(model), cache, ids[:, :1])
    assert vars(HANDOFF) == {"batch": None, "layer": None, "key": None}
    assert CACHE_ARGUMENT in ("cache", "past_key_values")
