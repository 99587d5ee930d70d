"""The package under another name, beside the installed one in one process: docs/vendoring.md."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from scratch import run, unpacked_sdist, wheel_of

import kvquant
from kvquant.backends import native

CODE = """
import logging
import torch
import kvquant
import mylib._vendor.kvquant as copied

assert copied.__file__ != kvquant.__file__
assert copied.QuantizedKVCache is not kvquant.QuantizedKVCache
key, value = torch.randn(2, 1, 9, 2, 64)
query = torch.randn(1, 1, 8, 64)
outs = []
for package in (kvquant, copied, kvquant):
    cache = package.QuantizedKVCache(1, 1, 2, 64, max_seq_len=64, dtype=torch.float32)
    cache.append(0, key, value)
    for _ in range(2):
        out = cache.attend(0, query, key[:, :1], value[:, :1])
    where = dict(block_table=cache.block_table, seq_lens=cache.seq_lens)

    def attend(query):
        return package.attention(query, cache.layer(0)[0], **where)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(query)
    assert torch.equal(compiled, attend(query))
    outs += [out, compiled]
    assert package.explain().backend == kvquant.explain().backend
    torch._dynamo.reset()
assert all(torch.equal(a, b) for a, b in zip(outs[:2] * 2, outs[2:]))
assert hasattr(torch.ops.mylib__vendor_kvquant, "attend_")

try:
    import transformers
except ImportError:
    print("without transformers")
else:
    from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache
    from mylib._vendor.kvquant.integrations.transformers import KVQuantCache as CopiedCache

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )
    logits = []
    for name, cache in (("kvquant", KVQuantCache), ("mylib__vendor_kvquant", CopiedCache)):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        with torch.no_grad():
            ids = torch.arange(9)[None]
            logits.append(model(ids, use_cache=True, **{CACHE_ARGUMENT: cache(model)}).logits)
    assert torch.equal(*logits)
    print("with transformers")
"""


needs_extension = pytest.mark.skipif(native.module is None, reason="the extension is not there")


@needs_extension
def test_two_copies_in_one_process(tmp_path: Path) -> None:
    vendored = tmp_path / "mylib" / "_vendor" / "kvquant"
    shutil.copytree(Path(kvquant.__file__).parent, vendored)
    shutil.copy(native.module.__file__, vendored)
    assert run("python", "-W", "ignore", "-c", CODE, cwd=tmp_path).startswith("with")


CMAKE = """
cmake_minimum_required(VERSION 3.25)
project(mylib LANGUAGES CXX)
set(KVQUANT_PACKAGE mylib/_vendor/kvquant)
add_subdirectory(third_party/kvquant)
"""

PYPROJECT = """
[build-system]
requires = ["scikit-build-core>=0.11", "pybind11>=3.0,<4"]
build-backend = "scikit_build_core.build"

[project]
name = "mylib"
version = "1.0"
dependencies = ["torch>=2.4"]
"""


@needs_extension
@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles
def test_whole_with_the_library_s_own_build(tmp_path: Path) -> None:
    sources = unpacked_sdist(tmp_path)
    project = tmp_path / "project"
    package = project / "src" / "mylib"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").touch()
    shutil.move(sources, project / "third_party" / "kvquant")
    project.joinpath("CMakeLists.txt").write_text(CMAKE)
    project.joinpath("pyproject.toml").write_text(PYPROJECT)
    with zipfile.ZipFile(wheel_of(project, "cmake.build-type=MinSizeRel")) as wheel:
        names = {name.removeprefix("mylib/_vendor/kvquant/") for name in wheel.namelist()}
        assert {"LICENSE", "py.typed", "version.py"} <= names
        assert not any(name.startswith(("kvquant/", "_C")) for name in wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert run("python", "-W", "ignore", "-c", CODE, cwd=tmp_path / "site").startswith("with")


PURE = """
import sys
import torch
import mylib._vendor.kvquant as copied

assert "kvquant" not in sys.modules
assert copied.explain().backend == "reference"
assert "No module named 'mylib._vendor.kvquant._C'" in copied.explain().reason, copied.explain()
"""


def test_pure_torch_in_one_folder(tmp_path: Path) -> None:
    sources = unpacked_sdist(tmp_path)
    vendored = tmp_path / "site" / "mylib" / "_vendor" / "kvquant"
    shutil.copytree(
        sources / "src" / "kvquant", vendored,
        ignore=shutil.ignore_patterns("cli.py", "demo", "integrations"),
    )  # fmt: skip
    shutil.copy(sources / "LICENSE", vendored)
    both, _, _ = CODE.partition("try:")  # without transformers
    run("python", "-W", "ignore", "-c", PURE, cwd=tmp_path / "site")
    run("python", "-W", "ignore", "-c", both, cwd=tmp_path / "site", KVQUANT_BACKEND="reference")
