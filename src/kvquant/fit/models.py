"""Configs of well-known models, so that nothing has to be downloaded to know a cache's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "read_config"]

_LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip

#: By name: the fields of a transformers config that decide sizes.
MODELS: dict[str, dict[str, Any]] = {
    "qwen-7b": {  # the first Qwen, in the shape of a Qwen2 without grouped heads: 7.7e9 parameters
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {"model_type": "llama", **_LLAMA},
    "llama-3.1-70b": {
        "model_type": "llama", **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral", **_LLAMA, "vocab_size": 32000, "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "gemma-2-9b": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584,
        "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "gemma-3n-e4b": {  # its text model, whose last 15 layers read the cache of earlier ones
        "model_type": "gemma3n_text",
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {"model_type": "deepseek_v3"},
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def read_config(source: str | Path) -> Any:
    """A transformers config from a model's folder, a ``config.json``, or a name in `MODELS`.

    Raises:
        ValueError: None of them; a config of no model type that this transformers knows.
    """
    from transformers import AutoConfig

    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            fields = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a model's config.json ({error})") from error
    elif (name := str(source).lower()) in MODELS:
        fields = dict(MODELS[name])
    else:
        raise ValueError(
            f"model: expected a folder with a config.json, such a file, or one of "
            f"{', '.join(MODELS)}; got '{source}'"
        )
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{source}: expected a config with a model_type")
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
