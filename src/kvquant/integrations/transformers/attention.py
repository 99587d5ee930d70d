"""The attention and mask functions that transformers calls under the name "kvquant"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)

from kvquant.integrations.transformers.handle import QuantizedHandle, warn_once

__all__ = ["kvquant_attention", "kvquant_mask", "register"]

NAME = "kvquant"


def register() -> None:
    """Make ``attn_implementation="kvquant"`` known to transformers."""
    AttentionInterface.register(NAME, kvquant_attention)
    AttentionMaskInterface.register(NAME, kvquant_mask)


def kvquant_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention on the 8-bit rows behind a handle; on plain tensors the usual dense attention.

    Args:
        module: The model's attention layer.
        query: ``(batch, q_heads, tokens, head_dim)``.
        key: A `QuantizedHandle`, or a tensor if the cache is another one.
        value: Like ``key``.
        attention_mask: None: causal, the window and the padding known; a 4D mask otherwise.
        dropout: Of the probabilities.
        scaling: Of the scores, ``head_dim**-0.5`` by default.
        softcap: Of the scores (Gemma 2).
        s_aux: A sink a head (GPT-OSS).
        sliding_window: Of this layer.
        is_causal: Overrides the module's flag.
        position_bias: Added to the scores (dense only).
        **kwargs: What else the model passes; the dense attention gets it.

    Returns:
        ``(batch, tokens, q_heads, v_dim)`` and no weights.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if isinstance(key, QuantizedHandle):
        snapshot = key.snapshot
        if attention_mask is not None:
            reason = "a mask that is not causal with a window and left padding"
        elif dropout:
            reason = "dropout"
        elif position_bias is not None:
            reason = "a position bias"
        elif snapshot.length != snapshot.layer.length:
            reason = "keys from before the cache's last update"
        else:
            out = snapshot.layer.attend(
                query,
                scaling=scaling,
                causal=causal,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=s_aux,
            )
            return out, None
        warn_once(f"{reason}: attention runs on a dequantised copy of the 8-bit cache")
        key, value = snapshot.dequantize()
        if attention_mask is None:
            window = snapshot.layer.sliding_window if sliding_window is None else sliding_window
            attention_mask = _history_mask(
                query, key.shape[2], causal, window, snapshot.layer.padding.starts
            )
    if softcap is None and s_aux is None:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return out, None
    return _capped_attention(
        query, key, value, attention_mask, dropout, scaling, softcap, s_aux, causal
    ), None


def kvquant_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None where causality, a window and left padding say it all; else transformers' 4D mask.

    The padding of a 2D mask goes to the cache (through the length that its layer gave out), which
    passes it to the kernels. With another cache this is transformers' own mask.
    """
    padding = getattr(kwargs.get("kv_length"), "padding", None)
    if padding is not None:
        kwargs["kv_length"] = kv_length = int(kwargs["kv_length"])
        query_length = kwargs.get("q_length")
        if query_length is None:  # 4.56 passes the positions
            query_length = kwargs["cache_position"].shape[0]
        regular = padding.read(kwargs.get("attention_mask"), query_length, kv_length)
        if regular and _is_causal_window(kwargs.get("mask_function", causal_mask_function)):
            return None
        kwargs["allow_is_causal_skip"] = False
    mask: Any = sdpa_mask(*args, **kwargs)
    return mask if isinstance(mask, Tensor) else None


def _is_causal_window(function: Callable[..., Any]) -> bool:
    """Whether a mask function is transformers' causal one, with or without its sliding window."""
    if function is causal_mask_function:
        return True
    parts = _parts(function)
    return causal_mask_function in parts and all(
        part is causal_mask_function or _name(part).startswith("sliding_window_overlay.")
        for part in parts
    )


def _parts(function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The functions that ``and_masks`` joined."""
    if not _name(function).startswith("and_masks."):
        return ()
    names = function.__code__.co_freevars
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    return tuple(cells["mask_functions"].cell_contents) if "mask_functions" in cells else ()


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", ""))


def _history_mask(
    query: Tensor, kv_length: int, causal: bool, window: int | None, starts: Tensor | None
) -> Tensor:
    """The mask that `attend` applies by itself, as a boolean (batch or 1, 1, queries, keys)."""
    length, device = query.shape[2], query.device
    at = torch.arange(kv_length - length, kv_length, device=device).view(1, 1, -1, 1)
    token = torch.arange(kv_length, device=device).view(1, 1, 1, -1)
    mask = token <= at if causal else torch.ones_like(token <= at)
    if window is not None:
        mask = mask & (token > at - window)
    if starts is not None:
        mask = mask & (token >= starts.to(device).view(-1, 1, 1, 1))
    return mask


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Dense attention with what F.scaled_dot_product_attention lacks: a softcap and sinks."""
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if mask is None and causal and length > 1:  # as sdpa has it: the first query sees one key
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = (query @ key.mT).float() * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + mask
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    probs = torch.nn.functional.dropout(probs, dropout)
    return (probs @ value).transpose(1, 2).contiguous()
