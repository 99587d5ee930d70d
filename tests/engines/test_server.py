"""vLLM's OpenAI server with a kvquant cache, many requests at once, some of them streamed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import LONG
from .offline import ENVIRONMENT, Answer, differences
from .reports import TOLERANCE, Reports

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LONG, reason="starts a server: make test-vllm"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_serve.py"
OPTIONS = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def server(model: str, scratch: Path) -> Iterator[str]:
    """The address of the example's server."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [
        sys.executable, EXAMPLE, "--serve", model, f"--port={port}", "--host=127.0.0.1",
        "--dtype=float32", "--enforce-eager", "--block-size=64", "--max-logprobs=5",
        f"--kv-cache-memory-bytes={256 << 20}", *options,
    ]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert process.poll() is None, (scratch / "server.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except (urllib.error.URLError, TimeoutError):
                    time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait()


def complete(address: str, model: str, prompt: str, stream: bool) -> Answer:
    body = {
        "model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 2,
        "stream": stream, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    parts: list[Any] = []
    with urllib.request.urlopen(request, timeout=3000) as response:
        if stream:
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    parts += json.loads(data)["choices"]
        else:
            parts = json.loads(response.read())["choices"]
    tokens, margins = [], []
    for part in parts:
        if part["logprobs"]:
            tokens += [int(name.split(":")[1]) for name in part["logprobs"]["tokens"]]
            for step in part["logprobs"]["top_logprobs"]:
                best = sorted(step.values())
                margins.append(best[-1] - best[-2])
    return Answer(tokens, margins, "".join(part["text"] for part in parts), 0)


def test_requests_at_once_get_what_they_get_alone(
    server: str, model: str, prompts: list[str], reports: Reports
) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(
                lambda item: complete(server, model, item[1], stream=item[0] % 2 == 1),
                enumerate(prompts),
            )
        )
    alone = reports["KVQUANT"].alone
    ties, wrong = differences(found, alone, TOLERANCE["KVQUANT"])
    texts = sum(a.text == b.text for a, b in zip(found, alone, strict=True))
    print(f"\n{len(found)} requests, {texts} with the same text, {ties} differ near ties")
    assert not wrong
