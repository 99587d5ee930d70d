"""Objects of a call to flat lists of arguments, as torch's schemas have them, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..fields import FIELDS, flat_names, kinds_of, view_of
from ..view import CacheView, Options, Sequences

__all__ = ["OPS", "named", "object_of", "of", "view_of"]

_T = TypeVar("_T", Sequences, Options)
_ATTEND = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor out, Tensor? lse"
)
_STORED = ("k_codes", "k_params", "v_codes", "v_params", "mean", "seq_lens", "young")
# Own arguments, objects, what is written, which of the objects' tensors may be missing.
OPS: dict[str, tuple[str, tuple[type, ...], tuple[str, ...], tuple[str, ...]]] = {
    "append_": (
        "Tensor key, Tensor value, Tensor? slot_mapping",
        (CacheView, Sequences), _STORED, ("block_table", "seq_lens"),
    ),
    "attend_": (
        _ATTEND,
        (CacheView, Sequences, Options), (*_STORED, "out", "lse"), (),
    ),
    "gather_": ("Tensor key, Tensor value", (CacheView, Sequences), ("key", "value"), ()),
}  # fmt: skip


def of(op: str) -> str:
    """The schema of an operation on a cache."""
    own, classes, written, optional = OPS[op]
    arguments, letters = [], iter("abcdefghij")
    for argument in [*own.split(", "), *(x for cls in classes for x in kinds_of(cls))]:
        kind, name = argument.split()
        if name in optional:
            kind += "?"
        if name in written:
            kind = kind.replace("Tensor", f"Tensor({next(letters)}!)")
        arguments.append(f"{kind} {name}")
    return f"({', '.join(arguments)}) -> ()"


_NAMES = {
    op: [*(x.split()[1] for x in own.split(", ")), *flat_names(*classes)]
    for op, (own, classes, _, _) in OPS.items()
}


def named(op: str, flat: Sequence[Any]) -> dict[str, Any]:
    """An operation's arguments by name."""
    return dict(zip(_NAMES[op], flat, strict=True))


def object_of(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """An object of flat values, checked by its constructor."""
    return cls(**{name: values[name] for name, _, _ in FIELDS[cls]})
