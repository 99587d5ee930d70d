"""Blocks of tokens on the host: how often each is held, and which a sequence holds."""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from threading import RLock
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import CacheFullError

__all__ = [
    "BlockIds",
    "BlockMap",
    "BlockPool",
    "Change",
    "carry_through",
    "ceil_to",
    "index_tensor",
    "step_up",
]

BlockIds: TypeAlias = tuple[tuple[int, ...], ...]


def ceil_to(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def step_up(now: int, least: int, unit: int) -> int:
    """The next size of something that grows: an eighth more, at least ``unit`` and ``least``."""
    return max(least, now + max(unit, now // 8))


def carry_through(steps: Callable[[], None]) -> None:
    """Take steps that belong together: an interrupt in their midst is raised after the last one.

    ``steps`` starts over then, so it must be such that what it did already does no harm; it asks
    for no memory once the first thing is changed.
    """
    try:
        steps()
    except BaseException:
        steps()
        raise


def index_tensor(
    values: Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Integers on ``device``, without waiting for it."""
    index = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)


class BlockPool:
    """Blocks ``0 .. num_blocks - 1``, and how many sequences of its maps hold each.

    What the maps hold is the state; counts, free blocks and tables on the device are derived from
    it. So whatever breaks off a change, an error or an interrupt, the next one finds that it was
    broken off and derives them again. The lowest free block is taken first, so that blocks at the
    end become free again and can be given up.

    Args:
        num_blocks: Blocks at the start, all free.
        limit: Most blocks there may be; None: any number.

    Attributes:
        lock: Held by whoever changes the pool, or the memory that its maps share.
        is_shared: More maps than one are in use, so that other caches may change the memory.
    """

    def __init__(self, num_blocks: int, limit: int | None) -> None:
        self.limit = limit
        self.lock = RLock()
        self.is_shared = False
        self._maps: weakref.WeakSet[BlockMap] = weakref.WeakSet()
        self._counts = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._is_broken = False  # a change has begun and not ended
        self._lost: list[None] = []  # not empty: a map is gone

    @property
    def num_blocks(self) -> int:
        """Blocks there are, free or held."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        with self.changing():
            return len(self._free)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The pool, for this thread alone and in order; not within itself."""
        with self.lock:
            if self._lost or self._is_broken:
                self._is_broken = True
                self._lost.clear()
                self._derive()
            yield
            self._is_broken = False

    def _derive(self) -> None:
        maps = list(self._maps)
        most = max((block for m in maps for ids in m.ids for block in ids), default=-1)
        counts = [0] * max(len(self._counts), most + 1)
        for m in maps:
            for ids in m.ids:
                for block in ids:
                    counts[block] += block >= 0
        for m in maps:
            m.write_table()
        self._counts = counts
        self._free = [block for block, count in enumerate(counts) if not count]
        self.is_shared = len(maps) > 1

    def add(self, blocks: BlockMap) -> None:
        """Count what a new map holds, for as long as it lives."""
        self._is_broken = True
        # It may come in the middle of anything, so it does next to nothing.
        weakref.finalize(blocks, self._lost.append, None).atexit = False
        self._maps.add(blocks)
        for block in (block for ids in blocks.ids for block in ids if block >= 0):
            if not self._counts[block]:
                self._free.remove(block)
                heapq.heapify(self._free)
            self._counts[block] += 1
        self.is_shared = len(self._maps) > 1

    def count(self, block: int) -> int:
        """How often ``block`` is held."""
        return self._counts[block]

    def size_for(self, wanted: int, name: str = "num_blocks") -> int:
        """How many blocks there must be for ``wanted`` free ones, within the limit.

        ``name``: the argument that asks for them.

        Raises:
            CacheFullError: The limit leaves no room.
        """
        now, missing = len(self._counts), wanted - len(self._free)
        if missing <= 0:
            return now
        size = step_up(now, now + missing, 1)
        if self.limit is not None:
            if now + missing > self.limit:
                raise CacheFullError(
                    f"{name}: {wanted} more blocks are needed, but only "
                    f"{len(self._free) + self.limit - now} of {self.limit} are free"
                )
            size = min(size, self.limit)
        return size

    def grow(self, size: int) -> None:
        """Let there be ``size`` blocks, if there are fewer."""
        self._is_broken = True
        self._free += range(len(self._counts), size)  # larger than all others: still a heap
        self._counts += [0] * (size - len(self._counts))

    def shrink(self, size: int) -> None:
        """Give up free blocks at the end, as long as ``size`` are left."""
        now = len(self._counts)
        while now > size and not self._counts[now - 1]:
            now -= 1
        if now < len(self._counts):
            self._is_broken = True
            self._counts = self._counts[:now]
            self._free = sorted(block for block in self._free if block < now)

    def take(self) -> int:
        """A free block, for a change that is to come. There must be one."""
        self._is_broken = True
        return heapq.heappop(self._free)

    def recount(self, gained: Iterable[int], lost: Iterable[int]) -> None:
        """A map holds other blocks; those that it gained were taken, or are held."""
        for block in gained:
            self._counts[block] += block >= 0
        for block in lost:
            if block < 0:
                continue
            self._counts[block] -= 1
            if not self._counts[block]:
                heapq.heappush(self._free, block)

    def mark(self) -> None:
        """A change begins that has to be derived again if it breaks off."""
        self._is_broken = True


class BlockMap:
    """The blocks of the sequences of one cache, in the order of their tokens.

    Attributes:
        ids: Blocks of each sequence, -1 where one was given back behind a window: the state.
        table: The same as int32 ``(batch, max_blocks)`` on the device, -1 where a sequence has no
            block. It is written in place unless it has to become wider, so that captured graphs
            see changes.
    """

    def __init__(self, ids: BlockIds, width: int, pool: BlockPool, device: torch.device) -> None:
        self.ids, self.pool = ids, pool
        self.table = _table(ids, width, device)
        pool.add(self)

    @property
    def width(self) -> int:
        """Most blocks of a sequence, as the table stands."""
        return self.table.shape[1]

    def write_table(self) -> None:
        """Let the table say what ``ids`` do."""
        width = max(self.width, *map(len, self.ids)) if self.ids else self.width
        table = _table(self.ids, width, self.table.device)
        if table.shape == self.table.shape:
            self.table.copy_(table)
        else:
            self.table = table

    def release(self) -> None:
        """Give all blocks back: the cache is gone."""
        with self.pool.changing():
            self.pool.mark()
            lost, self.ids = self.ids, ()
            self.pool.recount((), (block for ids in lost for block in ids))


class Change:
    """Other blocks for a map's sequences, all memory for it taken: `commit` asks for none.

    Made and committed within `BlockPool.changing`.
    """

    def __init__(self, blocks: BlockMap, ids: BlockIds, width: int | None = None) -> None:
        self._map, self._ids = blocks, ids
        now, device = blocks.width, blocks.table.device
        width = max(width or now, now)
        self._gained: list[int] = []
        self._lost: list[int] = []
        changed = {}
        for b, (old, new) in enumerate(zip_longest(blocks.ids, ids, fillvalue=())):
            for i, (before, after) in enumerate(zip_longest(old, new)):
                if before == after:
                    continue
                if after is not None:
                    self._gained.append(after)
                if before is not None:
                    self._lost.append(before)
                changed[b * width + i] = -1 if after is None else after
        self._table = None
        if len(ids) != len(blocks.ids) or width != now:
            self._table = _table(ids, width, device)
            return
        self._at = index_tensor(list(changed), device)
        self._entries = index_tensor(list(changed.values()), device, torch.int32)

    def commit(self) -> None:
        """Put them in; interrupted, the map and its table have them all the same."""
        self._map.pool.mark()
        carry_through(self._put)
        self._map.pool.recount(self._gained, self._lost)

    def _put(self) -> None:
        blocks = self._map
        if self._table is not None:
            blocks.table = self._table
        elif self._at.numel():
            blocks.table.view(-1).index_copy_(0, self._at, self._entries)
        blocks.ids = self._ids


def _table(ids: BlockIds, width: int, device: torch.device) -> Tensor:
    rows = [[*blocks, *[-1] * (width - len(blocks))] for blocks in ids]
    table = index_tensor(rows, device, torch.int32)
    return table if rows else table.reshape(0, width)
