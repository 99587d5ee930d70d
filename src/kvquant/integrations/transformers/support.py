"""Which models are served: the one place that decides, and says why not."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["NAME", "check_config", "config_of", "layer_windows", "refuse_unsupported_models"]

# What transformers calls our attention; a vendored copy has a name of its own.
NAME = __name__.split(".integrations.")[0].replace(".", "_")

# What there is instead of keys and values of its own, by model type.
_ELSEWHERE = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "reads the keys and values of the model that it drafts for",
    ),
    **dict.fromkeys(("openai-gpt", "reformer", "xlnet"), "uses no cache of keys and values"),
    **dict.fromkeys(("rwkv", "xlstm"), "keeps recurrent states"),
    "diffusion_gemma": "reads its cache by itself, past the attention function",
}
_STORED = ("full_attention", "sliding_attention", "chunked_attention")
_NOTHING_STORED = ("dummy", "moe", "mlp")


def config_of(model: Any) -> Any:
    """The config of a model, or the config itself."""
    config = getattr(model, "config", model)
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config: expected a model or its config, got {type(model).__name__}")
    return config


def layer_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window, None for a full one.

    Raises:
        ValueError: A model that keeps something else than a decoder's keys and values.
    """
    _check_type("config", config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("config: an encoder-decoder model; KVQuantCache serves decoders only")
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        if getattr(text, "num_hidden_layers", None) is None:
            raise ValueError(
                f"config: a model of type '{config.model_type}' does not say how many layers "
                "(num_hidden_layers) keep keys and values"
            )
        kind = "full_attention" if window is None else "sliding_attention"
        types = [kind] * text.num_hidden_layers
    for index, kind in enumerate(types):
        if kind not in _STORED + _NOTHING_STORED:
            raise ValueError(
                f"config: layer {index} is '{kind}'; KVQuantCache serves "
                + ", ".join(f"'{name}'" for name in _STORED)
            )
    return [window if kind == "sliding_attention" else None for kind in types]


def _check_type(name: str, config: Any) -> None:
    if (instead := _ELSEWHERE.get(config.model_type)) is not None:
        raise ValueError(f"{name}: a model of type '{config.model_type}' {instead}")


def refuse_unsupported_models() -> None:
    """Let transformers refuse "kvquant" for models whose attention does not go by that name."""
    if hasattr(PreTrainedModel, done := f"_{NAME}_is_checked"):
        return
    setattr(PreTrainedModel, done, True)

    def checked(method: Any) -> Any:
        @functools.wraps(method)
        def check(self: Any, *args: Any, **kwargs: Any) -> Any:
            if NAME in tree_leaves((args, kwargs)):
                _check_type("attn_implementation", self.config)
                _check_attention(type(self), self.config)
            return method(self, *args, **kwargs)

        return check

    for name in ("get_correct_attn_implementation", "set_attn_implementation"):
        setattr(PreTrainedModel, name, checked(getattr(PreTrainedModel, name)))


@functools.cache
def check_config(kind: type) -> None:
    """Refuse the models of a config, where "kvquant" was set past the checks of a model."""
    modules = [name.replace(".configuration_", ".modeling_") for name in _modules(kind)]
    _check_source(kind.__name__, modules, has_text=True, decodes=True)


def _check_attention(model: type, config: Any) -> None:
    """Refuse a model with attention layers that never ask for the registered function."""
    _check_source(
        model.__name__,
        _modules(model),
        has_text=getattr(config, "vocab_size", None) is not None,
        decodes=not getattr(config, "is_encoder_decoder", False),
    )


def _modules(kind: type) -> list[str]:
    """The modules of a model's or config's class and of those that it derives from."""
    return [
        base.__module__
        for base in kind.__mro__
        if issubclass(base, (PreTrainedModel, PretrainedConfig))
        and base not in (PreTrainedModel, PretrainedConfig)
    ]


def _check_source(name: str, modules: list[str], *, has_text: bool, decodes: bool) -> None:
    """Those that have a class for each name would fail on ours; those that compute attention by
    themselves would run without their mask. Towers of images and sound may do the latter.
    """
    try:
        code = "\n".join(inspect.getsource(sys.modules[module]) for module in modules)
    except (KeyError, OSError, TypeError):
        return
    layers = re.search(r"^class \w*Attention\w*\(", code, re.MULTILINE)
    if re.search(r"\w+_CLASSES\[[\w.]*_attn_implementation\]", code):
        why = f"has attention classes of its own for each name, and none for '{NAME}'"
    elif has_text and layers and "ALL_ATTENTION_FUNCTIONS" not in code:
        why = f"computes attention by itself and never asks for the function named '{NAME}'"
    else:
        return
    advice = "Load it with attn_implementation='eager'"
    if decodes:
        advice += ": KVQuantCache then stores 8 bits all the same, and each step dequantizes them"
    raise ValueError(f"attn_implementation: {name} {why}. {advice}")
