"""A transformers cache whose layers keep 8-bit rows and hand out references to them."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from typing_extensions import Self

from ... import CacheFormat, LayerFormats, QuantizedKVCache
from .batch import Batch
from .files import join, spread
from .layer import KVQuantLayer
from .steps import GraphStep
from .support import config_of, layer_windows

__all__ = ["KVQuantCache"]


class KVQuantCache(Cache):
    """An 8-bit cache for ``model.generate(..., past_key_values=KVQuantCache(model))``.

    Load the model with ``attn_implementation="kvquant"``: its attention reads the 8-bit rows. With
    any other attention the rows are dequantized at each step (correct, slow, reported once).

    Args:
        config: The model, or its config.
        max_cache_len: Capacity a sequence, allocated at once; None: grows, and layers with a
            sliding window keep little more than their window.
        block_size: Tokens of a block (a power of two from 16), None: one block a sequence.
        format: How rows are stored: a `kvquant.CacheFormat` or its name ("k8v4"), or a sequence of
            them, one per layer; ``CacheFormat()`` by default.
        exact_prompt: A prompt's own attention uses its exact keys and values where it can (no
            padding, window, softcap or sinks); False: every query reads stored rows.
        compileable: Let ``generate`` compile the decode steps, as it does with a StaticCache; needs
            a ``max_cache_len``.
        check_positions: Refuse tokens whose position_ids go back behind those of the stored ones,
            as another text's do; False: they may (soft prompts, parallel contexts).

    Raises:
        TypeError: Neither a model nor a config; a format of another type.
        ValueError: A model with layers that keep something else than keys and values; the name of
            no format, or another number of formats than layers; ``compileable`` without
            a ``max_cache_len`` or with a ``block_size``.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_cache_len: int | None = None,
        block_size: int | None = None,
        format: LayerFormats | None = None,
        exact_prompt: bool = True,
        check_positions: bool = True,
        compileable: bool = False,
    ) -> None:
        if compileable and (max_cache_len is None or block_size is not None):
            raise ValueError(
                "compileable: needs a max_cache_len and no block_size: the host gives out blocks"
            )
        windows = layer_windows(config_of(config))
        formats = CacheFormat.of_layers(format, len(windows))
        self.batch = Batch(check_positions, compileable)
        self.batch.layers = [
            KVQuantLayer(
                self.batch,
                sliding_window=window,
                max_cache_len=max_cache_len,
                block_size=block_size,
                format=layer_format,
                exact_prompt=exact_prompt,
            )
            for window, layer_format in zip(windows, formats, strict=True)
        ]
        super().__init__(layers=self.batch.layers)
        self.step: GraphStep | None = None  # see `graph_step`

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' storage as allocated, but of those in host memory."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode steps: where asked for, without a graph."""
        return self.step is None and self.batch.may_compile

    def fork(self) -> KVQuantCache:
        """An independent cache of the same tokens: a prompt that is continued more than once.

        With a ``block_size`` both share blocks until one writes to them; without, rows are copied.
        """
        for layer in self.layers:
            layer.flush()
        return deepcopy(self)

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Move the rows of all layers (or one) to host memory: of a chat that waits, say.

        A layer's next use brings it back, and so does `prefetch`. Layers that keep their sliding
        window only stay where they are.
        """
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.offload()

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Have all layers (or one) back on their devices."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.prefetch()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, which `kvquant.QuantizedKVCache.load` reads, too.

        Passes through host memory.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: Layers that are empty or unlike each other, that have given back tokens
                behind their sliding window, or whose head_dim is no multiple of 16; an attention
                mask that hid more than left padding.
        """
        join(self.layers).save(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        device: torch.device | str | int | None = None,
        **options: Any,
    ) -> Self:
        """A cache from a file that `save` wrote, of any model of the same shapes.

        Args:
            path: The file.
            config: The model, or its config.
            device: Where; the model's by default, torch's default device for a config.
            **options: Those of `KVQuantCache` but ``format``, which is the file's.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: No such file.
            TypeError: Neither a model nor a config; an unknown option.
            CacheFullError: More tokens than ``max_cache_len``.
            ValueError: The file does not hold together, or not of as many layers as the model.
        """
        if "format" in options:
            raise TypeError("format: is the file's")
        whole, layers = QuantizedKVCache.load(path, "cpu"), len(layer_windows(config_of(config)))
        if whole.num_layers != layers:
            raise ValueError(f"path: {whole.num_layers} layers, but the model has {layers}")
        cache = cls(config, format=whole.formats, **options)
        if device is None:
            device = getattr(config, "device", None)
        spread(whole, cache.layers, torch.empty(0, device=device).device)
        return cache

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        super().reset()
        self.batch.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self.batch.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self.batch.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self.batch.repeat_interleave(repeats)
