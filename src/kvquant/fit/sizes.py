"""Bytes of caches, by the caches themselves on torch's meta device; what fits in a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import CacheFormat, LayerFormats
from .layers import LayerShape, ModelShape

__all__ = ["FORMATS", "Layout", "Peer", "cache_bytes", "gib", "largest", "peer_bytes"]

#: What rows can be stored as, by the name in tables.
FORMATS: dict[str, CacheFormat] = {
    "8 bits": CacheFormat(),
    "8 bits, plain": CacheFormat.plain(),
    "k8v4": CacheFormat.named("k8v4"),
    "k4v4": CacheFormat.named("k4v4"),
}
Peer = Literal["DynamicCache", "StaticCache"]
_MOST = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a `KVQuantCache` is made and filled.

    Attributes:
        reserved: Room for every token is allocated at once (``max_cache_len``); else it grows.
        block_size: Tokens of a block; None: contiguous.
        format: How rows are stored: a format or its name, or one per layer.
        generated: Tokens at the end that come one at a time; the others are one prompt.
    """

    reserved: bool = False
    block_size: int | None = None
    format: LayerFormats | None = None
    generated: int = 0


def cache_bytes(
    shape: ModelShape, batch: int, length: int, layout: Layout | None = None
) -> dict[LayerShape, int]:
    """`KVQuantCache.nbytes` after ``length`` tokens a sequence, for each kind of layer.

    The cache itself is run on torch's meta device, so that the result is exact.

    Raises:
        ValueError: A number that is not positive, more generated tokens than there are.
    """
    from ..integrations.transformers import KVQuantCache, kvquant_attention

    layout = Layout() if layout is None else layout
    _check(batch=batch, length=length)
    if not 0 <= layout.generated < length:
        raise ValueError(
            f"generated: expected 0 to {length - 1} of {length} tokens, got {layout.generated}"
        )
    cache = KVQuantCache(
        shape.config,
        max_cache_len=length if layout.reserved else None,
        block_size=layout.block_size,
        format=layout.format,
    )
    module = torch.nn.Module()
    formats = CacheFormat.of_layers(layout.format, len(cache.layers))
    tried = {layer: _one_of_each(layer, formats) for layer in shape.layers}
    kinds = {index: layer for layer, counts in tried.items() for index in counts}
    for tokens in (length - layout.generated, *[1] * layout.generated):
        for index, layer in sorted(kinds.items()):
            key, value = _rows(layer, batch, tokens)
            k_handle, v_handle = cache.update(key, value, index)
            if layer.dequantized:
                cache.layers[index].flush()
            else:
                kvquant_attention(module, key, k_handle, v_handle, None)
    return {
        layer: sum(cache.layers[index].storage.nbytes * count for index, count in counts.items())
        for layer, counts in tried.items()
    }


def peer_bytes(shape: ModelShape, batch: int, length: int, peer: Peer = "DynamicCache") -> int:
    """Bytes of transformers' own 16-bit cache after ``length`` tokens, likewise."""
    import transformers

    _check(batch=batch, length=length)
    if peer == "DynamicCache":
        cache: Any = transformers.DynamicCache(config=shape.config)
    else:
        cache = transformers.StaticCache(config=shape.config, max_cache_len=length)
    total = 0
    for layer in shape.layers:
        of = cache.layers[layer.indices[0]]
        if peer == "DynamicCache":
            of.update(*_rows(layer, batch, length))
        else:
            of.lazy_initialization(*_rows(layer, batch, 1))
        total += (of.keys.nbytes + of.values.nbytes) * len(layer.indices)
    return total


def largest(nbytes: Callable[[int], int], room: int, limit: int = _MOST) -> int:
    """The largest number from 1 to ``limit`` whose bytes are at most ``room``; 0: not even 1.

    ``nbytes`` never falls. It is nearly linear for a cache, so that every other try is where a line
    through the bounds says, and the tries between halve what is left.
    """
    low, high = 0, limit + 1
    below, above = 0, 0  # bytes at the bounds; 0 above: not known
    tries = 0
    while high - low > 1:
        if not above:
            at = min(2 * low if low else 1, high - 1) if tries != 1 else low * room // max(1, below)
        elif tries % 2:
            at = (low + high) // 2
        else:
            at = low + (high - low) * (room - below) // (above - below)
        at, tries = min(max(at, low + 1), high - 1), tries + 1
        if (found := nbytes(at)) <= room:
            low, below = at, found
        else:
            high, above = at, found
    return low


def _one_of_each(kind: LayerShape, formats: Sequence[CacheFormat]) -> dict[int, int]:
    """A layer of each format, and how many layers of the kind are stored as it is."""
    counts = Counter(formats[index] for index in kind.indices)
    return {
        next(index for index in kind.indices if formats[index] == format): count
        for format, count in counts.items()
    }


def _rows(layer: LayerShape, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = (
        torch.empty(batch, layer.kv_heads, tokens, dim, dtype=torch.bfloat16, device="meta")
        for dim in (layer.k_dim, layer.v_dim)
    )
    return key, value


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")


def gib(nbytes: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
