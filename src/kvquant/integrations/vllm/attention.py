"""What a layer runs at each step: one append and attention on its pages."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from ... import CacheFormat, CacheView
from .metadata import Step
from .support import refusals

__all__ = ["KVQuantAttention"]


class KVQuantAttention(AttentionImpl):
    """One layer.

    Args:
        num_heads: Query heads of this rank.
        head_size: Channels of a key.
        scale: Of the scores.
        num_kv_heads: Heads of keys and values of this rank.
        alibi_slopes: One a query head: scores lose ``slope * |i - j|``.
        sliding_window: A query sees its own token and those before it, so many in all.
        kv_cache_dtype: As it was chosen.
        logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: they stay.
        attn_type: One of vLLM's.
        kv_sharing_target_layer_name: A layer whose keys and values this one reads.
        sinks: A logit a query head that joins the softmax, ``(num_heads,)``.
        **others: Options of other backends.

    Raises:
        ValueError: A kind of attention that is not served.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise ValueError(
                f"kvquant does not serve this model's attention, which has {', '.join(others)}: "
                "leave --attention-backend out"
            )
        # vLLM's CPU platform does not ask the backend first.
        reasons = refusals(
            CacheFormat(),
            device=torch.device(current_platform.device_type),
            head_size=head_size,
            dtype=torch.get_default_dtype(),
            kv_cache_dtype=kv_cache_dtype,
            attn_type=str(getattr(attn_type, "value", attn_type)),
        )
        if reasons:
            raise ValueError("; ".join(reasons))
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._given_sinks, self._sinks = sinks, sinks
        self._slopes: Tensor | None = None
        if alibi_slopes is not None:
            self._slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        self._reads_another = kv_sharing_target_layer_name is not None
        self._options = {
            "softmax_scale": float(scale),
            "sliding_window": sliding_window,
            "softcap": logits_soft_cap or None,
            "sinks": sinks is not None,
            "alibi_slopes": alibi_slopes is not None,
        }
        self._pages: weakref.ref[Tensor] | None = None
        self._view: CacheView | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take sinks as the kernels read them, once their values are there."""
        if self._given_sinks is not None:
            self._sinks = self._given_sinks.detach().float().contiguous()

    def view_of(self, layer: Any, pages: Tensor) -> CacheView:
        """A layer's memory, divided once; it does not outlive vLLM's ``pages``.

        vLLM takes memory back, after it has measured how much graphs need, by dropping ``pages``.
        """
        if self._view is None or self._pages is None or self._pages() is not pages:
            backend = layer.get_attn_backend()
            # Detached: a view of another tensor would keep that one.
            self._view = backend.view(pages.detach(), self.head_size, layer.head_size_v)
            self._pages = weakref.ref(pages, self._forget)
            if self._slopes is not None:
                self._slopes = self._slopes.to(pages.device)
        return self._view

    def _forget(self, pages: Any) -> None:
        self._view = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Append this step's tokens and attend, into ``output``.

        Args:
            layer: vLLM's.
            query: ``(tokens, num_heads, head_size)``; more rows than the step has tokens are
                padding, here and below.
            key: ``(tokens, num_kv_heads, head_size)``.
            value: ``(tokens, num_kv_heads, channels of a value)``.
            kv_cache: The layer's pages, ``(blocks, num_kv_heads, tokens, bytes)``.
            attn_metadata: The step; None while vLLM measures memory.
            output: ``(tokens, num_heads, channels of a value)``, written.
            output_scale: Never given: no fused quantization of the output is offered.
            output_block_scale: Likewise.
        """
        if attn_metadata is None:
            return output.zero_()
        attn_metadata.attend(
            self.view_of(layer, kv_cache),
            query,
            None if self._reads_another else key,
            None if self._reads_another else value,
            output,
            options=self._options,
            sinks=self._sinks,
            alibi_slopes=self._slopes,
        )
        return output
