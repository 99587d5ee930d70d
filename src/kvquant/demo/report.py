"""What the demo shows: tables in the terminal, a picture, a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..pictures import BLUE, GREY, RED, bars, panels, save

__all__ = ["LABELS", "answers_table", "plot", "quality_table", "summary_table"]

LABELS = {
    "bf16": "bf16",
    "fp8": "fp8 (e4m3)",
    "int8_plain": "int8, scale and offset per token",
    "kvquant": "kvquant",
    "k8v4": "kvquant, k8v4",
    "k4v4": "kvquant, k4v4",
}


def answers_table(answers: list[dict[str, str]], wide: str) -> Table:
    """Questions and both answers side by side."""
    table = Table(title="The same model, two caches (greedy)", show_lines=True, expand=True)
    table.add_column("question", ratio=1)
    table.add_column(wide, ratio=2)
    table.add_column("kvquant, 8 bits", ratio=2)
    for row in answers:
        same = row["wide"] == row["kvquant"]
        table.add_row(row["prompt"], row["wide"], "the same" if same else row["kvquant"])
    return table


def quality_table(title: str, scores: dict[str, dict[str, float]], reference_ppl: float) -> Table:
    """Perplexity, KL and agreement of each cache."""
    table = Table(title=title, caption=f"fp32 cache: perplexity {reference_ppl:.4f}")
    table.add_column("cache")
    for name in ("bits per element", "perplexity", "KL from fp32", "same top token"):
        table.add_column(name, justify="right")
    bits = {
        "bf16": "16", "fp8": "8", "int8_plain": "8.5", "kvquant": "8.5", "k8v4": "6.5",
        "k4v4": "4.5",
    }  # fmt: skip
    for name, label in LABELS.items():
        score = scores[name]
        style = "bold" if name == "kvquant" else None
        table.add_row(
            label,
            bits[name],
            f"{score['ppl']:.4f}",
            f"{score['kl']:.2e}",
            f"{100 * score['top1']:.2f}%",
            style=style,
        )
    return table


def summary_table(figures: dict[str, Any]) -> Table:
    """Bytes and time, ours beside the 16-bit cache."""
    size, times = figures["cache_bytes"], figures["decode_ms"]
    table = Table(title=f"Bytes and time ({figures['device']})")
    table.add_column("")
    for name in ("dense", "kvquant", "ratio"):
        table.add_column(name, justify="right")
    table.add_row(
        f"cache, {figures['context']} tokens (dense: 16 bits)",
        f"{size['fp16'] / 2**20:.1f} MiB",
        f"{size['kvquant'] / 2**20:.1f} MiB",
        f"{size['kvquant'] / size['fp16']:.3f}",
    )
    table.add_row(
        f"decode step behind {figures['decode_context']} tokens ({figures['decode_dtype']})",
        f"{times['dense']:.1f} ms",
        f"{times['kvquant']:.1f} ms",
        f"{times['kvquant'] / times['dense']:.3f}",
    )
    return table


def plot(figures: dict[str, Any], path: Path) -> None:
    """KL, bytes and decode time as a picture."""
    figure, (left, middle, right) = panels(3, widths=(2, 1, 1))
    names = list(LABELS)
    series = [("as it is", figures["quality"], 0.0)]
    if "key_bias" in figures:
        series = [
            ("as it is", figures["quality"], -0.2),
            ("with Qwen2-like key biases", figures["key_bias"], 0.2),
        ]
    width = 0.7 / len(series)
    for (label, scores, shift), plain in zip(series, (True, False), strict=False):
        colours = [BLUE if name == "kvquant" else GREY for name in names] if plain else RED
        at = [index + shift for index in range(len(names))]
        values = [scores[name]["kl"] for name in names]
        drawn = left.bar(at, values, width, color=colours, label=label, alpha=1 if plain else 0.75)
        left.bar_label(drawn, [f"{value:.1e}" for value in values], fontsize=8)
    left.set_yscale("log")
    left.set_xticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
    left.set_title(f"KL from an fp32 cache, {figures['context']} tokens")
    left.margins(y=0.2)
    if len(series) > 1:
        left.legend(fontsize=8)
    size, times = figures["cache_bytes"], figures["decode_ms"]
    pairs = (
        (middle, [size["fp16"] / 2**20, size["kvquant"] / 2**20], "fp16", "Cache, MiB"),
        (right, [times["dense"], times["kvquant"]], "dense", "Decode step, ms"),
    )
    for axis, values, name, title in pairs:
        bars(axis, [name, "kvquant"], values, title)
    right.set_xlabel(f"{figures['decode_context']} tokens, {figures['decode_dtype']}", fontsize=8)
    save(figure, path, f"{figures['model']} on {figures['device']}")
