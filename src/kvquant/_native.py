"""The only importer of the compiled extension."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  (first: the extension runs on the OpenMP threads that it brings)

__all__ = ["error", "module"]

module: Any  # None where the extension cannot be imported
error: str | None
try:
    from kvquant import _C as module  # type: ignore[attr-defined, no-redef]

    error = None
except ImportError as exception:
    module, error = None, f"{type(exception).__name__}: {exception}"
