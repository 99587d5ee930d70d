"""What `kvquant fit` says against real caches, and the command."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("rich")

from kvquant import CacheFormat, cli  # noqa: E402
from kvquant.fit import (  # noqa: E402
    MODELS,
    Layout,
    cache_bytes,
    largest,
    peer_bytes,
    read_config,
    shape_of,
)
from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
ONE = {"num_key_value_heads": 4}
GQA = {"num_key_value_heads": 2}
KINDS: dict[str, Any] = {
    "one-head-each": lambda: transformers.LlamaConfig(**SIZES, **ONE),
    "gqa": lambda: transformers.LlamaConfig(**SIZES, **GQA),
    "narrow": lambda: transformers.LlamaConfig(**{**SIZES, "head_dim": 24}, **GQA),
    "sliding": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=64),
    "mixed": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        **GQA,
        sliding_window=64,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
CASES = {  # kind, batch, prompt, generated, options of KVQuantCache
    "contiguous": ("one-head-each", 1, 300, 0, {}),
    "contiguous-grown": ("gqa", 2, 100, 60, {}),
    "contiguous-fixed": ("gqa", 3, 100, 20, {"max_cache_len": 120}),
    "paged": ("gqa", 2, 300, 0, {"block_size": 64}),
    "paged-grown": ("gqa", 3, 100, 90, {"block_size": 16}),
    "paged-fixed": ("one-head-each", 2, 90, 10, {"block_size": 32, "max_cache_len": 100}),
    "plain": ("gqa", 2, 100, 5, {"format": CacheFormat.plain()}),
    "k8v4": ("gqa", 2, 400, 5, {"format": "k8v4"}),
    "by-layer": ("gqa", 2, 400, 5, {"format": ["int8", "k4v4", "k4v4"]}),
    "by-layer-mixed": ("mixed", 2, 700, 9, {"format": ["int8", "k4v4", "k8v4"]}),
    "narrow-heads": ("narrow", 2, 100, 5, {}),
    "sliding": ("sliding", 2, 900, 0, {}),
    "sliding-grown": ("sliding", 2, 100, 300, {}),
    "sliding-fixed": ("sliding", 2, 100, 28, {"max_cache_len": 128}),
    "sliding-long-prompt": ("sliding", 1, 2500, 3, {}),
    "mixed": ("mixed", 2, 700, 90, {}),
    "mixed-blocks": ("mixed", 2, 700, 90, {"block_size": 32}),
}


def filled(config: Any, device: str, case: str) -> Any:
    """A real model's cache after a prompt and steps."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvquant")
    return fill(model.to(device).eval(), case)


def fill(model: Any, case: str) -> Any:
    _, batch, prompt, generated, options = CASES[case]
    cache = KVQuantCache(model, **options)
    ids = torch.ones(batch, prompt, dtype=torch.long, device=model.device)
    with torch.no_grad():
        for tokens in (ids, *[ids[:, :1]] * generated):
            model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    return cache


