"""One step's batch: whose tokens lie where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import INT32_MAX, check_flag, check_integer
from ..checks import check_index, check_slabs, check_table
from .specs import SeqsSpec, interned

__all__ = ["HostLengths", "Sequences"]


class HostLengths(NamedTuple):
    """What a batch's index tensors hold, where the host knows it exactly.

    Attributes:
        seq_lens: Tokens of each sequence, stored before the call.
        seq_starts: Its tokens of padding; None: of none.
        rows: The call's rows of each sequence, where they are packed.
    """

    seq_lens: tuple[int, ...]
    seq_starts: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Sequences:
    """One step's batch: whose tokens lie where. A cache has one a layer, an engine one a step.

    Sequence ``b``'s token ``t`` is row ``t % block_size`` of block
    ``block_table[b, t // block_size]``. What the tensors hold is read on the device alone: a block
    that is none, or a length past the table, leads nowhere, and rows without a place are dropped.

    Attributes:
        block_table: int32 ``(batch, max_blocks)``, contiguous rows.
        seq_lens: int32 ``(batch,)``: tokens stored before the call.
        seq_starts: int32 ``(batch,)``: tokens before it are padding and never seen.
        cu_seqlens_q: int32 ``(batch + 1,)``: where each sequence's packed rows begin.
        max_seqlen_q: With ``cu_seqlens_q``, a bound on the rows of one sequence; 0: their total.
        advance: The call adds its tokens to ``seq_lens``.
        young: With a format by age, uint8 ``(batch, num_kv_heads, CacheFormat.young_bytes(..))``:
            8-bit rows of the first and the newest tokens; see docs/by-age.md.
        on_host: What the tensors hold, taken at its word. Attention of long chunks on CUDA needs
            it, and reads the tensors back where it is not given.

    Raises:
        TypeError: An argument of another type or dtype.
        ValueError: Shapes or devices that do not belong together.
    """

    block_table: Tensor
    seq_lens: Tensor
    seq_starts: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 0
    advance: bool = False
    young: Tensor | None = None
    on_host: HostLengths | None = field(default=None, metadata={"is_flat": False})
    spec: SeqsSpec = field(init=False, repr=False)
    _twin: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        batch = check_table(self.block_table)
        device = self.block_table.device
        if self.seq_lens is None:
            raise TypeError("seq_lens: expected a tensor, got None")
        check_index("seq_lens", self.seq_lens, batch, device)
        check_index("seq_starts", self.seq_starts, batch, device)
        check_index("cu_seqlens_q", self.cu_seqlens_q, batch + 1, device)
        most = check_integer("max_seqlen_q", self.max_seqlen_q, 0, INT32_MAX)
        if most and self.cu_seqlens_q is None:
            raise ValueError(f"max_seqlen_q: only with cu_seqlens_q, got {most}")
        object.__setattr__(self, "max_seqlen_q", most)
        check_flag("advance", self.advance)
        if self.on_host is not None:
            _check_on_host(self.on_host, batch, self)
        if self.young is not None:
            check_slabs("young", self.young)
            if len(self.young) != batch or self.young.device != device:
                raise ValueError(
                    f"young: expected slabs of {batch} sequences on {device}, got shape "
                    f"{list(self.young.shape)} on {self.young.device}"
                )
        spec = SeqsSpec(
            batch, self.block_table.shape[1], self.cu_seqlens_q is not None,
            self.seq_starts is not None, most, self.advance, device,
            None if self.young is None else (self.young.shape[1], self.young.shape[2]),
        )  # fmt: skip
        object.__setattr__(self, "spec", interned(spec))
        object.__setattr__(self, "_twin", None)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.block_table.device

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.block_table, self.seq_lens, self.seq_starts, self.cu_seqlens_q)
        return Sequences, (*parts, self.max_seqlen_q, self.advance, self.young, self.on_host)


def _check_on_host(x: HostLengths, batch: int, seqs: Sequences) -> None:
    """As many lengths as sequences, and those that the batch has."""
    if not isinstance(x, HostLengths):
        raise TypeError(f"on_host: expected HostLengths, got {type(x).__name__}")
    for name, numbers, needed in (
        ("seq_lens", x.seq_lens, True),
        ("seq_starts", x.seq_starts, seqs.seq_starts is not None),
        ("rows", x.rows, seqs.cu_seqlens_q is not None),
    ):
        if (numbers is not None) != needed:
            raise ValueError(
                f"on_host.{name}: expected {'them' if needed else 'none'} with this batch, got "
                f"{numbers}"
            )
        if numbers is None:
            continue
        if not isinstance(numbers, tuple) or any(type(n) is not int for n in numbers):
            raise TypeError(f"on_host.{name}: expected a tuple of int, got {numbers!r}")
        if len(numbers) != batch or min(numbers, default=0) < 0:
            raise ValueError(
                f"on_host.{name}: expected {batch} numbers from 0 on, got {list(numbers)}"
            )
