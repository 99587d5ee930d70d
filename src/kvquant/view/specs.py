"""The numbers of a call that a choice of kernels may depend on, the same object where equal."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch

from ..formats import RowFormat

__all__ = ["SeqsSpec", "ViewSpec", "interned"]


class ViewSpec(NamedTuple):
    """The numbers of a view that a choice of kernels may depend on."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    v_head_dim: int
    k_format: RowFormat
    v_format: RowFormat
    mean_group: int
    is_empty: bool
    device: torch.device


class SeqsSpec(NamedTuple):
    """Likewise of a step's batch."""

    batch: int
    max_blocks: int
    is_packed: bool
    is_padded: bool
    max_seqlen_q: int
    advance: bool
    device: torch.device
    young: tuple[int, int] | None = None  # heads and bytes of a slab

    @property
    def by_age(self) -> bool:
        """Whether there are young rows."""
        return self.young is not None


_Spec = TypeVar("_Spec", ViewSpec, SeqsSpec)
_specs: dict[Any, Any] = {}
_MOST_SPECS = 1 << 12


def interned(spec: _Spec) -> _Spec:
    """The same object for equal specs, which are compared at each step; not while tracing."""
    if torch.compiler.is_compiling():
        return spec
    if len(_specs) > _MOST_SPECS:
        _specs.clear()
    try:
        found: _Spec = _specs.setdefault(spec, spec)
    except TypeError:  # of symbolic sizes
        return spec
    return found
