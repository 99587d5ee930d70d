"""What may be wrong with a model, its config and the cache that it is given."""

from __future__ import annotations

from typing import Any

from ..fit import Layout, cache_bytes, gib, read_config, shape_of, uses_kvquant
from .checks import Finding

__all__ = ["examine_call", "examine_model"]

_SWITCHES = ("use_cache_quantization", "use_cache_kernel")


def examine_model(
    source: Any, *, batch: int = 1, length: int = 8192, device_memory: int | None = None
) -> list[Finding]:
    """Rows about a model: whether it is served, its switches, whether its cache fits.

    Args:
        source: A folder, a config.json, a well-known name, or a transformers config.
        batch: Sequences.
        length: Tokens of each.
        device_memory: Bytes for weights in 16 bits and the cache; None: not compared.

    Raises:
        ValueError: No config, a number out of range.
    """
    from transformers import PretrainedConfig

    config = source if isinstance(source, PretrainedConfig) else read_config(source)
    rows = [_switches(config)]
    try:
        shape = shape_of(config)
    except ValueError as error:
        why = str(error)
        advice = "use transformers' own cache for it"
        return [Finding(check="model", state="stops", what=why, advice=advice), *rows]
    if shape.why_dequantized or any(layer.dequantized for layer in shape.layers):
        why = shape.why_dequantized or (
            "the model computes with what its cache stores (latent attention and the like): each "
            "step works on a 16-bit copy of a layer"
        )
        advice = "8 bits save memory with it, not time"
        model = Finding(check="model", state="slow", what=why, advice=advice)
    else:
        model = Finding(check="model", state="ok", what=f"'{config.model_type}' is served")
    nbytes = sum(cache_bytes(shape, batch, length, Layout(reserved=True)).values())
    weights = shape.weight_bytes()
    needs = (
        f"weights {gib(weights)} and the 8-bit cache {gib(nbytes)}, batch {batch}, "
        f"{length:,} tokens"
    )
    if device_memory is None or weights + nbytes <= device_memory:
        room = "" if device_memory is None else f", of {gib(device_memory)}"
        memory = Finding(check="memory", state="ok", what=needs + room)
    else:
        memory = Finding(
            check="memory",
            state="stops",
            what=f"{needs}: more than {gib(device_memory)}",
            advice="`kvquant fit` says the largest batch and length; generate_batch sizes batches",
        )
    return [model, *rows, memory]


def _switches(config: Any) -> Finding:
    quantization, kernel = (getattr(config, name, None) for name in _SWITCHES)
    if quantization:
        return Finding(
            check="switches",
            state="slow" if kernel is False else "ok",
            what="use_cache_quantization is set"
            + (", but use_cache_kernel=False: the torch reference runs" if kernel is False else ""),
            advice="load it by kvquant.compat.qwen.from_pretrained: transformers itself does not "
            "read the switch",
        )
    if kernel:
        return Finding(
            check="switches",
            state="stops",
            what="use_cache_kernel is set without use_cache_quantization: the cache stays in 16 "
            "bits",
            advice="set use_cache_quantization=True (the other two need not be set)",
        )
    what = "none in the config: the cache is quantized where from_pretrained or enable say so"
    return Finding(check="switches", state="note", what=what)


def examine_call(model: Any, cache: Any = None) -> Finding:
    """Whether a model's attention and the cache that it is given belong together.

    Args:
        model: A model of transformers.
        cache: What is passed to it as its cache; None: nothing is.

    Raises:
        TypeError: No model of transformers.
    """
    from transformers import PreTrainedModel

    from ..integrations.transformers import KVQuantCache

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    attends, stores = uses_kvquant(model), isinstance(cache, KVQuantCache)
    is_enabled = "generate" in vars(model) and cache is None
    if attends and (stores or is_enabled):
        return Finding(check="call", state="ok", what="8-bit cache, attention on the 8-bit data")
    if stores:
        return Finding(
            check="call",
            state="slow",
            what="a KVQuantCache is passed, but the attention is "
            f"'{model.config._attn_implementation}': each step dequantizes the whole cache",
            advice="model.set_attn_implementation('kvquant')",
        )
    if attends:
        return Finding(
            check="call",
            state="stops",
            what="the attention is 'kvquant', but no KVQuantCache is passed: keys and values stay "
            "in 16 bits",
            advice="pass KVQuantCache(model), or call enable(model) once",
        )
    return Finding(
        check="call",
        state="note",
        what="neither the attention nor the cache is kvquant's",
        advice="kvquant.integrations.transformers.enable(model)",
    )
