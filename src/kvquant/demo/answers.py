"""The same questions to the model with a 16-bit cache and with an 8-bit one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .model import cache_argument, use_attention_of
from .quality import rounded_cache

__all__ = ["PROMPTS", "Answer", "answer"]

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about a cat.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and what the model said with each cache.

    Attributes:
        prompt: The question.
        wide: With the 16-bit cache.
        kvquant: With the 8-bit cache.
    """

    prompt: str
    wide: str
    kvquant: str


@torch.no_grad()
def answer(tokenizer: Any, model: Any, prompt: str, *, tokens: int = 40) -> Answer:
    """Greedy answers; the 16-bit cache is a DynamicCache, of a float32 model rounded to bf16."""
    from transformers import DynamicCache

    from ..integrations.transformers import KVQuantCache

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    wide = (
        rounded_cache(model.config, torch.bfloat16)
        if model.dtype == torch.float32
        else DynamicCache(config=model.config)
    )
    said = []
    for cache in (wide, KVQuantCache(model)):
        use_attention_of(model, cache)
        output = model.generate(
            **inputs, **cache_argument(cache), do_sample=False, max_new_tokens=tokens
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        said.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return Answer(prompt, *said)
