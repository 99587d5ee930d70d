"""What generation does with a layer's sequences: the part that is not about new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import CacheFullError, CacheView, Sequences
from .batch import Batch
from .hosted import HostedLayer

__all__ = ["LayerSequences"]


class LayerSequences(HostedLayer):
    """Part of `KVQuantLayer`."""

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        raise NotImplementedError

    @length.setter
    def length(self, tokens: int) -> None:
        raise NotImplementedError

    batch: Batch
    device: torch.device
    max_cache_len: int | None
    _pending: tuple[Tensor, Tensor] | None
    _slid: int
    _starts: Tensor | None

    def refresh(self) -> None:
        """Look where the storage is now."""
        raise NotImplementedError

    def set_starts(self) -> None:
        """Tell the storage of the batch's left padding."""
        if self.storage is not None and self.batch.starts is not self._starts:
            self._starts = self.batch.starts
            on_device = None if self._starts is None else self._starts.to(self.device)
            self.storage.set_seq_starts(on_device)
            self.refresh()

    # ------------------------------------------------------------------------------ captured steps

    def make_ready(self) -> None:
        """See to room for a token, and to the padding, before a step is captured or replayed."""
        self.flush()
        self.set_starts()
        if self.storage is not None and self.storage.block_size is not None:
            self.storage.reserve(self.length + 1)

    def parts(self) -> tuple[CacheView, Sequences]:
        """The storage's memory and batch: the same objects while they stay where they are."""
        assert self.storage is not None
        return self.storage.layer(0)

    @property
    def stays(self) -> bool:
        """Whether a replay needs nothing of the host but to be counted: blocks have to be taken."""
        return self.storage is not None and self.storage.block_size is None

    def restore(self, length: int) -> None:
        """Forget what a capture, which did nothing on the device, told the host."""
        assert self.storage is not None
        self._pending = None
        self.storage.sync_lengths()
        self.length = length

    # ---------------------------------------------------------------------------------- sequences

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tokens by those of a `kvquant.QuantizedKVCache.state_dict` of one layer.

        Raises:
            CacheFullError: More tokens than ``max_cache_len``.
        """
        assert self.storage is not None
        length = int(state["seq_lens"].max())
        if self.max_cache_len is not None and length > self.max_cache_len:
            raise CacheFullError(
                f"max_cache_len: {self.max_cache_len} tokens a sequence, but {length} are stored"
            )
        self.storage.load_state_dict(state)
        self.length, self._slid = length, 0
        self.refresh()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end: -n of them, or (as 5.5 does) all behind a positive length."""
        self.flush()
        self.batch.positions = None
        keep = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        keep = max(0, keep)
        if self.storage is not None and keep < self.length:
            self.storage.crop(keep)
            self.length, self._slid = keep, min(self._slid, keep)

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self.batch.is_settled = False
        self._pending = None
        self.length = self._slid = 0
        if self.storage is not None:
            self.storage.reset()
        self._starts = None
        self.refresh()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence ``beam_idx[i]`` (beam search)."""
        self._change("reorder", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._change("select", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change("repeat_interleave", repeats)

    def _change(self, method: str, argument: Any) -> None:
        self.flush()
        if self.storage is None:
            return
        self.set_starts()
        if isinstance(argument, Tensor):
            argument = argument.to(self.device)
        getattr(self.storage, method)(argument)
        assert self._shape is not None
        self._shape = (self.storage.batch_size, *self._shape[1:])
        self.refresh()
