"""The sequences of a cache: what there is of them, and what generation does with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..arguments import (
    INT32_MAX,
    check_device,
    check_float_dtype,
    check_integer,
    require,
)
from ..checks import check_index
from ..formats import CacheFormat, LayerFormats
from ..plan import AnyPlan
from ..view import CacheView, Sequences
from . import rearrange, window
from .config import CacheConfig, check_layers
from .state import CacheState

__all__ = ["CacheSequences"]


class CacheSequences:
    """The part of `kvquant.QuantizedKVCache` that is not about new tokens."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        max_seq_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        format: LayerFormats | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | int | None = None,
    ) -> None:
        check_float_dtype("dtype", dtype)
        config = CacheConfig(
            num_layers=num_layers,
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else v_head_dim,
            max_seq_len=max_seq_len,
            block_size=block_size,
            num_blocks=num_blocks,
            formats=CacheFormat.of_layers(format, check_layers(num_layers)),
            device=check_device("device", device),
        )
        self.dtype = dtype
        self._adopt(CacheState.empty(config))

    def _adopt(self, state: CacheState) -> None:
        """Take what ``state`` holds."""
        old: CacheState | None = getattr(self, "_state", None)
        self._state = state
        self._known: dict[tuple[Any, ...], AnyPlan] = {}  # the last plan, by a call's options
        if old is not None:
            old.release()

    # ------------------------------------------------------------------------------- what there is

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._state.config.num_layers

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self._state.config.batch_size

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self._state.config.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self._state.config.head_dim

    @property
    def v_head_dim(self) -> int:
        """Channels of a value."""
        return self._state.config.v_head_dim

    @property
    def formats(self) -> tuple[CacheFormat, ...]:
        """How rows are stored, layer by layer."""
        return self._state.config.formats

    @property
    def format(self) -> CacheFormat:
        """How rows are stored, where all layers are alike.

        Raises:
            ValueError: They are not: see `formats`.
        """
        config = self._state.config
        require(config.is_uniform, "format: the layers are of several: formats has one per layer")
        return config.formats[0]

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self._state.config.device

    @property
    def block_size(self) -> int | None:
        """Tokens of a block; None: contiguous."""
        return self._state.config.block_size

    @property
    def capacity(self) -> int | None:
        """Most tokens of a sequence; None where only memory is the limit."""
        return self._state.config.capacity

    @property
    def max_length(self) -> int:
        """An upper bound of all lengths, known without asking the device."""
        return max(self._state.lengths.high)

    def max_length_of(self, layer: int) -> int:
        """An upper bound of a layer's lengths: the layers' differ in the middle of a step."""
        return self._state.lengths.high[self._check_layer(layer)]

    @property
    def seq_lens(self) -> Tensor:
        """Tokens of each sequence in layer 0: int32 ``(batch,)`` on the device."""
        return self._state.lengths.lens[0]

    def seq_lens_of(self, layer: int) -> Tensor:
        """Tokens of each sequence in a layer: int32 ``(batch,)`` on the device."""
        return self._state.lengths.lens[self._check_layer(layer)]

    @property
    def seq_starts(self) -> Tensor | None:
        """Padding tokens before each sequence: int32 ``(batch,)``, or None."""
        return self._state.seq_starts

    @property
    def block_table(self) -> Tensor:
        """Blocks of each sequence: int32 ``(batch, max_blocks)``; one if contiguous."""
        return self._state.blocks.table

    def layer(self, layer: int) -> tuple[CacheView, Sequences]:
        """A layer's memory and batch, until the cache grows: what `Plan.run` takes.

        A run that appends advances the lengths on the device only: call `sync_lengths` after it.
        """
        number = self._check_layer(layer)
        return self._state.view(number), self._state.seqs(number)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, tables and lengths; forks of a paged cache share the blocks' part."""
        state = self._state
        own = (state.blocks.table, state.lengths.seq_lens, *state.young)
        return state.memory.nbytes + sum(x.nbytes for x in own if x is not None)

    def __repr__(self) -> str:
        config = self._state.config
        kind = "contiguous" if self.block_size is None else f"blocks of {self.block_size}"
        return (
            f"QuantizedKVCache({config.num_layers} layers, {config.batch_size} sequences, "
            f"{config.num_kv_heads} heads of {config.head_dim}, {kind}, {self.max_length} of "
            f"{self.capacity or 'any'} tokens, {self.nbytes / 2**20:.1f} MiB on {config.device})"
        )

    def _check_layer(self, layer: int) -> int:
        number, count = check_integer("layer", layer), self.num_layers
        require(0 <= number < count, f"layer: expected 0 to {count - 1}, got {number}")
        return number

    # ---------------------------------------------------------------------------------- sequences

    def set_seq_starts(self, seq_starts: Tensor | None) -> None:
        """Say how many padding tokens precede each sequence: they are never seen.

        Args:
            seq_starts: int32 ``(batch,)``, copied; None: no padding.

        Raises:
            TypeError: Another dtype.
            ValueError: Another shape or device.
        """
        check_index("seq_starts", seq_starts, self.batch_size, self.device)
        self._state.set_starts(seq_starts)

    def reserve(self, tokens: int) -> None:
        """See to memory for ``tokens`` tokens a sequence in all layers, before a graph is captured.

        Where memory runs out, no block stays taken; layers that had grown by then stay as large.

        Raises:
            CacheFullError: More than the capacity.
        """
        self._state.reserve(check_integer("tokens", tokens, 0, INT32_MAX))

    def before_replay(self, tokens: int = 1) -> None:
        """Count ``tokens`` a sequence that the replay of a captured graph is about to append.

        Call it before each replay of a graph that appends to every layer: the host's bounds of the
        lengths stay true, and a cache that is full is refused. Blocks are taken, and shared ones
        copied, as `append` would; the tensors that the graph reads stay where they are if
        ``max_seq_len`` was given. Does not wait for the device.

        Raises:
            CacheFullError: No room; nothing was counted.
        """
        self._state.expect(check_integer("tokens", tokens, 0, INT32_MAX))

    def sync_lengths(self) -> None:
        """Read the lengths back from the device, after replays that were not counted before."""
        self._state.sync_lengths()

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens of each sequence, or drop the last ``-max_length``.

        A key mean stays: tokens that come again land in the group that they were in. Blocks that
        no token is left in are given back, reserved ones among them.
        """
        length, state = check_integer("max_length", max_length), self._state
        if state.window:
            longest = state.lengths.longest()
            kept = [max(0, n + length) if length < 0 else min(n, length) for n in longest]
            window.check_crop(state, kept)
        rearrange.crop(state, length)

    def slide(self, sliding_window: int, slack: int = 0) -> None:
        """Give back blocks that no later query with this ``sliding_window`` reads; paged only.

        Memory then grows with the window and not with the text. What is left of the last
        ``sliding_window + slack`` tokens can be attended to with a window of at most
        ``sliding_window``, and up to ``slack`` tokens can be cropped off again; `dequantize` gives
        zeros for the others, and such a cache cannot be saved. With a key mean at least one group
        of tokens is kept.

        Args:
            sliding_window: Of every later `attend`.
            slack: Tokens that `crop` may remove afterwards.

        Raises:
            ValueError: A contiguous cache, a number out of range.
        """
        sliding_window = check_integer("sliding_window", sliding_window, 1, INT32_MAX)
        slack = check_integer("slack", slack, 0, INT32_MAX)
        kept = window.kept(self._state, sliding_window)
        if self._state.window != kept:
            self._known.clear()  # plans with another window
        window.slide(self._state, kept, slack)

    def compact(self) -> None:
        """Move a paged cache to memory of as many blocks as it holds, if that is a tenth less.

        Both live until all is copied. Nothing is done where forks share the blocks.
        """
        if self.block_size is not None:
            state = window.compacted(self._state)
            if state is not None:
                self._adopt(state)

    def reset(self) -> None:
        """Forget all tokens and the padding; the memory stays."""
        rearrange.reset(self._state)

    def reorder(self, indices: Tensor | Iterable[int]) -> None:
        """Let sequence ``b`` continue what ``indices[b]`` was (beam search), in place.

        Paged: blocks are shared until one is written. Contiguous: sequences that appear again are
        copied over those that don't appear.

        Args:
            indices: One a sequence; any may appear again.

        Raises:
            ValueError: Another number of indices, or one out of range.
        """
        chosen = self._indices(indices)
        require(
            len(chosen) == self.batch_size,
            f"indices: expected {self.batch_size}, got {len(chosen)}",
        )
        rearrange.reorder(self._state, chosen)

    def select(self, indices: Tensor | Iterable[int]) -> None:
        """Keep the sequences ``indices``, in that order; any number of them, any repeated.

        Contiguous: into new tensors; the old ones live until all is copied.

        Raises:
            ValueError: No index, or one out of range.
        """
        self._adopt(rearrange.fork(self._state, self._indices(indices)))

    def repeat_interleave(self, repeats: int) -> None:
        """Let ``repeats`` sequences follow from each, side by side.

        Raises:
            ValueError: Not a positive number.
        """
        repeats = check_integer("repeats", repeats, 1, INT32_MAX // self.batch_size)
        self.select([b for b in range(self.batch_size) for _ in range(repeats)])

    def fork(self) -> Self:
        """An independent cache with the same tokens.

        Paged: both share blocks until one writes to them, in one stream. Contiguous: a copy.
        """
        return self._of(rearrange.fork(self._state, list(range(self.batch_size))), self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    @classmethod
    def _of(cls, state: CacheState, dtype: torch.dtype) -> Self:
        new = cls.__new__(cls)
        new.dtype = dtype
        new._adopt(state)
        return new

    def _indices(self, indices: Tensor | Iterable[int]) -> list[int]:
        if isinstance(indices, Tensor):
            require(
                indices.dim() == 1
                and not indices.is_floating_point()
                and not indices.is_complex()
                and indices.dtype != torch.bool
                and not indices.is_meta,
                f"indices: expected a vector of integers, got {indices.dtype}, shape "
                f"{list(indices.shape)}",
            )
            indices = indices.tolist()
        elif not isinstance(indices, Iterable):
            raise TypeError(f"indices: expected integers, got {type(indices).__name__}")
        chosen = [check_integer("indices", i, 0, self.batch_size - 1) for i in indices]
        require(bool(chosen), "indices: expected at least one")
        return chosen
