"""Programs that a test runs in its own process leave torch as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
