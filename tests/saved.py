"""A saved cache of each layout, kept for every released version: ``python -m tests.saved``.

Part of a release: what this version writes goes to ``data/<version>/``, is committed and never
written again. `test_serialize.py` loads the files of all versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

import kvquant
from kvquant import CacheFormat, QuantizedKVCache

DATA = Path(__file__).parent / "data"

LENGTHS = (20, 0, 7)
KINDS = {
    "contiguous-default": {"max_seq_len": 64},
    "growing-plain": {"format": CacheFormat.plain()},
    "paged-means": {
        "max_seq_len": 64, "block_size": 16,
        "format": CacheFormat(key_mean=16, value_rotation=True),
    },
    "pool-default": {"block_size": 16, "num_blocks": 6},
}  # fmt: skip


def caches() -> Iterator[tuple[str, QuantizedKVCache]]:
    """Two layers of three sequences of unlike lengths, one with padding."""
    torch.manual_seed(0)
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for kind, options in KINDS.items():
        cache = QuantizedKVCache(2, 3, 1, 16, v_head_dim=32, dtype=torch.bfloat16, **options)
        if kind == "paged-means":
            cache.set_seq_starts(torch.tensor([3, 0, 1], dtype=torch.int32))
        for layer in range(2):
            key, value = (torch.randn(sum(LENGTHS), 1, n, dtype=torch.bfloat16) for n in (16, 32))
            cache.append(layer, key, value, cu_seqlens=starts)
        yield kind, cache


def save(folder: Path) -> None:
    folder.mkdir(parents=True)  # never written again
    for kind, cache in caches():
        cache.save(folder / f"cache-{kind}.safetensors")


if __name__ == "__main__":
    save(DATA / kvquant.__version__)
