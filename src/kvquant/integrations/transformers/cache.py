"""A transformers cache whose layers keep 8-bit rows and hand out references to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import kvquant
from kvquant.integrations.transformers.handle import QuantizedHandle, handles

__all__ = ["KVLength", "KVQuantCache", "KVQuantLayer", "Padding"]

_STORED = ("full_attention", "sliding_attention", "chunked_attention")
_NOTHING_STORED = ("dummy", "moe", "mlp")


class Padding:
    """What the masks of a batch said about its padding; one for all layers of a cache.

    Attributes:
        starts: int32 ``(batch,)``: tokens of left padding, None without padding.
        regular: Whether left padding is all that the last 2D mask hid. If not, attention goes by
            the mask itself, over dequantised rows.
    """

    def __init__(self) -> None:
        self.starts: Tensor | None = None
        self.regular = True

    def read(self, mask: Tensor | None, query_length: int, kv_length: int) -> bool:
        """Take over a 2D mask (True: a token); returns `regular`.

        On an accelerator a decode step leaves things as the prompt's mask set them: its mask only
        adds tokens, and looking at it would wait for the device. Prompts (and chunks of more than
        one token) are looked at.
        """
        if mask is None:
            self.starts, self.regular = None, True
            return True
        if query_length == 1 and kv_length > 1 and mask.device.type != "cpu":
            return self.regular
        hidden = ~mask[:, :kv_length].bool()
        starts = hidden.sum(-1, dtype=torch.int32)
        left = torch.arange(hidden.shape[1], device=mask.device) < starts.unsqueeze(1)
        is_left, is_padded = torch.stack([(hidden == left).all(), starts.any()]).tolist()
        self.regular = is_left and hidden.shape[1] == kv_length
        if not (self.regular and is_padded):
            self.starts = None
        elif self.starts is None or not torch.equal(self.starts, starts):
            self.starts = starts
        return self.regular

    def rows(self, index: Tensor) -> None:
        """Follow a change of the batch's rows."""
        if self.starts is not None:
            self.starts = self.starts[index.to(self.starts.device)]


class KVLength(int):
    """The length that a layer gives to the mask function, with the padding to be read there."""

    padding: Padding

    def __new__(cls, length: int, padding: Padding) -> KVLength:
        """``length`` with ``padding`` attached."""
        number = super().__new__(cls, length)
        number.padding = padding
        return number


