"""vLLM's decode steps with kvquant's cache beside its own, through its scheduler and model runner.

``python -m benchmarks serve`` starts one engine a cache, each in a process of its own, on a Llama
of random weights: requests of equal length are read, then decode together, in CUDA graphs. The time
of a step is that of later tokens, the first ones of each request left out. kvquant's engine and
that with 16 bits run without graphs, too: how many answers are the same. Where vLLM has its
compiled kernels, ``--client`` also runs its own benchmark client against a server with each cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Report

# What each cache is chosen by: a backend and a cache dtype of vLLM's; None: as vLLM chooses.
CACHES: dict[str, tuple[str | None, str | None]] = {
    "kvquant": ("KVQUANT", None),
    "16 bits": (None, "auto"),
    "fp8": (None, "fp8"),
    "int8_per_token_head": (None, "int8_per_token_head"),
}


@dataclass
class Case:
    """One engine and its requests.

    Attributes:
        cache: One of `CACHES`.
        batch: Requests at once.
        context: Tokens of each prompt.
        steps: Decode steps whose time is taken.
        layers: Of the model.
        heads: Query heads; a fourth as many of keys and values, of 128 channels.
        memory: Bytes of the cache.
        eager: Without CUDA graphs.
        backend: vLLM's own backend for its own caches.
        native: Without vLLM's compiled operators.
    """

    cache: str
    batch: int
    context: int
    steps: int
    layers: int
    heads: int
    memory: int
    eager: bool
    backend: str | None
    native: bool


def save_model(folder: Path, case: Case) -> None:
    """A Llama of random weights, without a tokenizer."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=case.heads * 128, intermediate_size=case.heads * 256,
        num_hidden_layers=case.layers, num_attention_heads=case.heads,
        num_key_value_heads=case.heads // 4, head_dim=128, max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"], dtype="float16",
    )  # fmt: skip
    config.save_pretrained(folder)


