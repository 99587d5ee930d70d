"""The engine with its scheduler, prefix cache, chunked prefill and preemption, on prompts of mixed
length: each request's text is what it is alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .conftest import LONG
from .offline import Job, differences, run
from .reports import OURS, OWN, OWN16, TOLERANCE, Reports, tell

pytestmark = pytest.mark.timeout(3600)
MOST_DIVERGENCE = {"KVQUANT_PLAIN": 1e-3, "KVQUANT": 3e-4}  # plain rows know no rotation and mean


@pytest.mark.parametrize("name", OURS)
def test_a_request_gets_the_text_that_it_gets_alone(name: str, reports: Reports) -> None:
    report = reports[name]
    ties, wrong = differences(report.batch, report.alone, TOLERANCE[name])
    assert not wrong
    if LONG:  # differences at near-equal logits, as the engine has them with its own cache
        own = differences(reports[OWN16].batch, reports[OWN16].alone, TOLERANCE[name])
        print(f"\n{name}: {ties}; the engine's own 16 bits: {own[0]}, and {len(own[1])} elsewhere")
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
    tell(name, report)
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
