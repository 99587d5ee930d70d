"""What the import says beside a transformers that it cannot serve."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

from kvquant.doctor import checks
from kvquant.integrations.transformers._version import MINIMUM

MISSING = "raise ModuleNotFoundError('No module named transformers')"
FAKE = "from . import utils; __version__ = {!r}"
UTILS = "def is_torch_available(): return False"


@pytest.mark.parametrize(
    ("package", "says"),
    [
        (MISSING, "needs transformers 5.5 or newer: pip install 'kvquant[transformers]'"),
        (FAKE.format("4.57.6"), "needs transformers 5.5 or newer, found 4.57.6"),
        (FAKE.format("6.1.0"), f"transformers 6.1.0 does not work with torch {torch.__version__}"),
    ],
)
def test_what_is_not_served_is_said(package: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "transformers"
    folder.mkdir()
    folder.joinpath("__init__.py").write_text(package)
    folder.joinpath("utils.py").write_text(UTILS)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kvquant.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert says in last


def test_the_minimum_is_the_same_wherever_it_stands() -> None:
    """The doctor looks without an import of transformers, pip before there is any."""
    assert checks._TRANSFORMERS == MINIMUM
    wanted = f"transformers>={'.'.join(map(str, MINIMUM))};"
    assert any(line.replace(" ", "").startswith(wanted) for line in requires("kvquant") or ())
