"""The cases that laws are checked on: a covering array, in which every pair of values of two axes
comes together at least once. The same ones every time, under names that can be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

import kvquant

FORMATS = {
    "default": kvquant.CacheFormat(),
    "plain": kvquant.CacheFormat.plain(),
    "mean64": kvquant.CacheFormat(key_mean=64, value_rotation=True),
    "mean16": kvquant.CacheFormat(key_rotation=False, key_mean=16),
    "rotated": kvquant.CacheFormat(key_mean=None, value_rotation=True),
    "k8v4": kvquant.CacheFormat(value="int4", value_rotation=True),
    "k4v4": kvquant.CacheFormat(key="int4", value="int4", key_mean=64, value_rotation=True),
}
AXES: dict[str, dict[str, Any]] = {
    "format": FORMATS,
    "layout": {"contiguous": None, "paged16": 16, "paged64": 64, "paged256": 256},
    "dtype": {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32},
    "dims": {
        "64": (64, 64), "128": (128, 128), "80-48": (80, 48), "192": (192, 192),
        "256": (256, 256), "16-256": (16, 256),
    },
    "heads": {"mha": (3, 3), "gqa4": (8, 2), "gqa8": (8, 1), "mqa7": (7, 1)},
    "feature": {
        "usual": {}, "window": {"sliding_window": 33}, "softcap": {"softcap": 20.0},
        "sinks": {"sinks": True}, "alibi": {"alibi_slopes": True}, "all": {"causal": False},
        "splits": {"split_size": 256}, "padded": {"padded": True},
    },
    "queries": {"1": 1, "4": 4, "16": 16, "33": 33},
    "form": {"dense": "dense", "packed": "packed", "step": "step"},
}  # fmt: skip


def cases() -> Iterator[dict[str, str]]:
    """A covering array: every pair of values of two axes comes together at least once."""
    names = list(AXES)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(AXES[a], AXES[b])
    }
    state = 1
    while missing:
        best: tuple[int, dict[str, str]] = (-1, {})
        (first, value), (second, other) = min(missing)
        for _ in range(40):
            case = {}
            for name, values in AXES.items():
                state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
                case[name] = list(values)[(state >> 33) % len(values)]
            case[first], case[second] = value, other
            new = sum(pair in missing for pair in itertools.combinations(case.items(), 2))
            if new > best[0]:
                best = new, case
        missing -= set(itertools.combinations(best[1].items(), 2))
        yield best[1]


def name_of(case: dict[str, str]) -> str:
    """All values of a case."""
    return "/".join(case.values())
