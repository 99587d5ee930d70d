"""What changes which tokens the sequences of a cache have: crops, another order, forks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .blocks import BlockIds, BlockPool, Change, carry_through, index_tensor
from .state import CacheState, normal
from .young import is_kept, selected, widened

__all__ = ["crop", "fork", "reorder", "reset"]


@dataclass(frozen=True)
class _Contents:
    """Which tokens sequences have, all memory for it taken.

    Attributes:
        ids: Blocks of each sequence.
        bounds: Bounds of the lengths, ``[layer][sequence]``.
        seq_lens: int32 ``(num_layers, batch)``.
        seq_starts: int32 ``(batch,)``; None: no padding.
        young: Each layer's slabs; None: they are as they were, or there are none.
    """

    ids: BlockIds
    bounds: list[list[int]]
    seq_lens: Tensor
    seq_starts: Tensor | None
    young: list[Tensor | None]


def crop(state: CacheState, length: int) -> None:
    """Keep ``length`` tokens of each sequence, or remove ``-length``."""
    _put(state, _cropped(state, length))


def reset(state: CacheState) -> None:
    """No tokens and no padding; the memory stays."""
    _put(state, replace(_cropped(state, 0), seq_starts=None))


def reorder(state: CacheState, indices: list[int]) -> None:
    """Let sequence ``b`` be what ``indices[b]`` was, in place; as many sequences as before."""
    picked = _picked(state, indices)
    if state.config.block_size is not None:
        _put(state, picked)
        return
    ids = [list(blocks) for blocks in picked.ids]
    spare = [blocks[0] for i, blocks in enumerate(state.blocks.ids) if i not in indices]
    pairs, taken = [], set()
    for blocks in ids:
        if blocks[0] in taken:
            pairs.append((blocks[0], spare.pop()))
            blocks[0] = pairs[-1][1]
        taken.add(blocks[0])
    _put(state, replace(picked, ids=tuple(map(tuple, ids))), pairs)


@normal
def fork(state: CacheState, indices: list[int]) -> CacheState:
    """A state with the sequences ``indices``: blocks are shared, or copied if contiguous."""
    with state.pool.changing():
        return _fork(state, indices)


def _fork(state: CacheState, indices: list[int]) -> CacheState:
    new = _picked(state, indices)
    config, ids = replace(state.config, batch_size=len(indices)), new.ids
    memory, pool, width = state.memory, state.pool, state.blocks.width
    if config.block_size is None:
        memory = memory.selected([blocks[0] for blocks in ids])
        pool, width = BlockPool(len(indices), len(indices)), 1
        ids = tuple((b,) for b in range(len(indices)))
    else:
        state.may_share = True
        state.room = [-1] * len(state.room)
    found = CacheState(
        config, memory, pool, ids, new.seq_lens, new.seq_starts, new.bounds, width, new.young
    )
    found.window = state.window
    if config.block_size is not None and pool.limit is not None and config.num_blocks is None:
        pool.limit += config.pool_share
    return found


def _picked(state: CacheState, indices: list[int]) -> _Contents:
    """The sequences ``indices``, as they are; lengths, padding and slabs are copies."""
    state.settle()
    at, starts = index_tensor(indices, state.config.device), state.seq_starts
    live = state.live(state.lengths.longest())
    return _Contents(
        tuple(live[i] for i in indices),
        [[of[i] for i in indices] for of in map(state.lengths.bounds, state.layers)],
        state.lengths.seq_lens.index_select(1, at),
        None if starts is None else starts.index_select(0, at),
        selected(state.young, at),
    )


def _cropped(state: CacheState, length: int) -> _Contents:
    length = max(-(2**31) + 1, min(length, 2**31 - 1))  # lengths are int32
    config, lengths = state.config, state.lengths
    if lengths.stale and (config.block_size is not None or config.device.type == "cpu"):
        state.settle()
    now, seq_lens = [lengths.bounds(i) for i in state.layers], lengths.seq_lens
    if length < 0:
        bounds = [[max(0, n + length) for n in of] for of in now]
        after = (seq_lens + length).clamp(min=0)
    else:
        bounds = [[min(n, length) for n in of] for of in now]
        after = seq_lens.clamp(max=length)
    ids = state.live([max(of) for of in zip(*bounds, strict=True)])
    if ids != state.blocks.ids:
        state.refuse_in_capture()
    young = [
        None
        if slab is None or (not lengths.stale and is_kept(format, now[i], bounds[i]))
        else widened(config, format, state.view(i), slab, state.blocks.table, seq_lens[i], after[i])
        for i, format, slab in zip(state.layers, config.formats, state.young, strict=True)
    ]
    return _Contents(ids, bounds, after, state.seq_starts, young)


def _put(state: CacheState, new: _Contents, copies: Sequence[tuple[int, int]] = ()) -> None:
    """Give the sequences of ``state`` these contents, all of them or none.

    Args:
        state: Of as many sequences.
        new: The contents.
        copies: Blocks to copy before, (from, to): contiguous sequences that continue twice.
    """
    lengths, rows = state.lengths, max(state.lengths.high)
    with state.pool.changing():
        change = None if new.ids == state.blocks.ids else Change(state.blocks, new.ids)
        # A block that was full, and is shared therefore, may be the one that is written next.
        state.may_share = state.config.block_size is not None
        state.room = [-1] * len(state.room)

        def put() -> None:
            state.memory.copy_blocks(copies, rows)
            if change is not None:
                change.commit()
            lengths.seq_lens.copy_(new.seq_lens)
            for slab, now in zip(state.young, new.young, strict=True):
                if slab is not None and now is not None:
                    slab.copy_(now)
            state.set_starts(new.seq_starts)
            lengths.set_bounds(new.bounds)

        carry_through(put)
        if change is not None:
            state.pool.shrink(state.memory.num_blocks)
        state.may_share = bool(state.shared_tails())
    state.refresh_room()