def cuda_storages() -> set[int]:
    """Addresses of the memory of all tensors on the GPU."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.is_cuda]
    return {x.untyped_storage().data_ptr() for x in found}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_a_real_cache(case: str, device: str) -> None:
    kind, batch, prompt, generated, options = CASES[case]
    layout = Layout(
        reserved="max_cache_len" in options,
        block_size=options.get("block_size"),
        format=options.get("format"),
        generated=generated,
    )
    config = KINDS[kind]()
    cache = filled(config, device, case)
    said = cache_bytes(shape_of(config), batch, prompt + generated, layout)
    assert sum(said.values()) == cache.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_that_the_device_gives(case: str, cuda: str) -> None:
    config = KINDS[CASES[case][0]]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvquant")
    model = model.to(cuda).eval()
    fill(model, case)  # workspaces of cuBLAS and of the kernels are made at the first call
    known, before = cuda_storages(), torch.cuda.memory_allocated()
    cache = fill(model, case)
    new, rise = cuda_storages() - known, torch.cuda.memory_allocated() - before
    print(f"{case}: {cache.nbytes} bytes, {rise - cache.nbytes} more in {len(new)} tensors")
    assert 0 <= rise - cache.nbytes <= 512 * len(new)


@pytest.mark.parametrize("kind", ["gqa", "sliding", "mixed"])
def test_bytes_of_transformers_own_caches(kind: str) -> None:
    config = KINDS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, shape = torch.ones(2, 300, dtype=torch.long), shape_of(config)
    for peer, cache in (
        ("DynamicCache", transformers.DynamicCache(config=config)),
        ("StaticCache", transformers.StaticCache(config=config, max_cache_len=300)),
    ):
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert peer_bytes(shape, 2, 300, peer) == real, peer
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_model_of_the_tables_has_its_size() -> None:
    shape = shape_of(read_config("qwen-7b"))
    assert shape.parameters == 7_721_324_544
    assert [(layer.kind, layer.kv_heads, layer.indices) for layer in shape.layers] == [
        ("full", 32, tuple(range(32)))
    ]
    assert shape.weight_bytes(16) == 2 * shape.parameters
    assert 4e9 < shape.weight_bytes(4.25) < 6e9  # the embeddings stay in 16 bits


def test_kinds_of_layers_are_named() -> None:
    shared = shape_of(read_config("gemma-3n-e4b"))
    assert (shared.shared, sum(len(layer.indices) for layer in shared.layers)) == (15, 20)
    refused = shape_of(transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4))
    assert "computes attention by itself" in str(refused.why_dequantized)
    assert refused.layers[0].dequantized


def test_latent_attention_is_dequantized() -> None:
    pytest.importorskip("transformers", minversion="5.24")  # before, its cache had whole heads
    latent = shape_of(
        transformers.DeepseekV3Config(
            **{**SIZES, "head_dim": 16}, **ONE, q_lora_rank=32, kv_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8,
            n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32,
            first_k_dense_replace=1,
        )
    )  # fmt: skip
    assert [layer.kind for layer in latent.layers] == ["full, dequantized at each step"]


@pytest.mark.parametrize(
    ("room", "limit", "expected"),
    [(99, 10**6, 0), (100, 10**6, 16), (5000, 10**6, 800), (5000, 9, 9)],
)
def test_largest(room: int, limit: int, expected: int) -> None:
    assert largest(lambda n: -(-n // 16) * 100, room, limit) == expected


def test_every_known_model_has_a_config() -> None:
    for name in MODELS:
        assert read_config(name).model_type


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_config_is_read(source: str, tmp_path: Path) -> None:
    KINDS["gqa"]().save_pretrained(tmp_path)
    path = tmp_path if source == "folder" else tmp_path / "config.json"
    assert read_config(path).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a folder with a config.json, such a file, or one of qwen-7b"),
        ("{", "expected a model's config.json"),
        ("[1]", "expected a config with a model_type"),
        ('{"model_type": "nothing"}', "nothing"),
    ],
)
def test_what_is_no_config_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_the_config_stays_as_it_is() -> None:
    config = KINDS["gqa"]()
    config._attn_implementation = "eager"
    shape_of(config)
    assert config._attn_implementation == "eager"


def test_bad_numbers_are_refused() -> None:
    shape = shape_of(KINDS["gqa"]())
    with pytest.raises(ValueError, match="batch: expected a positive integer, got 0"):
        cache_bytes(shape, 0, 10)
    with pytest.raises(ValueError, match="generated: expected 0 to 9 of 10 tokens, got 10"):
        cache_bytes(shape, 1, 10, Layout(generated=10))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    KINDS["gqa"]().save_pretrained(tmp_path)
    file, picture = tmp_path / "fit.json", tmp_path / "fit.png"
    arguments = ["fit", str(tmp_path), "--batch", "2", "--length", "160", "--generated", "60"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--device-memory", "1", "--spare", "0.9", "--json", str(file),
                  "--picture", str(picture)])  # fmt: skip
    assert not end.value.code
    figures = json.loads(file.read_text())
    cache = filled(KINDS["gqa"](), "cpu", "contiguous-grown")
    assert figures["cache_bytes"]["8 bits"] == cache.nbytes
    fits = figures["fits"]
    fixed, wide = fits["8 bits, max_cache_len"], fits["DynamicCache, 16 bits"]
    assert fixed["largest_batch"] > 1.5 * wide["largest_batch"]
    assert picture.stat().st_size > 10_000
    assert "What fits in 1.00 GiB" in capsys.readouterr().out


def test_the_command_names_what_is_wrong() -> None:
    pytest.importorskip("typer")
    with pytest.raises(SystemExit, match="kvquant fit: model: expected a folder"):
        cli.main(["fit", "no-such-model"])
