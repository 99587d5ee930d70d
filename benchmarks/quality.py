"""How far each cache moves a model, on prose and on a passage that returns, measured on any model.

Prose: Alice's Adventures in Wonderland, read in chunks of 256 tokens. Repeat: 512 of its tokens,
1,024 others and the same 512 again, of which the last are compared: what a cache has to recall from
far back. KL is the divergence of the next token's distribution from that of a float32 cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import kvquant
from benchmarks.common import Report
from kvquant.demo import assets, model, quality

PASSAGE, BETWEEN = 512, 1024  # tokens


def load(gguf: Path | None) -> tuple[Any, Any]:
    """Tokenizer and model in float32: the demo's, or those of a file that transformers reads."""
    if gguf is None:
        return model.load(assets.cache_folder())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvquant.integrations import transformers as _  # noqa: F401  (registers "kvquant")

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="kvquant"
    )
    return tokenizer, loaded.eval()


def caches(config: Any, tokens: int, names: list[str], edges: int = 1) -> dict[str, Any]:
    """Empty caches, "fp32" first.

    "k8v4 uniform" has all rows in 4 bits, "k8v4 edges" the first and the last ``edges`` layers in
    8.
    """
    from kvquant.integrations.transformers import KVQuantCache

    known = quality.caches(config, tokens)
    inner = config.num_hidden_layers - 2 * edges
    for name in ("k8v4", "k4v4"):
        by_age = kvquant.CacheFormat.named(name)
        outer = [kvquant.CacheFormat()] * edges
        formats: dict[str, kvquant.LayerFormats] = {
            f"{name} uniform": replace(by_age, by_age=False),
            f"{name} edges": [*outer, *[by_age] * inner, *outer],
        }
        for label, format in formats.items():
            known[label] = KVQuantCache(
                config, max_cache_len=tokens, format=format, exact_prompt=False
            )
    return {name: known[name] for name in ("fp32", *names)}


def repeated(ids: Tensor) -> Tensor:
    """A passage, other tokens, the passage."""
    return torch.cat([ids[:, : PASSAGE + BETWEEN], ids[:, :PASSAGE]], 1)


def main(
    gguf: Annotated[Path | None, typer.Option(help="Of another model than the demo's.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of prose.")] = 2048,
    repeat: Annotated[bool, typer.Option(help="The passage that returns, in place of it.")] = False,
    key_bias: Annotated[bool, typer.Option(help="With key biases like Qwen2's.")] = False,
    begin: Annotated[int, typer.Option(help="Characters of the text that are left out.")] = 20_000,
    only: Annotated[
        str, typer.Option(help="Caches, by comma.")
    ] = "bf16,fp8,int8_plain,kvquant,k8v4,k4v4",
    edges: Annotated[int, typer.Option(help="Int8 layers at both ends, in the 'edges'.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print KL, loss and agreement of each cache.

    Example: python -m benchmarks quality --repeat --json quality.json
    """
    tokenizer, loaded = load(gguf)
    text = assets.fetch(assets.TEXT, assets.cache_folder()).read_text(encoding="latin-1")
    ids = tokenizer(text[begin:], return_tensors="pt").input_ids[:, :context]
    first = 0
    if repeat:
        ids, first = repeated(ids), PASSAGE + BETWEEN
    name = gguf.name if gguf else "SmolLM2-135M-Instruct"
    report = Report(
        "Quality", model=name, begin=begin, tokens=ids.shape[1], compared_from=first,
        key_bias=key_bias,
    )  # fmt: skip
    by_name = caches(loaded.config, ids.shape[1], only.split(","), edges)
    with quality.key_bias(loaded) if key_bias else nullcontext():
        scores = quality.measure(loaded, ids, by_name, first=first)
    for cache, score in scores.items():
        report.add(
            cache=cache, kl_1e4=score.kl * 1e4, loss=log(score.ppl), ppl=score.ppl, top1=score.top1,
            nbytes=getattr(by_name[cache], "nbytes", None),
        )  # fmt: skip
        report.save(json)
    report.finish(json)


if __name__ == "__main__":
    typer.run(main)
