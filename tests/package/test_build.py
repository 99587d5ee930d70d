"""The extension module itself: what it exports, what it needs, what it says of itself."""

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import kvquant

_C = pytest.importorskip("kvquant._C")
PATH = Path(_C.__file__)


def output_of(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run(
        [tool, *arguments, str(PATH)], check=True, capture_output=True, text=True
    ).stdout


def test_exports_only_its_entry() -> None:
    names = [line.split()[-1] for line in output_of("nm", "-D", "--defined-only").splitlines()]
    assert names == ["PyInit__C"]


def test_needs_neither_cuda_nor_torch() -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d"))
    assert any(name.startswith("libc.so") for name in needed)
    assert not [n for n in needed if re.match(r"lib(cuda|nv|torch|c10|python)", n)]


def test_holds_no_path_of_the_building_machine() -> None:
    assert "RPATH" not in (dynamic := output_of("readelf", "-d"))
    assert "RUNPATH" not in dynamic


def test_versions_agree() -> None:
    assert version("kvquant") == kvquant.__version__ == _C.build_info()["version"]
