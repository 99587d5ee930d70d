"""transformers models on the 8-bit cache against the same models on transformers' own."""

from __future__ import annotations

import pytest
import torch

import kvquant

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
    QuantizedHandle,
)
from support import no_waiting  # noqa: E402
from tiny import (  # noqa: E402
    CONFIGS,
    TOLERANCE,
    assert_close,
    generate,
    ids_of,
    logits,
    make,
    reference,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


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
    assert "dequantized" not in warnings_of.text


@pytest.mark.parametrize("pair", [{"value": "int4"}, {"key": "int4", "value": "int4"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_by_age_are_nearer_those_of_a_full_cache_than_uniform_ones(
    name, pair, device
) -> None:
    """Most tokens are old, groups being of 16: what is young still shows."""
    model, peer = make(name, device), reference(name, device)
    ids = ids_of(2, 160, device)
    errors = []
    for by_age in (True, False):
        format = kvquant.CacheFormat(key_mean=16, by_age=by_age, **pair)
        cache = KVQuantCache(model, format=format, exact_prompt=False)
        full = transformers.DynamicCache(config=peer.config)
        squares = []
        for part in ids.split([41, 7, *[1] * 40, 52, *[1] * 20], dim=1):
            ours, wanted = logits(model, cache, part), logits(peer, full, part)
            squares.append(((ours - wanted).square().sum(), wanted.square().sum()))
        error, size = (torch.stack(of).sum() for of in zip(*squares, strict=True))
        errors.append(float((error / size).sqrt()))
    assert errors[0] < 0.85 * errors[1]


def test_formats_by_layer(device: str) -> None:
    """Each layer's rows are those of a cache of its format, and a wrong number is refused."""
    model, ids = make("llama", device), ids_of(2, 60, device)
    k4v4 = kvquant.CacheFormat(key="int4", value="int4", key_mean=16, by_age=True)
    formats = ["int8", k4v4, "plain"]
    caches = [KVQuantCache(model, format=format) for format in (formats, "int8", k4v4)]
    for cache in caches:
        for part in ids.split([40, *[1] * 20], dim=1):
            logits(model, cache, part)
    mixed, int8, old = ([layer.storage for layer in cache.layers] for cache in caches)
    assert torch.equal(mixed[0].dequantize(0)[0], int8[0].dequantize(0)[0])
    assert [of.format for of in mixed] == [*kvquant.CacheFormat.of_layers(formats, 3)]
    assert mixed[1].nbytes == old[1].nbytes
    assert caches[0].nbytes == sum(of.nbytes for of in mixed)
    with pytest.raises(ValueError, match="format: expected one for each of 3 layers, got 2"):
        KVQuantCache(model, format=formats[:2])
    with pytest.raises(ValueError, match="format: expected one for each of 3 layers, got 4"):
        kvquant.integrations.transformers.enable(model, format=[*formats, "int8"])


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
    assert "dequantized" not in warnings_of.text


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
    assert warnings_of.text.count("dequantized copy") == 1


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
    assert "dequantized copy" in warnings_of.text


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


@pytest.mark.parametrize("block_size", [None, 16])
def test_forks_of_a_prefix_go_on_by_themselves(block_size: int | None, device: str) -> None:
    model, prefix = make("llama", device), ids_of(1, 40, device)
    cache = KVQuantCache(model, block_size=block_size)
    logits(model, cache, prefix)
    before = cache.layers[0].dequantize(40)[0].clone()
    found = []
    for i in range(2):
        question = torch.cat([prefix, ids_of(1, 5 + i, device)], dim=1)
        fork = cache.fork()
        found.append(generate(model, fork, question, 6))
        again = KVQuantCache(model, block_size=block_size)
        logits(model, again, prefix)
        assert torch.equal(found[-1], generate(model, again, question, 6))
        assert fork.get_seq_length() > cache.get_seq_length() == 40
        if block_size:  # the first two blocks are the prefix's
            ours, theirs = (x.layers[0].storage.layer(0)[1].block_table for x in (cache, fork))
            assert torch.equal(ours[:, :2], theirs[:, :2])
    assert torch.equal(cache.layers[0].dequantize(40)[0], before)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_as_the_text_grows(device: str) -> None:
    model, ids = make("llama", device), ids_of(1, 60, device)
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    compiled = torch.compile(model, backend="eager")
    cache, other = KVQuantCache(model), KVQuantCache(model)
    graphs = []
    for part in ids.split([20, *[1] * 40], dim=1):
        assert_close(logits(compiled, cache, part), logits(model, other, part), 1e-4)
        graphs.append(counts["unique_graphs"])
    assert 0 < graphs[3] == graphs[-1]
