"""What a cache holds: as rows, in Qwen's form, as tensors by name, and in files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..arguments import check_float_dtype
from ..functional import gather_rows
from . import files, serialize
from .config import CacheConfig
from .sequences import CacheSequences
from .serialize import LayerPast
from .state import CacheState
from .window import first_stored

__all__ = ["StoredCache"]


class StoredCache(CacheSequences):
    """The part of `kvquant.QuantizedKVCache` that gives out what is stored, and takes it in."""

    def dequantize(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as attention sees them.

        Args:
            layer: Which one.
            dtype: Of the result; the cache's by default.

        Returns:
            key ``(batch, tokens, kv_heads, head_dim)`` and value, zero where a sequence has no
            token or padding.
        """
        layer, state = self._check_layer(layer), self._state
        dtype = self.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        state.settle()
        with state.pool.lock:
            seqs = replace(state.seqs(layer), seq_starts=first_stored(state), advance=False)
            return gather_rows(state.view(layer), seqs, state.lengths.high[layer], dtype)

    def layer_past(self, layer: int) -> LayerPast:
        """A layer as Qwen's original code has it: ``x ~ scale * (q - zero)``.

        Returns:
            (q, scale, zero) of the keys and of the values: uint8 ``(batch, kv_heads, tokens,
            head_dim)`` and float32 ``(batch, kv_heads, tokens, 1)``, copies.

        Raises:
            ValueError: Another format than ``CacheFormat.plain()``, or sequences of several
                lengths.
        """
        return serialize.layer_past(self._state, self._check_layer(layer))

    @classmethod
    def from_layer_past(
        cls,
        past: Sequence[LayerPast],
        *,
        max_seq_len: int | None = None,
        block_size: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """A cache in ``CacheFormat.plain()`` from `layer_past` of every layer.

        Args:
            past: ((qk, ks, kz), (qv, vs, vz)) a layer; scales and zeros of shape (b, h, s, 1), or
                (b, h, 1, 1) where a head shares them. They are rounded to float16.
            max_seq_len: As for a new cache.
            block_size: As for a new cache.
            dtype: As for a new cache.

        Raises:
            TypeError: Another structure, a dtype that is not supported.
            ValueError: Shapes that do not belong together, or scales beyond float16.
        """
        check_float_dtype("dtype", dtype)
        return cls._of(serialize.from_layer_past(past, max_seq_len, block_size), dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is stored, sequence by sequence, the same whatever the blocks.

        Returns:
            "format", "seq_lens", "seq_starts" if there are any, and of each layer
            "layers.0.k_data" (batch, kv_heads, tokens, head_dim) and so on: copies on the cache's
            device.
        """
        return serialize.state_dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tokens by those of a `state_dict` of the same format and shapes.

        Raises:
            TypeError: A dtype is another.
            ValueError: Something is missing, of another shape, or of another format.
            CacheFullError: More tokens than the capacity, or more blocks than ``num_blocks``:
                sequences that shared blocks each have their own then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of tensors, got {type(state).__name__}")
        try:
            serialize.check_state(state, self._state.config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state: {error}") from None
        new = CacheState.empty(self._state.config)
        serialize.fill(new, state)
        self._adopt(new)

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._state
        return _restore, (type(self), state.config, self.dtype, self.state_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file.

        Raises:
            ImportError: safetensors is not installed.
        """
        files.save(self._state, self.dtype, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str | int | None = None,
        *,
        max_seq_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
    ) -> Self:
        """A cache from a file that `save` wrote.

        Its capacity and its blocks are those of the saved cache, but memory is taken for the
        stored tokens only: more comes by growth, up to the capacity, or at once if ``max_seq_len``
        or ``num_blocks`` is given. A file is checked as a whole before memory is taken for it.

        Args:
            path: The file.
            device: Where; torch's default device by default.
            max_seq_len: In place of the saved cache's, allocated at once.
            block_size: In place of the saved cache's, whose ``num_blocks`` are then as many tokens.
            num_blocks: In place of the saved cache's, allocated at once.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: No such file.
            TypeError: An argument of another type.
            CacheFullError: The stored tokens do not fit the sizes given.
            ValueError: The file is cut off, from another version or another program, or does not
                hold together.
        """
        sizes = {"max_seq_len": max_seq_len, "block_size": block_size, "num_blocks": num_blocks}
        return cls._of(*files.load(path, device, sizes))


def _restore(
    cls: type[StoredCache], config: CacheConfig, dtype: torch.dtype, state: dict[str, Tensor]
) -> StoredCache:
    return cls._of(serialize.restore(config, state, allocate=True), dtype)
