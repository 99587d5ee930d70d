"""A user's strictly typed module needs no cast and no ignore."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvquant

SAMPLE = Path(__file__).with_name("sample.py")
PACKAGE = Path(kvquant.__file__).parent


def mypy(path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    env = dict(os.environ)
    if PACKAGE.parent.name != "site-packages":  # an editable install, which mypy does not follow
        env["MYPYPATH"] = str(PACKAGE.parent)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull,
         "--cache-dir", str(cache), str(path)],
        env=env, cwd=cache, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_sample_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(SAMPLE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_sample_is_strictly_typed(tmp_path: Path) -> None:
    assert PACKAGE.joinpath("py.typed").is_file()
    done = mypy(SAMPLE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"  # and it does look
    wrong.write_text(SAMPLE.read_text().replace("out, lse = cache", "out: int = cache"))
    assert 'variable has type "int"' in mypy(wrong, tmp_path).stdout
