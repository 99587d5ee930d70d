"""Fingerprints of what the kernels compute: ``python -m tests.digests check`` after a change that
must not touch a bit, ``record`` before it.

Inputs come from an integer generator of our own, so that no library's random numbers count. A
digest is the SHA-256 of everything that a case wrote and returned. Attention's last bits depend on
the instruction set, so each has its digests; so has each GPU architecture.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import kvquant
from kvquant.backends import build_info
from tests.matrix import AXES, cases, name_of

FILE = Path(__file__).parent / "data" / "digests.json"
app = typer.Typer(add_completion=False, no_args_is_help=True)

LENGTHS = (300, 17, 0, 255)


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
            name_of(case): run_case(case, number, device) for number, case in enumerate(cases())
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
