"""The command line: what it knows about the machine, and what it needs installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvquant import cli

WITHOUT_TYPER = """
import sys
sys.modules["typer"] = sys.modules["rich"] = None
from kvquant.cli import main
main({arguments!r})
"""


def run_without_typer(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TYPER.format(arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.logging.getLogger("kvquant"), "setLevel", lambda level: None)


def test_collect_has_every_part() -> None:
    info = cli.collect()
    assert set(info) == {"versions", "machine", "extension", "cpu", "cuda", "backends"}
    assert set(info["versions"]) == {"kvquant", "torch", "python"}
    assert info["cpu"]["threads"] > 0
    assert info["backends"]["reference"] == {"works": True}
    for state in info["backends"].values():
        assert state["works"] or (state["reason"] and state["advice"])
    json.dumps(info)


@pytest.mark.parametrize(
    ("built", "reason", "advice"),
    [
        pytest.param({"error": "ImportError: no"}, "ImportError: no", "install", id="no-extension"),
        pytest.param({"cuda": False}, "without CUDA", "KVQUANT_CUDA=ON", id="cpu-build"),
        pytest.param(
            {"cuda": True, "devices": 0, "cuda_error": "old driver", "cuda_runtime": 13000},
            "old driver",
            "CUDA 13.0",
            id="no-driver",
        ),
    ],
)
def test_a_backend_that_cannot_work_says_why(
    built: dict[str, Any], reason: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "build_info", lambda: built)
    info = cli.collect()
    state = info["backends"]["cuda"]
    assert not state["works"]
    assert reason in state["reason"]
    assert advice in state["advice"]
    text = "\n".join(cli._lines(info))
    assert reason in text
    assert advice in text


def test_info_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    file = tmp_path / "info.json"
    with pytest.raises(SystemExit) as end:
        cli.main(["info", "--json", str(file)])
    assert not end.value.code
    assert "reference   works" in capsys.readouterr().out
    assert json.loads(file.read_text())["backends"]["reference"]["works"]


def test_info_needs_torch_alone(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    done = run_without_typer("info", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "reference   works" in done.stdout
    assert json.loads(file.read_text())["versions"]["kvquant"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        pytest.param(["demo"], 1, "pip install 'kvquant[demo]'", id="demo"),
        pytest.param(["--help"], 0, "usage: kvquant info|doctor", id="help"),
        pytest.param(["nonsense"], 1, "usage: kvquant info|doctor", id="unknown"),
    ],
)
def test_without_typer(
    arguments: list[str],
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    said = end.value.code if isinstance(end.value.code, str) else ""
    assert bool(end.value.code) == bool(status)
    assert text in said + capsys.readouterr().out


def test_demo_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    for name in [*sys.modules]:
        if name.startswith(("kvquant.bench", "kvquant.demo", "kvquant.terminal")):
            monkeypatch.delitem(sys.modules, name)  # another test may have imported rich for them
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(SystemExit, match=r"rich.* is missing.*kvquant\[demo\]"):
        cli.main(["demo"])


@pytest.mark.parametrize("command", ["info", "doctor", "demo", "fit", "bench"])
def test_help_has_an_example_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert f"Example: kvquant {command}" in printed
    assert "--json" in printed


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvquant", "info"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "reference   works" in done.stdout
