"""The demo from end to end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..terminal import console, device_name, progress, write_json
from . import answers, quality, report, speed
from .assets import TEXT, cache_folder, fetch
from .model import load

__all__ = ["Options", "run"]

_TEXT_BEGIN = 20_000  # behind the title page


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to run.

    Attributes:
        context: Tokens read for the quality figures.
        key_bias: Also measure with Qwen2-like key biases.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        json: Where to write the figures.
        picture: Where to write the picture.
        decode_context: Tokens behind which decoding is timed; None: 8192 on a GPU, 4096 else.
    """

    context: int = 2048
    key_bias: bool = False
    device: str | None = None
    json: Path | None = None
    picture: Path = Path("kvquant-demo.png")
    decode_context: int | None = None


def run(options: Options, *, loaded: tuple[Any, Any, str] | None = None) -> dict[str, Any]:
    """Run the demo and return its figures.

    Args:
        options: What to run.
        loaded: Tokenizer, model and text to use instead of the demo's own.

    Raises:
        AssetError: The model or the text could not be had.
    """
    for needed in ("matplotlib", "..integrations.transformers"):
        import_module(needed, __package__)  # says what is missing before anything is fetched
    import transformers

    out = console()
    began = time.perf_counter()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, model, text = loaded or _load(out.print)
    model = model.to(device)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
    context = min(options.context, ids.shape[1])
    on_gpu = device.type == "cuda"
    decode_context = options.decode_context or (8192 if on_gpu else 4096)
    figures: dict[str, Any] = {
        "model": getattr(model.config, "name_or_path", "").rpartition("/")[2] or "model",
        "device": device_name(device),
        "versions": {
            "kvquant": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "context": context,
    }

    fast = model.to(torch.bfloat16) if on_gpu else model  # a GPU answers in its own precision
    wide = "DynamicCache, bf16" if on_gpu else "DynamicCache rounded to bf16, model in fp32"
    said = []
    with progress("answering", len(answers.PROMPTS)) as advance:
        for prompt in answers.PROMPTS:
            said.append(asdict(answers.answer(tokenizer, fast, prompt)))
            advance(1)
    figures |= {"answers": said, "wide_cache": wide}
    out.print(report.answers_table(said, wide))

    with progress("decoding", 46) as advance:
        times = speed.decode_times(fast, ids[:, :512], context=decode_context, advance=advance)
    figures |= {
        "decode_ms": times,
        "decode_context": decode_context,
        "decode_dtype": str(fast.dtype).removeprefix("torch."),
    }

    if on_gpu:  # rounding the weights to bf16 cannot be undone
        model = (loaded or _load(out.print))[1].to(device, torch.float32)
    figures |= _quality(model, ids[:, :context], "quality")
    _show(out.print, figures, "quality", "as it is")
    if options.key_bias:
        with quality.key_bias(model):
            figures |= _quality(model, ids[:, :context], "key_bias")
        _show(out.print, figures, "key_bias", f"key biases of {quality.KEY_BIAS:g} injected")
    figures["seconds"] = round(time.perf_counter() - began, 1)

    out.print(report.summary_table(figures))
    report.plot(figures, options.picture)
    out.print(f"picture: {options.picture}   ({figures['seconds']:.0f} s in all)")
    write_json(options.json, figures)
    return figures


def _load(log: Callable[[str], None]) -> tuple[Any, Any, str]:
    folder = cache_folder()
    text = fetch(TEXT, folder, log=log).read_text(encoding="latin-1")[_TEXT_BEGIN:]
    tokenizer, model = load(folder, log=log)
    return tokenizer, model, text


def _quality(model: Any, ids: Any, key: str) -> dict[str, Any]:
    """Figures of all caches under ``key``, and the bytes."""
    by_name = quality.caches(model.config, ids.shape[1])
    with progress("reading", ids.shape[1] * len(by_name)) as advance:
        scores = quality.measure(model, ids, by_name, advance=advance)
    reference = scores.pop("fp32")
    return {
        key: {name: score.as_dict() for name, score in scores.items()},
        f"{key}_reference_ppl": reference.ppl,
        "cache_bytes": {
            "fp16": quality.fp16_bytes(model, ids.shape[1]),
            "kvquant": by_name["kvquant"].nbytes,
        },
    }


def _show(log: Callable[..., None], figures: dict[str, Any], key: str, how: str) -> None:
    title = f"{figures['context']} tokens read through each cache, model {how}"
    log(report.quality_table(title, figures[key], figures[f"{key}_reference_ppl"]))
