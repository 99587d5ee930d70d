"""Every test of a cache runs with each pair of row formats, and with two by layer."""

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
BY_LAYER = "by-layer"


@pytest.fixture(scope="module", autouse=True, params=[*PAIRS, BY_LAYER])
def pair(request: pytest.FixtureRequest) -> Iterator[str]:
    """The pair that `modelled.make` takes; by layer: int8, and 4 bits by age in larger groups."""
    usual = modelled.SMALL
    formats = {name: replace(usual, value_rotation=None, **of) for name, of in PAIRS.items()}
    formats[BY_LAYER] = usual, replace(formats["k4v4-by-age"], key_mean=32)
    modelled.SMALL = formats[request.param]
    yield request.param
    modelled.SMALL = usual
