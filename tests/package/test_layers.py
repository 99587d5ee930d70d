"""What the compiled layers may know: kernels, formats and CPU code see neither Python nor torch."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)\b")


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def sources(folder: str) -> list[Path]:
    return sorted(
        p for p in (CSRC / folder).rglob("*") if p.suffix in {".cpp", ".cu", ".cuh", ".h"}
    )


@pytest.mark.parametrize("folder", ["common", "formats", "kernels", "cpu"])
def test_no_torch_and_no_python_below_the_bindings(folder: str) -> None:
    assert sources(folder)
    foreign = {p.name: [i for i in includes(p) if FOREIGN.match(i)] for p in sources(folder)}
    assert not {name: found for name, found in foreign.items() if found}


def test_no_torch_at_all() -> None:
    foreign = {
        p.name
        for p in sources(".")
        if any(i.startswith(("torch", "ATen", "c10")) for i in includes(p))
    }
    assert not foreign


def test_the_cpu_needs_no_cuda() -> None:
    needed = {
        p.name
        for p in sources("cpu")
        if any(i.startswith(("cuda", "kernels/")) for i in includes(p))
    }
    assert not needed
