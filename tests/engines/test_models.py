"""The engine on small models of random weights: memory, tensor parallelism, sliding windows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import LONG
from .offline import Job, Report, differences, run

pytestmark = pytest.mark.timeout(3600)
long = pytest.mark.skipif(not LONG, reason="make test-vllm")
TOKENS = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 128}


def save(kind: str, folder: Path, **options: Any) -> str:
    """A model of random weights; returns its folder."""
    import transformers

    torch.manual_seed(0)
    config_of = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")
    config = config_of(vocab_size=512, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)  # so that the next token depends on those before it
    model.save_pretrained(folder / kind)
    return str(folder / kind)


@pytest.fixture(scope="module")
def llama(scratch: Path) -> str:
    return save(
        "Llama", scratch, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, max_position_embeddings=2048,
    )  # fmt: skip


def numbers(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]


def ask(model: str, backend: str | None, **engine: Any) -> Report:
    prompts = numbers(5, 70, 200, 300, 31, 129)
    return run(
        Job(
            model=model, prompts=prompts, backend=backend, engine={**TOKENS, **engine},
            max_tokens=24, alone=len(prompts) if engine.get("tensor_parallel_size", 1) == 1 else 0,
        )
    )  # fmt: skip


@long
def test_the_engine_counts_almost_twice_the_tokens(llama: str) -> None:
    memory = {"kv_cache_memory_bytes": 64 << 20, "dtype": "bfloat16"}
    own = run(Job(llama, numbers(5), engine={**TOKENS, **memory}, max_tokens=2))
    ours = run(
        Job(llama, numbers(5), "KVQUANT", {**TOKENS, **memory, "block_size": 256}, max_tokens=2)
    )
    for name, report in (("bfloat16", own), ("kvquant", ours)):
        (line,) = re.findall(r"KV cache size: [\d,]+ tokens", report.log)
        print(f"\n{name}: {line}")
    assert ours.capacity >= 1.9 * own.capacity


def test_two_ranks_give_the_tokens_of_one(llama: str) -> None:
    one = ask(llama, "KVQUANT")
    two = ask(llama, "KVQUANT", tensor_parallel_size=2, distributed_executor_backend="mp")
    assert [a.tokens for a in two.batch] == [a.tokens for a in one.batch]


@pytest.mark.parametrize("block_size", [64, pytest.param(256, marks=long)])
def test_pages_that_come_back_from_other_memory_read_the_same(llama: str, block_size: int) -> None:
    """Through vLLM's offloading connector; every bit of the logits' margins is the same."""
    prompts = numbers(300, 130, 470)
    engine = {**TOKENS, "block_size": block_size}
    report = run(Job(llama, prompts, "KVQUANT", engine, reloaded=len(prompts)))
    for kept, reloaded in zip(report.kept, report.reloaded, strict=True):
        assert kept == reloaded
    assert sum(answer.cached for answer in report.reloaded) >= 512


WINDOWED = {
    "Gemma3": dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=96, max_position_embeddings=2048,
        sliding_window_pattern=6,
    ),
    "GptOss": dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64, sliding_window=128, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=2048,
    ),
}  # fmt: skip


@long
@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("block_size", [64, 256])
def test_layers_with_a_window_give_blocks_back(kind: str, block_size: int, scratch: Path) -> None:
    model = save(kind, scratch, **WINDOWED[kind])
    own = ask(model, None, block_size=block_size)
    ours = ask(model, "KVQUANT", block_size=block_size)
    for found, expected in ((ours.batch, ours.alone), (ours.batch, own.batch)):
        _, wrong = differences(found, expected, 5e-2)
        assert not wrong
