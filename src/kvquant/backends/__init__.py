"""The implementations of the operations: importing this registers them."""

from __future__ import annotations

from typing import Any

from ..ops import register_backend
from . import cpu, cuda, native, reference

__all__ = ["build_info"]

register_backend("reference", reference.BACKEND)
register_backend("cpu", cpu.BACKEND)
register_backend("cuda", cuda.BACKEND)


def build_info() -> dict[str, Any]:
    """What the compiled extension is and finds here, or ``{"error": why it is not there}``."""
    if native.module is None:
        return {"error": native.error}
    info: dict[str, Any] = native.module.build_info()
    return info
