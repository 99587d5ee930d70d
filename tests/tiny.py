"""Tiny transformers models with random weights, and what the tests do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import CACHE_ARGUMENT  # noqa: E402

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
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        sliding_window=16,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
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
