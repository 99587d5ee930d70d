"""Each mode's tokens are right, or refused, as the table in the documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

from .judge import MODELS, judge
from .modes import MODES

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
TABLE = PAGE.split("<!-- modes: begin -->")[1].split("<!-- modes: end -->")[0]
LINES = [line[2:] for line in TABLE.splitlines() if line.startswith("| ")]
ROWS = dict(line.split(" | ", 1) for line in LINES[2:])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # transformers' own, about configs this small
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_mode_is_as_the_table_says(name: str, mode: str) -> None:
    word, _, reason = judge(name, mode, "cpu").partition(": ")
    *words, reasons = ROWS[mode].removesuffix(" |").split(" | ")
    assert word == words[list(MODELS).index(name)]
    assert reason in reasons.replace("\\|", "|")


def test_the_table_has_no_other_modes() -> None:
    assert list(ROWS) == list(MODES)
