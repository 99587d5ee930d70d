"""The only importer of the compiled extension, to which it gives torch's threads."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..fields import names_of
from ..version import __version__
from ..view import CacheView, Options, Sequences

__all__ = ["error", "module"]


_USED = (
    "CacheView", "Call", "MatmulParams", "Place", "Sequences", "append", "append_floats",
    "build_info", "capture_id", "dequantize", "fields", "gather", "graph_workspace", "merge",
    "pv_matmul", "qk_matmul", "quantize", "read_pieces", "refuse_rows", "use_openmp",
)  # fmt: skip


def _openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime of torch's own operations; 0: none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel  # looked for in what it needs, too
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _check(extension: Any) -> None:
    """The extension is this package's: same version, names and fields."""
    found = extension.build_info()["version"]
    if found != __version__:
        raise ImportError(f"it is of version {found}, but this package of {__version__}")
    if lacks := [name for name in _USED if not hasattr(extension, name)]:
        raise ImportError(f"it has no {', '.join(lacks)}, but this package uses them")
    for cls in (CacheView, Sequences, Options):
        names = extension.fields()[cls.__name__]
        if names != (expected := names_of(cls)):
            raise ImportError(f"its {cls.__name__} has {names}, but this package's {expected}")


module: Any  # None where the extension cannot be imported
error: str | None
try:
    module = import_module(f"{__name__.removesuffix('.backends.native')}._C")
    _check(module)
except ImportError as exception:
    module, error = None, f"{type(exception).__name__}: {exception}"
else:
    error = None
    module.use_openmp(_openmp())
