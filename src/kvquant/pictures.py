"""How the commands' pictures look; matplotlib, from the extra ``kvquant[demo]``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["BLUE", "COLOURS", "GREY", "RED", "bars", "lines", "panels", "save"]

GREY, BLUE, RED = "#9aa5b1", "#2563eb", "#dc2626"
COLOURS = (GREY, BLUE, "#059669", "#d97706", "#7c3aed")


def panels(count: int, *, widths: Iterable[float] | None = None, height: float = 3.8) -> Any:
    """A figure of ``count`` panels side by side, and the panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shares = [1.0] * count if widths is None else list(widths)
    figure, axes = plt.subplots(
        1, count, figsize=(12 if count > 1 else 8, height), width_ratios=shares, squeeze=False
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def bars(axis: Any, names: list[str], values: list[float], title: str, fmt: str = "%.1f") -> None:
    """Bars with their values above; the last one is ours."""
    colours = [GREY] * (len(names) - 1) + [BLUE]
    axis.bar_label(axis.bar(names, values, 0.6, color=colours), fmt=fmt, fontsize=9)
    axis.margins(y=0.15)
    axis.set_title(title)


def lines(
    axis: Any,
    series: dict[str, list[tuple[float, float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    floor: str | None = None,
    log: bool = True,
) -> None:
    """A line for each of ``series``, by name; the one named ``floor`` is dashed and black."""
    colours = iter(COLOURS)
    for name, points in series.items():
        style = (
            {"color": "black", "linestyle": "--", "linewidth": 1}
            if name == floor
            else {"color": next(colours), "marker": "o", "markersize": 4}
        )
        axis.plot([a for a, _ in points], [b for _, b in points], label=name, **style)
    if log:
        axis.set_xscale("log", base=2)
        ticks = sorted({a for points in series.values() for a, _ in points})
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8, rotation=30)
        axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def save(figure: Any, path: Path, title: str) -> None:
    """Write a PNG."""
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
