"""vLLM on a CPU: these tests run in an environment of their own (`make test-vllm`)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .reports import Reports

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

LONG = os.environ.get("KVQUANT_TEST_LONG") == "1"


def pytest_report_header() -> str | None:
    """Say that these tests were left out, if they were."""
    return None if find_spec("vllm") else "tests/engines: left out, vLLM is not installed here"


@pytest.fixture(scope="session")
def model() -> str:
    """SmolLM2-135M-Instruct's folder."""
    from kvquant.demo.assets import cache_folder
    from kvquant.demo.model import load

    folder = cache_folder()
    load(folder)
    return str(folder / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def text() -> str:
    """Some prose."""
    from kvquant.demo.assets import TEXT, cache_folder, fetch

    return fetch(TEXT, cache_folder()).read_text()


@pytest.fixture(scope="session")
def prompts(text: str) -> list[str]:
    """Prompts of 3 to 700 tokens; every fourth begins with the same 400."""
    count = 64 if LONG else 10
    prefix, found = text[2000:3600], []
    for i in range(count):
        begin = 5000 + 1500 * i
        own = text[begin : begin + (20, 120, 500, 2200)[i % 4] // (1 if i % 8 < 4 else 2)]
        found.append(prefix + own if i % 4 == 1 else own)
    return found


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def reports(model: str, text: str, prompts: list[str], scratch: Path) -> Reports:
    """What came of the prompts with each cache, in so few blocks that requests are preempted."""
    from transformers import AutoTokenizer

    from .reports import Reports

    tokens = AutoTokenizer.from_pretrained(model)(text[8000:20000])["input_ids"]
    scored = [tokens[i * 600 : (i + 1) * 600] for i in range(3 if LONG else 1)]
    return Reports(scratch, model=model, prompts=prompts, scored=scored)
