"""A short run of the damaged files; ``python -m tests.fuzz files`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors.torch")


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by Linux's means")
def test_files() -> None:
    # Another process: it forks, and limits its own memory.
    code = "from fuzz.files import main; main(count=1500, jobs=1)"
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
