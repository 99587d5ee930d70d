"""Behind a sliding window: blocks that nobody will read again are given back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import require
from .blocks import BlockIds, BlockPool, Change, index_tensor
from .state import CacheState

__all__ = ["check_crop", "check_window", "compacted", "first_stored", "kept", "slide"]

_NONE = -1  # in the place of a block that was given back


def _first_needed(state: CacheState, length: int) -> int:
    """The first block that a sequence of ``length`` tokens reads, its group's mean included."""
    config = state.config
    group = config.mean_group or 1
    return max(0, length - state.window) // group * group // (config.block_size or 1)


def kept(state: CacheState, sliding_window: int) -> int:
    """How many tokens before a sequence's end are kept for attention with this window.

    Raises:
        ValueError: The cache is contiguous.
    """
    require(
        state.config.block_size is not None,
        "slide: only a paged cache (block_size) can give back blocks behind a window",
    )
    # A step that begins a group reads the group before it.
    return max(sliding_window, state.config.mean_group)


def slide(state: CacheState, window: int, slack: int) -> None:
    """See `QuantizedKVCache.slide`; ``window`` is what `kept` says."""
    lengths = state.lengths
    if lengths.stale:
        state.sync_lengths()
    state.window = window
    with state.pool.changing():
        ids: BlockIds = tuple(
            (_NONE,) * (first := min(_first_needed(state, lengths.shortest(b) - slack), len(of)))
            + of[first:]
            for b, of in enumerate(state.blocks.ids)
        )
        if ids != state.blocks.ids:
            state.refuse_in_capture()
            Change(state.blocks, ids).commit()
    state.refresh_room()


def check_window(state: CacheState, sliding_window: int) -> None:
    """Refuse attention to tokens that were given back."""
    if any(_gone(state)) and not 0 < sliding_window <= state.window:
        raise ValueError(
            f"sliding_window: the cache keeps a window of {state.window} tokens, got "
            f"{sliding_window or None}"
        )


def check_crop(state: CacheState, lengths: list[int]) -> None:
    """Refuse lengths whose windows reach back to tokens that were given back."""
    for length, gone in zip(lengths, _gone(state), strict=True):
        if length and gone > _first_needed(state, length):
            raise ValueError(
                f"max_length: the window of {state.window} tokens before token {length} is no "
                f"longer stored; the first {gone * (state.config.block_size or 1)} tokens were "
                "given back"
            )


def first_stored(state: CacheState) -> Tensor | None:
    """Each sequence's first token that is neither padding nor given back; None: they all are."""
    starts = state.seq_starts
    if any(gone := _gone(state)):
        size = state.config.block_size or 1
        first = index_tensor([n * size for n in gone], state.config.device, torch.int32)
        starts = first if starts is None else torch.maximum(starts, first)
    return starts


def _gone(state: CacheState) -> list[int]:
    """Blocks of each sequence that were given back: its first ones."""
    if not state.window:
        return [0] * len(state.blocks.ids)
    return [
        next((i for i, block in enumerate(of) if block != _NONE), len(of))
        for of in state.blocks.ids
    ]


def compacted(state: CacheState) -> CacheState | None:
    """The state in memory of as many blocks as are held; None where that is no tenth less."""
    held = sorted({block for of in state.blocks.ids for block in of if block != _NONE})
    if state.pool.is_shared or len(held) * 1.1 + 1 >= state.memory.num_blocks:
        return None
    state.refuse_in_capture()
    new = {_NONE: _NONE, **{block: i for i, block in enumerate(held)}}
    ids = tuple(tuple(new[block] for block in of) for of in state.blocks.ids)
    bounds = [state.lengths.bounds(i) for i in range(state.config.num_layers)]
    pool = BlockPool(len(held), state.pool.limit)
    found = CacheState(
        state.config, state.memory.selected(held), pool, ids, state.lengths.seq_lens,
        state.seq_starts, bounds, state.blocks.width, state.young,
    )  # fmt: skip
    found.window = state.window
    return found
