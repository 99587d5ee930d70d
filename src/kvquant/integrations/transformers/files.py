"""A model's layers as one `kvquant.QuantizedKVCache` in host memory, which has files, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import QuantizedKVCache
from .layer import KVQuantLayer

__all__ = ["join", "spread"]

_LIKE = ("batch_size", "num_kv_heads", "head_dim", "v_head_dim", "dtype")


def join(layers: Sequence[KVQuantLayer]) -> QuantizedKVCache:
    """All tokens of layers that hold the same number of them.

    Raises:
        ValueError: Layers that are empty or unlike each other, that have given back tokens behind
            their window or pad their heads; a mask that hides more than left padding.
    """
    tensors: dict[str, torch.Tensor] = {}
    lengths, likes, formats = [], [], []
    for index, layer in enumerate(layers):
        layer.flush()
        storage = layer.storage
        _require(storage is not None, f"layer {index} holds nothing yet")
        assert storage is not None
        _require(not layer.is_narrow, f"head_dim of layer {index} is no multiple of 16")
        likes.append({name: getattr(storage, name) for name in _LIKE})
        _require(likes[-1] == likes[0], f"layer {index} is of {likes[-1]}, layer 0 of {likes[0]}")
        formats.append(storage.format)
        state = storage.state_dict()
        lengths.append(state.pop("seq_lens").cpu())
        for name, x in state.items():
            tensors[name.replace("layers.0.", f"layers.{index}.")] = x.cpu()
    _require(layers[0].batch.regular, "the last attention mask hid more than left padding")
    whole = QuantizedKVCache(len(layers), **likes[0], format=formats, device="cpu")
    of_all = {"format": whole.state_dict()["format"], "seq_lens": torch.cat(lengths)}
    whole.load_state_dict({**tensors, **of_all})
    return whole


def spread(whole: QuantizedKVCache, layers: Sequence[KVQuantLayer], device: torch.device) -> None:
    """Put the tokens of ``whole`` into as many new layers, on ``device``.

    Raises:
        ValueError: Sequences of unlike lengths.
        CacheFullError: More tokens than the layers take.
    """
    state = whole.state_dict()
    lens = state.pop("seq_lens")
    length = int(lens.max())
    if bool((lens != length).any()):
        raise ValueError("path: its sequences are of unlike lengths")
    starts = whole.seq_starts
    layers[0].batch.restore(None if starts is None else starts.to(device), length)
    options: dict[str, Any] = {"dtype": whole.dtype, "device": device}
    shape = whole.batch_size, whole.num_kv_heads, 0
    key = torch.empty(*shape, whole.head_dim, **options)
    value = torch.empty(*shape, whole.v_head_dim, **options)
    of_all = {name: x for name, x in state.items() if not name.startswith("layers.")}
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}."
        rows = {
            name.replace(prefix, "layers.0."): state[name].to(device)
            for name in state
            if name.startswith(prefix)
        }
        layer.lazy_initialization(key, value)
        assert layer.storage is not None
        of_one = {"format": layer.storage.state_dict()["format"], "seq_lens": lens[index, None]}
        layer.load_state_dict({**of_all, **rows, **of_one})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"cache: cannot be saved: {message}")
