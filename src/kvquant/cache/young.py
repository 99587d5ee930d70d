"""A cache's young rows (docs/by-age.md): their memory, which of them count, and crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from ..formats import SPARE_TOKENS, CacheFormat, open_start
from ..formats.affine import AffineRows
from ..view import CacheView
from .config import CacheConfig

__all__ = [
    "aged",
    "allocate",
    "is_kept",
    "live_old",
    "live_young",
    "pieces",
    "restored",
    "selected",
    "slabs",
    "widened",
]


def allocate(config: CacheConfig) -> list[Tensor | None]:
    """Each layer's slabs, ``(batch, heads, bytes)``; None: not by age."""
    lead, dims = (config.batch_size, config.num_kv_heads), (config.head_dim, config.v_head_dim)
    return [
        torch.zeros(*lead, format.young_bytes(*dims), dtype=torch.uint8, device=config.device)
        if format.by_age
        else None
        for format in config.formats
    ]


def selected(young: Sequence[Tensor | None], at: Tensor) -> list[Tensor | None]:
    """Copies of the slabs of the sequences ``at``."""
    return [None if slab is None else slab.index_select(0, at) for slab in young]


def slabs(config: CacheConfig, format: CacheFormat, young: Tensor) -> CacheView:
    """A layer's slabs as a view with a block a sequence."""
    return CacheView.slab(
        young, config.head_dim, v_head_dim=config.v_head_dim, block_size=format.young_tokens,
        format=format.young,
    )  # fmt: skip


def live_old(format: CacheFormat, length: int) -> range:
    """The tokens of a sequence whose rows a file has from the blocks."""
    if not format.by_age:
        return range(length)
    return range(format.age_group, open_start(format.age_group, length))


def live_young(format: CacheFormat, lengths: Sequence[int]) -> Tensor:
    """Which rows of a slab count, ``(batch, young_tokens)``."""
    group, ring = format.age_group, format.age_group + SPARE_TOKENS
    live = torch.zeros(len(lengths), format.young_tokens, dtype=torch.bool)
    for rows, length in zip(live, lengths, strict=True):
        rows[: min(group, length)] = True
        first = max(group, open_start(group, length - SPARE_TOKENS))
        rows[group + torch.arange(first, max(first, length)) % ring] = True
    return live


def is_kept(format: CacheFormat, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether the ring holds all that it must after a crop of sequences of these lengths."""
    group = format.age_group
    return all(
        new <= group
        or open_start(group, n - SPARE_TOKENS) <= max(group, open_start(group, new - SPARE_TOKENS))
        for n, new in zip(before, after, strict=True)
    )


def aged(
    config: CacheConfig,
    format: CacheFormat,
    view: CacheView,
    young: Tensor,
    table: Tensor,
    lengths: Sequence[int],
) -> None:
    """Write the open groups' rows to the blocks, too, of sequences of ``lengths`` from a file."""
    group, ring = format.age_group, format.age_group + SPARE_TOKENS
    held = slabs(config, format, young)
    for b, length in enumerate(lengths):
        begin = max(group, open_start(group, length))
        tokens = torch.arange(begin, max(begin, length), device=young.device)
        block, row = table[b, tokens // view.block_size].long(), tokens % view.block_size
        at = group + tokens % ring
        for old, new in ((view.k, held.k), (view.v, held.v)):
            assert isinstance(old.format, AffineRows)
            assert isinstance(new.format, AffineRows)
            codes, params = old.format.narrow(new.format, new.codes[b][:, at], new.params[b][:, at])
            old.codes[block, :, row] = codes.transpose(0, 1)
            old.params[block, :, row] = params.transpose(0, 1)


def widened(
    config: CacheConfig,
    format: CacheFormat,
    view: CacheView,
    young: Tensor,
    table: Tensor,
    before: Tensor,
    after: Tensor,
) -> Tensor:
    """A copy of one layer's slabs whose ring holds what it must after a crop, old rows as they are.

    Args:
        config: Of the cache.
        format: Of the layer.
        view: The layer.
        young: Its slabs.
        table: Blocks of each sequence.
        before: Tokens of each sequence, ``(batch,)``.
        after: Those that stay.
    """
    group, ring = format.age_group, format.age_group + SPARE_TOKENS

    def kept(lengths: Tensor) -> Tensor:
        return (lengths - (SPARE_TOKENS + 1)).clamp(min=0) // group * group

    begin, end = kept(after).clamp(min=group), torch.minimum(after, kept(before))
    tokens = begin[:, None] + torch.arange(ring, device=begin.device)
    index, row = tokens // view.block_size, tokens % view.block_size
    block = table.gather(1, index.clamp(max=table.shape[1] - 1).long())
    there = (tokens < end[:, None]) & (index < table.shape[1]) & (block >= 0)
    block, row = block.where(there, 0), row.where(there, 0)
    sequence, at = torch.arange(len(begin), device=begin.device)[:, None], group + tokens % ring
    result = young.clone()
    held = slabs(config, format, result)
    for old, new in ((view.k, held.k), (view.v, held.v)):
        assert isinstance(old.format, AffineRows)
        for to, found in (
            (new.codes, old.format.unpack(old.codes[block, :, row])),
            (new.params, old.params[block, :, row]),
        ):
            to[sequence, :, at] = found.where(there[..., None, None], to[sequence, :, at])
    return result


@contextmanager
def restored(*tensors: Tensor) -> Iterator[None]:
    """Leave tensors as they are now if what is done within fails."""
    before = [x.clone() for x in tensors]
    try:
        yield
    except BaseException:
        for x, kept in zip(tensors, before, strict=True):
            x.copy_(kept)
        raise


def pieces(format: CacheFormat, bound: int, tokens: int) -> list[tuple[int, int]]:
    """How new tokens behind ``bound`` are fed, so that attention reads their own group young."""
    if not format.by_age or tokens <= SPARE_TOKENS:
        return [(0, tokens)]
    group = format.age_group
    edges = [0, *range(group - bound % group, tokens, group), tokens]
    return list(pairwise(edges))
