"""`benchmarks batch` on a tiny model: all answers are counted, each way has its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("typer")
pytest.importorskip("rich")

from benchmarks import batch  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


def test_the_program(tmp_path: Path) -> None:
    transformers.LlamaConfig(
        vocab_size=1100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    file = tmp_path / "batch.json"
    batch.main(
        json=file, device="cpu", count=6, tokens=8, model=str(tmp_path), dtype="float32"
    )  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert [row["how"] for row in rows] == [
        "generate_batch, 8 bits", "one by one, 8 bits", "generate_batch, DynamicCache",
    ]  # fmt: skip
    words = rows[1]["note"].split()
    counts = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    assert counts["equal"] + counts["near_ties"] == 6
    assert counts["widest"] < batch.TIE
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(6 * 8 / row["seconds"])


def test_answers_are_counted_by_where_they_part() -> None:
    def run(*answers: list[int]) -> batch.Run:
        margins = [torch.tensor([1.0, batch.TIE / 2, 1.0])] * len(answers)
        return batch.Run([torch.tensor(answer) for answer in answers], margins, 1.0, 1.0)

    expected = run([1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3])
    found = run([1, 2, 3], [1, 9, 9], [1, 2, 9], [9, 2, 3])
    assert batch.agreement(expected, found) == {
        "equal": 1, "near_ties": 1, "other": 2, "widest": 1.0,
    }  # fmt: skip
