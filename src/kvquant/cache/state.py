"""What a cache holds: storage, tables, lengths, and the host's bounds on the lengths."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CacheFullError
from .blocks import BlockAllocator, LayerPool, Tables, ceil_to, index_tensor, step_up
from .config import CacheConfig

__all__ = ["CacheState"]

_ROWS = 256  # a contiguous layer grows by as many tokens at least

# For what makes tensors: those made within torch.inference_mode() could not be written outside.
_normal = torch.inference_mode(mode=False)


class CacheState:
    """Storage, tables, lengths and bounds of one cache.

    The device knows the lengths; the host knows an upper bound of each, so that no call waits for
    the device. A contiguous sequence is one block whose size is the layer's capacity.

    Attributes:
        seq_lens: int32 ``(num_layers, batch)`` on the device.
        lens: Its rows.
        high: The largest bound of each layer.
        room: Tokens that a layer takes, for every sequence, before `make_room` has to see to it.
    """

    def __init__(
        self,
        config: CacheConfig,
        pool: LayerPool,
        allocator: BlockAllocator,
        owned: list[list[int]],
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        bounds: list[list[int]],
        width: int,
    ) -> None:
        self.config, self.pool, self.allocator = config, pool, allocator
        self.seq_starts = seq_starts
        self.tables = Tables(owned, width, allocator, config.device)
        self.inexact = False  # a bound may be above its length
        self.may_share = allocator.any_shared  # a block that an append writes may be another's too
        self.high: list[int] = []
        self._lag: list[list[int]] = []
        self.room: list[int] = []
        self._set_lens(seq_lens)
        self.set_bounds(bounds)
        weakref.finalize(self, Tables.release, self.tables).atexit = False

    @classmethod
    @_normal
    def empty(cls, config: CacheConfig, *, allocate: bool = True) -> CacheState:
        """A cache without tokens, its capacity allocated or left to growth."""
        paged, capacity = config.block_size, config.capacity
        share = config.pool_share
        if allocate:
            blocks, size = share, paged or (16 if capacity is None else capacity)
        else:
            blocks, size = (0, paged) if paged else (share, 0)
        pool = LayerPool.allocate(
            config.num_layers,
            blocks,
            config.kv_heads,
            size,
            config.k_dim,
            config.v_dim,
            config.format,
            config.device,
        )
        allocator = BlockAllocator(blocks, None if capacity is None and paged else share)
        batch = config.batch_size
        owned: list[list[int]] = [[] if paged else [allocator.take()] for _ in range(batch)]
        width = min((capacity or paged) // paged, max(1, share)) if paged and allocate else 1
        shape = config.num_layers, batch
        seq_lens = torch.zeros(shape, dtype=torch.int32, device=config.device)
        bounds = [[0] * batch for _ in range(config.num_layers)]
        return cls(config, pool, allocator, owned, seq_lens, None, bounds, width)

    # ------------------------------------------------------------------------------------- bounds

    def _set_lens(self, seq_lens: Tensor) -> None:
        self.seq_lens = seq_lens
        self.lens = list(seq_lens.unbind(0))

    def bounds(self, layer: int) -> list[int]:
        """No sequence of the layer is longer."""
        high = self.high[layer]
        return [high - lag for lag in self._lag[layer]]

    def set_bounds(self, bounds: list[list[int]]) -> None:
        """Replace the bounds of every layer."""
        self.high = [max(of_layer) for of_layer in bounds]
        self._lag = [[max(of_layer) - n for n in of_layer] for of_layer in bounds]
        self._refresh_room()

    def add(self, layer: int, counts: list[int]) -> None:
        """Count new tokens of a ragged call."""
        bounds = [n + new for n, new in zip(self.bounds(layer), counts, strict=True)]
        high = self.high[layer] = max(bounds)
        self._lag[layer] = [high - n for n in bounds]
        self._refresh_room(layer)

    def mark(self, layer: int) -> tuple[int, list[int]]:
        """For `undo`."""
        return self.high[layer], self._lag[layer]

    def undo(self, layer: int, mark: tuple[int, list[int]], added: int | Tensor, most: int) -> None:
        """Take back an append of ``added`` tokens (or by offsets of packed rows) since ``mark``."""
        counts = added if isinstance(added, int) else added.diff().clamp(0, most)
        self.lens[layer].sub_(counts)
        self.high[layer], self._lag[layer] = mark
        self._refresh_room(layer)

    def sync_lengths(self) -> None:
        """Read the lengths back: the bounds are exact then."""
        self.set_bounds(self.seq_lens.tolist())
        self.inexact = False

    def settle(self) -> None:
        """Exact bounds, for methods that may wait for the device anyway."""
        if self.config.device.type != "cpu" and not _capturing(self.config.device):
            self.sync_lengths()

    def _refresh_room(self, layer: int | None = None) -> None:
        layers = range(self.config.num_layers) if layer is None else (layer,)
        if layer is None:
            self.room = [-1] * len(layers)
        size = self.config.block_size
        for i in layers:
            storage = self.pool.layers[i]
            if size is None:
                self.room[i] = storage.block_size - self.high[i]
            elif self.may_share or storage.k_data.shape[0] < self.allocator.num_blocks:
                self.room[i] = -1  # a block may have to be copied, or the layer to grow
            else:
                held = zip(self.tables.owned, self.bounds(i), strict=True)
                self.room[i] = min(len(blocks) * size - n for blocks, n in held)

    # --------------------------------------------------------------------------------------- room

    def make_room(self, layer: int, counts: list[int], name: str = "key") -> None:
        """See to room for ``counts`` more tokens in a layer, which the argument ``name`` brings.

        Raises:
            CacheFullError: There is none; nothing changed.
            RuntimeError: Tensors would have to change while a CUDA graph is captured.
        """
        try:
            self._make_room(layer, counts, name)
        except CacheFullError:
            if not self.inexact or _capturing(self.config.device):
                raise
            self.sync_lengths()  # the bounds may have been too high
            self._make_room(layer, counts, name)

    @_normal
    def _make_room(self, layer: int, counts: list[int], name: str) -> None:
        ends = [n + new for n, new in zip(self.bounds(layer), counts, strict=True)]
        most, capacity = max(ends), self.config.capacity
        if capacity is not None and most > capacity:
            raise CacheFullError(
                f"{name}: layer {layer} would hold {most} tokens a sequence, but the cache takes "
                f"{capacity}"
            )
        if self.config.block_size is not None:
            self._make_block_room(layer, ends, name)
        elif most > (now := self.pool.layers[layer].block_size):
            self._refuse_in_capture()
            size = ceil_to(step_up(now, most, _ROWS) if now else most, 16)
            self.pool.resize(layer, block_size=size if capacity is None else min(size, capacity))
        self._refresh_room(None if self.config.block_size is not None else layer)

    def _make_block_room(self, layer: int, ends: list[int], name: str) -> None:
        size, owned, allocator = self.config.block_size or 1, self.tables.owned, self.allocator
        missing = [
            max(0, -(-n // size) - len(blocks)) for n, blocks in zip(ends, owned, strict=True)
        ]
        copies = self._shared_tails() if self.may_share else []
        here = self.pool.layers[layer].k_data.shape[0]
        if copies or any(missing):
            self._refuse_in_capture()
            blocks = allocator.size_for(sum(missing) + len(copies), name)
        elif here < allocator.num_blocks:  # another layer has grown: as far as this one's tokens go
            held = (ids[: -(-n // size)] for n, ids in zip(ends, owned, strict=True))
            least = 1 + max((max(ids) for ids in held if ids), default=-1)
            blocks = min(step_up(here, least, 1), allocator.num_blocks) if here < least else here
        else:
            blocks = here
        for i in self._layers if copies else (layer,):
            if self.pool.layers[i].k_data.shape[0] < blocks:
                self._refuse_in_capture()
                self.pool.resize(i, num_blocks=blocks)
        allocator.grow(blocks)
        if copies or any(missing):
            new = [list(blocks) for blocks in owned]
            pairs = []
            for b, i in copies:
                pairs.append((new[b][i], allocator.take()))
                new[b][i] = pairs[-1][1]
            fresh = [[allocator.take() for _ in range(n)] for n in missing]
            width = max(len(have) + len(more) for have, more in zip(new, fresh, strict=True))
            try:
                rows = [have + more for have, more in zip(new, fresh, strict=True)]
                now = self.tables.width
                put = self.tables.plan(rows, now if width <= now else step_up(now, width, 4))
                self.pool.copy_blocks(pairs)
                put()
            except BaseException:
                allocator.release(block for _, block in pairs)
                allocator.release(block for more in fresh for block in more)
                raise
            allocator.release(block for block, _ in pairs)
        self.may_share = False

    def _shared_tails(self) -> list[tuple[int, int]]:
        """(sequence, index) of held blocks that an append may write and that others read."""
        size = self.config.block_size or 1
        counts: dict[int, int] = {}
        tails = []
        for b, blocks in enumerate(self.tables.owned):
            shortest = min(high - lag[b] for high, lag in zip(self.high, self._lag, strict=True))
            for i in range(shortest // size, len(blocks)):
                count = counts.get(blocks[i], self.allocator.count(blocks[i]))
                if count > 1:
                    tails.append((b, i))
                    counts[blocks[i]] = count - 1
        return tails

    def reserve(self, tokens: int) -> None:
        """See to memory for ``tokens`` tokens a sequence in every layer."""
        held = [len(blocks) for blocks in self.tables.owned]
        try:
            for layer in self._layers:
                more = [max(0, tokens - n) for n in self.bounds(layer)]
                self.make_room(layer, more, "tokens")
        except BaseException:
            owned = zip(self.tables.owned, held, strict=True)
            self._give_back([blocks[:count] for blocks, count in owned])
            self._refresh_room()
            raise

    def _give_back(self, kept: list[list[int]]) -> None:
        """Release the blocks of each sequence behind those that it keeps."""
        dropped = [
            block
            for blocks, keep in zip(self.tables.owned, kept, strict=True)
            for block in blocks[len(keep) :]
        ]
        if dropped:
            self._refuse_in_capture()
            self.tables.plan(kept)()
            self.allocator.release(dropped)
            self.allocator.shrink(self.pool.num_blocks)
        self.may_share = self.allocator.any_shared

    def _refuse_in_capture(self) -> None:
        if _capturing(self.config.device):
            raise RuntimeError(
                "the cache has to make room while a CUDA graph is captured: call reserve() first"
            )

    # ---------------------------------------------------------------------------------- sequences

    def _live(self, lengths: list[int]) -> list[list[int]]:
        """The blocks that the first ``lengths`` tokens of each sequence take."""
        size = self.config.block_size
        if size is None:
            return [list(blocks) for blocks in self.tables.owned]
        held = zip(self.tables.owned, lengths, strict=True)
        return [blocks[: -(-n // size)] for blocks, n in held]

    def _longest(self) -> list[int]:
        """The bound of each sequence over all layers."""
        return [max(of_layers) for of_layers in zip(*map(self.bounds, self._layers), strict=True)]

    @property
    def _layers(self) -> range:
        return range(self.config.num_layers)

    def crop(self, length: int) -> None:
        """Keep ``length`` tokens of each sequence, or remove ``-length``."""
        length = max(-(2**31) + 1, min(length, 2**31 - 1))  # lengths are int32
        if self.config.block_size is not None and self.inexact:
            self.settle()
        if length < 0:
            bounds = [[max(0, n + length) for n in self.bounds(i)] for i in self._layers]
        else:
            bounds = [[min(n, length) for n in self.bounds(i)] for i in self._layers]
        kept = self._live([max(of_layers) for of_layers in zip(*bounds, strict=True)])
        self._give_back(kept)
        if length < 0:
            self.seq_lens.add_(length).clamp_(min=0)
        else:
            self.seq_lens.clamp_(max=length)
        self.set_bounds(bounds)

    @_normal
    def fork(self, indices: list[int]) -> CacheState:
        """A state with the sequences ``indices``: blocks are shared, or copied if contiguous."""
        self.settle()
        config = replace(self.config, batch_size=len(indices))
        device = config.device
        at = index_tensor(indices, device)
        seq_lens = self.seq_lens.index_select(1, at)
        starts = None if self.seq_starts is None else self.seq_starts.index_select(0, at)
        bounds = [[of_layer[i] for i in indices] for of_layer in map(self.bounds, self._layers)]
        live = self._live(self._longest())
        owned = [list(live[i]) for i in indices]
        if config.block_size is None:
            pool = self.pool.selected([blocks[0] for blocks in owned])
            allocator = BlockAllocator(len(indices), len(indices))
            owned, width = [[allocator.take()] for _ in indices], 1
            return CacheState(config, pool, allocator, owned, seq_lens, starts, bounds, width)
        allocator, width = self.allocator, self.tables.width
        for blocks in owned:
            allocator.share(blocks)
        try:
            state = CacheState(config, self.pool, allocator, owned, seq_lens, starts, bounds, width)
        except BaseException:
            for blocks in owned:
                allocator.release(blocks)
            raise
        if allocator.limit is not None and config.num_blocks is None:
            allocator.limit += config.pool_share
        self.may_share = True
        self._refresh_room()
        return state

    def reorder(self, indices: list[int]) -> None:
        """Let sequence ``b`` be what ``indices[b]`` was, in place; as many sequences as before."""
        self.settle()
        bounds = [[of_layer[i] for i in indices] for of_layer in map(self.bounds, self._layers)]
        live = self._live(self._longest())
        owned, before = [list(live[i]) for i in indices], [list(x) for x in self.tables.owned]
        at = index_tensor(indices, self.config.device)
        seq_lens = self.seq_lens.index_select(1, at)
        starts = None if self.seq_starts is None else self.seq_starts.index_select(0, at)
        if self.config.block_size is None:
            spare = [blocks[0] for i, blocks in enumerate(before) if i not in indices]
            pairs, taken = [], set()
            for blocks in owned:
                if blocks[0] in taken:
                    pairs.append((blocks[0], spare.pop()))
                    blocks[0] = pairs[-1][1]
                taken.add(blocks[0])
            put = self.tables.plan(owned)
            self.pool.copy_blocks(pairs, max(self.high))
            put()
        else:
            self.tables.plan(owned)()
            for blocks in owned:
                self.allocator.share(blocks)
            for blocks in before:
                self.allocator.release(blocks)
            self.may_share = True
        self.seq_lens.copy_(seq_lens)
        if self.seq_starts is not None and starts is not None:
            self.seq_starts.copy_(starts)
        self.set_bounds(bounds)

    @_normal
    def set_starts(self, starts: Tensor | None) -> None:
        """Take other numbers of padding tokens, in place where there are some."""
        if starts is None:
            self.seq_starts = None
        elif self.seq_starts is None:
            self.seq_starts = torch.empty_like(starts).copy_(starts)
        else:
            self.seq_starts.copy_(starts)

    def reset(self) -> None:
        """No tokens; the memory stays."""
        self.crop(0)
        self.seq_starts = None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
