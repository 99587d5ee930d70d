"""`enable`: generate() on an 8-bit cache that nobody passes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
    disable,
    enable,
)
from tiny import CONFIGS, generate, ids_of, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def tokens_of(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, return_dict_in_generate=True, **settings)


def cache_of(out: Any) -> Any:
    return out.get(CACHE_ARGUMENT) if CACHE_ARGUMENT in out else out.past_key_values


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_is_that_with_a_cache_passed(name: str, device: str) -> None:
    model, ids = make(name, device), ids_of(2, 20, device)
    expected = generate(model, KVQuantCache(model), ids, 6)
    enabled = make(name, device, "eager")
    assert enable(enabled) is enabled
    for _ in range(2):  # each call has a cache of its own
        out = tokens_of(enabled, ids)
        assert torch.equal(out.sequences, expected)
        assert isinstance(cache_of(out), KVQuantCache)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=["beams", "sampling", "several"],
)
def test_modes_of_generate(options: dict[str, Any], device: str) -> None:
    ids, found = ids_of(2, 20, device), []
    for cache in (True, False):
        model = make("llama", device)
        passed = {CACHE_ARGUMENT: KVQuantCache(model)} if cache else {}
        if not cache:
            enable(model)
        torch.manual_seed(5)
        found.append(tokens_of(model, ids, **passed, **options).sequences)
    assert torch.equal(*found)


def test_a_call_that_brings_a_cache_or_wants_none_is_left_alone(device: str) -> None:
    model, ids = enable(make("llama", device)), ids_of(1, 10, device)
    mine = transformers.DynamicCache(config=model.config)
    assert cache_of(tokens_of(model, ids, **{CACHE_ARGUMENT: mine})) is mine
    assert cache_of(tokens_of(model, ids, use_cache=False)) is None
    static = cache_of(tokens_of(model, ids, cache_implementation="static", disable_compile=True))
    assert isinstance(static, transformers.StaticCache)
    config = transformers.GenerationConfig(use_cache=False, max_new_tokens=3)
    assert cache_of(model.generate(ids, config, return_dict_in_generate=True)) is None


def test_options_are_those_of_the_cache(device: str) -> None:
    model, ids = enable(make("llama", device), max_cache_len=12), ids_of(1, 10, device)
    with pytest.raises(kvquant.CacheFullError, match="max_cache_len: 12"):
        tokens_of(model, ids)
    enable(model, block_size=16, format=kvquant.CacheFormat.plain())
    cache = cache_of(tokens_of(model, ids))
    storage = cache.layers[0].storage
    assert storage.format == kvquant.CacheFormat.plain()
    assert storage.block_size == 16


def test_disable_gives_back_what_was_there(device: str) -> None:
    model, ids = make("llama", device, "sdpa"), ids_of(1, 10, device)
    before = tokens_of(model, ids)
    enable(enable(model), block_size=16)  # twice: the attention from before the first
    assert model.config._attn_implementation == "kvquant"
    assert disable(model) is model
    assert model.config._attn_implementation == "sdpa"
    after = tokens_of(model, ids)
    assert torch.equal(after.sequences, before.sequences)
    assert isinstance(cache_of(after), transformers.DynamicCache)
    assert disable(model) is model  # and again


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_generates_by_itself(copied: Any, device: str) -> None:
    model, ids = enable(make("llama", device)), ids_of(1, 10, device)
    other = copied(model)
    other.lm_head.weight.data.zero_()  # every logit is equal: token 0
    assert tokens_of(other, ids).sequences[0, -1] == 0
    assert isinstance(cache_of(tokens_of(other, ids)), KVQuantCache)
    assert tokens_of(model, ids).sequences[0, 10:].any()


def test_a_pipeline(device: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")
    model = make("llama", device, "sdpa")
    made: list[KVQuantCache] = []
    enable(model)
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs[CACHE_ARGUMENT])
        return forward(*args, **kwargs)

    model.forward = watched
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=fast, device=device)
    text = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")
    assert made
    assert all(isinstance(cache, KVQuantCache) for cache in made)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers model .* got Linear"):
        enable(torch.nn.Linear(2, 2))  # type: ignore[type-var]
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        enable(model)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="computes attention by itself"):
        enable(bloom)
    for refused in (model, bloom):
        assert "generate" not in vars(refused)
        assert refused.config._attn_implementation != "kvquant"
