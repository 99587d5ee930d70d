"""`kvquant bench` on small shapes: figures that hang together, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from kvquant import CacheFormat, cli
from kvquant.bench import run as module


def small(device: str, **more: object) -> module.Options:
    return module.Options(
        device=device, decode=[(1, 256), (1, 512), (2, 256)], prompt=[(1, 64)], rounds=1, **more
    )


def test_figures(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    figures = module.run(small(device, json=file, picture=picture))
    assert json.loads(file.read_text()) == figures
    assert picture.stat().st_size > 10_000
    kinds = [row["what"] for row in figures["rows"]]
    assert kinds == ["decode", "decode", "decode", "prompt", "store"]
    for row in figures["rows"]:
        assert row["ms"] > 0
        assert row["torch_ms"] > 0
        assert row["speedup"] == pytest.approx(row["torch_ms"] / row["ms"])
        assert row["percent"] == pytest.approx(row["floor_ms"] / row["ms"] * 100)
    row_bytes = CacheFormat().row_bytes(128, 128)
    first = figures["rows"][0]
    assert first["bytes"] == 256 * 8 * (row_bytes + 1)  # and a mean of 256 bytes
    assert first["torch_bytes"] == 2 * 256 * 8 * 128 * (2 if device == "cuda" else 4)
    assert "speedup" in capsys.readouterr().out


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    for name in ("_DECODE", "_PROMPT"):
        monkeypatch.setattr(module, name, {"cpu": [(1, 64)]})
    file = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--device", "cpu", "--json", str(file)])
    assert not end.value.code
    assert json.loads(file.read_text())["device"].startswith("CPU")


def test_a_device_that_is_not_here() -> None:
    missing = "cuda" if not torch.cuda.is_available() else "tpu"
    with pytest.raises(ValueError, match=f"device: expected 'cpu'.*got '{missing}'"):
        module.run(small(missing))