def randomize(model: torch.nn.Module) -> None:
    """Weights with which answers vary: vLLM's own are so small that each token repeats itself."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(std=weight.shape[1] ** -0.5)


def decode(case: Case, wait: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of a decode step, and tokens that fit: in this process.

    Args:
        case: What to run.
        wait: Called when the engine stands, before it works.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    from kvquant.integrations.vllm import cache_dtype

    backend, dtype = CACHES[case.cache]
    options: dict[str, Any] = {}
    if case.native:
        options["compilation_config"] = {
            "custom_ops": ["none"], "mode": 0,
            "cudagraph_mode": "NONE" if case.eager else "FULL_DECODE_ONLY",
        }  # fmt: skip
        operators = ("rms_norm", "fused_add_rms_norm", "gelu_and_mul_sparse")
        options["kernel_config"] = {
            "ir_op_priority": {name: ["native"] for name in operators}, "enable_jit_warmup": False,
        }  # fmt: skip
    if (chosen := backend or case.backend) is not None:
        options["attention_backend"] = chosen
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), case)
        llm = LLM(
            model=folder, skip_tokenizer_init=True, load_format="dummy", dtype="float16",
            kv_cache_dtype=dtype or cache_dtype(), max_num_seqs=case.batch, seed=0,
            max_model_len=case.context + case.steps + 64, kv_cache_memory_bytes=case.memory,
            gpu_memory_utilization=0.1, enforce_eager=case.eager, enable_prefix_caching=False,
            disable_log_stats=True, **options,
        )  # fmt: skip
    llm.apply_model(randomize)
    wait()
    torch.manual_seed(0)
    prompts = torch.randint(0, 4000, (case.batch, case.context)).tolist()
    times: list[float] = []
    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=0, max_tokens=case.steps + 8, ignore_eos=True, detokenize=False
    )
    for i, tokens in enumerate(prompts):
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=tokens), sampling)
    answers: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - begin)
        answers.update({out.request_id: list(out.outputs[0].token_ids) for out in outputs})
    config = engine.vllm_config.cache_config
    return {
        "ms": statistics.median(times[-case.steps :]) * 1e3,
        "capacity": config.num_gpu_blocks * config.block_size,
        "answers": [answers[str(i)] for i in range(case.batch)],
    }


class Engine:
    """`decode` in a process of its own, which starts at once and works when it is told to."""

    def __init__(self, case: Case, folder: Path, log: Path) -> None:
        self.case, self._folder = case, folder
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve", json.dumps(asdict(case)), str(folder)],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> None:
        """Until the engine stands, or has failed."""
        while not (self._folder / "stands").exists() and self._process.poll() is None:
            time.sleep(0.1)

    def work(self) -> tuple[dict[str, Any] | None, str]:
        """The figures, None where it failed; and what it printed."""
        self._process.communicate("go\n")
        self._log.seek(0)
        printed = self._log.read()
        if self._process.returncode:
            return None, printed
        return json.loads((self._folder / "figures.json").read_text()), printed


def _main(case: Case, folder: Path) -> None:
    def wait() -> None:
        (folder / "stands").touch()
        if not sys.stdin.readline():
            sys.exit("nobody waits for the figures any more")

    (folder / "figures.json").write_text(json.dumps(decode(case, wait)))


def client(model: str, cache: str, port: int, requests: int) -> str:
    """What vLLM's own benchmark client prints against a server with this cache."""
    from kvquant.integrations.vllm import cache_dtype

    backend, dtype = CACHES[cache]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    chosen = ["--attention-backend", backend] if backend else []
    options = ["--port", str(port), "--kv-cache-dtype", dtype or cache_dtype(), *chosen]
    server = subprocess.Popen([*vllm, "serve", model, *options])
    try:
        return subprocess.run(
            [
                *vllm, "bench", "serve", "--model", model, "--port", str(port), "--dataset-name",
                "random", "--num-prompts", str(requests), "--ready-check-timeout-sec", "600",
            ],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    finally:
        server.terminate()
        server.wait()


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    batch: int = 32,
    context: int = 4096,
    steps: int = 40,
    layers: int = 4,
    heads: int = 32,
    gib: float = 20,
    backend: Annotated[str | None, typer.Option(help="vLLM's own, for its own caches")] = None,
    native: Annotated[bool, typer.Option(help="without vLLM's compiled operators")] = False,
    caches: str = ",".join(CACHES),
    together: Annotated[bool, typer.Option(help="engines start at once, and take turns")] = False,
    log: Annotated[Path | None, typer.Option(help="a folder for what the engines print")] = None,
    model: Annotated[str | None, typer.Option("--client", help="a model to serve")] = None,
) -> None:
    """Time vLLM's decode steps with kvquant's cache and with its own.

    Example: python -m benchmarks serve --json serve.json
    """
    report = Report(
        f"vLLM, a decode step of {layers} layers: {batch} requests of {context} tokens; fits: "
        "tokens that the cache has room for; same: answers that are those without graphs"
    )
    cases = [
        Case(
            cache, batch, context, steps, layers, heads, int(gib * 2**30), without, backend, native
        )
        for cache in caches.split(",")
        for without in ((True, False) if cache in ("kvquant", "16 bits") else (False,))
    ]  # fmt: skip
    eager: dict[str, list[list[int]]] = {}  # answers of each cache
    for turn in [cases] if together else [[case] for case in cases]:
        with tempfile.TemporaryDirectory() as scratch:
            engines = []
            for number, case in enumerate(turn):
                (folder := Path(scratch) / str(number)).mkdir()
                (logs := log or folder).mkdir(parents=True, exist_ok=True)
                mode = "eager" if case.eager else "graphs"
                engines.append(Engine(case, folder, logs / f"{case.cache}, {mode}.log"))
            for engine in engines:
                engine.wait()
            for engine in engines:
                case, (found, printed) = engine.case, engine.work()
                if found is None:
                    print(f"{case}: failed\n{printed[-3000:]}", flush=True)
                    continue
                same = ""
                if case.eager:
                    eager[case.cache] = found["answers"]
                elif case.cache in eager:
                    pairs = zip(eager[case.cache], found["answers"], strict=True)
                    same = f"{sum(a == b for a, b in pairs)} of {batch}"
                report.add(
                    cache=case.cache, graphs="no" if case.eager else "yes", ms=found["ms"],
                    fits=found["capacity"], same=same,
                )  # fmt: skip
                report.save(json_path)
    if report.rows:
        report.print()
    if model is not None:
        for port, cache in enumerate(("kvquant", "16 bits", "fp8"), start=8100):
            print(f"{cache}\n{client(model, cache, port, requests=200)}")


if __name__ == "__main__":
    _main(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]))
