"""Prompts through vLLM's offline API, in a process of its own: what came out, as JSON.

python -m tests.engines.offline '{"backend": "KVQUANT", ...}': see `Job`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# One thread: OpenMP's would spin on cores that other processes need.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}

#: To where vLLM offloads pages, if a job asks for that.
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "HostSpec",
        "spec_module_path": "tests.engines.offloading",
        "cpu_bytes_to_use": 64 << 20,
    },
}


@dataclass
class Job:
    """What to run.

    Attributes:
        model: Its folder.
        prompts: Texts, or lists of tokens.
        backend: vLLM's name of an attention backend; None: its own choice.
        engine: Further arguments of ``LLM``.
        max_tokens: Of each answer.
        again: How many prompts are asked a second time, from the prefix cache.
        alone: How many prompts are asked one by one, with an empty prefix cache.
        reloaded: How many prompts are asked one by one from the prefix cache, and once more after
            all pages were overwritten, from where vLLM has offloaded them.
        logits: Where the logits of ``scored`` go, as a tensor of all their tokens.
        scored: Prompts whose logits are taken.
    """

    model: str
    prompts: list[Any]
    backend: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 16
    again: int = 0
    alone: int = 0
    reloaded: int = 0
    logits: str | None = None
    scored: list[Any] = field(default_factory=list)


@dataclass
class Answer:
    """Tokens, and how far the best logit of each was above the second."""

    tokens: list[int]
    margins: list[float]
    text: str
    cached: int


@dataclass
class Report:
    """What came of a job.

    Attributes:
        batch: The answers of all prompts together.
        again: The answers of those asked again.
        alone: The answers of those asked alone.
        kept: The answers of those asked one by one from the prefix cache.
        reloaded: The answers of the same from offloaded pages.
        preemptions: Counted by vLLM in the first batch.
        capacity: Tokens for which vLLM has blocks.
        log: What the process printed.
    """

    batch: list[Answer]
    again: list[Answer]
    alone: list[Answer]
    kept: list[Answer]
    reloaded: list[Answer]
    preemptions: int
    capacity: int
    log: str = ""


def run(job: Job, **environment: str) -> Report:
    """The job's report, from a new process."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "tests.engines.offline", json.dumps(asdict(job)), str(path)],
            cwd=root,
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-12000:]}\nexit status {done.returncode}")
        found = json.loads(path.read_text())
    for name in ("batch", "again", "alone", "kept", "reloaded"):
        found[name] = [Answer(**answer) for answer in found[name]]
    return Report(**{**found, "log": done.stdout})


def differences(
    found: list[Answer], expected: list[Answer], tolerance: float
) -> tuple[int, list[int]]:
    """How many answers first differ where two logits are within ``tolerance``, and which answers
    differ elsewhere.
    """
    ties, wrong = 0, []
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.tokens == theirs.tokens:
            continue
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is not None and min(ours.margins[at], theirs.margins[at]) < tolerance:
            ties += 1
        else:
            wrong.append(index)
    return ties, wrong


def _main(job: Job) -> Report:
    from vllm import LLM, SamplingParams, TokensPrompt

    from kvquant.integrations.vllm import FORMATS, cache_dtype

    engine: dict[str, Any] = {
        **({"kv_transfer_config": OFFLOADING} if job.reloaded else {}),
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16,
        "kv_cache_memory_bytes": 256 << 20, "max_num_batched_tokens": 256, **job.engine,
    }  # fmt: skip
    if job.backend is not None:
        engine["attention_backend"] = job.backend
    if job.backend in FORMATS:
        engine.setdefault("kv_cache_dtype", cache_dtype())
    llm = LLM(model=job.model, disable_log_stats=False, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=job.max_tokens, logprobs=2)

    def ask(prompts: list[Any]) -> list[Answer]:
        inputs = [x if isinstance(x, str) else TokensPrompt(prompt_token_ids=x) for x in prompts]
        answers = []
        for request in llm.generate(inputs, sampling, use_tqdm=False):
            answer = request.outputs[0]
            best = [sorted(x.logprob for x in step.values()) for step in answer.logprobs]
            answers.append(
                Answer(
                    tokens=list(answer.token_ids),
                    margins=[x[-1] - x[-2] for x in best],
                    text=answer.text,
                    cached=request.num_cached_tokens or 0,
                )
            )
        return answers

    batch = ask(job.prompts)
    preemptions = _counter(llm, "vllm:num_preemptions")
    again = ask(job.prompts[: job.again]) if job.again else []
    alone = []
    for prompt in job.prompts[: job.alone]:
        llm.reset_prefix_cache()
        alone += ask([prompt])
    kept = [ask([prompt])[0] for prompt in job.prompts[: job.reloaded]]
    if job.reloaded:
        llm.collective_rpc(_overwrite)
        llm.reset_prefix_cache()
    reloaded = [ask([prompt])[0] for prompt in job.prompts[: job.reloaded]]
    if job.logits is not None:
        _score(llm, job)
    config = llm.llm_engine.vllm_config.cache_config
    return Report(
        batch, again, alone, kept, reloaded, preemptions, config.num_gpu_blocks * config.block_size
    )


def _overwrite(worker: Any) -> None:
    """Every page of a process of vLLM's."""
    for pages in worker.model_runner.kv_caches:
        pages.fill_(-1)


def _counter(llm: Any, name: str) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)


def _score(llm: Any, job: Job) -> None:
    """The logits from which vLLM takes the ``prompt_logprobs`` of the scored prompts."""
    import torch
    from vllm import SamplingParams, TokensPrompt

    rows: list[Any] = []

    def keep(model: Any) -> None:
        inner = model.compute_logits

        def compute_logits(hidden: Any) -> Any:
            logits = inner(hidden)
            rows.append(logits.float().clone())
            return logits

        model.compute_logits = compute_logits

    llm.apply_model(keep)
    for tokens in job.scored:
        llm.generate(
            TokensPrompt(prompt_token_ids=tokens),
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
    torch.save(torch.cat(rows), job.logits)


if __name__ == "__main__":
    report = _main(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(asdict(report)))
