"""The engine with its scheduler, prefix cache, chunked prefill and preemption, on prompts of mixed
length: each request's text is what it is alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .conftest import LONG
from .offline import Job, Report, differences, run

pytestmark = pytest.mark.timeout(3600)

# Blocks of 64 tokens for about half of what 16 requests hold at once.
ENGINE = {"block_size": 64, "num_gpu_blocks_override": 40}
TOLERANCE = {"KVQUANT_PLAIN": 1e-2, "KVQUANT": 5e-2, None: 1e-2}


@pytest.fixture(scope="module")
def scored(model: str, text: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text[8000:20000])["input_ids"]
    return [tokens[i * 600 : (i + 1) * 600] for i in range(3 if LONG else 1)]


@pytest.fixture(scope="module")
def reports(
    model: str, prompts: list[str], scored: list[list[int]], scratch: Path
) -> dict[str | None, Report]:
    """Of each backend; None: the engine's own."""
    found = {}
    for backend in TOLERANCE:
        found[backend] = run(
            Job(
                model=model, prompts=prompts, backend=backend, engine=ENGINE, again=4,
                alone=len(prompts), max_tokens=16, logits=str(scratch / f"{backend}.pt"),
                scored=scored,
            )
        )  # fmt: skip
        report = found[backend]
        ties, wrong = differences(report.batch, report.alone, TOLERANCE[backend])
        print(
            f"{backend}: {len(prompts)} requests, {report.preemptions} preemptions, "
            f"{sum(a.cached for a in report.batch)} tokens from the prefix cache, {ties} differ at "
            f"near-equal logits, {len(wrong)} elsewhere"
        )
    return found


@pytest.mark.parametrize("backend", ["KVQUANT_PLAIN", "KVQUANT"])
def test_a_request_gets_the_text_that_it_gets_alone(
    backend: str, reports: dict[str | None, Report]
) -> None:
    report = reports[backend]
    ties, wrong = differences(report.batch, report.alone, TOLERANCE[backend])
    assert not wrong
    own, _ = differences(reports[None].batch, reports[None].alone, TOLERANCE[backend])
    if backend == "KVQUANT_PLAIN":
        assert ties <= own + len(report.batch) // 32


@pytest.mark.parametrize("backend", ["KVQUANT_PLAIN", "KVQUANT"])
def test_requests_were_preempted_and_read_shared_pages(
    backend: str, reports: dict[str | None, Report]
) -> None:
    report = reports[backend]
    if LONG:
        assert report.preemptions
    assert sum(answer.cached for answer in report.batch)
    assert all(answer.cached for answer in report.again if len(answer.tokens) > 16)
    _, wrong = differences(report.again, report.batch[: len(report.again)], TOLERANCE[backend])
    assert not wrong


@pytest.mark.parametrize("backend", ["KVQUANT_PLAIN", "KVQUANT"])
def test_prompt_logprobs_are_those_of_the_engine_s_own_cache(
    backend: str, reports: dict[str | None, Report], scratch: Path
) -> None:
    own, ours = (torch.load(scratch / f"{name}.pt") for name in (None, backend))
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), own.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    print(f"{backend}: mean KL divergence {divergence:.2e} over {len(own)} tokens")
    assert divergence <= 3e-4
