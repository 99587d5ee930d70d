"""The attention function that transformers calls under the name "kvquant"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from .compiled import HANDOFF
from .handle import QuantizedHandle, Snapshot, warn_once
from .mask import CausalMask, is_step_mask, kvquant_mask
from .support import NAME, refuse_unsupported_models

__all__ = ["kvquant_attention", "register"]


def register() -> None:
    """Make ``attn_implementation="kvquant"`` known to transformers."""
    AttentionInterface.register(NAME, kvquant_attention)
    AttentionMaskInterface.register(NAME, kvquant_mask)
    refuse_unsupported_models()


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
        key: A `QuantizedHandle`, or a tensor if the cache is another one, or if the model computed
            with what the cache gave it.
        value: Like ``key``.
        attention_mask: A `CausalMask`, None (causal, the layer's window and the cache's padding) or
            a 4D mask, as `kvquant_mask` or the caller made it.
        dropout: Of the probabilities.
        scaling: Of the scores, ``head_dim**-0.5`` by default.
        softcap: Of the scores (Gemma 2).
        s_aux: A sink a head (GPT-OSS).
        sliding_window: Of this layer; a mask has its own.
        is_causal: Overrides the module's flag.
        position_bias: Added to the scores (dense only).
        **kwargs: What else the model passes; the dense attention gets it.

    Returns:
        ``(batch, tokens, q_heads, v_dim)`` and no weights.

    Raises:
        ValueError: ``output_attentions=True``: there are no weights to give out.
        RuntimeError: In compiled code, keys or values that are not those that the cache gave out.
    """
    options: dict[str, Any] = {
        "dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux,
        "sliding_window": sliding_window, "is_causal": is_causal, "position_bias": position_bias,
        **kwargs,
    }  # fmt: skip
    if not torch.compiler.is_compiling() or HANDOFF.layer is None:
        out: tuple[Tensor, None] = _attention(module, query, key, value, attention_mask, **options)
        return out
    layer, taken = HANDOFF.layer, HANDOFF.key
    HANDOFF.layer = HANDOFF.key = None
    if taken is not key:
        raise RuntimeError(
            "kvquant: in compiled code the model attends to keys that the cache did not give out: "
            "generate(..., disable_compile=True)"
        )
    if (
        (attention_mask is not None and not is_step_mask(attention_mask))
        or dropout
        or position_bias is not None
        or kwargs.get("output_attentions")
    ):
        late: tuple[Tensor, None] = _attention_late(
            layer, module, query, key, value, attention_mask, **options
        )
        return late
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = layer.sliding_window if sliding_window is None else sliding_window
    return layer.attend_traced(
        query, key, value,
        scaling=scaling, causal=causal, sliding_window=window, softcap=softcap, sinks=s_aux,
    ), None  # fmt: skip


@torch.compiler.disable
def _attention_late(
    layer: Any, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What compiled code cannot do: the handles are made after all, and the graph breaks."""
    out: tuple[Tensor, None] = _attention(module, query, *layer.take(key, value), *args, **kwargs)
    return out


@torch.compiler.disable
def _attention(
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
    """`kvquant_attention`, not compiled."""
    if is_step_mask(attention_mask):
        attention_mask = None
    if type(key) is type(value) is QuantizedHandle:
        handles = [key, value]
    else:
        handles = [x for x in (key, value) if isinstance(x, QuantizedHandle)]
    if kwargs.get("output_attentions"):
        if handles:
            handles[0].snapshot.layer.drop_call()
        raise ValueError(
            f"output_attentions: attn_implementation='{NAME}' has no attention weights to give "
            "out; load the model with attn_implementation='eager' for them"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if handles:
        snapshot = handles[0].snapshot
        layer = snapshot.layer
        window = layer.sliding_window if sliding_window is None else sliding_window
        if layer.leads:
            layer.follow(kwargs.get("position_ids"))
        reason = ""
        if isinstance(attention_mask, CausalMask):
            causal, window = True, attention_mask.window
            _check_length(attention_mask, snapshot)
            if window is None and layer.sliding_window is not None:
                dropped = _dropped(snapshot, query.shape[2])
                if query.shape[2] == 1:
                    window = layer.sliding_window
                elif dropped:
                    token = torch.arange(snapshot.length, device=query.device)
                    attention_mask = attention_mask.dense() & (token >= dropped)
                    reason = "tokens that a sliding cache drops, though the model's mask shows them"
        elif attention_mask is not None:
            reason = "a mask that is not causal with a window and left padding"
        if dropout:
            reason = "dropout"
        elif position_bias is not None:
            reason = "a position bias"
        elif len(handles) != 2:
            reason = "keys or values that the model computed with"
        elif snapshot.length != layer.length:
            reason = "keys from before the cache's last update"
        if len(handles) != 2 or snapshot.length != layer.length:
            layer.batch.is_plain = False
        if not reason:
            out = layer.attend(
                query,
                scaling=scaling,
                causal=causal,
                sliding_window=window,
                softcap=softcap,
                sinks=s_aux,
            )
            return out, None
        if layer.batch.is_captured:
            raise RuntimeError(reason)
        warn_once(f"{reason}: attention runs on a dequantized copy of the 8-bit cache")
        key, value = (x.dequantize() if isinstance(x, QuantizedHandle) else x for x in (key, value))
        if attention_mask is None:
            attention_mask = _history_mask(query, key.shape[2], causal, window, layer.batch.starts)
        elif layer.slides and not isinstance(attention_mask, CausalMask):
            attention_mask = _within(attention_mask, _dropped(snapshot, query.shape[2]))
    if isinstance(attention_mask, CausalMask):
        attention_mask = attention_mask.dense()
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


def _check_length(mask: CausalMask, snapshot: Snapshot) -> None:
    """Refuse a mask that cannot fit the keys: layers differ where an earlier call failed."""
    if mask.kv_length != snapshot.length and not snapshot.layer.batch.is_captured:
        snapshot.layer.drop_call()
        raise ValueError(
            f"cache: the mask is of {mask.kv_length} tokens, but a layer holds {snapshot.length}: "
            "an earlier call failed half way. crop() or reset() the cache"
        )


def _dropped(snapshot: Snapshot, tokens: int) -> int:
    """Tokens that transformers' own sliding cache would have dropped though no mask hides them.

    Some models (Moshi) have a window in their config, which makes their cache slide, and masks
    without one.
    """
    return max(0, snapshot.length - tokens - (snapshot.layer.sliding_window or 0) + 1)


def _within(mask: Tensor, first: int) -> Tensor:
    """A written mask that hides the tokens before ``first``, which a sliding cache drops."""
    hidden = torch.arange(mask.shape[-1], device=mask.device) < first
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


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
