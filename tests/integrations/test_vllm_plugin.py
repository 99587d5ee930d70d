"""The plugin for vLLM where there is no vLLM that it serves."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvquant.integrations import vllm
from kvquant.integrations.vllm import formats


def run(code: str, version: str | None, folder: Path) -> str:
    """What a program prints beside a vLLM of this version; None: beside none."""
    (folder / "vllm").mkdir()
    if version is None:
        text = "raise ModuleNotFoundError('No module named vllm')"
    else:
        text = ""
        (folder / "vllm" / "version.py").write_text(f"__version__ = {version!r}")
    (folder / "vllm" / "__init__.py").write_text(text)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "needs vLLM 0.32 and 0.33, which is not installed: pip install 'kvquant[vllm]'"),
        ("0.28.1", "serves vLLM 0.32 and 0.33; the installed 0.28.1 is too old"),
        ("0.34.0rc1", "the installed 0.34.0rc1 is too new"),
    ],
)
def test_what_is_not_served_is_said(version: str | None, says: str, tmp_path: Path) -> None:
    code = """
        from kvquant.integrations.vllm import cache_dtype, register
        register()  # vLLM goes on without us
        try:
            cache_dtype()
        except ImportError as error:
            print("ImportError:", error)
    """
    found = run(code, version, tmp_path)
    assert found.count(says) == 2  # logged by the plugin, raised where it is needed


@pytest.mark.parametrize(
    ("version", "name"), [("0.32.0", "int8_per_token_head"), ("0.33.1+cu130", "kvquant")]
)
def test_the_cache_dtype_s_name(version: str, name: str, tmp_path: Path) -> None:
    code = "from kvquant.integrations.vllm import cache_dtype; print(cache_dtype())"
    assert run(code, version, tmp_path).strip() == name


def test_names_of_formats_fit_an_enum_and_a_command_line() -> None:
    for name, format in vllm.FORMATS.items():
        assert name.isidentifier()
        assert name == name.upper()
        for size in formats.BLOCK_SIZES:
            stored = formats.format_of(format, size)
            assert stored.key_mean is None or stored.key_mean <= size
            content = formats.content_bytes(format, 128, 128, size)
            assert content * size >= stored.slab_bytes(128, 128, size)
            assert 512 / content >= 1.9
