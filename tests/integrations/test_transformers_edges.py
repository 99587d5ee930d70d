"""What transformers models ask of the cache at the edges: served, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
    QuantizedHandle,
    handle,
)
from kvquant.integrations.transformers.mask import CausalMask  # noqa: E402
from tiny import (  # noqa: E402
    COMMON,
    CONFIGS,
    assert_close,
    generate,
    ids_of,
    logits,
    make,
    reference,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def xglm(attention: str) -> Any:
    config = transformers.XGLMConfig(
        vocab_size=97, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def test_models_with_an_attention_of_their_own_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"attn_implementation: XGLM\w+ computes attention by its"):
        xglm("kvquant")
    model = xglm("eager")
    for call in ({"attn_implementation": "kvquant"}, {"attn_implementation": {"": "kvquant"}}):
        with pytest.raises(ValueError, match="Load it with attn_implementation='eager'"):
            model.set_attn_implementation(**call)
    assert model.config._attn_implementation == "eager"
    falcon = transformers.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="attn_implementation: FalconForCausalLM"):
        transformers.AutoModelForCausalLM.from_config(falcon, attn_implementation="kvquant")


def test_a_refused_model_runs_eager_on_the_cache() -> None:
    torch.manual_seed(3)
    model = xglm("eager").eval().requires_grad_(False)
    caches = KVQuantCache(model), transformers.DynamicCache()
    ids = ids_of(2, 20, "cpu")
    for part in ids.split([12, 7, 1], dim=1):
        ours, theirs = (logits(model, cache, part) for cache in caches)
        assert_close(ours, theirs)


def test_attention_weights_are_not_to_be_had() -> None:
    model = make("llama", "cpu")
    cache = KVQuantCache(model)
    with pytest.raises(ValueError, match=r"output_attentions: .* load the model with .*'eager'"):
        logits(model, cache, ids_of(1, 4, "cpu"), output_attentions=True)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="output_attentions"):
        generate(
            model, KVQuantCache(model), ids_of(1, 4, "cpu"),
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip


def test_another_cache_is_reported_once(device: str, warnings_of: pytest.LogCaptureFixture) -> None:
    model = make("llama", device)
    generate(model, None, ids_of(1, 6, device))
    assert warnings_of.text.count(f"Pass {CACHE_ARGUMENT}=KVQuantCache(model)") == 1
    handle._warned.clear()
    warnings_of.clear()
    model(input_ids=ids_of(1, 6, device), use_cache=False)
    generate(model, KVQuantCache(model), ids_of(1, 6, device))
    assert not warnings_of.text


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "even"])
def test_a_cache_continues_one_text(device: str, padded: bool) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    ids = ids_of(2, 9, device)
    options = {}
    if padded:
        ids[1, :3] = 0
        options["attention_mask"] = ids.ne(0).long()
    first = generate(model, cache, ids, **options)
    with pytest.raises(ValueError, match="A cache continues one text: reset"):
        generate(model, cache, ids, **options)
    cache.reset()
    assert torch.equal(generate(model, cache, ids, **options), first)


def test_a_crop_takes_positions_back(device: str) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    ids = ids_of(1, 12, device)
    logits(model, cache, ids)
    cache.crop(-4)
    logits(model, cache, ids[:, 8:])
    assert cache.get_seq_length() == 12


def test_autocast(device: str) -> None:
    model, peer = make("llama", device), reference("llama", device)
    cache, full = KVQuantCache(model), transformers.DynamicCache(config=peer.config)
    with torch.autocast(device, torch.bfloat16):
        for part in ids_of(2, 30, device).split([20, 1, 9], dim=1):
            assert_close(logits(model, cache, part), logits(peer, full, part))
    part = ids_of(2, 1, device)  # and on without it
    assert_close(logits(model, cache, part), logits(peer, full, part))


@pytest.mark.parametrize("head_dim", [8, 24, 36])
def test_heads_that_are_no_multiple_of_sixteen(head_dim: int, device: str) -> None:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**COMMON, "head_dim": head_dim})
    models = []
    for attention in ("kvquant", "sdpa"):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        models.append(model.to(device).eval().requires_grad_(False))
    cache, full = KVQuantCache(models[0]), transformers.DynamicCache(config=config)
    for part in ids_of(2, 30, device).split([20, 1, 9], dim=1):
        assert_close(logits(models[0], cache, part), logits(models[1], full, part))
    key, _ = cache.layers[0].dequantize(30)
    assert key.shape == (2, 2, 30, head_dim)


def test_a_cache_is_made_from_a_model_or_its_config() -> None:
    model = make("llama", "cpu")
    assert len(KVQuantCache(model).layers) == len(KVQuantCache(model.config).layers) == 3
    with pytest.raises(TypeError, match="config: expected a model or its config, got str"):
        KVQuantCache("llama")


def test_a_layer_shows_its_rows_to_models_that_look(device: str) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    assert cache.layers[0].keys is None
    ids = ids_of(2, 10, device)
    logits(model, cache, ids)
    for got, rows in zip(
        (cache.layers[1].keys, cache.layers[1].values), cache.layers[1].dequantize(10), strict=True
    ):
        assert isinstance(got, QuantizedHandle)
        assert torch.equal(got + 0, rows)


def test_a_mask_is_written_only_for_those_who_look() -> None:
    model, peer = make("mistral-sliding", "cpu"), make("mistral-sliding", "cpu", "eager")
    masks = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    model.model.layers[0].self_attn.register_forward_pre_hook(spy, with_kwargs=True)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :5] = 0
    cache = KVQuantCache(model)
    logits(model, cache, ids_of(2, 30, "cpu"), attention_mask=mask)
    (got,) = masks
    assert isinstance(got, CausalMask)
    assert got.window == 16
    assert got._written is None
    assert got[:, :, :, :30].window == 16
    assert got._written is None
    assert "window=16" in repr(got)
    wanted = transformers.masking_utils.create_sliding_window_causal_mask(
        config=peer.config, inputs_embeds=torch.zeros(2, 30, 64), attention_mask=mask,
        **{CACHE_ARGUMENT: transformers.DynamicCache()},
    )  # fmt: skip
    seen = mask[:, None, :, None].bool() & got
    assert torch.equal(seen, mask[:, None, :, None].bool() & (wanted == 0))


def test_chunks_of_a_left_padded_prompt(device: str) -> None:
    model = make("llama", device)
    ids = ids_of(2, 40, device)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    options = {"exact_prompt": False, "format": kvquant.CacheFormat(key_mean=None)}
    whole = generate(model, KVQuantCache(model, **options), ids, attention_mask=mask)
    for size in (1, 11):  # the padding ends within a chunk, and behind several
        cache = KVQuantCache(model, **options)
        parts = generate(model, cache, ids, attention_mask=mask, prefill_chunk_size=size)
        assert (parts[:, :44] == whole[:, :44]).all()


def test_steps_are_looked_at_while_a_sequence_is_all_padding() -> None:
    """As on an accelerator, where a decode step's mask is not looked at otherwise."""

    class Elsewhere(Tensor):
        device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    batch = KVQuantCache(CONFIGS["llama"]()).batch
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    layer = batch.layers[0]
    for length in range(1, 13):
        looked = mask[:, :length].as_subclass(Elsewhere)
        assert batch.read(looked, 1, length)
        batch.take(layer)
        assert batch.starts is None or batch.starts.tolist() == [0, min(length, 5)]
    mask[0, 9] = 0  # not what a decode step may do: it is not seen there
    assert batch.read(mask.as_subclass(Elsewhere), 1, 12)
    assert not batch.read(mask, 1, 12)


