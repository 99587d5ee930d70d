"""Decode steps in compiled code: a layer whose memory stays in place, written by an operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import CacheFullError, CacheView, Sequences, attention
from .batch import Batch
from .hosted import HostedLayer
from .support import NAME

__all__ = ["HANDOFF", "CompiledLayer", "Handoff"]


# The schema in words: torch 2.4 cannot read it off annotations that are strings.
@torch.library.custom_op(
    f"{NAME}::first_length", mutates_args=(), schema="(Tensor seq_lens) -> Tensor"
)
def _first_length(seq_lens: Tensor) -> Tensor:
    """The first of int32 (batch,) lengths as int64 (), at this point of the program.

    An operator, because Inductor moves a plain read into the kernels that need it, which may come
    behind the operator that advances the lengths.
    """
    return seq_lens[0].long()


@_first_length.register_fake
def _(seq_lens: Tensor) -> Tensor:
    return seq_lens.new_empty((), dtype=torch.int64)


class _Memory(NamedTuple):
    """What a step reads and writes: the very tensors of the storage, at addresses that stay."""

    view: CacheView
    seqs: Sequences


class Handoff:
    """What a cache leaves for the mask function and the attention function while code is traced.

    transformers calls both without the cache. All three calls are within one trace; before and
    after it nothing is here.

    Attributes:
        batch: Of the cache that a mask is being made for.
        layer: That has taken rows which no attention has asked for yet.
        key: The rows that it has handed on in their place: it is known by them.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.layer: CompiledLayer | None = None
        self.key: Tensor | None = None


HANDOFF = Handoff()


class CompiledLayer(HostedLayer):
    """Part of `KVQuantLayer`: what compiled code does with a layer, and what the host knows then.

    Compiled code reads no number that changes from step to step, or it would be compiled anew. It
    only notes that the host is behind; whoever asks for `length` next waits for the device.
    """

    batch: Batch
    is_compileable: bool
    is_narrow: bool
    max_cache_len: int | None
    sliding_window: int | None
    _length: int
    _is_behind: bool
    _asked: int
    _counted: int
    _memory: _Memory | None
    _pending: tuple[Tensor, Tensor] | None

    def _rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    # ------------------------------------------------------------------------------- on the host

    @property
    def length(self) -> int:
        """Tokens a sequence, padding among them. After compiled steps it waits for the device.

        Raises:
            CacheFullError: These have brought more than ``max_cache_len``.
        """
        if self._is_behind and self.storage is not None:
            self.storage.sync_lengths()
            self.length = self.storage.max_length
            if self.max_cache_len is not None and self._length > self.max_cache_len:
                raise CacheFullError(
                    f"max_cache_len: {self.max_cache_len} tokens a sequence, but compiled steps "
                    f"have brought {self._length}"
                )
        if self._counted != self.batch.replays:
            self._count_replays()
        return self._length

    @length.setter
    def length(self, tokens: int) -> None:
        self._length, self._is_behind, self._asked = tokens, False, 0
        self._counted = self.batch.replays

    def _count_replays(self) -> None:
        """Let the storage know of the tokens that graphs have appended."""
        new = self.batch.replays - self._counted
        self._counted += new
        self._length += new
        if self.storage is not None:
            self.storage.before_replay(new)

    def device_length(self) -> Tensor:
        """The length where the host need not know it: int64 ()."""
        assert self.storage is not None
        return self.storage.seq_lens[0].long()

    def expect_step(self) -> None:
        """Count a step that may come by compiled code; near the end of the memory, look.

        Raises:
            CacheFullError: A token more than ``max_cache_len``.
        """
        assert self.max_cache_len is not None
        self._asked += 1
        if self._length + self._asked > self.max_cache_len and self.length >= self.max_cache_len:
            raise CacheFullError(
                f"max_cache_len: {self.max_cache_len} tokens a sequence, but {self.length} are "
                "stored and 1 more came"
            )

    def refresh(self) -> None:
        """Look where the storage is now."""
        self.batch.is_settled = False
        if self._storage is None or not self.is_compileable:
            return
        view, seqs = self._storage.layer(0)
        if self._memory is None or self._memory.view is not view or self._memory.seqs is not seqs:
            self._memory = _Memory(view, seqs)
            batch = seqs.block_table, seqs.seq_lens, seqs.seq_starts, seqs.young
            for x in (*view.tensors.values(), *batch):
                if x is not None:
                    torch._dynamo.mark_static_address(x)

    # -------------------------------------------------------------------------- in compiled code

    def is_traced(self) -> bool:
        """Whether traced code goes on from the layer's memory as it is.

        Not while rows wait that `KVQuantLayer.update` brought and no attention took: the host has
        to store them first.
        """
        return (
            torch.compiler.is_compiling()
            and self.is_compileable
            and self._memory is not None
            and self._pending is None
        )

    def takes_traced(self) -> bool:
        """Whether traced code may take the layer's rows as they come."""
        return self.is_traced() and self.batch.masked and self.batch.is_plain

    def length_traced(self) -> Tensor:
        """The length on the device, int64 ()."""
        assert self._memory is not None
        length: Tensor = _first_length(self._memory.seqs.seq_lens)
        return length

    def take_traced(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take rows: the attention function finds them here."""
        HANDOFF.layer, HANDOFF.key = self, key
        self._is_behind, self.batch.is_settled = True, False
        return key, value

    def attend_traced(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        causal: bool,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """As `KVQuantLayer.attend`, by an operator that also appends and counts."""
        assert self._memory is not None
        assert self.max_cache_len is not None
        view, seqs = self._memory.view, self._memory.seqs
        if sliding_window is not None and sliding_window >= self.max_cache_len:
            sliding_window = None
        options: dict[str, Any] = {
            "softmax_scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "causal": causal,
            "sliding_window": sliding_window,
            "softcap": softcap,
        }
        if key.dtype is not value.dtype:  # torch.autocast
            dtype = torch.promote_types(key.dtype, value.dtype)
            key, value = key.to(dtype), value.to(dtype)
        out = attention(
            self._rows(query), view, self._rows(key), self._rows(value),
            block_table=seqs.block_table, seq_lens=seqs.seq_lens, seq_starts=seqs.seq_starts,
            sinks=None if sinks is None else sinks.detach().float().contiguous(),
            advance=True, young=seqs.young, **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        v_dim = value.shape[-1]
        return out if out.shape[-1] == v_dim else out[..., :v_dim]
