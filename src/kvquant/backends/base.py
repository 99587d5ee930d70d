"""What a backend is, and what an attention call is chosen by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..view import CacheView, Options, SeqsSpec, Sequences, ViewSpec

__all__ = [
    "Backend",
    "Look",
    "Outputs",
    "Prepared",
    "Problem",
    "aligned",
    "is_contiguous",
    "look_of",
]

_ALIGNMENT = 16  # bytes


class Look(NamedTuple):
    """What a choice may depend on in a tensor of rows."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def is_contiguous(look: Look) -> bool:
    """Whether rows that look so are contiguous; what a dimension of one steps does not matter."""
    return all(
        n == 1 or step == look.shape[i + 1 :].numel()
        for i, (n, step) in enumerate(zip(look.shape, look.strides, strict=True))
    )


def look_of(x: Tensor, any_total: bool = False) -> Look:
    """How a tensor looks; ``any_total``: of packed rows, in any number."""
    shape = torch.Size((-1, *x.shape[1:])) if any_total else x.shape
    return Look(shape, x.stride(), x.dtype, x.device)


def aligned(x: Tensor) -> Tensor:
    """Rows as torch's attention kernels on CUDA take them; a copy, if need be.

    They ask neither for alignment (torch 2.11: the one for float32 reads misaligned rows, and the
    device is lost) nor whether rows share their memory (cuDNN 9.19 makes no output like them).
    """
    if not x.is_cuda:
        return x
    places = x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1])
    if all(places) and not any(place % _ALIGNMENT for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Problem(NamedTuple):
    """An attention call as numbers. Packed rows' first size is -1: a plan serves any total."""

    query: Look
    key: Look | None
    value: Look | None
    view: ViewSpec
    seqs: SeqsSpec
    options: Options
    max_seqlen_q: int  # rows of a sequence, packed: a bound on them
    sinks: bool
    alibi_slopes: bool
    lse: bool
    exact: bool


class Outputs:
    """What a call writes into, where its caller gives nothing."""

    def __init__(self, problem: Problem) -> None:
        self._dim, self._wants_lse = problem.view.v_head_dim, problem.lse
        self._is_packed = problem.seqs.is_packed
        # The fastest of torch's ways to the right tensor, where that is what it gives.
        self._is_alike = (
            not self._is_packed
            and self._dim == problem.view.head_dim
            and is_contiguous(problem.query)
        )

    def new_out(self, query: Tensor) -> Tensor:
        """A new output; packed rows of no sequence are zero in it."""
        if self._is_alike:
            return torch.empty_like(query)
        shape = (*query.shape[:-1], self._dim)
        return query.new_zeros(shape) if self._is_packed else query.new_empty(shape)

    def of(
        self, query: Tensor, out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The caller's, or new ones."""
        if out is None:
            out = self.new_out(query)
        if self._wants_lse and lse is None:
            lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        return out, lse


class Prepared(ABC):
    """A call that is ready to run on tensors that look as planned.

    Attributes:
        backend: Who runs it.
        regime: Which of the backend's kernels.
        details: More to know about it, by name.
        reads_lengths: It needs the batch's lengths on the host: see `Sequences.on_host`.
    """

    backend: str
    regime: str
    details: dict[str, Any]
    reads_lengths: bool = False

    @abstractmethod
    def launch(
        self,
        query: Tensor,
        view: CacheView,
        seqs: Sequences,
        key: Tensor | None,
        value: Tensor | None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append the keys and values, if any, and attend; the output, and the lse if planned."""


class Backend(ABC):
    """The operations on one kind of device. Arguments are checked, outputs allocated."""

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, device: torch.device, view: ViewSpec | None = None) -> str | None:
        """Why it cannot serve tensors on ``device``, and such a view if one is given, or None."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Prepared | str:
        """Ready for a problem, or why another backend has to serve it.

        Raises:
            ValueError: An option that no kernel can honour.
        """

    @abstractmethod
    def append(
        self,
        key: Tensor,
        value: Tensor,
        view: CacheView,
        seqs: Sequences | None,
        slot_mapping: Tensor | None,
    ) -> None:
        """Quantize rows into the cache, behind ``seqs`` or by slots."""

    @abstractmethod
    def gather(self, view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
        """Dequantize the first tokens of each sequence into ``key`` and ``value``."""

    @abstractmethod
    def quantize(
        self, x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero of plain tensors."""

    @abstractmethod
    def dequantize(
        self, q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        """``scale * (q - zero)``."""

    @abstractmethod
    def qk_matmul(
        self, query: Tensor, qk: Tensor, scale: Tensor, zero: Tensor, group_size: int
    ) -> Tensor:
        """Queries times quantized keys."""

    @abstractmethod
    def pv_matmul(
        self, probs: Tensor, qv: Tensor, scale: Tensor, zero: Tensor, group_size: int
    ) -> Tensor:
        """Probabilities times quantized values."""
