"""A layer whose rows may wait in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import QuantizedKVCache

__all__ = ["HostedLayer"]


class HostedLayer:
    """Part of `KVQuantLayer`: where its rows are."""

    dtype: torch.dtype
    slides: bool
    _host: dict[str, Tensor] | None = None  # the storage's state, while it waits there
    _memory: Any
    _shape: tuple[int, int, int, int, torch.device] | None
    _storage: QuantizedKVCache | None = None

    @property
    def storage(self) -> QuantizedKVCache | None:
        """The layer's cache, None before the first rows; whoever asks has it on the device."""
        if self._host is not None:
            self.prefetch()
        return self._storage

    @storage.setter
    def storage(self, new: QuantizedKVCache | None) -> None:
        self._storage, self._host = new, None

    @property
    def nbytes(self) -> int:
        """Bytes on the device, as allocated."""
        return 0 if self._storage is None else self._storage.nbytes

    def flush(self) -> None:
        """Store rows that no attention has taken."""
        raise NotImplementedError

    def set_starts(self) -> None:
        """Tell the storage of the batch's left padding."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Make the storage."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tokens."""
        raise NotImplementedError

    def offload(self) -> None:
        """Move the rows to host memory, until `prefetch` or the next use of the layer.

        A layer that keeps its sliding window only stays where it is: it is small.
        """
        self.flush()
        if self._storage is None or self.slides:
            return
        self.set_starts()
        self._host = {name: x.cpu() for name, x in self._storage.state_dict().items()}
        self._storage = self._memory = None

    def prefetch(self) -> None:
        """Have the rows back on the device."""
        host = self._host
        if host is None or self._shape is None:
            return
        batch, heads, k_dim, v_dim, device = self._shape
        key, value = (
            torch.empty(batch, heads, 0, dim, dtype=self.dtype, device=device)
            for dim in (k_dim, v_dim)
        )
        try:
            self.lazy_initialization(key, value)
            self.load_state_dict({name: x.to(device) for name, x in host.items()})
        except BaseException:
            self._storage, self._host = None, host
            raise
