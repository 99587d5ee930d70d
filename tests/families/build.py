"""Tiny random models of every text-generating family that transformers can build."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from .sizes import CANNOT, FILLED, HEAD_DIM, LAYERS, OVERRIDES, PARTS, SIZES, VOCAB

__all__ = ["CannotBuild", "build", "config_of", "names"]

_MAPPINGS = (  # in this order: a model type goes by its decoder where it has one
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
)
_DROPPED = (
    "id2label",
    "label2id",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "dtype",
)
_ORDINARY = ("bos_", "eos_", "pad_", "unk_", "mask_", "sep_", "cls_", "decoder_start_")


class CannotBuild(Exception):
    """The installed transformers cannot build this family from a config."""


def names() -> list[str]:
    """All model types, sorted."""
    return sorted(_classes())


def build(name: str, attention: str) -> Any:
    """A tiny model with random weights, the same ones for each ``attention``."""
    if name in CANNOT:
        raise CannotBuild(CANNOT[name])
    config = config_of(name)
    cls = getattr(transformers, _classes()[name])
    for part in config.sub_configs:  # as AutoModelForCausalLM does it for text_config
        if cls.config_class is type(getattr(config, part)) is not type(config):
            config = getattr(config, part)
            break
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():  # biases, and weights that start as nothing
            parameter.data.normal_(std=0.2, generator=generator)
    model = getattr(model, PARTS[name]) if name in PARTS else model
    return model.eval().requires_grad_(False)


def config_of(name: str) -> Any:
    """The config of a model type, tiny."""
    config_class = transformers.CONFIG_MAPPING[name]
    override = OVERRIDES.get(name, {})
    values = copy.deepcopy(override["default"]) if "default" in override else None
    values = config_class(**(values or {})).to_dict()
    _shrink(values, iter(range(VOCAB - 16, VOCAB)))
    if "is_decoder" in values and name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        values.update(is_decoder=True, is_encoder_decoder=False)  # and no cross-attention
    for path, value in override.items():
        if path != "default":
            _set(values, path.split("."), copy.deepcopy(value))
    return config_class(**values)


def _classes() -> dict[str, str]:
    classes: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for name, cls in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            classes.setdefault(name, cls)
    return classes


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values[part]
    values[path[-1]] = value


def _shrink(values: dict[str, Any], special: Iterator[int]) -> None:
    """Make the config in ``values`` tiny, and those in it."""
    for key in _DROPPED:
        values.pop(key, None)
    old = dict(values)
    _pick_layers(values)
    for key, value in list(values.items()):
        if isinstance(value, dict):
            if "rope" not in key and all(isinstance(k, str) for k in value):
                _shrink(value, special)
        elif key.endswith(("token_id", "token_index", "_token")):
            values[key] = _token(key, value, special)
        elif "dropout" in key or "layerdrop" in key or "_pdrop" in key:
            values[key] = 0.0 if isinstance(value, float) else value
        elif key.endswith("initializer_range") or (
            key in ("init_std", "initializer_factor") and value < 0.1
        ):
            values[key] = 0.2
        elif key in SIZES and type(value) is int and value > 0:
            values[key] = SIZES[key]
        elif key in ("max_position_embeddings", "n_positions", "n_ctx") and type(value) is int:
            values[key] = min(value, 512)
        elif key == "first_k_dense_replace":
            values[key] = min(value, 1)
        elif key == "depths":
            values[key] = [1] * len(value)
        elif value is None and key in FILLED:
            values[key] = SIZES[key]
    _head_dims(values, old)


def _pick_layers(values: dict[str, Any]) -> None:
    """Keep one layer of each kind, two at least."""
    for key in LAYERS:
        count = values.get(key)
        if type(count) is not int or count < 3:
            continue
        lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == count}
        lists = {k: v for k, v in lists.items() if not _are_indices(v, count)}
        own = values.get("per_layer_config") or {}
        own = {int(index): settings for index, settings in own.items()}
        kinds = [
            str([v[i] for v in lists.values() if type(v[i]) is not float] + [own.get(i)])
            for i in range(count)
        ]
        kept = sorted({kinds.index(kind) for kind in kinds})
        kept = kept if len(kept) > 1 else [0, 1]
        values[key] = len(kept)
        for name, entries in lists.items():
            values[name] = [entries[i] for i in kept]
        if own:
            values["per_layer_config"] = {str(j): own[i] for j, i in enumerate(kept) if i in own}
        for name, entries in values.items():
            if isinstance(entries, list) and _are_indices(entries, count):
                values[name] = [kept.index(i) for i in entries if i in kept]


def _are_indices(entries: list[Any], count: int) -> bool:
    """Whether a list names layers."""
    return (
        len(entries) > 2
        and all(type(i) is int and i < count for i in entries)
        and all(i < j for i, j in itertools.pairwise(entries))
    )


def _token(key: str, value: Any, special: Iterator[int]) -> Any:
    """An id within the vocabulary; those of images and the like are not used by texts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if type(value) is not int or value < 5:
        return value
    if key.startswith(_ORDINARY):
        return {"bos": 1, "eos": 2, "pad": 0}.get(key[:3], 3)
    return next(special, VOCAB - 1)


def _head_dims(values: dict[str, Any], old: dict[str, Any]) -> None:
    """Make what depends on the head_dim fit."""
    if "qk_rope_head_dim" in old and "head_dim" in old:
        both = old["qk_rope_head_dim"] + old.get("qk_nope_head_dim", 0)
        if old["head_dim"] == both:
            values["head_dim"] = 2 * HEAD_DIM
    if "kv_lora_rank" in old and "num_key_value_heads" in old:
        values["num_key_value_heads"] = SIZES[
            "num_attention_heads"
        ]  # latent attention has no groups
    heads = next((old[k] for k in ("num_attention_heads", "num_heads") if old.get(k)), None)
    dim = old.get("head_dim")
    if not dim and heads and isinstance(old.get("hidden_size"), int):
        dim = old["hidden_size"] // heads
    for rope in (v for k, v in values.items() if "rope" in k and isinstance(v, dict)):
        section = rope.get("mrope_section")
        if section and dim:
            rope["mrope_section"] = _scaled(section, HEAD_DIM / dim)
        for key in ("original_max_position_embeddings",):
            if type(rope.get(key)) is int:
                rope[key] = min(rope[key], 512)


def _scaled(section: list[int], factor: float) -> list[int]:
    """Sections of rotary frequencies, their sum scaled."""
    total = round(sum(section) * factor)
    scaled = [max(1, int(part * factor)) for part in section]
    scaled[0] += total - sum(scaled)
    return scaled
