"""The parts of a cache together: lengths, blocks and memory; room for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CacheFullError
from ..formats import SPARE_TOKENS
from ..view import CacheView, HostLengths, Sequences
from .blocks import BlockIds, BlockMap, BlockPool, Change, ceil_to, step_up
from .config import CacheConfig
from .lengths import Lengths, is_capturing
from .memory import LayerMemory
from .young import allocate as allocate_young

__all__ = ["CacheState", "normal"]

_ROWS = 256  # a contiguous layer grows by as many tokens at least

# For what makes tensors: those made within torch.inference_mode() could not be written outside.
normal = torch.inference_mode(mode=False)


class CacheState:
    """Memory, blocks and lengths of one cache.

    A contiguous sequence is one block whose size is the layer's capacity. Whatever can be refused,
    or can run out of memory, comes before the first change.

    Attributes:
        room: Tokens that a layer takes, for every sequence, before `make_room` has to see to it.
        young: Each layer's slabs of young rows, ``(batch, heads, bytes)``; None: not by age.
        may_share: A block that an append writes may be held by others, too.
        most_at_once: New tokens that a layer's attention takes in one call whatever the groups.
        kinds: The same number for layers of the same format.
    """

    def __init__(
        self,
        config: CacheConfig,
        memory: LayerMemory,
        pool: BlockPool,
        ids: BlockIds,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        bounds: list[list[int]],
        width: int,
        young: list[Tensor | None],
    ) -> None:
        self.young = young
        self.most_at_once = [2**31 if slab is None else SPARE_TOKENS for slab in young]
        self.kinds = [config.formats.index(format) for format in config.formats]
        self.config, self.memory, self.pool = config, memory, pool
        self.seq_starts = seq_starts
        self.window = 0  # tokens before a sequence's end that are kept at least; 0: all of them
        self.lengths = Lengths(seq_lens, bounds)
        self._seqs: list[Sequences | None] = [None] * config.num_layers
        self.room = [-1] * config.num_layers
        self.blocks = BlockMap(ids, width, pool, config.device)
        self.may_share = bool(self.shared_tails())
        self.refresh_room()

    @classmethod
    @normal
    def empty(cls, config: CacheConfig, *, allocate: bool = True) -> CacheState:
        """A cache without tokens, its capacity allocated or left to growth."""
        paged, capacity = config.block_size, config.capacity
        share = config.pool_share
        if allocate:
            blocks, size = share, paged or (16 if capacity is None else capacity)
        else:
            blocks, size = (0, paged) if paged else (share, 0)
        memory = LayerMemory.allocate(
            config.formats, blocks, config.num_kv_heads, size, config.head_dim, config.v_head_dim,
            config.device,
        )  # fmt: skip
        pool = BlockPool(blocks, None if capacity is None and paged else share)
        batch = config.batch_size
        ids: BlockIds = tuple(() if paged else (b,) for b in range(batch))
        width = min((capacity or paged) // paged, max(1, share)) if paged and allocate else 1
        seq_lens = torch.zeros(config.num_layers, batch, dtype=torch.int32, device=config.device)
        bounds = [[0] * batch for _ in range(config.num_layers)]
        return cls(config, memory, pool, ids, seq_lens, None, bounds, width, allocate_young(config))

    # ------------------------------------------------------------------------------ what calls take

    @property
    def layers(self) -> range:
        """The layers' numbers."""
        return range(self.config.num_layers)

    def view(self, layer: int) -> CacheView:
        """A layer's memory, until it grows."""
        return self.memory.views[layer]

    def seqs(self, layer: int) -> Sequences:
        """A layer's batch, whose lengths its calls advance."""
        found = self._seqs[layer]
        if (
            found is None
            or found.block_table is not self.blocks.table
            or found.seq_starts is not self.seq_starts
        ):
            found = Sequences(
                self.blocks.table, self.lengths.lens[layer], self.seq_starts, advance=True,
                young=self.young[layer],
            )  # fmt: skip
            self._seqs[layer] = found
        return found

    def told(self, layer: int, seqs: Sequences, rows: Sequence[int] | None) -> Sequences:
        """A layer's batch with the lengths that the host knows, where it knows them exactly.

        ``rows``: the call's of each sequence, where they are packed and known.
        """
        is_packed = seqs.cu_seqlens_q is not None
        if self.lengths.stale or self.seq_starts is not None or is_packed != (rows is not None):
            return seqs
        known = HostLengths(
            tuple(self.lengths.bounds(layer)), None, None if rows is None else tuple(rows)
        )
        return replace(seqs, on_host=known)

    # ------------------------------------------------------------------------------------- lengths

    def sync_lengths(self) -> None:
        """Read the lengths back: the bounds are exact then."""
        self.room = [-1] * len(self.room)
        self.lengths.sync()
        self.refresh_room()

    def settle(self) -> None:
        """Exact bounds, for methods that may wait for the device anyway."""
        device = self.config.device
        if (self.lengths.stale or device.type != "cpu") and not is_capturing(device):
            self.sync_lengths()

    def refresh_room(self, layer: int | None = None) -> None:
        """Work out how much room there is."""
        size, lengths = self.config.block_size, self.lengths
        for i in self.layers if layer is None else (layer,):
            view = self.memory.views[i]
            if size is None:
                self.room[i] = view.block_size - lengths.high[i]
            elif self.may_share or view.num_blocks < self.pool.num_blocks:
                self.room[i] = -1  # a block may have to be copied, or the layer to grow
            else:
                held = zip(self.blocks.ids, lengths.bounds(i), strict=True)
                self.room[i] = min(len(blocks) * size - n for blocks, n in held)

    # --------------------------------------------------------------------------------------- room

    def make_room(self, layer: int, counts: Sequence[int], name: str = "key") -> None:
        """See to room for ``counts`` more tokens in a layer, which the argument ``name`` brings.

        Raises:
            CacheFullError: There is none; nothing changed.
            RuntimeError: Tensors would have to change while a CUDA graph is captured.
        """
        try:
            self._make_room(layer, counts, name)
        except CacheFullError:
            if not self.lengths.stale or is_capturing(self.config.device):
                raise
            self.sync_lengths()  # the bounds may have been too high
            self._make_room(layer, counts, name)

    @normal
    def _make_room(self, layer: int, counts: Sequence[int], name: str) -> None:
        bounds = self.lengths.bounds(layer)
        ends = [n + new for n, new in zip(bounds, counts, strict=True)]
        most, capacity = max(ends), self.config.capacity
        if capacity is not None and most > capacity:
            raise CacheFullError(
                f"{name}: layer {layer} would hold {most} tokens a sequence, but the cache takes "
                f"{capacity}"
            )
        if self.config.block_size is not None:
            with self.pool.changing():
                self._make_block_room(layer, ends, name)
            self.may_share = False
        elif most > (now := self.memory.views[layer].block_size):
            self.refuse_in_capture()
            size = ceil_to(step_up(now, most, _ROWS) if now else most, 16)
            self.memory.resize(layer, block_size=size if capacity is None else min(size, capacity))
        self.refresh_room(None if self.config.block_size is not None else layer)

    def _make_block_room(self, layer: int, ends: list[int], name: str) -> None:
        size, ids, pool = self.config.block_size or 1, self.blocks.ids, self.pool
        missing = [max(0, -(-n // size) - len(blocks)) for n, blocks in zip(ends, ids, strict=True)]
        copies = self.shared_tails() if self.may_share else []
        here, there = self.memory.views[layer].num_blocks, pool.num_blocks
        if copies or any(missing):
            self.refuse_in_capture()
            blocks = pool.size_for(sum(missing) + len(copies), name)
        elif here < there:  # another layer has grown: as far as this one's tokens go
            held = (of[: -(-n // size)] for n, of in zip(ends, ids, strict=True))
            least = 1 + max((max(of) for of in held if of), default=-1)
            blocks = min(step_up(here, least, 1), there) if here < least else here
        else:
            blocks = here
        for i in self.layers if copies else (layer,):
            if self.memory.views[i].num_blocks < blocks:
                self.refuse_in_capture()
                self.memory.resize(i, num_blocks=blocks)
        pool.grow(blocks)
        if copies or any(missing):
            new = [list(of) for of in ids]
            pairs = []
            for b, i in copies:
                pairs.append((new[b][i], pool.take()))
                new[b][i] = pairs[-1][1]
            for of, more in zip(new, missing, strict=True):
                of += [pool.take() for _ in range(more)]
            width, now = max(map(len, new)), self.blocks.width
            change = Change(
                self.blocks,
                tuple(map(tuple, new)),
                now if width <= now else step_up(now, width, 4),
            )
            self.memory.copy_blocks(pairs)
            change.commit()

    def shared_tails(self) -> list[tuple[int, int]]:
        """(sequence, index) of held blocks that an append may write and that others read."""
        size = self.config.block_size or 1
        counts: dict[int, int] = {}
        tails = []
        for b, blocks in enumerate(self.blocks.ids):
            for i in range(self.lengths.shortest(b) // size, len(blocks)):
                count = counts.get(blocks[i], self.pool.count(blocks[i]))
                if count > 1:
                    tails.append((b, i))
                    counts[blocks[i]] = count - 1
        return tails

    def reserve(self, tokens: int) -> None:
        """See to memory for ``tokens`` tokens a sequence in every layer."""
        held = [len(blocks) for blocks in self.blocks.ids]
        try:
            for layer in self.layers:
                more = [max(0, tokens - n) for n in self.lengths.bounds(layer)]
                self.make_room(layer, more, "tokens")
        except BaseException:
            ids = zip(self.blocks.ids, held, strict=True)
            self._give_back(tuple(blocks[:count] for blocks, count in ids))
            self.refresh_room()
            raise

    def expect(self, tokens: int) -> None:
        """See to room for ``tokens`` more in every layer, and raise the bounds by them."""
        counts = [tokens] * self.config.batch_size
        for layer in self.layers:
            if self.room[layer] < tokens or self.pool.is_shared:
                self.make_room(layer, counts, "tokens")
        self.lengths.stale = True  # a replay that does not come leaves them too high
        for layer in self.layers:
            self.room[layer] -= tokens
            self.lengths.high[layer] += tokens

    def _give_back(self, kept: BlockIds) -> None:
        """Release the blocks of each sequence behind those that it keeps."""
        with self.pool.changing():
            if kept != self.blocks.ids:
                self.refuse_in_capture()
                self.room = [-1] * len(self.room)
                Change(self.blocks, kept).commit()
                self.pool.shrink(self.memory.num_blocks)

    def refuse_in_capture(self) -> None:
        """Raise where tensors would have to change while a CUDA graph is captured."""
        if is_capturing(self.config.device):
            raise RuntimeError(
                "the cache has to make room while a CUDA graph is captured: call reserve() first"
            )

    # ---------------------------------------------------------------------------------- sequences

    def live(self, lengths: list[int]) -> BlockIds:
        """The blocks that the first ``lengths`` tokens of each sequence take."""
        size = self.config.block_size
        if size is None:
            return self.blocks.ids
        held = zip(self.blocks.ids, lengths, strict=True)
        return tuple(blocks[: -(-n // size)] for blocks, n in held)

    @normal
    def set_starts(self, starts: Tensor | None) -> None:
        """Take other numbers of padding tokens, in place where there are some."""
        if starts is None:
            self.seq_starts = None
        elif self.seq_starts is None:
            self.seq_starts = torch.empty_like(starts).copy_(starts)
        elif starts is not self.seq_starts:
            self.seq_starts.copy_(starts)

    def release(self) -> None:
        """Give all blocks back at once: a traceback somewhere may keep the state alive."""
        self.blocks.release()
