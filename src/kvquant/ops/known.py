"""Attention calls of operators that were found to be good: compiled code makes the same ones at
every step, with rows elsewhere and all else in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import backends
from ..fields import names_of
from ..view import CacheView, RowsView, SeqsSpec, Sequences, ViewSpec

__all__ = ["Known", "find", "key_of", "remember"]

_ROWS = 7  # the first arguments of attend_: what may lie anywhere
_MOST = 1 << 12
_known: dict[Any, Known] = {}
_T = TypeVar("_T", CacheView, Sequences)


class Known(NamedTuple):
    """What a good call comes to. It holds addresses, which its key has too, and no tensor."""

    prepared: backends.Prepared
    view: ViewSpec
    view_twin: Any
    seqs: SeqsSpec
    seqs_twin: Any

    def objects(self, values: Mapping[str, Any]) -> tuple[CacheView, Sequences]:
        """The view and the sequences of a call, whose checks would find what they found before."""
        k, v = (
            RowsView(values[f"{x}_codes"], values[f"{x}_params"], values[f"{x}_head_dim"], rows)
            for x, rows in (("k", self.view.k_format), ("v", self.view.v_format))
        )
        view = _made(
            CacheView, k=k, v=v, mean=values["mean"], mean_group=self.view.mean_group,
            spec=self.view, _twin=self.view_twin,
        )  # fmt: skip
        batch = {name: values[name] for name in names_of(Sequences)}
        return view, _made(Sequences, **batch, spec=self.seqs, _twin=self.seqs_twin)


def _made(cls: type[_T], **fields: Any) -> _T:
    """An object whose parts were checked before."""
    x = object.__new__(cls)
    x.__dict__.update(fields)
    return x


def key_of(flat: Sequence[Any]) -> Any:
    """All that checks and kernels depend on; None where that cannot be told."""
    key: list[Any] = [backends.forced(), torch.is_grad_enabled()]
    for i, x in enumerate(flat):
        if isinstance(x, Tensor):
            if type(x) is not Tensor or x.layout != torch.strided or x.is_meta:
                return None
            address = x.data_ptr() if i >= _ROWS else 0
            key.append((address, x.shape, x.stride(), x.dtype, x.device, x.requires_grad))
        else:
            key.append((type(x), x))
    return tuple(key)


def find(key: Any) -> Known | None:
    """The call of this key, if it was good before."""
    return None if key is None else _known.get(key)


def remember(key: Any, prepared: backends.Prepared, view: CacheView, seqs: Sequences) -> None:
    """Note a call that was good, if a compiled backend has it by addresses."""
    if key is None or view._twin is None or seqs._twin is None:
        return
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = Known(prepared, view.spec, view._twin, seqs.spec, seqs._twin)
