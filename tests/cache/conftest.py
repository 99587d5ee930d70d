"""Every test of a cache runs with each pair of row formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

import modelled

PAIRS = {
    "int8": {},
    "k8v4": {"value": "int4"},
    "k4v4": {"key": "int4", "value": "int4"},
    "k8v4-by-age": {"value": "int4", "by_age": True},
    "k4v4-by-age": {"key": "int4", "value": "int4", "by_age": True},
}


@pytest.fixture(scope="module", autouse=True, params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Iterator[str]:
    """The pair that `modelled.make` takes."""
    usual = modelled.SMALL
    modelled.SMALL = replace(usual, value_rotation=None, **PAIRS[request.param])
    yield request.param
    modelled.SMALL = usual
