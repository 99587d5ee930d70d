"""The examples run as they stand; those of transformers on a tiny model of random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ["<unk>", "<pad>", "<eos>", "user", "assistant", "end", "Q", "A", "what", "is", "a", "it"]


def run(name: str, *arguments: Any, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", ["custom_decode.py", "engine_step.py"])
def test_an_example_runs(name: str) -> None:
    assert run(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers", minversion="5.5")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=1, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_generate(model: Path) -> None:
    assert "MiB for" in run("transformers_generate.py", model, "what is it", "what is a user")


def test_chat(model: Path) -> None:
    out = run("transformers_chat.py", model, text="what is it\nwhat is a user\n")
    assert out.count("\n\n") == 2
    assert "MiB for" in out


def test_questions_about_a_document(model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("what is it user end " * 500)
    questions = "what is it", "what is a user"
    out = run("transformers_prefix.py", model, tmp_path / "book.txt", *questions)
    assert "read 2500 tokens" in out
    assert all(f"Q: {question}" in out for question in questions)
