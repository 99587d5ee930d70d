"""64 prompts of mixed length through `generate_batch`, beside one by one and beside DynamicCache.

On the CPU: SmolLM2-135M reads pieces of a text; each answer is compared with that of one prompt at
a time on the same cache. On a GPU: random weights in the shape of Llama 3.1 8B.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import Report
from benchmarks.generate import Clock, greedy
from benchmarks.step import flash_only
from kvquant.compat.qwen import apply_switches, generate_batch

TIE = 0.05  # logits this near may change places: 8 bits of a batch's rows round alike, sums do not


def prompts_of(text: str, count: int, longest: int) -> list[str]:
    """Pieces of a text, of 40 to ``longest`` characters."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, longest, (count,), generator=generator).tolist()
    begins = torch.randint(0, len(text) - longest, (count,), generator=generator).tolist()
    return [text[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts through one way.

    Attributes:
        answers: Their new tokens.
        margins: By how much each token's logit beats the runner-up's; empty where not asked for.
        seconds: Of everything.
        step_ms: Median milliseconds between two tokens of a batch, or of a prompt.
    """

    answers: list[Tensor]
    margins: list[Tensor]
    seconds: float
    step_ms: float


def one_by_one(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> Run:
    """Prompt after prompt, each with an 8-bit cache of its own."""
    from kvquant.integrations.transformers import KVQuantCache

    answers, margins, steps, begin = [], [], [], time.perf_counter()
    for prompt in prompts:
        ids, clock = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device), Clock()
        out = greedy(
            model, ids, KVQuantCache(model, exact_prompt=False), tokens, clock,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        top = torch.stack(out.logits)[:, 0].float().topk(2).values
        answers.append(out.sequences[0, ids.shape[1] :].cpu())
        margins.append((top[:, 0] - top[:, 1]).cpu())
        steps += clock.steps
    return Run(answers, margins, time.perf_counter() - begin, statistics.median(steps))


def agreement(expected: Run, found: Run) -> dict[str, Any]:
    """Answers that are equal, that part at a near tie, and that part elsewhere.

    ``widest``: the largest margin at which answers part.
    """
    counts: dict[str, Any] = {"equal": 0, "near_ties": 0, "other": 0, "widest": 0.0}
    for want, margins, got in zip(expected.answers, expected.margins, found.answers, strict=True):
        differs = (want != got[: len(want)]).nonzero()
        if not len(differs):
            counts["equal"] += 1
        else:
            margin = float(margins[differs[0]])
            counts["near_ties" if margin < TIE else "other"] += 1
            counts["widest"] = max(counts["widest"], round(margin, 4))
    return counts


def batched(
    model: Any, tokenizer: Any, prompts: list[str], tokens: int, *, exact_prompt: bool
) -> Run:
    """Through `generate_batch`."""
    clock, begin = Clock(), time.perf_counter()
    answers = generate_batch(
        model, tokenizer, prompts, max_new_tokens=tokens, min_new_tokens=tokens,
        exact_prompt=exact_prompt, do_sample=False, return_tokens=True, stopping_criteria=[clock],
    )  # fmt: skip
    return Run(answers, [], time.perf_counter() - begin, statistics.median(clock.steps))


class Letters:
    """A tokenizer of single characters, for models of random weights."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"input_ids": [1 + ord(c) % 1000 for c in text]}


def random_model(name: str, device: str) -> Any:
    """Random weights in bf16, in the shape of a model of `kvquant.fit`."""
    from transformers import AutoModelForCausalLM

    from kvquant.fit import read_config

    config = read_config(name)
    config.eos_token_id = config.bos_token_id = None
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    count: int = 64,
    tokens: int = 32,
    longest: int = 160,
    model: Annotated[
        str | None, typer.Option(help="Of random weights, see kvquant fit; SmolLM2 on the CPU.")
    ] = "llama-3.1-8b" if torch.cuda.is_available() else None,
    dtype: Annotated[
        str, typer.Option(help="In bfloat16 logits are 0.06 and more apart: all is a near tie.")
    ] = "bfloat16" if torch.cuda.is_available() else "float32",
) -> None:
    """Print tokens/s of `generate_batch` and of its peers, and how many answers agree.

    Example: python -m benchmarks batch --device cpu --json batch.json
    """
    torch.set_grad_enabled(False)
    on_gpu = device == "cuda"
    if model is not None:
        tokenizer, loaded = Letters(), random_model(model, device)
        text = "".join(chr(33 + (i * i * 7 + i) % 90) for i in range(longest * 3))
    else:
        from kvquant.demo.assets import TEXT, cache_folder, fetch
        from kvquant.demo.model import load

        folder = cache_folder()
        tokenizer, loaded = load(folder)
        text = fetch(TEXT, folder).read_text(encoding="latin-1")[20_000:]
    what = "SmolLM2-135M" if model is None else f"random weights, {model}"
    what = f"{what}, {dtype}"
    loaded = loaded.to(dtype=getattr(torch, dtype))
    prompts = prompts_of(text, count, longest)
    report = Report(
        f"{count} prompts, {tokens} new tokens each, {what}", threads=torch.get_num_threads()
    )

    def add(how: str, run: Run, note: str = "") -> None:
        report.add(
            how=how, seconds=run.seconds, tokens_per_s=count * tokens / run.seconds,
            step_ms=run.step_ms, ratio=run.seconds / ours.seconds, note=note,
        )  # fmt: skip
        report.save(json)

    apply_switches(loaded, use_cache_quantization=True)
    batched(loaded, tokenizer, prompts[:2], 8, exact_prompt=on_gpu)  # warm up
    ours = batched(loaded, tokenizer, prompts, tokens, exact_prompt=on_gpu)
    add("generate_batch, 8 bits", ours)
    if not on_gpu:
        alone = one_by_one(loaded, tokenizer, prompts, tokens)
        counts = agreement(alone, ours)
        add("one by one, 8 bits", alone, " ".join(f"{k} {v}" for k, v in counts.items()))
    apply_switches(loaded, use_cache_quantization=False)
    loaded.set_attn_implementation("sdpa")
    batched(loaded, tokenizer, prompts[:2], 8, exact_prompt=on_gpu)
    wide = batched(loaded, tokenizer, prompts, tokens, exact_prompt=on_gpu)
    add("generate_batch, DynamicCache", wide)
    if on_gpu:  # cuDNN makes a plan for each length
        with flash_only():
            wide = batched(loaded, tokenizer, prompts, tokens, exact_prompt=on_gpu)
        add("generate_batch, DynamicCache without cuDNN", wide)
    report.finish(json)