def test_positions_in_a_buffer_that_is_reused(device: str) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    logits(model, cache, ids_of(2, 10, device))
    positions = torch.full((2, 1), 10, device=device)
    for _ in range(3):
        logits(model, cache, ids_of(2, 1, device), position_ids=positions)
        positions += 1
    logits(
        model,
        cache,
        ids_of(2, 4, device),
        position_ids=torch.arange(13, 17, device=device)[None].expand(2, 4),
    )
    assert cache.get_seq_length() == 17


def test_positions_may_go_back_where_that_is_meant(device: str) -> None:
    model = make("llama", device)
    ids = ids_of(1, 8, device)
    positions = torch.arange(8, device=device)[None]
    caches = KVQuantCache(model), KVQuantCache(model, check_positions=False)
    for cache in caches:
        logits(model, cache, ids, position_ids=positions)
    with pytest.raises(ValueError, match=r"position_ids: from 0 on, but .* check_positions=False"):
        logits(model, caches[0], ids, position_ids=positions)
    logits(model, caches[1], ids, position_ids=positions)
    assert [cache.get_seq_length() for cache in caches] == [8, 16]


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: torch.ops.aten._to_copy(mask),
        lambda mask: mask.clone(),
        lambda mask: mask.expand(*mask.shape),
        lambda mask: mask[:, :, :, : mask.shape[-1]],
        lambda mask: mask.view(mask.shape),
    ],
)
def test_a_copied_mask_is_still_no_mask(change: Any, warnings_of: pytest.LogCaptureFixture) -> None:
    """As between the layers of a model that lies on several devices."""
    model = make("mistral-sliding", "cpu")
    ids = ids_of(2, 40, "cpu")
    expected = logits(model, KVQuantCache(model), ids)

    def copied(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": change(kwargs["attention_mask"])}

    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    assert torch.equal(logits(model, KVQuantCache(model), ids), expected)
    assert not warnings_of.text
    mask = CausalMask(
        (1, 1, 2, 2), torch.device("cpu"), None, lambda: torch.eye(2).bool()[None, None]
    )
    assert not isinstance(mask.float(), CausalMask)
    assert torch.equal(mask[:, :, :1].clone() + 0.0, torch.tensor([[[[1.0, 0.0]]]]))


def test_a_call_that_fails_leaves_padding_and_layers(device: str) -> None:
    model = make("llama", device)
    ids = ids_of(2, 10, device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = KVQuantCache(model, max_cache_len=32)
    logits(model, cache, ids, attention_mask=mask)
    positions = cache.batch.positions
    with pytest.raises(kvquant.CacheFullError):
        logits(model, cache, ids_of(2, 30, device), attention_mask=torch.ones(2, 40).to(device))
    assert cache.batch.starts is not None
    assert cache.batch.starts.tolist() == [0, 4]
    for broken in (1, 2):
        layer = cache.layers[broken].storage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                layer, "attend", lambda *_, **__: (_ for _ in ()).throw(MemoryError("none left"))
            )
            with pytest.raises(MemoryError):
                logits(model, cache, ids[:, :3], attention_mask=torch.ones(2, 13).to(device))
        assert [one.get_seq_length() for one in cache.layers] == [10] * 3
        assert cache.batch.starts.tolist() == [0, 4]
        assert torch.equal(cache.batch.positions, positions)
    again = KVQuantCache(model, max_cache_len=32)
    logits(model, again, ids, attention_mask=mask)
    more = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    got, expected = (logits(model, one, ids[:, :1], attention_mask=more) for one in (cache, again))
    assert torch.equal(got, expected)


def test_copies_of_a_cache_and_of_a_layer(device: str) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    ids = ids_of(2, 10, device)
    logits(model, cache, ids)
    twin, layer = copy.deepcopy(cache), copy.deepcopy(cache.layers[0])
    assert layer.batch is cache.batch  # models that add a layer copy one
    assert layer.storage is not cache.layers[0].storage
    assert twin.batch is not cache.batch
    assert all(one.batch is twin.batch for one in twin.layers)
    assert twin.batch.layers is twin.layers
    assert [one.leads for one in twin.layers] == [True, False, False]
    assert not layer.leads
    first = logits(model, cache, ids[:, :1])
    assert cache.get_seq_length() == 11
    assert twin.get_seq_length() == 10
    assert torch.equal(logits(model, twin, ids[:, :1]), first)


def test_layers_left_apart_are_reported(device: str) -> None:
    model = make("llama", device)
    cache = KVQuantCache(model)
    logits(model, cache, ids_of(1, 10, device))
    cache.layers[1].crop(-1)
    with pytest.raises(ValueError, match="cache: the mask is of 11 tokens, but a layer holds 10"):
        logits(model, cache, ids_of(1, 1, device))
    cache.crop(9)
    logits(model, cache, ids_of(1, 1, device))
    assert [one.get_seq_length() for one in cache.layers] == [10] * 3


def test_a_name_set_past_the_checks_is_refused_in_the_forward_pass() -> None:
    model = xglm("eager")
    model.config._attn_implementation = "kvquant"
    with pytest.raises(ValueError, match="XGLMConfig computes attention by itself"):
        logits(model, KVQuantCache(model), ids_of(1, 4, "cpu"))


def test_a_subclass_of_a_users_own_is_served(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "own_model.py").write_text(
        "import torch\nfrom transformers import LlamaForCausalLM\n"
        "class OwnAttentionPool(torch.nn.Module):\n    pass\n"
        "class OwnLlama(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_model import OwnLlama  # type: ignore[import-not-found]

    model = OwnLlama._from_config(CONFIGS["llama"](), attn_implementation="kvquant")
    logits(model.eval().requires_grad_(False), KVQuantCache(model), ids_of(1, 4, "cpu"))
