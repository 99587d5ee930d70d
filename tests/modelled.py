"""Caches beside a plain list of full-precision rows that goes through the same operations."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvquant import CacheFormat, QuantizedKVCache
from support import same_bits

LAYERS, HEADS, DIM, V_DIM = 2, 2, 32, 16
SMALL = CacheFormat(key_mean=16)  # groups that short tests cross
KINDS = {
    "contiguous": {"max_seq_len": 400},
    "growing": {},
    "paged16": {"max_seq_len": 400, "block_size": 16},
    "paged64": {"max_seq_len": 400, "block_size": 64},
    "paged-growing": {"block_size": 32},
    "paged-pool": {"block_size": 16, "num_blocks": 400},
}


def make(kind: str, batch: int = 3, device: str = "cpu", **options) -> QuantizedKVCache:
    options = {"format": SMALL, "v_head_dim": V_DIM, "device": device, **KINDS[kind], **options}
    return QuantizedKVCache(LAYERS, batch, HEADS, DIM, **options)


def rows(*lead: int, device: str = "cpu", heads: int = HEADS) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(*lead, heads, DIM, device=device),
        torch.randn(*lead, heads, V_DIM, device=device),
    )


def row_error(bits: int) -> float:
    """No more of a normally distributed row's length is lost.

    Half a step of a range of eight standard deviations in each channel; so 200,000 rows lose no
    more than half of it, by way of 8 bits or not.
    """
    return 8 / (2 * 2**bits)


def assert_rows(found: Tensor, wanted: Tensor, bits: int) -> None:
    """Rows (.., dim) that were stored in codes of so many bits, and the bits of their own dtype."""
    limit = row_error(bits) + torch.finfo(found.dtype).eps
    error = (found.double() - wanted.double()).norm(dim=-1)
    assert (error <= limit * wanted.double().norm(dim=-1)).all()


@dataclass
class Rows:
    """For each layer and sequence the exact (keys, values), each ``(tokens, heads, dim)``."""

    batch: int
    layers: list[list[tuple[Tensor, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        empty = torch.empty(0, HEADS, DIM), torch.empty(0, HEADS, V_DIM)
        self.layers = [[empty] * self.batch for _ in range(LAYERS)]

    @property
    def lengths(self) -> list[int]:
        return [len(key) for key, _ in self.layers[0]]

    def append(self, layer: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers[layer] = [
            (torch.cat([key, new_key.cpu()]), torch.cat([value, new_value.cpu()]))
            for (key, value), (new_key, new_value) in zip(self.layers[layer], parts, strict=True)
        ]

    def crop(self, length: int) -> None:
        def kept(x: Tensor) -> Tensor:
            return x[: max(0, len(x) + length) if length < 0 else length]

        self.layers = [[(kept(key), kept(value)) for key, value in layer] for layer in self.layers]

    def select(self, indices: Sequence[int]) -> None:
        self.batch = len(indices)
        self.layers = [[layer[i] for i in indices] for layer in self.layers]

    def fork(self) -> Rows:
        return deepcopy(self)

    def check(self, cache: QuantizedKVCache) -> None:
        """Every row is where it belongs, within the format's error."""
        cache.sync_lengths()
        assert cache.batch_size == self.batch
        assert cache.max_length == max(self.lengths)
        for layer, sequences in enumerate(self.layers):
            assert cache.seq_lens_of(layer).tolist() == [len(key) for key, _ in sequences]
            key, value = (x.cpu() for x in cache.dequantize(layer, torch.float32))
            k_rows, v_rows = cache.formats[layer].rows
            for b, (true_key, true_value) in enumerate(sequences):
                n = len(true_key)
                assert_rows(key[b, :n], true_key, k_rows.bits)
                assert_rows(value[b, :n], true_value, v_rows.bits)
                assert not key[b, n:].any()
                assert not value[b, n:].any()


def append_dense(caches: Sequence[QuantizedKVCache], model: Rows | None, tokens: int) -> None:
    for layer in range(LAYERS):
        key, value = rows(caches[0].batch_size, tokens, device=str(caches[0].device))
        for cache in caches:
            cache.append(layer, key, value)
        if model is not None:
            model.append(layer, list(zip(key, value, strict=True)))


def append_ragged(
    caches: Sequence[QuantizedKVCache], model: Rows | None, counts: Sequence[int]
) -> None:
    device = str(caches[0].device)
    cu = torch.tensor([0, *torch.tensor(list(counts)).cumsum(0)], dtype=torch.int32).to(device)
    for layer in range(LAYERS):
        key, value = rows(sum(counts), device=device)
        for cache in caches:
            cache.append(layer, key, value, cu_seqlens=cu)
        if model is not None:
            parts = zip(key.split(list(counts)), value.split(list(counts)), strict=True)
            model.append(layer, list(parts))


def assert_same(a: QuantizedKVCache, b: QuantizedKVCache) -> None:
    """The same bits, whatever the layout."""
    assert_state(a, b.state_dict())


def assert_state(cache: QuantizedKVCache, state: dict[str, Tensor]) -> None:
    ours = cache.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in ours.items():
        assert same_bits(tensor, state[name]), name


def attend_all(cache: QuantizedKVCache, queries: Tensor, **options) -> Tensor:
    outs = [cache.attend(layer, queries, **options) for layer in range(cache.num_layers)]
    return torch.stack([out for out in outs if isinstance(out, Tensor)])


class Unchanged:
    """Everything that a caller can see of a cache is the same after a ``with`` block."""

    def __init__(self, cache: QuantizedKVCache) -> None:
        self.cache, self.state = cache, cache.state_dict()
        self.visible = self.look()

    def look(self) -> tuple[int, list[int]]:
        lengths = [self.cache.max_length_of(i) for i in range(LAYERS)]
        return self.cache.batch_size, lengths

    def __enter__(self) -> Unchanged:
        return self

    def __exit__(self, *raised) -> None:
        assert self.look() == self.visible
        assert_state(self.cache, self.state)
