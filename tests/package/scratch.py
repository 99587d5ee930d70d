"""The sdist, made from this repository, and projects in scratch folders that start from it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a program that must succeed; python is this interpreter."""
    first, *rest = map(str, command)
    done = subprocess.run(
        [sys.executable if first == "python" else first, *rest], cwd=cwd, check=False,
        env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def unpacked_sdist(folder: Path) -> Path:
    """The sources as PyPI has them, unpacked; skips where they or the build's tools are missing."""
    if not ROOT.joinpath("_build_backend").is_dir():
        pytest.skip("the sources of the package are not there")
    for module in ("scikit_build_core", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = f"import kvquant_build; print(kvquant_build.build_sdist({str(folder)!r}))"
    run("python", "-c", code, cwd=ROOT, PYTHONPATH="_build_backend")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def without_nvcc() -> dict[str, str]:
    """The environment of a machine with gcc alone."""
    path = os.environ["PATH"].split(os.pathsep)
    kept = [folder for folder in path if not Path(folder, "nvcc").exists()]
    return {"PATH": os.pathsep.join(kept), "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}


def wheel_of(project: Path, *settings: str, **env: str) -> Path:
    """The wheel of a project, built without a network and without nvcc."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    out = project.parent / f"{project.name}-wheel"
    options = [part for setting in settings for part in ("-C", setting)]
    run(
        "python", "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation",
        "--no-deps", "--no-index", "-w", out, *options, ".", cwd=project, **without_nvcc(), **env,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel
