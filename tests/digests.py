"""Fingerprints of what the kernels compute: ``python -m tests.digests check`` after a change that
must not touch a bit, ``record`` before it.

Inputs come from an integer generator of our own, so that no library's random numbers count. A
digest is the SHA-256 of everything that a case wrote and returned. Attention's last bits depend on
the instruction set, so each has its digests; so has each GPU architecture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import kvquant
from kvquant.backends import build_info

FILE = Path(__file__).parent / "data" / "digests.json"
app = typer.Typer(add_completion=False, no_args_is_help=True)

FORMATS = {
    "default": kvquant.CacheFormat(),
    "plain": kvquant.CacheFormat.plain(),
    "mean64": kvquant.CacheFormat(key_mean=64, value_rotation=True),
    "mean16": kvquant.CacheFormat(key_rotation=False, key_mean=16),
    "rotated": kvquant.CacheFormat(key_mean=None, value_rotation=True),
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
LENGTHS = (300, 17, 0, 255)


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


class Numbers:
    """Integers from a generator of our own, as rows with a few large channels."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 7919 + 1

    def rows(self, *shape: int) -> Tensor:
        """Multiples of 1/256 from about -4 to 4 in float32; one channel of each row is larger."""
        count = torch.Size(shape).numel()
        at = torch.arange(count, dtype=torch.int64) + self._state
        self._state += count
        for _ in range(3):  # splitmix's steps, in 31 bits
            at = (at ^ at >> 15) * 0x2C1B3C6D & 0x7FFFFFFF
            at = (at ^ at >> 12) * 0x297A2D39 & 0x7FFFFFFF
        x = ((at % 2049) - 1024).float() / 256
        x = x.reshape(shape)
        x[..., 1] += 6
        return x


def run_case(case: dict[str, str], number: int, device: str) -> str:
    """The digest of one case."""
    chosen = {name: AXES[name][value] for name, value in case.items()}
    (k_dim, v_dim), (q_heads, kv_heads) = chosen["dims"], chosen["heads"]
    dtype, tokens, options = chosen["dtype"], chosen["queries"], dict(chosen["feature"])
    numbers, batch = Numbers(number), len(LENGTHS)

    def on(x: Tensor) -> Tensor:
        return x.to(device)

    for name in ("sinks", "alibi_slopes"):
        if options.get(name):
            options[name] = on(numbers.rows(q_heads, 16)[:, 0].abs().contiguous())
    cache = kvquant.QuantizedKVCache(
        1, batch, kv_heads, k_dim, v_head_dim=v_dim, max_seq_len=512,
        block_size=chosen["layout"], format=chosen["format"], dtype=dtype, device=device,
    )  # fmt: skip
    for tensor in cache.layer(0)[0].tensors.values():
        tensor.zero_()
    if options.pop("padded", False):
        cache.set_seq_starts(on(torch.tensor([5, 17, 0, 2], dtype=torch.int32)))
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    rows = (numbers.rows(sum(LENGTHS), kv_heads, dim).to(dtype) for dim in (k_dim, v_dim))
    cache.append(0, *map(on, rows), cu_seqlens=offsets)
    lead = (batch * tokens,) if chosen["form"] == "packed" else (batch, tokens)
    results: list[Tensor] = []
    for _ in range(3 if chosen["form"] == "step" else 1):
        query = on(numbers.rows(*lead, q_heads, k_dim).to(dtype))
        new = [on(numbers.rows(*lead, kv_heads, dim).to(dtype)) for dim in (k_dim, v_dim)]
        extra: dict[str, Any] = {}
        if chosen["form"] == "packed":
            extra["cu_seqlens_q"] = torch.arange(batch + 1, dtype=torch.int32) * tokens
        if chosen["form"] == "step":
            results.append(cache.attend(0, query, *new, exact_prompt=False, **options))
        else:
            results += cache.attend(
                0, query, *new, exact_prompt=False, return_lse=True, **extra, **options
            )
    results += [*cache.dequantize(0), cache.seq_lens, *cache.state_dict().values()]
    digest = hashlib.sha256()
    for tensor in results:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{flat.dtype} {list(flat.shape)} ".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def compute(device: str) -> tuple[str, dict[str, str]]:
    """What computed, and the digest of each case by its values."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        who = f"sm_{major}{minor}"
    else:
        who = build_info()["cpu_isa"]
    with torch.no_grad():
        return who, {
            "/".join(case.values()): run_case(case, number, device)
            for number, case in enumerate(cases())
        }


@app.command()
def record(device: str = "cpu", file: Path = FILE) -> None:
    """Write the digests of this machine's instruction set or GPU into the file."""
    who, found = compute(device)
    known = json.loads(file.read_text()) if file.exists() else {}
    known[who] = found
    file.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
    print(f"{who}: {len(found)} digests recorded")


@app.command()
def check(device: str = "cpu", file: Path = FILE) -> None:
    """Compare with the file; exit with 1 where one differs."""
    who, found = compute(device)
    known = json.loads(file.read_text())[who]
    other = [case for case, digest in found.items() if known.get(case) != digest]
    for case in other:
        print(f"{who}: {case}: {found[case]}, recorded {known.get(case)}")
    print(f"{who}: {len(found)} digests, {len(other)} differ")
    raise typer.Exit(bool(other) or found.keys() != known.keys())


if __name__ == "__main__":
    app(prog_name="python -m tests.digests")
