"""The operations as torch sees them: schemas, fake implementations, and the choice of a backend.

Every operation is in ``torch.ops.kvquant`` with its mutations declared, so that ``torch.compile``
and ``torch.library.opcheck`` work. `call` is the way in: plain eager tensors go straight to the
implementation, everything else (compiling, subclasses, dispatch modes) through the dispatcher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_splits

__all__ = [
    "OPS",
    "Backend",
    "call",
    "choose",
    "forced",
    "is_plain",
    "prepare_step",
    "refuse_splits",
    "register_backend",
    "use_backend",
]

_PACKAGE = __name__.removesuffix(".ops")  # a vendored copy has names of its own
_NAMESPACE = _PACKAGE.replace(".", "_")
logger = logging.getLogger(_PACKAGE)

_STORAGE = "Tensor k_data, Tensor k_params, Tensor? k_mean, Tensor v_data, Tensor v_params"
_STORAGE_OUT = (
    "Tensor(a!) k_data, Tensor(b!) k_params, Tensor(c!)? k_mean, "
    "Tensor(d!) v_data, Tensor(e!) v_params"
)
_ROTATION = "int mean_group, int k_rotation, int v_rotation"

OPS = {
    "quantize": (
        "(Tensor x, float qmin, float qmax, str granularity, int group_size)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "dequantize": (
        "(Tensor q, Tensor scale, Tensor zero, int group_size, ScalarType dtype) -> Tensor"
    ),
    "qk_matmul": "(Tensor query, Tensor qk, Tensor scale, Tensor zero, int group_size) -> Tensor",
    "pv_matmul": "(Tensor probs, Tensor qv, Tensor scale, Tensor zero, int group_size) -> Tensor",
    "append_": (
        f"(Tensor key, Tensor value, {_STORAGE_OUT}, Tensor? block_table, Tensor(f!)? seq_lens,"
        f" Tensor? cu_seqlens, Tensor? seq_starts, Tensor? slot_mapping, {_ROTATION},"
        " int max_tokens, bool advance) -> ()"
    ),
    "gather": (
        f"({_STORAGE}, Tensor block_table, Tensor seq_lens, Tensor? seq_starts, {_ROTATION},"
        " int tokens, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "attention": (
        f"(Tensor query, {_STORAGE}, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens,"
        f" Tensor? seq_starts, Tensor? sinks, Tensor? alibi_slopes, {_ROTATION}, int max_tokens,"
        " float softmax_scale, bool causal, int sliding_window, float softcap, int split_size,"
        " bool return_lse) -> (Tensor, Tensor)"
    ),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A set of implementations for one device type.

    Attributes:
        name: What `use_backend` and `explain` call it.
        implementations: By operation name, with the operation's positional arguments.
        refuses: Why a call cannot be served (operation name, its arguments), or None.
        step: Prepares an append and attention that is repeated on tensors that look alike; None:
            the backend has no shorter way than the two operations.
        max_splits: Splits of a given size that a sequence may have at most; None: it has none.
    """

    name: str
    implementations: dict[str, Callable[..., Any]]
    refuses: Callable[[str, Sequence[Any]], str | None]
    step: Callable[..., Callable[..., Tensor]] | None = None
    max_splits: int | None = None


_backends: dict[str, Backend] = {}  # by device type; "reference" serves every other device
_forced: ContextVar[str | None] = ContextVar(f"{_NAMESPACE}_backend", default=None)
_reported: set[tuple[str, str]] = set()