class KVQuantLayer(CacheLayerMixin):
    """One layer: `kvquant.QuantizedKVCache` behind the methods that transformers calls.

    Layers with a sliding window keep every token; attention reads the window. The new rows of
    `update` wait until the attention function takes them (append and attend are one call), or
    until anything else needs them stored.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # nothing is ever dropped
    supports_early_init = True

    def __init__(
        self,
        padding: Padding,
        *,
        sliding_window: int | None = None,
        max_cache_len: int | None = None,
        block_size: int | None = None,
        format: kvquant.CacheFormat | None = None,
        exact_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.sliding_window = sliding_window
        self.max_cache_len = max_cache_len
        self.exact_prompt = exact_prompt
        self.length = 0
        self.storage: kvquant.QuantizedKVCache | None = None
        self._options: dict[str, Any] = {
            "max_seq_len": max_cache_len,
            "block_size": block_size,
            "format": format,
        }
        self._pending: tuple[Tensor, Tensor] | None = None
        self._starts: Tensor | None = None
        self._sinks: tuple[Tensor, Tensor] | None = None
        self._shape: tuple[Any, ...] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Make the storage, for the batch, heads and head_dims of the first rows."""
        value_states = key_states if value_states is None else value_states
        batch, heads, _, dim = key_states.shape
        self._shape = _row_shape(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.storage = kvquant.QuantizedKVCache(
            1,
            batch,
            heads,
            dim,
            v_head_dim=value_states.shape[-1],
            dtype=key_states.dtype,
            device=key_states.device,
            **self._options,
        )
        self._starts = None
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences, once initialised."""
        if self._shape is None:
            raise AttributeError("batch_size: the layer is not initialised yet")
        return int(self._shape[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[QuantizedHandle, QuantizedHandle]:
        """Take new rows ``(batch, kv_heads, tokens, head_dim)``; returns handles on all rows."""
        self.flush()
        shape = _row_shape(key_states, value_states)
        if self.storage is None or (shape != self._shape and not self.length):
            self.lazy_initialization(key_states, value_states)
        elif shape != self._shape:
            raise ValueError(
                f"key_states, value_states: the cache holds (batch, heads, k_dim, v_dim, dtype, "
                f"device) {self._shape}, got {shape}"
            )
        new = key_states.shape[-2]
        if self.max_cache_len is not None and self.length + new > self.max_cache_len:
            raise kvquant.CacheFullError(
                f"max_cache_len: {self.max_cache_len} tokens a sequence, but {self.length} are "
                f"stored and {new} more came"
            )
        self.length += new
        self._pending = (key_states, value_states)
        return handles(self, self.length, key_states, value_states)

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float | None,
        causal: bool,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention on the 8-bit rows for queries (batch, q_heads, tokens, head_dim).

        Returns:
            ``(batch, tokens, q_heads, v_dim)``.
        """
        assert self.storage is not None
        self._set_starts()
        key, value = (None, None) if self._pending is None else self._pending
        window = self.sliding_window if sliding_window is None else sliding_window
        if window is not None and window >= self.length:
            window = None  # it hides nothing yet
        if sinks is not None and (self._sinks is None or self._sinks[0] is not sinks):
            self._sinks = (sinks, sinks.detach().float().contiguous())
        try:
            out = self.storage.attend(
                0,
                query.transpose(1, 2),
                None if key is None else key.transpose(1, 2),
                None if value is None else value.transpose(1, 2),
                softmax_scale=scaling,
                causal=causal,
                sliding_window=window,
                softcap=softcap,
                sinks=None if sinks is None or self._sinks is None else self._sinks[1],
                exact_prompt=self.exact_prompt,
            )
        except BaseException:
            self._drop_pending()  # a failed forward leaves this layer as it was
            raise
        self._pending = None
        assert isinstance(out, Tensor)
        return out

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self.length -= self._pending[0].shape[-2]
            self._pending = None

    def flush(self) -> None:
        """Store rows that no attention has taken."""
        if self._pending is not None and self.storage is not None:
            key, value = self._pending
            self._set_starts()
            self.storage.append(0, key.transpose(1, 2), value.transpose(1, 2))
            self._pending = None

    def dequantize(self, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` rows, keys and values (batch, kv_heads, length, head_dim)."""
        assert self.storage is not None
        self.flush()
        key, value = self.storage.dequantize(0, dtype=self.dtype)
        return key[:, :length].transpose(1, 2), value[:, :length].transpose(1, 2)

    def _set_starts(self) -> None:
        if self.storage is not None and self.padding.starts is not self._starts:
            self._starts = self.padding.starts
            on_device = None if self._starts is None else self._starts.to(self.device)
            self.storage.set_seq_starts(on_device)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens a sequence, padding among them; known on the host."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        if isinstance(query_length, Tensor):  # 4.56 passes the positions
            query_length = query_length.shape[0]
        return KVLength(self.length + query_length, self.padding), 0

    def get_max_length(self) -> int:
        """``max_cache_len``, -1 without."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in 4.56

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end: -n of them, or (as 4.56 did) all behind a positive length."""
        self.flush()
        keep = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        keep = max(0, keep)
        if self.storage is not None and keep < self.length:
            self.storage.crop(keep)
            self.length = keep

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self._pending = None
        self.length = 0
        if self.storage is not None:
            self.storage.reset()
        self._starts = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence ``beam_idx[i]`` (beam search)."""
        self._rows("reorder", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._rows("select", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._rows("repeat_interleave", repeats)

    def _rows(self, method: str, argument: Any) -> None:
        self.flush()
        if self.storage is None:
            return
        self._set_starts()
        if isinstance(argument, Tensor):
            argument = argument.to(self.device)
        getattr(self.storage, method)(argument)
        assert self._shape is not None
        self._shape = (self.storage.batch_size, *self._shape[1:])

    def offload(self) -> None:
        """Not supported."""
        raise NotImplementedError("KVQuantCache does not offload: its rows stay on their device")

    prefetch = offload


class KVQuantCache(Cache):
    """An 8-bit cache for ``model.generate(..., past_key_values=KVQuantCache(model.config))``.

    Load the model with ``attn_implementation="kvquant"``: its attention reads the 8-bit rows. With
    any other attention the rows are dequantised at each step (correct, slow, reported once).

    Args:
        config: The model's config.
        max_cache_len: Capacity a sequence, allocated at once; None: grows.
        block_size: Tokens of a block (a power of two from 16), None: one block a sequence.
        format: How rows are stored, ``kvquant.CacheFormat()`` by default.
        exact_prompt: A prompt's own attention uses its exact keys and values where it can (no
            padding, window, softcap or sinks); False: every query reads stored rows.

    Raises:
        ValueError: A model with layers that keep something else than keys and values.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_cache_len: int | None = None,
        block_size: int | None = None,
        format: kvquant.CacheFormat | None = None,
        exact_prompt: bool = True,
    ) -> None:
        self.padding = Padding()
        layers = [
            KVQuantLayer(
                self.padding,
                sliding_window=window,
                max_cache_len=max_cache_len,
                block_size=block_size,
                format=format,
                exact_prompt=exact_prompt,
            )
            for window in _windows(config)
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' storage as allocated."""
        return sum(layer.storage.nbytes for layer in self.layers if layer.storage is not None)

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        super().reset()
        self.padding.read(None, 0, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self.padding.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self.padding.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        if self.padding.starts is not None:
            self.padding.starts = self.padding.starts.repeat_interleave(repeats)


def _row_shape(key: Tensor, value: Tensor) -> tuple[Any, ...]:
    batch, heads, _, dim = key.shape
    return (batch, heads, dim, value.shape[-1], key.dtype, key.device)


def _windows(config: Any) -> list[int | None]:
    """Each layer's sliding window, None for a full one."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("config: an encoder-decoder model; KVQuantCache serves decoders only")
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        kind = "full_attention" if window is None else "sliding_attention"
        types = [kind] * text.num_hidden_layers
    for index, kind in enumerate(types):
        if kind not in _STORED + _NOTHING_STORED:
            raise ValueError(
                f"config: layer {index} is '{kind}'; KVQuantCache serves "
                + ", ".join(f"'{name}'" for name in _STORED)
            )
    return [window if kind == "sliding_attention" else None for kind in types]
