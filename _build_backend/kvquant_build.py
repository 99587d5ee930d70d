"""scikit-build-core, plus nvcc as a build requirement where the machine has none.

Run as a program it prints what a build without isolation needs beside the static requirements.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

_NVCC = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]


def _nvcc_requires() -> list[str]:
    if not sys.platform.startswith("linux") or os.environ.get("KVQUANT_PURE"):
        return []
    if os.environ.get("KVQUANT_CUDA", "AUTO").upper() in {"OFF", "0", "FALSE", "NO"}:
        return []
    if os.environ.get("CUDACXX") or os.environ.get("CMAKE_CUDA_COMPILER") or shutil.which("nvcc"):
        return []
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    if any(home and Path(home, "bin", "nvcc").exists() for home in homes):
        return []
    return _NVCC


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_nvcc_requires()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_nvcc_requires()]


if __name__ == "__main__":
    print(*get_requires_for_build_editable())
