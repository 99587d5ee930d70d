"""A layer of the cache: 8-bit rows, and references to them for the attention function."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ... import CacheFormat, CacheFullError, QuantizedKVCache
from .batch import Batch, KVLength
from .compiled import HANDOFF, CompiledLayer
from .handle import QuantizedHandle, handles
from .sequences import LayerSequences

_CHANNELS = 16  # of which the kernels take a multiple
# Of layers that keep their window only: tokens of a block, of a piece of a long prompt, and behind
# the window, which crop may still go back.
_BLOCK, _PIECE, _SLACK = 64, 1024, 32

__all__ = ["KVQuantLayer"]


class KVQuantLayer(CompiledLayer, LayerSequences, CacheLayerMixin):
    """One layer: `kvquant.QuantizedKVCache` behind the methods that transformers calls.

    A layer with a sliding window gives back memory behind it, unless ``max_cache_len`` fixes its
    memory: then it keeps every token, and attention reads the window. The new rows of `update` wait
    until the attention function takes them (append and attend are one call), or
    until anything else needs them stored. Heads whose channels are no multiple of 16 are stored
    with zeros behind them.
    """

    is_croppable = True
    is_sliding = False  # lengths count every token
    supports_early_init = True

    def __init__(
        self,
        batch: Batch,
        *,
        sliding_window: int | None = None,
        max_cache_len: int | None = None,
        block_size: int | None = None,
        format: CacheFormat | None = None,
        exact_prompt: bool = True,
    ) -> None:
        self._shape: tuple[int, int, int, int, torch.device] | None = None
        self._memory = None
        super().__init__()
        self.is_compileable = max_cache_len is not None and block_size is None
        self.batch = batch
        self.leads = False  # whether it takes a call's tokens first
        self.is_narrow = False  # whether rows are stored with zeros behind them
        self.sliding_window = sliding_window
        self.max_cache_len = max_cache_len
        self.exact_prompt = exact_prompt
        self.length = 0
        self.storage = None
        self.slides = sliding_window is not None and max_cache_len is None
        self._slid = 0  # the length when memory was given back last
        self._options: dict[str, Any] = {
            "max_seq_len": max_cache_len,
            "block_size": _BLOCK if block_size is None and self.slides else block_size,
            "format": format,
        }
        self._pending: tuple[Tensor, Tensor] | None = None
        self._starts: Tensor | None = None
        self._sinks: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQuantLayer:
        """A layer of the same cache, unless the whole cache is being copied."""
        alone = id(self.batch) not in memo
        if alone:
            memo[id(self.batch)] = self.batch
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        self.flush()
        state = self.__getstate__()
        new.__setstate__({name: deepcopy(x, memo) for name, x in state.items()})
        new.leads = self.leads and not alone
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Make the storage, for the batch, heads and head_dims of the first rows."""
        value_states = key_states if value_states is None else value_states
        self._shape = batch, heads, dim, v_dim, _ = _row_shape(key_states, value_states)
        self.is_narrow = bool(dim % _CHANNELS or v_dim % _CHANNELS)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.storage = QuantizedKVCache(
            1,
            batch,
            heads,
            dim + -dim % _CHANNELS,
            v_head_dim=v_dim + -v_dim % _CHANNELS,
            dtype=key_states.dtype,
            device=key_states.device,
            **self._options,
        )
        self._starts = None
        self.is_initialized = True
        self.refresh()

    @property
    def batch_size(self) -> int:
        """Sequences, once initialized."""
        if self._shape is None:
            raise AttributeError("batch_size: the layer is not initialized yet")
        return int(self._shape[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new rows ``(batch, kv_heads, tokens, head_dim)``; returns handles on all rows.

        In compiled code it returns the new rows, by which the attention function knows the layer.

        Raises:
            ValueError: Another batch, number of heads or channels, or device than the stored rows.
            CacheFullError: More tokens than ``max_cache_len``.
        """
        if self.takes_traced():
            return self.take_traced(key_states, value_states)
        found: tuple[Tensor, Tensor] = self.take(key_states, value_states)
        return found

    @torch.compiler.disable
    def take(
        self, key_states: Tensor, value_states: Tensor
    ) -> tuple[QuantizedHandle, QuantizedHandle]:
        """Take new rows and return handles on all: see `update`."""
        self.flush()
        shape = _row_shape(key_states, value_states)
        if self.storage is None or (shape != self._shape and not self.length):
            self.lazy_initialization(key_states, value_states)
        elif shape != self._shape:
            self.batch.undo(self.length, taken=False)
            raise ValueError(
                f"key_states, value_states: the cache holds (batch, heads, k_dim, v_dim, device) "
                f"{self._shape}, got {shape}"
            )
        new = key_states.shape[-2]
        try:
            self.check_room(new)
        except CacheFullError:
            self.batch.undo(self.length, taken=False)
            raise
        if self.leads or self.batch.waits:
            self.batch.take(self)
        self.length += new
        key, value = key_states, value_states
        if key.dtype is not value.dtype:  # torch.autocast
            dtype = torch.promote_types(key.dtype, value.dtype)
            key, value = key.to(dtype), value.to(dtype)
        self._pending = self._rows(key), self._rows(value)
        batch, heads, k_dim, v_dim, _ = shape
        shapes = (batch, heads, k_dim), (batch, heads, v_dim)
        return handles(self, self.length, *shapes, key_states, value_states)

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than ``max_cache_len``.

        Raises:
            CacheFullError: They are.
        """
        if self.max_cache_len is not None and self.length + tokens > self.max_cache_len:
            raise CacheFullError(
                f"max_cache_len: {self.max_cache_len} tokens a sequence, but {self.length} are "
                f"stored and {tokens} more came"
            )

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
        assert self._shape is not None
        self.set_starts()
        key, value = (None, None) if self._pending is None else self._pending
        if key is None:
            self.batch.is_plain = False
        window, most = sliding_window, self.length
        if query.shape[2] == 1 and self.max_cache_len is not None:
            most = self.max_cache_len  # all decode steps alike: they may be captured
        if window is not None and window >= most:
            window = None  # it hides nothing yet
        piece = self.length
        if window is not None and key is not None and self.slides:
            self._slide(window, self.length - key.shape[1])
            piece = _PIECE
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        if sinks is not None and (self._sinks is None or self._sinks[0] is not sinks):
            self._sinks = (sinks, sinks.detach().float().contiguous())
        options: dict[str, Any] = {
            "softmax_scale": scaling,
            "causal": causal,
            "sliding_window": window,
            "softcap": softcap,
            "sinks": None if sinks is None or self._sinks is None else self._sinks[1],
            "exact_prompt": self.exact_prompt,
        }
        try:
            rows = self._rows(query)
            if key is None or value is None or key.shape[1] <= piece:
                out = self.storage.attend(0, rows, key, value, **options)
            else:
                out = self._attend_in_pieces(rows, key, value, piece, options)
        except BaseException:
            self.drop_call()
            raise
        self._pending = None
        assert isinstance(out, Tensor)
        v_dim = self._shape[3]
        return out if out.shape[-1] == v_dim else out[..., :v_dim]

    def _attend_in_pieces(
        self, query: Tensor, key: Tensor, value: Tensor, piece: int, options: dict[str, Any]
    ) -> Tensor:
        """Of a prompt that is longer than the memory of a layer with a window is to be."""
        assert self.storage is not None
        parts: list[Any] = []
        before = self.length - key.shape[1]
        try:
            for begin in range(0, key.shape[1], piece):
                part = slice(begin, begin + piece)
                if begin:
                    self._slide(options["sliding_window"], before + begin)
                parts.append(
                    self.storage.attend(0, query[:, part], key[:, part], value[:, part], **options)
                )
        except BaseException:
            self.storage.reset()  # what the window has passed is gone
            self._slid = 0
            raise
        self._slide(options["sliding_window"], self.length)
        self.storage.compact()
        return torch.cat(parts, dim=1)

    def _slide(self, window: int, length: int) -> None:
        """Give back memory behind the window of a layer that holds ``length`` tokens."""
        assert self.storage is not None
        if length - self._slid >= _BLOCK:
            self.storage.slide(max(window, self.sliding_window or 0), _SLACK)
            self._slid = length

    def _rows(self, x: Tensor) -> Tensor:
        """Rows (batch, heads, tokens, dim) as the cache takes them, (batch, tokens, heads, dim)."""
        if self.is_narrow:
            x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _CHANNELS))
        elif x.stride(-1) != 1:
            x = x.contiguous()
        return x.transpose(1, 2)

    def follow(self, positions: Any) -> None:
        """Refuse a call whose position_ids, where the model says them, are of another text."""
        if self._pending is None:
            return
        try:
            self.batch.follow(self, positions, self._pending[0].shape[1])
        except ValueError:
            self.drop_call()
            raise

    def drop_call(self) -> None:
        """Forget the tokens of a call that failed here, in the layers before, too."""
        if self._pending is not None:
            self.length -= self._pending[0].shape[1]
            self._pending = None
            self.batch.undo(self.length, taken=True)

    def flush(self) -> None:
        """Store rows that no attention has taken; the host knows its length then."""
        self.batch.is_settled = False
        if self.length and self._pending is not None and self.storage is not None:
            key, value = self._pending
            self.set_starts()
            try:
                self.storage.append(0, key, value)
            except BaseException:
                self.drop_call()
                raise
            self._pending = None

    def dequantize(self, length: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The first ``length`` rows, keys and values (batch, kv_heads, length, head_dim)."""
        if self.batch.is_captured:
            raise RuntimeError("the step reads dequantized rows, whose number is the text's length")
        assert self.storage is not None
        assert self._shape is not None
        self.flush()
        key, value = self.storage.dequantize(0, dtype=self.dtype if dtype is None else dtype)
        _, _, k_dim, v_dim, _ = self._shape
        return (
            key[:, :length, :, :k_dim].transpose(1, 2).contiguous(),
            value[:, :length, :, :v_dim].transpose(1, 2).contiguous(),
        )

    @property
    def keys(self) -> QuantizedHandle | None:
        """All stored keys, for models that look into a layer; None before the first."""
        return self._stored()[0]

    @keys.setter
    def keys(self, nothing: None) -> None:
        """Transformers' own initialization: there is nothing to set."""

    @property
    def values(self) -> QuantizedHandle | None:
        """Like `keys`."""
        return self._stored()[1]

    @values.setter
    def values(self, nothing: None) -> None:
        """See `keys`."""

    def _stored(self) -> tuple[QuantizedHandle | None, QuantizedHandle | None]:
        if self._shape is None:
            return None, None
        batch, heads, k_dim, v_dim, device = self._shape
        like = torch.empty(0, dtype=self.dtype, device=device)
        return handles(self, self.length, (batch, heads, k_dim), (batch, heads, v_dim), like, like)

    def get_seq_length(self, *args: Any) -> int | Tensor:
        """Tokens a sequence, padding among them.

        Known on the host, but in compiled code, in a step that is being captured, and after steps
        of compiled code: int64 () on the device.
        """
        if self.is_traced():
            return self.length_traced()
        length: int | Tensor = self._seq_length()
        return length

    @torch.compiler.disable
    def _seq_length(self) -> int | Tensor:
        if self._is_behind:
            return self.device_length()
        if self.batch.is_captured:
            stored = self.device_length()
            return stored if self._pending is None else stored + self._pending[0].shape[1]
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        if self.is_traced():
            assert self.max_cache_len is not None
            self.batch.masked = False  # until our mask function is asked
            HANDOFF.batch = self.batch
            return self.max_cache_len, 0
        sizes: tuple[int, int] = self._mask_sizes(query_length)
        return sizes

    @torch.compiler.disable
    def _mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.batch.masked = False
        if self.batch.is_captured and self.max_cache_len is not None:
            return KVLength(self.max_cache_len, self.batch, is_exact=False), 0
        if self.batch.may_compile and query_length == 1 and self.max_cache_len is not None:
            self.expect_step()
            if self._is_behind:
                return KVLength(self.max_cache_len, self.batch, is_exact=False), 0
        return KVLength(self.length + query_length, self.batch), 0

    def get_max_length(self) -> int:
        """``max_cache_len``, -1 without."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in 5.5


def _row_shape(key: Tensor, value: Tensor) -> tuple[int, int, int, int, torch.device]:
    batch, heads, _, dim = key.shape
    return batch, heads, dim, value.shape[-1], key.device
