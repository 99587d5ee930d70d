"""Layers with a sliding window give back memory behind it, and compute what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # noqa: E402
from tiny import assert_close, generate, ids_of, logits, make, reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
MODELS = ["mistral-sliding", "gemma2", "gpt-oss-sinks"]
WINDOW = 16  # of tiny.py's models
HELD = 256 + 256 + 32 + 64  # a group of the key mean behind the window's, the slack, a block


def held(layer: Any) -> int:
    """Tokens of the longest sequence for which a layer has blocks."""
    table, view = layer.storage.block_table, layer.storage.layer(0)[0]
    return int((table >= 0).sum(1).max()) * view.block_size


@pytest.mark.parametrize("parts", [[700], [3000], [400, 300, 1, 1, 250]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_memory(name: str, parts: list[int], device: str) -> None:
    model, peer = make(name, device), reference(name, device)
    cache, whole = KVQuantCache(model), KVQuantCache(model, max_cache_len=4096)
    full = transformers.DynamicCache(config=peer.config)
    ids = ids_of(2, sum(parts) + 130, device)
    # Pieces of a prompt take group means from stored rows, a prompt at once from its exact ones.
    tolerance = 1e-2 if max(parts) > 1024 else 1e-3
    for part in ids.split([*parts, *[1] * 130], dim=1):
        found = logits(model, cache, part)
        assert_close(found, logits(model, whole, part), tolerance)
        if part.shape[1] > 1:
            assert_close(found, logits(peer, full, part))
        else:
            logits(peer, full, part)
    for layer in cache.layers:
        if layer.sliding_window is None:
            assert held(layer) >= ids.shape[1]
        else:
            assert held(layer) <= HELD
            assert layer.storage.layer(0)[0].num_blocks * 64 <= 1.2 * (1024 + HELD)
    assert cache.get_seq_length() == ids.shape[1]


def test_bytes_beside_those_of_a_dynamic_cache(device: str) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, head_dim=128, sliding_window=512,
        max_position_embeddings=65536,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvquant")
    model = model.to(device, torch.bfloat16).eval().requires_grad_(False)
    cache = KVQuantCache(model)
    for part in ids_of(1, 16384, device).split(4096, dim=1):
        model(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    windows = [layer.sliding_window for layer in cache.layers]
    assert windows.count(512) == 5
    dynamic = sum(16384 if window is None else 512 for window in windows) * 2 * 128 * 2
    assert cache.nbytes <= 0.6 * dynamic  # the longer the text, the nearer to 0.52


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"prompt_lookup_num_tokens": 4, "eos_token_id": 1},  # transformers 5.5 needs one for it
    ],
    ids=["beams", "sampling", "lookup"],
)
def test_modes_of_generate(options: dict[str, Any], device: str) -> None:
    model = make("gemma2", device)
    ids = ids_of(1, 700, device)
    found = []
    for limit in (None, 1024):
        torch.manual_seed(7)
        cache = KVQuantCache(model, max_cache_len=limit)
        found.append(generate(model, cache, ids, 90, **options))
    assert torch.equal(*found)


def test_forks_and_left_padding(device: str) -> None:
    model = make("mistral-sliding", device)
    ids = ids_of(2, 600, device)
    mask = torch.ones_like(ids)
    mask[1, :590] = 0
    found = []
    for limit in (None, 1024):
        cache = KVQuantCache(model, max_cache_len=limit)
        part = mask[:, :600]
        logits(model, cache, ids, attention_mask=part)
        fork = cache.fork()
        steps = []
        for i in range(80):
            part = torch.cat([part, torch.ones_like(part[:, :1])], dim=1)
            new = ids[:, i : i + 1]
            steps.append(logits(model, fork, new, attention_mask=part))
        found.append(torch.cat(steps, dim=1))
        assert cache.get_seq_length() == 600
    assert_close(*found, 1e-3)


def test_eager_attention_reads_the_window(device: str) -> None:
    model, eager = make("mistral-sliding", device), make("mistral-sliding", device, "eager")
    cache, ids = KVQuantCache(model), ids_of(1, 500, device)
    logits(model, cache, ids)
    logits(model, cache, ids[:, :1])  # memory behind the window is given back
    copied = cache.fork()
    expected = logits(model, cache, ids[:, 1:4])
    assert_close(logits(eager, copied, ids[:, 1:4]), expected, 1e-3)


def test_a_written_mask_hides_what_is_gone(device: str) -> None:
    model = make("mistral-sliding", device)
    cache, ids = KVQuantCache(model), ids_of(1, 500, device)
    logits(model, cache, ids)
    logits(model, cache, ids[:, :1])
    fork = cache.fork()
    expected = logits(model, fork, ids[:, 1:2])
    mask = torch.ones(1, 1, 1, 502, dtype=torch.bool, device=device)
    assert_close(logits(model, cache, ids[:, 1:2], attention_mask=mask), expected, 1e-3)


def test_a_call_that_fails_in_a_later_layer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mistral-sliding", device)
    cache, ids = KVQuantCache(model), ids_of(1, 2500, device)
    logits(model, cache, ids[:, :400])
    fork = cache.fork()
    storage = cache.layers[2].storage
    monkeypatch.setattr(type(storage), "attend", _failing(type(storage).attend, storage))
    with pytest.raises(RuntimeError, match="broken"):
        logits(model, cache, ids[:, 400:420])
    assert cache.get_seq_length() == 400  # a short chunk is undone
    monkeypatch.undo()
    assert_close(logits(model, cache, ids[:, 400:420]), logits(model, fork, ids[:, 400:420]), 1e-5)
    storage = cache.layers[2].storage
    monkeypatch.setattr(type(storage), "attend", _failing(type(storage).attend, storage))
    with pytest.raises(RuntimeError, match="broken"):
        logits(model, cache, ids[:, 420:])
    monkeypatch.undo()
    cache.reset()  # a long one is not: the windows have moved on
    assert logits(model, cache, ids[:, :10]).isfinite().all()


def _failing(attend: Any, storage: Any) -> Any:
    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is storage:
            raise RuntimeError("broken")
        return attend(self, *args, **kwargs)

    return fails
