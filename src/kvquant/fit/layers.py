"""What each layer of a model keeps, found by a forward of the model on torch's meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LayerShape", "ModelShape", "shape_of", "uses_kvquant"]

_PROBE = 8  # tokens of the forward


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The keys and values that the layers of one kind keep.

    Attributes:
        indices: The layers of this kind.
        kv_heads: Heads of keys and values.
        k_dim: Channels of a key.
        v_dim: Channels of a value.
        window: Its sliding window in tokens; None: it keeps every token.
        dequantized: The model computes with what is stored (latent attention), so that each step
            works on a 16-bit copy of this layer.
    """

    indices: tuple[int, ...]
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None
    dequantized: bool

    @property
    def kind(self) -> str:
        """What to call it in a table."""
        name = "full" if self.window is None else f"sliding, {self.window}"
        return f"{name}, dequantized at each step" if self.dequantized else name


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the memory of a model and of its cache.

    Attributes:
        config: Of the model's text part.
        layers: Each kind of layer.
        shared: Layers that read the cache of an earlier one.
        parameters: All of them, in elements.
        linear: Those of linear layers but the output's, which weight quantization stores in fewer
            bits.
        why_dequantized: Why steps dequantize, where the attention "kvquant" refuses the model.
    """

    config: Any
    layers: tuple[LayerShape, ...]
    shared: int
    parameters: int
    linear: int
    why_dequantized: str | None = None

    def weight_bytes(self, bits: float = 16) -> int:
        """Bytes of the weights, linear layers in ``bits`` and the rest in 16."""
        return int(self.linear * bits / 8 + (self.parameters - self.linear) * 2)


def shape_of(config: Any) -> ModelShape:
    """The shape of a model, from its config; no weights are needed, no memory is taken.

    Raises:
        ValueError: A model that the 8-bit cache does not serve, or that cannot be tried without
            its weights.
    """
    from transformers import AutoModelForCausalLM

    from ..integrations.transformers import CACHE_ARGUMENT, KVQuantCache

    text = copy.deepcopy(config.get_text_config(decoder=True))  # a model sets its attention in it
    cache = KVQuantCache(text)  # refuses what it does not serve
    model, why = None, None
    for attention in ("kvquant", "eager"):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    text, attn_implementation=attention, dtype=torch.bfloat16
                )
            break
        except ValueError as error:
            if attention == "eager":
                raise
            why = str(error)
    assert model is not None
    touched = [_watch(layer) for layer in cache.layers]
    ids = torch.zeros(1, _PROBE, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"config: a model of type '{text.model_type}' cannot be tried without its weights "
            f"({type(error).__name__}: {error})"
        ) from error
    found: dict[tuple[Any, ...], list[int]] = {}  # the layers of each kind
    for index, (layer, was_touched) in enumerate(zip(cache.layers, touched, strict=True)):
        if layer.keys is None:
            continue
        _, heads, _, k_dim = layer.keys.shape
        of = (heads, k_dim, layer.values.shape[-1], layer.sliding_window, bool(was_touched))
        found.setdefault(of, []).append(index)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    return ModelShape(
        config=text,
        layers=tuple(LayerShape(tuple(indices), *of) for of, indices in found.items()),
        shared=len(cache.layers) - sum(map(len, found.values())),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=linear,
        why_dequantized=why,
    )


def _watch(layer: Any) -> list[int]:
    """Filled when somebody reads a layer's rows as a tensor: on meta, that costs nothing."""
    seen: list[int] = []
    dequantize = layer.dequantize

    def watched(length: int, dtype: torch.dtype | None = None) -> Any:
        seen.append(length)
        return dequantize(length, dtype)

    layer.dequantize = watched
    return seen


def uses_kvquant(model: Any) -> bool:
    """Whether a transformers model's attention is kvquant's."""
    from transformers import AttentionInterface

    from ..integrations.transformers import kvquant_attention  # registers its name

    name = model.config.get_text_config(decoder=True)._attn_implementation
    return AttentionInterface().get(name) is kvquant_attention
