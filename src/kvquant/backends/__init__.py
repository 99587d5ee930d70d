"""The implementations of the operations: importing this registers them."""

from __future__ import annotations

from typing import Any

from kvquant import _native
from kvquant.backends import cpu, cuda, reference
from kvquant.ops import register_backend

__all__ = ["build_info"]

register_backend("reference", reference.BACKEND)
register_backend("cpu", cpu.BACKEND)
register_backend("cuda", cuda.BACKEND)


def build_info() -> dict[str, Any]:
    """What the compiled extension is and finds here, or ``{"error": why it is not there}``."""
    if _native.module is None:
        return {"error": _native.error}
    info: dict[str, Any] = _native.module.build_info()
    return info
