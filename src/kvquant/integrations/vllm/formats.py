"""Names of formats, and how many bytes of vLLM's pages they take."""

from __future__ import annotations

from dataclasses import replace

from ... import CacheFormat

__all__ = ["BLOCK_SIZES", "FORMATS", "block_size_of", "content_bytes", "format_of"]

#: The formats by the names of their backends in vLLM: a new format is one more row.
FORMATS: dict[str, CacheFormat] = {
    "KVQUANT": CacheFormat(),
    "KVQUANT_PLAIN": CacheFormat.plain(),
    "KVQUANT_K8V4": CacheFormat(value="int4"),
    "KVQUANT_K4V4": CacheFormat(key="int4", value="int4"),
}
#: Tokens of a block that kernels run on, the preferred size first.
BLOCK_SIZES = (256, 128, 64)


def block_size_of(tokens: int) -> int:
    """The kernels' block size for pages of ``tokens``: the largest that divides them.

    Raises:
        ValueError: There is none.
    """
    for size in BLOCK_SIZES:
        if tokens % size == 0:
            return size
    raise ValueError(
        f"block_size: kvquant serves {', '.join(map(str, BLOCK_SIZES))} and their multiples, got "
        f"{tokens}: leave --block-size out, or pass --block-size {BLOCK_SIZES[0]}"
    )


def format_of(format: CacheFormat, block_size: int) -> CacheFormat:
    """The format in blocks of ``block_size``: a group of keys with one mean never leaves its block.

    vLLM may join blocks of different requests to one prefix, and frees blocks behind a sliding
    window. With each block's mean inside it, every block is decoded by itself, whoever wrote those
    before it.
    """
    if format.key_mean is None or format.key_mean <= block_size:
        return format
    return replace(format, key_mean=block_size)


def content_bytes(format: CacheFormat, head_dim: int, v_head_dim: int, block_size: int) -> int:
    """Bytes that vLLM has to count for a token of one head: its rows, and a share of the mean."""
    slab = format_of(format, block_size).slab_bytes(head_dim, v_head_dim, block_size)
    return -(-slab // block_size)
