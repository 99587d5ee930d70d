"""Host time of decode steps on either device, and two builds of kvquant beside each other.

``python -m benchmarks host`` prints microseconds; with ``--old FOLDER`` (another version, put there
by ``pip install --target``) both builds run in turn, each time in a process of its own.
"""

from __future__ import annotations

import json as json_module
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

HEADS, KV_HEADS, DIM, TOKENS = 32, 8, 128, 16
Call = Callable[[], object]


def parts(device: str) -> dict[str, tuple[Call, Call]]:
    """What is timed, by name, and what makes the history short again."""
    import transformers

    import kvquant
    from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache

    dtype = torch.float16 if device == "cuda" else torch.float32
    new: dict[str, Any] = {"device": device, "dtype": dtype}
    cache = kvquant.QuantizedKVCache(
        1, 1, KV_HEADS, DIM, max_seq_len=65536, dtype=dtype, device=device
    )
    cache.append(0, *torch.randn(2, 1, TOKENS, KV_HEADS, DIM, **new))
    query = torch.randn(1, 1, HEADS, DIM, **new)
    key, value = torch.randn(2, 1, 1, KV_HEADS, DIM, **new)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=65536,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="kvquant", dtype=dtype
    )
    model = model.to(device).eval()
    stepped = KVQuantCache(model.config, max_cache_len=65536)
    ids = torch.randint(0, 97, (1, TOKENS), device=device)
    model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: stepped})
    token = ids[:, :1]

    def step() -> None:
        model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: stepped})

    def crop() -> None:
        cache.crop(TOKENS)

    return {
        "attend with append": (lambda: cache.attend(0, query, key, value), crop),
        "attend": (lambda: cache.attend(0, query), crop),
        "append": (lambda: cache.append(0, key, value), crop),
        "transformers, a step of 8 layers": (
            step, lambda: stepped.crop(TOKENS - stepped.get_seq_length())
        ),
    }  # fmt: skip


def measure(device: str, rounds: int = 21, seconds: float = 0.1) -> dict[str, float]:
    """Microseconds of each part: the least of some rounds, which other work disturbs least."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    figures = {}
    for name, (call, crop) in parts(device).items():
        for _ in range(20):
            call()
        wait()
        start = time.perf_counter()
        call()
        calls = max(5, min(100, int(seconds / (time.perf_counter() - start))))
        times = []
        for _ in range(rounds):
            crop()
            call()
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) / calls * 1e6)
        figures[name] = min(times)
    return figures


def _in_child(device: str, folder: Path | None) -> dict[str, float]:
    """The figures of the build in ``folder``, ahead of the one that is installed."""
    root = str(Path(__file__).parents[1])
    code = f"import sys, json\nsys.path.append({root!r})\n"
    if folder:  # an editable install finds itself before any path
        code += (
            "from importlib.machinery import PathFinder\n"
            "others = [x for x in sys.meta_path if x is not PathFinder]\n"
            "editable = [x for x in others if x.find_spec('kvquant', None)]\n"
            "sys.meta_path[:] = [x for x in sys.meta_path if x not in editable]\n"
            f"sys.path.insert(0, {str(folder.resolve())!r})\n"
            "import kvquant\n"
            f"assert kvquant.__file__.startswith({str(folder.resolve())!r}), kvquant.__file__\n"
        )
    code += f"from benchmarks import host\nprint(json.dumps(host.measure({device!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    figures: dict[str, float] = json_module.loads(done.stdout.splitlines()[-1])
    return figures


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    old: Annotated[
        Path | None, typer.Option(help="Another build, by pip install --target.")
    ] = None,
    new: Annotated[
        Path | None, typer.Option(help="Likewise; by default the installed one.")
    ] = None,
    rounds: int = 7,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print host time of decode steps, and its ratio to another build's."""
    from benchmarks.common import Report

    report = Report("Host time of decode steps, us", host=device)
    if old is None:
        for name, figure in _in_child(device, new).items():
            report.add(part=name, us=figure)
    else:
        pairs = []
        for i in range(rounds):  # in both orders: a machine that warms up would favour one
            runs = {}
            for build in (old, new) if i % 2 else (new, old):
                runs[build] = _in_child(device, build)
            pairs.append((runs[old], runs[new]))
        for name in pairs[0][0]:
            ratios = [after[name] / before[name] for before, after in pairs]
            report.add(
                part=name,
                old_us=statistics.median(before[name] for before, _ in pairs),
                new_us=statistics.median(after[name] for _, after in pairs),
                ratio=statistics.median(ratios),
                least=min(ratios),
                most=max(ratios),
            )
    report.finish(json)
