"""No family of transformers gets wrong logits from the 8-bit cache."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.24")

from .build import CannotBuild, names
from .check import judge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # transformers' own, about configs this small
]


@pytest.mark.parametrize("name", names())
def test_logits_are_right_or_refused(name: str) -> None:
    try:
        verdict = judge(name)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    assert verdict.state != "wrong", verdict.reason
