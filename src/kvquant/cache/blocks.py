"""Blocks of tokens: who holds which (on the host, with reference counts), and their storage."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import CacheFullError
from ..formats import CacheFormat
from ..storage import LayerStorage

__all__ = ["BlockAllocator", "LayerPool", "Tables", "ceil_to", "index_tensor", "step_up"]

Pairs: TypeAlias = list[tuple[int, int]]


def ceil_to(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def step_up(now: int, least: int, unit: int) -> int:
    """The next size of something that grows: an eighth more, at least ``unit`` and ``least``."""
    return max(least, now + max(unit, now // 8))


class BlockAllocator:
    """Reference counts of blocks ``0 .. num_blocks - 1`` and a heap of free ones. Host only.

    The lowest free block is taken first, so that blocks at the end become free again and can be
    given up.

    Args:
        num_blocks: Blocks at the start, all free.
        limit: Most blocks there may be; None: any number.
    """

    def __init__(self, num_blocks: int, limit: int | None) -> None:
        self.limit = limit
        self._counts = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._shared = 0

    @property
    def any_shared(self) -> bool:
        """Whether a block is held more than once."""
        return self._shared > 0

    @property
    def num_blocks(self) -> int:
        """Blocks there are, free or held."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def size_for(self, wanted: int, name: str = "num_blocks") -> int:
        """How many blocks there must be for ``wanted`` free ones, within the limit.

        ``name``: the argument that asks for them.

        Raises:
            CacheFullError: The limit leaves no room.
        """
        now, missing = self.num_blocks, wanted - len(self._free)
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
        self._free += range(self.num_blocks, size)  # larger than all others: still a heap
        self._counts += [0] * (size - self.num_blocks)

    def shrink(self, size: int) -> None:
        """Give up free blocks at the end, as long as ``size`` are left."""
        now = self.num_blocks
        while now > size and not self._counts[now - 1]:
            now -= 1
        if now < self.num_blocks:
            del self._counts[now:]
            self._free = sorted(block for block in self._free if block < now)

    def take(self) -> int:
        """A free block, now held once. There must be one."""
        block = heapq.heappop(self._free)
        self._counts[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Hold each of ``blocks`` once more."""
        for block in blocks:
            self._counts[block] += 1
            self._shared += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Hold each of ``blocks`` once less; those that nobody holds are free again."""
        for block in blocks:
            self._counts[block] -= 1
            if self._counts[block]:
                self._shared -= 1
            else:
                heapq.heappush(self._free, block)

    def count(self, block: int) -> int:
        """How often ``block`` is held."""
        return self._counts[block]


class LayerPool:
    """The storage of all layers, which may lie under several caches at a time.

    Attributes:
        layers: A `LayerStorage` each.
        args: The same, as operations take it: (k_data, k_params, k_mean, v_data, v_params).
    """

    def __init__(self, layers: Iterable[LayerStorage]) -> None:
        self.layers = list(layers)
        self.args = [_as_args(storage) for storage in self.layers]

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        kv_heads: int,
        block_size: int,
        k_dim: int,
        v_dim: int,
        format: CacheFormat,
        device: torch.device,
    ) -> LayerPool:
        """Unwritten storage for every layer."""
        return cls(
            LayerStorage.allocate(
                num_blocks, kv_heads, block_size, k_dim, v_dim, format=format, device=device
            )
            for _ in range(num_layers)
        )

    @property
    def num_blocks(self) -> int:
        """Blocks that every layer has."""
        return min(storage.k_data.shape[0] for storage in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(storage.nbytes for storage in self.layers)

    def resize(
        self, layer: int, *, num_blocks: int | None = None, block_size: int | None = None
    ) -> None:
        """Move one layer to larger tensors: its old ones live until the copy is complete."""
        old = self.layers[layer]
        blocks, heads, size, k_dim = old.k_data.shape
        new = LayerStorage.allocate(
            num_blocks or blocks,
            heads,
            block_size or size,
            k_dim,
            old.v_data.shape[3],
            format=old.format,
            device=old.k_data.device,
        )
        for name, tensor in new.tensors.items():
            part = old.tensors[name]
            tensor[: part.shape[0], :, : part.shape[2]].copy_(part)
        self.layers[layer], self.args[layer] = new, _as_args(new)

    def selected(self, blocks: Sequence[int]) -> LayerPool:
        """A copy that holds ``blocks``, in that order."""
        return LayerPool(
            _replaced(
                storage,
                {
                    name: tensor.index_select(0, index_tensor(blocks, tensor.device))
                    for name, tensor in storage.tensors.items()
                },
            )
            for storage in self.layers
        )

    def copy_blocks(self, pairs: Pairs, rows: int | None = None) -> None:
        """Copy blocks (from, to) in every layer, as far as the first ``rows`` of each.

        No memory is asked for once the first block is written.
        """
        if not pairs:
            return
        device = self.layers[0].k_data.device
        source, target = (index_tensor([pair[i] for pair in pairs], device) for i in (0, 1))
        parts = [
            (name, tensor if name == "k_mean" else tensor[:, :, :rows])
            for storage in self.layers
            for name, tensor in storage.tensors.items()
        ]
        between: dict[tuple[str, int], Tensor] = {}
        for name, part in parts:
            if (name, part.shape[2]) not in between:
                between[name, part.shape[2]] = part.new_empty(len(pairs), *part.shape[1:])
        for name, part in parts:
            rows_between = between[name, part.shape[2]]
            torch.index_select(part, 0, source, out=rows_between)
            part.index_copy_(0, target, rows_between)


class Tables:
    """The blocks of each sequence of one cache: on the host, and as a tensor for the kernels.

    Attributes:
        owned: Blocks of each sequence, in the order of its tokens.
        device: int32 ``(batch, max_blocks)`` on the device; -1 where a sequence has no block. It is
            written in place unless it has to become wider, so that captured graphs see changes.
    """

    def __init__(
        self, owned: list[list[int]], width: int, allocator: BlockAllocator, device: torch.device
    ) -> None:
        self.owned = owned
        self.allocator = allocator
        self.device = self._on_device(owned, width, device)

    @property
    def width(self) -> int:
        """Most blocks of a sequence, as the tensor stands."""
        return self.device.shape[1]

    def plan(self, owned: list[list[int]], width: int | None = None) -> Callable[[], None]:
        """Prepare other blocks of all sequences; what is returned puts them in, and cannot fail.

        Counts of blocks are the caller's affair.
        """
        width, device = width or self.width, self.device.device
        if len(owned) != len(self.owned) or width != self.width:
            table = self._on_device(owned, width, device)

            def put() -> None:
                self.device = table
                self.owned[:] = owned

            return put
        changed = {
            b * width + i: new[i] if i < len(new) else -1
            for b, (old, new) in enumerate(zip(self.owned, owned, strict=True))
            if old != new
            for i in range(max(len(old), len(new)))
            if i >= len(old) or i >= len(new) or old[i] != new[i]
        }
        at = index_tensor(list(changed), device)
        blocks = index_tensor(list(changed.values()), device, torch.int32)

        def put_changes() -> None:
            if changed:
                self.device.view(-1).index_copy_(0, at, blocks)
            self.owned[:] = owned

        return put_changes

    def release(self) -> None:
        """Give all blocks back: the cache is gone."""
        for blocks in self.owned:
            self.allocator.release(blocks)
        self.owned.clear()

    @staticmethod
    def _on_device(owned: list[list[int]], width: int, device: torch.device) -> Tensor:
        rows = [blocks + [-1] * (width - len(blocks)) for blocks in owned]
        return index_tensor(rows, device, torch.int32)


def _as_args(storage: LayerStorage) -> tuple[Tensor | None, ...]:
    return (
        storage.k_data,
        storage.k_params,
        storage.k_mean,
        storage.v_data,
        storage.v_params,
    )


def _replaced(storage: LayerStorage, tensors: dict[str, Any]) -> LayerStorage:
    return replace(storage, **tensors)


def index_tensor(
    values: Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Integers on ``device``, without waiting for it."""
    index = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)
