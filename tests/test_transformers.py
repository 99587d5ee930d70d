"""transformers models on the 8-bit cache against the same models on transformers' own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant

transformers = pytest.importorskip("transformers", minversion="4.56")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
    QuantizedHandle,
    handle,
)
from kvquant.integrations.transformers.mask import CausalMask  # noqa: E402
from support import no_waiting  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "mistral-sliding": lambda: transformers.MistralConfig(**COMMON, sliding_window=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, sliding_window=16, query_pre_attn_scalar=32, attn_logit_softcapping=5.0
    ),
    "gpt-oss-sinks": lambda: transformers.GptOssConfig(
        **{**COMMON, "initializer_range": 0.1},  # one expert: a router would turn errors into jumps
        sliding_window=16,
        num_local_experts=1,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
TOLERANCE = 0.05  # of the logits' standard deviation; rounding keys and values to bf16: 0.007


def make(name: str, device: str, attention: str = "kvquant") -> Any:
    torch.manual_seed(3)
    config = CONFIGS[name]()
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():  # biases: those of keys are large
            parameter.data.normal_(std=1.0)
    return model.to(device).eval().requires_grad_(False)


def reference(name: str, device: str) -> Any:
    return make(name, device, "eager" if name in ("gemma2", "gpt-oss-sinks") else "sdpa")


def ids_of(batch: int, tokens: int, device: str) -> Tensor:
    return torch.randint(2, 97, (batch, tokens)).to(device)


def logits(model: Any, cache: Any, ids: Tensor, **options: Any) -> Tensor:
    out: Tensor = model(
        input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}, **options
    ).logits.float()
    return out


def generate(model: Any, cache: Any, ids: Tensor, new: int = 12, **options: Any) -> Tensor:
    out: Tensor = model.generate(
        ids, **{CACHE_ARGUMENT: cache, "max_new_tokens": new, "do_sample": False, **options}
    )
    return out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (actual - expected).square().mean().sqrt() / expected.std()
    assert error < tolerance, f"error {error:.4f} of the logits' deviation"


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    handle._warned.clear()
    caplog.set_level(logging.WARNING, "kvquant")
    return caplog


@pytest.mark.parametrize("exact_prompt", [True, False], ids=["exact-prompt", "stored-prompt"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_a_full_cache(
    name: str, exact_prompt: bool, device: str, warnings_of: pytest.LogCaptureFixture
) -> None:
    model, peer = make(name, device), reference(name, device)
    cache = KVQuantCache(model.config, exact_prompt=exact_prompt)
    full = transformers.DynamicCache(config=peer.config)
    ids = ids_of(2, 60, device)
    for part in ids.split([41, 7, 1, 1, 10], dim=1):  # a prompt, a chunk, steps, a chunk
        assert_close(logits(model, cache, part), logits(peer, full, part))
    assert cache.get_seq_length() == 60
    assert "dequantised" not in warnings_of.text


def test_a_prompt_is_exact(device: str) -> None:
    ids = ids_of(2, 40, device)
    model, peer = make("llama", device), reference("llama", device)
    expected = logits(peer, transformers.DynamicCache(config=peer.config), ids)
    torch.testing.assert_close(
        logits(model, KVQuantCache(model.config), ids), expected, atol=1e-4, rtol=1e-4
    )
    stored = logits(model, KVQuantCache(model.config, exact_prompt=False), ids)
    assert (stored - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_equal_where_margins_are_clear(name: str, device: str) -> None:
    model, peer = make(name, device), reference(name, device)
    ids = ids_of(16, 30, device)
    out = peer.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack(out.logits, dim=1).float()
    top = steps.topk(2).values
    clear = (top[..., 0] - top[..., 1]) / steps.std() > 4 * TOLERANCE
    compared = clear.int().cumprod(1).bool()  # up to the first close call of a sequence
    assert compared.sum() > 10, "the model is no use for this test"
    tokens = generate(model, KVQuantCache(model.config), ids)[:, 30:]
    assert torch.equal(tokens[compared], out.sequences[:, 30:][compared])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-sliding", "gemma2"])
def test_a_left_padded_batch_equals_its_rows_alone(
    name: str, device: str, warnings_of: pytest.LogCaptureFixture
) -> None:
    model = make(name, device)
    lengths = (25, 9, 17)
    rows = [ids_of(1, n, device) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(width) >= width - n)[None] for n in lengths]).long().to(device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = KVQuantCache(model.config, exact_prompt=False)
    alone = [KVQuantCache(model.config, exact_prompt=False) for _ in rows]
    got = logits(model, cache, ids, attention_mask=mask, position_ids=positions)
    for i, (row, own) in enumerate(zip(rows, alone, strict=True)):
        assert_close(got[i, width - lengths[i] :], logits(model, own, row)[0])
    for _ in range(3):
        token = ids_of(3, 1, device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        got = logits(model, cache, token, attention_mask=mask, position_ids=positions)
        for i, own in enumerate(alone):
            assert_close(got[i], logits(model, own, token[i : i + 1])[0])
    assert cache.batch.starts is not None
    assert cache.batch.starts.tolist() == [0, 16, 8]
    assert "dequantised" not in warnings_of.text


def test_generate_on_a_left_padded_batch(device: str) -> None:
    model = make("llama", device)
    ids = ids_of(2, 20, device)
    ids[1, :8] = 0
    mask = ids.ne(0).long()
    tokens = generate(model, KVQuantCache(model.config), ids, attention_mask=mask)
    alone = generate(model, KVQuantCache(model.config), ids[1:, 8:])
    assert torch.equal(tokens[1, 20:], alone[0, 12:])


def test_sampling_and_a_fixed_capacity(device: str) -> None:
    model = make("qwen2", device)
    ids = ids_of(2, 10, device)
    outs = []
    for options in ({}, {"max_cache_len": 40}, {"block_size": 16}):
        torch.manual_seed(5)
        cache = KVQuantCache(model.config, **options)
        outs.append(generate(model, cache, ids, do_sample=True, temperature=2.0))
    assert outs[0].shape == (2, 22)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_beam_search(device: str) -> None:
    model, peer = make("llama", device), reference("llama", device)
    ids = ids_of(2, 10, device)
    ours = generate(model, KVQuantCache(model.config), ids, num_beams=3, new=6)
    full = transformers.DynamicCache(config=peer.config)
    assert torch.equal(ours, generate(peer, full, ids, num_beams=3, new=6))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_gets_dequantised_rows(
    name: str, attention: str, device: str, warnings_of: pytest.LogCaptureFixture
) -> None:
    model, other = make(name, device), make(name, device, attention)
    ids = ids_of(2, 30, device)
    caches = [KVQuantCache(m.config, exact_prompt=False) for m in (model, other)]
    for part in ids.split([20, 5, 1, 4], dim=1):
        ours, theirs = (logits(m, c, part) for m, c in zip((model, other), caches, strict=True))
        assert_close(ours, theirs, 0.01)
    assert warnings_of.text.count("attn_implementation='kvquant'") == 1


def test_a_custom_mask_is_honoured(device: str, warnings_of: pytest.LogCaptureFixture) -> None:
    model, peer = make("llama", device), reference("llama", device)
    ids = ids_of(1, 12, device)
    mask = torch.ones(12, 12, dtype=torch.bool, device=device).tril()
    mask[:, 3] = False
    mask[3, 3] = True
    caches = KVQuantCache(model.config), transformers.DynamicCache(config=peer.config)
    ours, theirs = (
        logits(m, c, ids, attention_mask=mask[None, None])
        for m, c in zip((model, peer), caches, strict=True)
    )
    assert_close(ours, theirs)
    assert warnings_of.text.count("dequantised copy") == 1


def test_a_mask_with_holes_is_honoured(device: str, warnings_of: pytest.LogCaptureFixture) -> None:
    model, peer = make("llama", device), reference("llama", device)
    caches = KVQuantCache(model.config), transformers.DynamicCache(config=peer.config)
    ids = ids_of(2, 13, device)
    mask = torch.ones(2, 13, dtype=torch.long, device=device)
    mask[1, 4:7] = 0
    for part in (slice(0, 12), slice(12, 13)):
        ours, theirs = (
            logits(m, c, ids[:, part], attention_mask=mask[:, : part.stop])
            for m, c in zip((model, peer), caches, strict=True)
        )
        visible = mask[:, part].bool()
        assert_close(ours[visible], theirs[visible])
    assert not caches[0].batch.regular
    assert "dequantised copy" in warnings_of.text


def test_the_attention_serves_other_caches(device: str) -> None:
    for name in ("llama", "gemma2"):
        model, peer = make(name, device), reference(name, device)
        ids = ids_of(1, 20, device)
        caches = [transformers.DynamicCache(config=m.config) for m in (model, peer)]
        for part in ids.split([12, 1, 7], dim=1):
            ours, theirs = (logits(m, c, part) for m, c in zip((model, peer), caches, strict=True))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_crop_reset_and_the_rows_of_a_batch(device: str) -> None:
    model = make("llama", device)
    ids = ids_of(2, 24, device)
    cache = KVQuantCache(model.config)
    first = logits(model, cache, ids)
    step = logits(model, cache, ids[:, :1])
    cache.crop(-1)
    assert cache.get_seq_length() == 24
    torch.testing.assert_close(logits(model, cache, ids[:, :1]), step)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0], device=device))
    swapped = logits(model, cache, ids[:, :1].flip(0))
    assert_close(swapped.flip(0), step, 1e-3)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].batch_size == 4
    again = logits(model, cache, ids[:, :1].flip(0).repeat_interleave(2, dim=0))
    assert_close(again[::2].flip(0), step, 1e-3)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([2], device=device))
    assert_close(logits(model, cache, ids[:1, :1]), step[:1], 1e-3)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, cache, ids), first)


def test_handles_are_references(device: str) -> None:
    cache = KVQuantCache(CONFIGS["llama"](), max_cache_len=16)
    key, value = (torch.randn(2, 2, 10, 32, device=device) for _ in range(2))
    got = cache.update(key, value, 0)
    assert all(isinstance(x, QuantizedHandle) and x.shape == key.shape for x in got)
    assert "QuantizedHandle" in repr(got[0])
    torch.testing.assert_close(got[0] + 0, key, atol=0.03, rtol=0)
    torch.testing.assert_close(got[1].float(), value, atol=0.03, rtol=0)
    assert cache.get_mask_sizes(3, 0) == (13, 0)
    assert cache.nbytes < key.nbytes  # keys and values of 16 tokens; fp32 keys of 10


@pytest.mark.gpu
def test_decoding_never_waits_for_the_device(cuda: str) -> None:
    model = make("llama", cuda)
    cache = KVQuantCache(model.config, max_cache_len=64)
    ids = ids_of(2, 20, cuda)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    logits(model, cache, ids, attention_mask=mask)
    positions = torch.full((2, 1), 20, device=cuda)
    step = {"attention_mask": torch.cat([mask, mask[:, :1].clone().fill_(1)], 1)}
    with no_waiting():
        model(
            input_ids=ids[:, :1],
            use_cache=True,
            position_ids=positions,
            **{CACHE_ARGUMENT: cache},
            **step,
        )


def test_errors_name_what_is_wrong(device: str) -> None:
    config = CONFIGS["llama"]()
    cache = KVQuantCache(config, max_cache_len=16)
    rows = torch.randn(1, 2, 10, 32, device=device)
    cache.update(rows, rows, 0)
    with pytest.raises(kvquant.CacheFullError, match=r"max_cache_len: 16 .* 10 are stored and 10"):
        cache.update(rows, rows, 0)
    with pytest.raises(ValueError, match="key_states"):
        cache.update(rows[:, :1], rows[:, :1], 0)
    with pytest.raises(NotImplementedError, match="does not offload"):
        cache.layers[0].offload()
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer 1 is 'linear_attention'"):
        KVQuantCache(config)
    config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        KVQuantCache(config)


def test_a_failed_forward_leaves_the_cache_as_it_was() -> None:
    model = make("llama", "cpu")
    ids = ids_of(1, 12, "cpu")
    cache = KVQuantCache(model.config)
    model.requires_grad_(True)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
        fresh = model(
            input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: KVQuantCache(model.config)}
        ).logits
    assert torch.equal(again, fresh)


# ------------------------------------------------------------------------- what cannot be served


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
