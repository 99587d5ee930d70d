"""The operations as torch sees them: for compiled code, tensor subclasses and dispatch modes.

Schemas are made from the dataclasses of `kvquant.view`. Operations on a cache write into what they
are given and return nothing, so that ``torch.compile`` and ``torch.library.opcheck`` work without
fakes. An operator called directly makes the objects of a call again, and so is checked by their
constructors. Eager calls do not come by here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, calls
from ..arguments import check_tensor
from ..checks import check_index
from ..fields import flatten
from ..view import CacheView, Options, Sequences
from . import affine, known, schema

__all__ = ["OPS", "append", "attend", "call", "gather", "is_plain"]

_NAMESPACE = __name__.removesuffix(".ops").replace(".", "_")  # a vendored copy has its own


def is_plain(x: Tensor) -> bool:
    """Whether a call on ``x`` needs no dispatcher: eager, no subclass, no mode."""
    return type(x) is Tensor and not _is_compiling() and not _dispatch_modes() and not x.is_meta


def append(
    key: Tensor,
    value: Tensor,
    view: CacheView,
    seqs: Sequences | None,
    slot_mapping: Tensor | None,
) -> None:
    """Append through the dispatcher."""
    batch = [None, None, None, None, 0, False, None] if seqs is None else flatten(seqs)
    _handles["append_"](key, value, slot_mapping, *flatten(view), *batch)


def attend(
    query: Tensor,
    view: CacheView,
    seqs: Sequences,
    key: Tensor | None,
    value: Tensor | None,
    options: Options,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attend through the dispatcher."""
    _handles["attend_"](
        query, key, value, sinks, alibi_slopes, out, lse, *flatten(view), *flatten(seqs),
        *flatten(options),
    )  # fmt: skip


def gather(view: CacheView, seqs: Sequences, key: Tensor, value: Tensor) -> None:
    """Gather through the dispatcher."""
    _handles["gather_"](key, value, *flatten(view), *flatten(seqs))


def call(name: str, *args: Any) -> Any:
    """Run an operation on plain (q, scale, zero) tensors, its arguments checked."""
    if is_plain(args[0]):
        return getattr(backends.select(name, args[0].device), name)(*args)
    return _handles[name](*args)


# --------------------------------------------------------------------------------- implementations


def _append(*flat: Any) -> None:
    values = schema.named("append_", flat)
    key, value, slots = values["key"], values["value"], values["slot_mapping"]
    view, seqs = schema.view_of(values), None
    if values["block_table"] is not None or values["seq_lens"] is not None:
        seqs = schema.object_of(Sequences, values)
    calls.check_append(key, value, view, seqs, slots)
    backend = backends.select("append_", view.device, view.spec)
    backend.append(key, value, view, seqs, slots)


def _attend(*flat: Any) -> None:
    values = schema.named("attend_", flat)
    query, out, lse = values["query"], values["out"], values["lse"]
    sinks, slopes = values["sinks"], values["alibi_slopes"]
    key = known.key_of(flat)
    if (found := known.find(key)) is not None:
        found.prepared.launch(
            query, *found.objects(values), values["key"], values["value"], sinks, slopes, out, lse
        )
        return
    view, seqs = schema.view_of(values), schema.object_of(Sequences, values)
    problem = calls.problem_of(
        query, view, seqs, values["key"], values["value"], schema.object_of(Options, values),
        sinks=sinks is not None, alibi_slopes=slopes is not None, lse=lse is not None,
    )  # fmt: skip
    check_index("sinks", sinks, query.shape[-2], query.device, torch.float32)
    check_index("alibi_slopes", slopes, query.shape[-2], query.device, torch.float32)
    calls.check_out(out, lse, query, view.v.head_dim)
    prepared = backends.prepare(problem)
    prepared.launch(query, view, seqs, values["key"], values["value"], sinks, slopes, out, lse)
    known.remember(key, prepared, view, seqs)


def _gather(*flat: Any) -> None:
    values = schema.named("gather_", flat)
    key, value = values["key"], values["value"]
    view, seqs = schema.view_of(values), schema.object_of(Sequences, values)
    calls.check_gather(view, seqs, key, value)
    backend = backends.select("gather_", view.device, view.spec)
    backend.gather(view, seqs, key, value)


def _affine(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        check_tensor("argument", args[0])
        affine.CHECKS[name](*args)
        return getattr(backends.select(name, args[0].device), name)(*args)

    return run


def _no_fake(*flat: Any) -> None:
    return None


OPS: dict[str, str] = {**affine.SCHEMAS, **{name: schema.of(name) for name in schema.OPS}}
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    **{name: _affine(name) for name in affine.SCHEMAS},
    "append_": _append,
    "attend_": _attend,
    "gather_": _gather,
}

_is_compiling = torch.compiler.is_compiling
# Private, hence guarded: without it every call takes the dispatcher (about 4 us instead of 0.1).
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

_library = torch.library.Library(_NAMESPACE, "DEF")
for _name, _schema in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _IMPLEMENTATIONS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"{_NAMESPACE}::{_name}", affine.FAKES.get(_name, _no_fake), lib=_library
    )
_handles = {name: getattr(getattr(torch.ops, _NAMESPACE), name).default for name in OPS}
