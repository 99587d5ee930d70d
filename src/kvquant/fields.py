"""The dataclasses of a call as flat lists of fields, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .formats import ROW_FORMATS
from .view import CacheView, Options, RowsView, Sequences

__all__ = ["FIELDS", "flat_names", "flatten", "kinds_of", "names_of", "view_of"]

_KINDS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "float": "float",
    "bool": "bool",
}


def _listed(cls: type, prefix: str = "", path: tuple[str, ...] = ()) -> list[tuple[str, str, Any]]:
    """(flat name, kind in torch's schemas, path to the value) of each field."""
    found: list[tuple[str, str, Any]] = []
    for f in fields(cls):
        if not f.init or not f.metadata.get("is_flat", True):
            continue
        here = (*path, f.name)
        if f.type == "RowsView":
            found += _listed(RowsView, f"{f.name}_", here)
        elif f.type == "RowFormat":
            found.append((f"{prefix}format", "str", (*here, "name")))
            found.append((f"{prefix}rotated", "bool", (*here, "rotated")))
        else:
            found.append((prefix + f.name, _KINDS[str(f.type)], here))
    return found


FIELDS: dict[type, list[tuple[str, str, Any]]] = {
    cls: _listed(cls) for cls in (CacheView, Sequences, Options)
}


def names_of(cls: type) -> list[str]:
    """The flat names of a class, in order."""
    return [name for name, _, _ in FIELDS[cls]]


def kinds_of(cls: type) -> list[str]:
    """Each field as torch's schemas have it."""
    return [f"{kind} {name}" for name, kind, _ in FIELDS[cls]]


def flat_names(*classes: type) -> list[str]:
    """The names of several classes' fields."""
    return [name for cls in classes for name in names_of(cls)]


def flatten(x: Any) -> list[Any]:
    """The values of an object's fields, in their order."""
    values = []
    for _, _, path in FIELDS[type(x)]:
        value = x
        for name in path:
            value = getattr(value, name)
        values.append(value)
    return values


def view_of(flat: Mapping[str, Any]) -> CacheView:
    """A view of flat values, checked by its constructor.

    Raises:
        TypeError: A part of another type.
        ValueError: Parts that do not belong together.
    """
    rows = []
    for x in ("k", "v"):
        name = flat[f"{x}_format"]
        if name not in ROW_FORMATS:
            raise ValueError(f"{x}_format: expected one of {', '.join(ROW_FORMATS)}, got {name!r}")
        rows.append(
            RowsView(
                flat[f"{x}_codes"],
                flat[f"{x}_params"],
                flat[f"{x}_head_dim"],
                ROW_FORMATS[name](flat[f"{x}_rotated"]),
            )
        )
    return CacheView(rows[0], rows[1], flat["mean"], flat["mean_group"])
