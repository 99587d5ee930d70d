"""`benchmarks memory` on a tiny model: caches hold what `kvquant fit` says, rows are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("typer")
pytest.importorskip("rich")

from benchmarks import memory  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def test_caches_hold_what_fit_says(folder: Path) -> None:
    model = memory.random_model(str(folder), "cpu")
    trial = memory.Trial(model, memory.shape_of(model.config))
    for kind in memory.CACHES:
        found = trial.measure(kind, 3, 150)
        assert found["cache_gib"] * memory.GIB == trial.predicted(kind, 3, 150), kind


def test_out_of_memory_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = memory.random_model(str(folder), "cpu")
    trial = memory.Trial(model, memory.shape_of(model.config))
    fill = trial.fill

    def small(cache: object, kind: str, batch: int, tokens: int) -> None:
        if batch > 7:
            raise torch.OutOfMemoryError("as a GPU says it")
        fill(cache, kind, batch, tokens)

    monkeypatch.setattr(trial, "fill", small)
    found = trial.measure("KVQuantCache", 8, 50)["cache_gib"]
    assert found != found, "NaN"
    room = trial.shape.weight_bytes() + memory.GIB // 2
    for guess in (5, 7, 9):  # too few, right, too many
        space = (room + guess * trial.predicted("KVQuantCache", 1, 50)) / memory.GIB
        assert trial.largest_batch("KVQuantCache", 50, space) == 7


def test_the_program(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    memory.main(
        json=file, plot=picture, tables="length,weights", memory=1, device="cpu",
        model=str(folder), scale=32, largest=False,
    )  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 5 * 3 + 3 + 2
    assert [row["original"] for row in rows if row["weights"] != "16 bits"] == [8.21, 7.5]
    assert picture.stat().st_size > 10_000
