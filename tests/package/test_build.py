"""The extension module itself: what it exports, what it needs, what it says of itself."""

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import kvquant
from kvquant.backends import native

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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("version", "it is of version 0.0.9, but this package of"),
        ("functions", "it has no append_floats, but this package uses them"),
        ("fields", "its Options has"),
    ],
)
def test_an_extension_of_another_version_is_not_used(change: str, expected: str) -> None:
    class Other:
        def build_info(self) -> dict[str, str]:
            return {"version": "0.0.9" if change == "version" else kvquant.__version__}

        def fields(self) -> dict[str, list[str]]:
            return {**_C.fields(), "Options": ["scale"]}

        def __getattr__(self, name: str) -> object:
            if change == "functions" and name == "append_floats":
                raise AttributeError(name)
            return print

    with pytest.raises(ImportError, match=expected):
        native._check(Other())


def test_every_name_that_is_used_is_checked() -> None:
    folder = Path(native.__file__).parents[1]
    used = {
        name
        for path in folder.rglob("*.py")
        for name in re.findall(r"native\.module\.(\w+)", path.read_text())
    }
    assert used
    assert used <= set(native._USED)
