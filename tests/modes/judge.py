"""Whether a mode is right: its tokens are those of eager attention over the dequantized cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvquant.integrations.transformers import handle
from tiny import make

from .modes import MODES, Case

__all__ = ["MODELS", "judge"]

MODELS = {"llama": "Llama", "gemma3": "Gemma 3", "gpt-oss-sinks": "GPT-OSS"}


def judge(name: str, mode: str, device: str) -> str:
    """What a mode gives: "yes", "dequantized: why", or "refused: why".

    Raises:
        AssertionError: Other tokens than those of eager attention.
    """
    run = MODES[mode].run
    try:
        with _messages() as messages:
            found = run(Case(name, make(name, device), device))
    except (NotImplementedError, ValueError) as error:
        return f"refused: {error}"
    expected = run(Case(name, make(name, device, "eager"), device))
    assert torch.equal(found, expected), f"{mode}, {name}: {found.tolist()}, {expected.tolist()}"
    return "dequantized: " + "; ".join(messages) if messages else "yes"


@contextmanager
def _messages() -> Iterator[list[str]]:
    """What the integration says meanwhile, none of it said before."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handle._warned.clear()
    handler = Keep(logging.WARNING)
    handle.logger.addHandler(handler)
    try:
        yield found
    finally:
        handle.logger.removeHandler(handler)
