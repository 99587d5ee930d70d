"""The engine with its scheduler, prefix cache, chunked prefill and preemption, on prompts of mixed
length: each request's text is what it is alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import LONG
from .offline import Job, Report, differences, run

pytestmark = pytest.mark.timeout(3600)

# Blocks of 64 tokens for about half of what 16 requests hold at once.
ENGINE = {"block_size": 64, "num_gpu_blocks_override": 40}
OWN, OWN16 = "the engine's own", "the engine's own, 16 bits"
TOLERANCE = {"KVQUANT_PLAIN": 1e-2, "KVQUANT": 5e-2, OWN: 1e-2, OWN16: 1e-2}
OURS = ["KVQUANT_PLAIN", "KVQUANT"] if LONG else ["KVQUANT"]
MOST_DIVERGENCE = {"KVQUANT_PLAIN": 1e-3, "KVQUANT": 3e-4}  # plain rows know no rotation and mean


@pytest.fixture(scope="module")
def scored(model: str, text: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text[8000:20000])["input_ids"]
    return [tokens[i * 600 : (i + 1) * 600] for i in range(3 if LONG else 1)]


class Reports(dict[str, Report]):
    """Of each cache, when it is first asked for. vLLM's own has 16 bits only where the whole model
    has.
    """

    def __init__(self, scratch: Path, **job: Any) -> None:
        super().__init__()
        self._scratch, self._job = scratch, job

    def __missing__(self, name: str) -> Report:
        self[name] = run(
            Job(
                backend=name if name in OURS else None, again=4, alone=len(self._job["prompts"]),
                engine={**ENGINE, "dtype": "bfloat16" if name == OWN16 else "float32"},
                logits=str(self._scratch / f"{name}.pt"), **self._job,
            )
        )  # fmt: skip
        _tell(name, self[name])
        return self[name]


@pytest.fixture(scope="module")
def reports(model: str, prompts: list[str], scored: list[list[int]], scratch: Path) -> Reports:
    return Reports(scratch, model=model, prompts=prompts, scored=scored)


def _tell(name: str, report: Report) -> None:
    ties, wrong = differences(report.batch, report.alone, TOLERANCE[name])
    print(
        f"\n{name}: {len(report.batch)} requests, {report.preemptions} preemptions, "
        f"{sum(a.cached for a in report.batch)} tokens from the prefix cache, {ties} differ at "
        f"near-equal logits, {len(wrong)} elsewhere"
    )


@pytest.mark.parametrize("name", OURS)
def test_a_request_gets_the_text_that_it_gets_alone(name: str, reports: Reports) -> None:
    report = reports[name]
    ties, wrong = differences(report.batch, report.alone, TOLERANCE[name])
    assert not wrong
    if LONG:  # differences at near-equal logits, as the engine has them with its own cache
        own = differences(reports[OWN16].batch, reports[OWN16].alone, TOLERANCE[name])
        print(f"\n{name}: {ties}; the engine's own 16 bits: {own[0]}, and {len(own[1])} elsewhere")
        if name == "KVQUANT_PLAIN":
            assert ties <= own[0] + len(own[1])


@pytest.mark.parametrize("name", OURS)
def test_requests_read_the_pages_of_others(name: str, reports: Reports) -> None:
    report = reports[name]
    assert sum(answer.cached for answer in report.batch)
    assert sum(answer.cached for answer in report.again)
    _, wrong = differences(report.again, report.batch[: len(report.again)], TOLERANCE[name])
    assert not wrong


@pytest.mark.parametrize("name", OURS)
def test_preempted_requests_go_on(name: str, model: str, text: str) -> None:
    """Eight requests fill all blocks, and each needs one more before it ends."""
    prompts = [text[4000 + 900 * i :][:180] for i in range(8)]
    engine = {"block_size": 64, "num_gpu_blocks_override": 9, "max_model_len": 256}
    report = run(
        Job(model=model, prompts=prompts, backend=name, engine=engine, max_tokens=40, alone=8)
    )
    _tell(name, report)
    assert report.preemptions
    _, wrong = differences(report.batch, report.alone, TOLERANCE[name])
    assert not wrong


@pytest.mark.skipif(not LONG, reason="needs the engine's own cache too: make test-vllm")
@pytest.mark.parametrize("name", OURS)
def test_prompt_logprobs_are_those_of_the_engine_s_own_cache(
    name: str, reports: Reports, scratch: Path
) -> None:
    for of in (OWN, name):
        assert reports[of].batch  # which leaves its logits
    own, ours = (torch.load(scratch / f"{of}.pt") for of in (OWN, name))
    assert own.shape == ours.shape
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), own.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    print(f"\n{name}: mean KL divergence {divergence:.2e} over {len(own)} tokens")
    assert divergence <= MOST_DIVERGENCE[name]
