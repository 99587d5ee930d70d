"""Many prompts at once: the answers of one by one, in order, in batches that fit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.compat.qwen import apply_switches, batches, generate_batch  # noqa: E402
from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    GraphStep,
    KVQuantCache,
)
from tiny import make  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]
TOKENS = 12


class Letters:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id = None, 3

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(c) % 93 for c in text]}

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(33 + int(i)) for i in ids if i != self.eos_token_id)


def prompts_of(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [
        "".join(chr(33 + (7 * i * i + 31 * n) % 90) for i in range(length))
        for n, length in enumerate(lengths)
    ]


def model_of(name: str, device: str, *, quantized: bool = True) -> Any:
    return apply_switches(
        make(name, device, "sdpa"), use_cache_quantization=quantized, log=lambda line: None
    )


def one_by_one(model: Any, prompt: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A prompt's new tokens, and by how much each beats the runner-up."""
    ids = torch.tensor([Letters()(prompt)["input_ids"]], device=model.device)
    out = model.generate(
        ids, do_sample=False, max_new_tokens=TOKENS, output_logits=True, pad_token_id=3,
        return_dict_in_generate=True, **{CACHE_ARGUMENT: KVQuantCache(model, exact_prompt=False)},
        **options,
    )  # fmt: skip
    top = torch.stack(out.logits)[:, 0].float().topk(2).values
    return out.sequences[0, ids.shape[1] :].cpu(), (top[:, 0] - top[:, 1]).cpu()


def same_but_for_ties(expected: Tensor, margins: Tensor, found: Tensor, tie: float) -> bool:
    """Whether tokens are equal up to the first at which the runner-up was as good."""
    for want, margin, got in zip(expected, margins, found, strict=False):
        if want != got:
            return bool(margin < tie)
    return len(expected) == len(found)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-sliding"])
def test_answers_are_those_of_one_by_one(name: str, device: str) -> None:
    model, prompts = model_of(name, device), prompts_of(24)
    found = generate_batch(
        model, Letters(), prompts, max_new_tokens=TOKENS, exact_prompt=False, batch_size=10,
        do_sample=False, return_tokens=True, progress=False, eos_token_id=3,
    )  # fmt: skip
    equal = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        expected, margins = one_by_one(model, prompt, eos_token_id=3)
        assert same_but_for_ties(expected, margins, tokens, 1e-3 if device == "cpu" else 1e-1)
        equal += torch.equal(tokens, expected)
    assert equal >= 20


def test_texts_come_in_order_without_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of("llama", "cpu"), prompts_of(7)
    options = {"max_new_tokens": 5, "do_sample": False, "progress": False}
    texts = generate_batch(model, Letters(), prompts, **options)
    tokens = generate_batch(model, Letters(), prompts, return_tokens=True, **options)
    assert texts == [Letters().decode(of, True) for of in tokens]
    assert all(len(of) == 5 for of in tokens)
    end = int(tokens[0][1])
    first = next(i for i, token in enumerate(tokens[0]) if token == end)
    ended = generate_batch(
        model, Letters(), prompts, return_tokens=True, eos_token_id=end, **options
    )
    assert ended[0].tolist() == tokens[0][: first + 1].tolist()


@pytest.mark.gpu
def test_steps_are_replayed_on_a_gpu(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    close = GraphStep.close

    def watched(step: GraphStep) -> None:
        made.append(step.calls.copy())
        close(step)

    monkeypatch.setattr(GraphStep, "close", watched)
    model = model_of("llama", cuda)
    generate_batch(
        model, Letters(), prompts_of(6), max_new_tokens=12, min_new_tokens=12, batch_size=3
    )
    assert made == [{"model": 2, "capture": 1, "replay": 9}] * 2


def test_batches_go_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of("llama", "cpu"), []
    generate = type(model).generate

    def watched(self: Any, ids: Tensor, **options: Any) -> Any:
        seen.append((tuple(ids.shape), type(options.get(CACHE_ARGUMENT))))
        return generate(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", watched)
    prompts = ["x" * n for n in (3, 9, 1, 8, 2)]
    generate_batch(model, Letters(), prompts, max_new_tokens=2, batch_size=2, progress=False)
    assert seen == [((2, 9), KVQuantCache), ((2, 3), KVQuantCache), ((1, 1), KVQuantCache)]
    seen.clear()
    wide = model_of("llama", "cpu", quantized=False)
    generate_batch(wide, Letters(), prompts, max_new_tokens=2, progress=False)
    assert seen == [((5, 9), type(None))], "transformers' own cache, one batch"


def test_the_batch_is_what_fits() -> None:
    model, wide = model_of("llama", "cpu"), model_of("llama", "cpu", quantized=False)
    sizes = [batches.batch_size_for(of, 500, 500, free=20_000_000) for of in (model, wide)]
    assert 1 < sizes[1] < sizes[0] < 256
    assert batches.batch_size_for(model, 500, 500, free=40_000_000) == pytest.approx(
        2 * sizes[0], abs=1
    )
    assert batches.batch_size_for(model, 500, 500, free=10) == 1
    assert batches.batch_size_for(model, 5, 5) == 256


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama", "cpu")
    generate, seen = type(model).generate, []

    def small(self: Any, ids: Tensor, **options: Any) -> Any:
        seen.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("as a GPU says it")
        return generate(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", small)
    caplog.set_level(logging.WARNING, "kvquant")
    prompts = prompts_of(5)
    found = generate_batch(model, Letters(), prompts, max_new_tokens=2, progress=False)
    assert len(found) == 5
    assert all(found)
    assert seen == [5, 2, 2, 1]
    assert "out of memory with 5 prompts" in caplog.text


def test_a_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    generate_batch(model_of("llama", "cpu"), Letters(), ["abc", "d"], max_new_tokens=2)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"prompts": "one text"}, TypeError, "prompts: expected a sequence of texts, got 'one"),
        ({"prompts": ["a", 3]}, TypeError, "prompts: expected a sequence of texts"),
        ({"prompts": ["a", ""]}, ValueError, "prompts: number 1 has no token"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected a positive number, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size: expected an integer, got 2.5"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1, got 2"),
    ],
)
def test_bad_input_is_refused(changed: Any, error: type[Exception], message: str) -> None:
    arguments = {"prompts": ["a"], "max_new_tokens": 2, **changed}
    with pytest.raises(error, match=message):
        generate_batch(model_of("llama", "cpu"), Letters(), **arguments)


def test_no_prompts_no_answers() -> None:
    assert generate_batch(model_of("llama", "cpu"), Letters(), [], progress=False) == []
