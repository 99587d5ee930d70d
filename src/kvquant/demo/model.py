"""Loading the demo's model: converted once from its 4-bit file, then in half a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .assets import MODEL, fetch

__all__ = ["cache_argument", "load", "use_attention_of"]

_FOLDER = "SmolLM2-135M-Instruct"
_COMPLETE = "converted-from.txt"  # written last


def load(folder: Path, *, log: Callable[[str], None] = print) -> tuple[Any, Any]:
    """The tokenizer and the model in float32, on the CPU, with the attention "kvquant".

    Raises:
        AssetError: The model's file could not be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..integrations import transformers as _  # noqa: F401  (registers "kvquant")

    logging.disable_progress_bar()
    target = folder / _FOLDER
    complete = target / _COMPLETE
    if not complete.exists() or complete.read_text() != MODEL.sha256:
        file = fetch(MODEL, folder, log=log)
        log("converting the model (once, about 20 s)")
        _convert(file, target)
        complete.write_text(MODEL.sha256)
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="kvquant"
    )
    return tokenizer, model.eval()


def use_attention_of(model: Any, cache: Any) -> None:
    """Let the model attend with "kvquant" on its cache, with torch's own on any other."""
    from ..integrations.transformers import KVQuantCache

    model.set_attn_implementation("kvquant" if isinstance(cache, KVQuantCache) else "sdpa")


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword under which this transformers takes a cache."""
    from ..integrations.transformers import CACHE_ARGUMENT

    return {CACHE_ARGUMENT: cache}


def _convert(file: Path, target: Path) -> None:
    for needed in ("accelerate", "gguf", "sentencepiece"):
        import_module(needed)  # its error says what is missing
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(part)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model read from such a file
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
