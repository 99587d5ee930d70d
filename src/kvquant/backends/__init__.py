"""Who computes: a table of backends by device type, and the choice among them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..view import ViewSpec
from . import native
from .base import Backend, Look, Prepared, Problem, look_of
from .cpu import CPU
from .cuda import CUDA
from .exact import Exact
from .reference import REFERENCE

__all__ = [
    "BACKENDS",
    "Backend",
    "Look",
    "Prepared",
    "Problem",
    "build_info",
    "choose",
    "forced",
    "look_of",
    "prepare",
    "select",
    "use_backend",
]

BACKENDS: dict[str, Backend] = {"cpu": CPU, "cuda": CUDA}  # the reference serves every other device

_PACKAGE = __name__.removesuffix(".backends")  # a vendored copy has names of its own
_forced: ContextVar[str] = ContextVar(f"{_PACKAGE}_backend")
_reported: set[tuple[str, str]] = set()
_prepared: dict[tuple[Problem, str], Prepared] = {}
_MOST = 1 << 12
_logger = logging.getLogger(_PACKAGE)

_default = os.environ.get("KVQUANT_BACKEND", "auto")
if _default not in ("auto", "reference"):
    raise ValueError(f"KVQUANT_BACKEND: expected 'auto' or 'reference', got {_default!r}")


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


def forced() -> str:
    """The backend that is forced here, or "auto"."""
    return _forced.get(_default)


def choose(device: torch.device, view: ViewSpec | None = None) -> tuple[Backend, str]:
    """The backend that serves tensors on ``device``, and such a view if one is given, and why."""
    if forced() == "reference":
        return REFERENCE, "forced by use_backend or KVQUANT_BACKEND"
    backend = BACKENDS.get(device.type)
    if backend is None:
        return REFERENCE, f"no compiled backend for device type '{device.type}'"
    if reason := backend.refuses(device, view):
        return REFERENCE, reason
    return backend, f"compiled {backend.name} kernels"


def select(op: str, device: torch.device, view: ViewSpec | None = None) -> Backend:
    """The backend for an operation; that it is the reference is logged once."""
    backend, reason = choose(device, view)
    if backend is REFERENCE:
        _report(op, reason)
    return backend


def prepare(problem: Problem) -> Prepared:
    """The backend's kernels for an attention call; remembered.

    Raises:
        ValueError: An option that no kernel can honour.
    """
    at = problem, forced()
    found = _prepared.get(at)
    if found is None:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        found = _prepared[at] = _prepare(problem)
    return found


def _prepare(problem: Problem) -> Prepared:
    backend, reason = choose(problem.query.device, problem.view)
    prepared = backend.prepare(problem)
    if isinstance(prepared, str):
        reason, prepared = prepared, REFERENCE.prepare(problem)
    if prepared.backend == REFERENCE.name and problem.query.device.type != "meta":
        _report("attention", reason)
        prepared.details = {"reason": reason, **prepared.details}
    return Exact(problem, backend, prepared) if problem.exact else prepared


def build_info() -> dict[str, Any]:
    """What the compiled extension is and finds here, or ``{"error": why it is not there}``."""
    if native.module is None:
        return {"error": native.error}
    info: dict[str, Any] = native.module.build_info()
    return info


def _report(op: str, reason: str) -> None:
    if (op, reason) not in _reported:
        _reported.add((op, reason))
        _logger.warning("%s runs on the torch reference: %s", op, reason)
