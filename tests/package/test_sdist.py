"""What `pip install` does with the sdist on a machine with gcc alone."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
from scratch import run, unpacked_sdist, wheel_of

CODE = """
import json
import torch
import kvquant
from kvquant.backends import build_info

key, value = torch.randn(2, 1, 70, 2, 64)
cache = kvquant.QuantizedKVCache(1, 1, 2, 64, dtype=torch.float32)
query = torch.randn(1, 1, 8, 64)
cache.append(0, key, value)
out = cache.attend(0, query, key[:, :1], value[:, :1])
with kvquant.use_backend("reference"):
    torch.testing.assert_close(out, cache.attend(0, query), atol=2e-3, rtol=2e-3)
print(json.dumps({**build_info(), "file": kvquant.__file__, "backend": kvquant.explain().backend}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles
def test_wheel_from_the_sdist_without_nvcc(tmp_path: Path) -> None:
    wheel = wheel_of(unpacked_sdist(tmp_path), KVQUANT_CUDA="AUTO", KVQUANT_CUDA_ARCHS="")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # -S: without the hooks of an editable install, which would come first
    packages = os.pathsep.join([str(site), *(p for p in sys.path if "site-packages" in p)])
    found = json.loads(run("python", "-S", "-c", CODE, cwd=tmp_path, PYTHONPATH=packages))
    assert Path(found["file"]).is_relative_to(site)
    assert found["backend"] == "cpu"
    assert not found["cuda"]
    assert found["cuda_error"] == "built without CUDA"


def test_the_python_part_alone(tmp_path: Path) -> None:
    """What is built on Windows and macOS."""
    wheel = wheel_of(unpacked_sdist(tmp_path), KVQUANT_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert not [name for name in file.namelist() if Path(name).suffix in {".so", ".cpp", ".h"}]