def register_backend(device_type: str, backend: Backend) -> None:
    """Let ``backend`` serve the tensors of ``device_type`` (or be the "reference")."""
    _backends[device_type] = backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within a ``with`` block: "reference", or "auto" for the usual choice.

    The environment variable ``KVQUANT_BACKEND`` does the same for a whole process.

    Raises:
        ValueError: An unknown name.
    """
    if not isinstance(name, str) or name not in ("auto", "reference"):
        raise ValueError(f"name: expected 'auto' or 'reference', got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(name: str, args: Sequence[Any]) -> tuple[Backend, str]:
    """The backend that serves operation ``name`` on ``args``, and why."""
    device_type = args[0].device.type
    reference = _backends["reference"]
    if (_forced.get() or _default_backend) == "reference":
        return reference, "forced by use_backend or KVQUANT_BACKEND"
    backend = _backends.get(device_type)
    if backend is None:
        return reference, f"no compiled backend for device type '{device_type}'"
    if reason := backend.refuses(name, args):
        return reference, reason
    return backend, f"compiled {backend.name} kernels"


def refuse_splits(args: Sequence[Any], split_size: int, capacity: int) -> None:
    """Raise what an attention on ``args`` would, ahead of an append that comes before it."""
    check_splits(split_size, capacity, choose("attention", args)[0].max_splits)


def forced() -> str | None:
    """The backend that `use_backend` forces here, if any."""
    return _forced.get()


def prepare_step(
    storage: Sequence[Any], query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> Callable[..., Tensor] | None:
    """A shorter way to append and attend, for tensors that look like these.

    Args:
        storage: A layer's (k_data, k_params, k_mean, v_data, v_params).
        query: ``(batch, tokens, q_heads, head_dim)``.
        key: ``(batch, tokens, kv_heads, head_dim)``.
        value: ``(batch, tokens, kv_heads, v_head_dim)``.
        *options: (mean_group, k_rotation, v_rotation), softmax_scale, causal, sliding_window,
            softcap, split_size.

    Returns:
        A function of (layer, storage, block_table, seq_lens, seq_starts, query, key, value) that
        returns the output; None where the backend has none, or dtypes differ.
    """
    if not query.dtype == key.dtype == value.dtype:
        return None
    backend, _ = choose("attention", (query, *storage))
    both = choose("append_", (key, value, *storage))[0] is backend
    if backend.step is None or not both or not is_plain(query):
        return None
    return backend.step(query, key, value, *options)


def _run(name: str, *args: Any) -> Any:
    backend, reason = choose(name, args)
    if backend.name == "reference" and (name, reason) not in _reported:
        _reported.add((name, reason))
        logger.warning("%s runs on the torch reference: %s", name, reason)
    return backend.implementations[name](*args)


def is_plain(x: Tensor) -> bool:
    """Whether a call on ``x`` needs no dispatcher: eager, no subclass, no mode."""
    return type(x) is Tensor and not _is_compiling() and not _dispatch_modes()


def call(name: str, *args: Any) -> Any:
    """Run an operation; the first argument is a tensor on the device that decides."""
    plain = is_plain(args[0]) and not args[0].is_meta
    return _run(name, *args) if plain else _handles[name](*args)


def _fake_quantize(
    x: Tensor, qmin: float, qmax: float, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, s, d = x.shape
    shape = {
        "token": (b, h, s, 1),
        "head": (b, h, 1, 1),
        "channel": (b, h, -(-s // group_size) if group_size else 1, d),
    }[granularity]
    pair = [x.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=torch.uint8), pair[0], pair[1]


def _fake_dequantize(
    q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _fake_qk(query: Tensor, qk: Tensor, *args: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], qk.shape[-2])


def _fake_pv(probs: Tensor, qv: Tensor, *args: Any) -> Tensor:
    return probs.new_empty(*probs.shape[:-1], qv.shape[-1])


def _fake_append(*args: Any) -> None:
    return None


def _fake_gather(k_data: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    v_data, block_table, tokens, dtype = args[2], args[4], args[-2], args[-1]
    batch, heads = block_table.shape[0], k_data.shape[1]
    key, value = (
        t.new_empty(batch, tokens, heads, t.shape[-1], dtype=dtype) for t in (k_data, v_data)
    )
    return key, value


def _fake_attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    v_data, return_lse = args[3], args[-1]
    lse_shape = query.shape[:-1] if return_lse else (0,)
    return (
        query.new_empty(*query.shape[:-1], v_data.shape[-1]),
        query.new_empty(lse_shape, dtype=torch.float32),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "dequantize": _fake_dequantize,
    "qk_matmul": _fake_qk,
    "pv_matmul": _fake_pv,
    "append_": _fake_append,
    "gather": _fake_gather,
    "attention": _fake_attention,
}

_default_backend = os.environ.get("KVQUANT_BACKEND", "auto")
if _default_backend not in ("auto", "reference"):
    raise ValueError(f"KVQUANT_BACKEND: expected 'auto' or 'reference', got {_default_backend!r}")

_is_compiling = torch.compiler.is_compiling
# Private, hence guarded: without it every call takes the dispatcher (about 4 us instead of 0.1).
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

_library = torch.library.Library(_NAMESPACE, "DEF")
for _name, _schema in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, partial(_run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{_name}", _FAKES[_name], lib=_library)
_handles = {name: getattr(getattr(torch.ops, _NAMESPACE), name).default for name in OPS}
