"""Where the tests run: devices and backends as fixtures, with visible reasons to skip."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

import kvquant
from kvquant import backends

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; torch's threads would spin on them


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device; those that are not here skip."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _need_native("cuda")
    return "cuda"


@pytest.fixture(scope="module", params=["native", "reference"])
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The compiled kernels and the torch reference, each on every device."""
    if request.param == "reference":
        with kvquant.use_backend("reference"):
            yield "reference"
    else:
        _need_native(device)
        yield "native"


@pytest.fixture(scope="module")
def native(device: str) -> str:
    """For comparisons between the two backends."""
    _need_native(device)
    return device


def _need_native(device: str) -> None:
    chosen, reason = backends.choose(torch.empty(0, device=device).device)
    if chosen.name == "reference":
        pytest.skip(f"no compiled kernels on {device}: {reason}")


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the transformers integration logs, none of it logged before."""
    from kvquant.integrations.transformers import handle

    handle._warned.clear()
    caplog.set_level(logging.WARNING, "kvquant")
    return caplog
