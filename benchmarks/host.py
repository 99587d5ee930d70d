"""Host time and kernels on either device, and two builds of kvquant beside each other.

``python -m benchmarks host`` prints microseconds; with ``--old FOLDER`` (another version, put there
by ``pip install --target``) both builds run in turn, a twentieth of a second each, in two processes
on one core.
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
from torch import Tensor

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

    found: dict[str, tuple[Call, Call]] = {
        "attend with append": (lambda: cache.attend(0, query, key, value), crop),
        "attend": (lambda: cache.attend(0, query), crop),
        "append": (lambda: cache.append(0, key, value), crop),
        "transformers, a step of 8 layers": (
            step, lambda: stepped.crop(TOKENS - stepped.get_seq_length())
        ),
    }  # fmt: skip
    if hasattr(kvquant, "plan"):
        view, seqs = kvquant.QuantizedKVCache(
            1, 1, KV_HEADS, DIM, max_seq_len=65536, dtype=dtype, device=device
        ).layer(0)
        lens = seqs.seq_lens.fill_(TOKENS)
        planned = kvquant.plan(query, view, seqs, key, value)
        found[PLANNED] = (
            lambda: planned.run(query, view, seqs, key, value), lambda: lens.fill_(TOKENS)
        )  # fmt: skip
    return found


def kernels(device: str) -> dict[str, tuple[Call, Call]]:
    """Attention with append on caches of many tokens, by shape; on a GPU in a captured graph."""
    import kvquant

    dtype, found = (torch.float16 if device == "cuda" else torch.bfloat16), {}
    for name, (batch, heads, kv_heads, dim, tokens, new, block) in SHAPES[device].items():
        cache = kvquant.QuantizedKVCache(
            1, batch, kv_heads, dim, max_seq_len=tokens + 4096, block_size=block, dtype=dtype,
            device=device,
        )  # fmt: skip
        step = max(1, 8192 // batch)
        for begin in range(0, tokens, step):
            count = min(step, tokens - begin)
            rows = torch.randn(2, batch, count, kv_heads, dim, device=device, dtype=dtype)
            cache.append(0, *rows)
        query = torch.randn(batch, new, heads, dim, device=device, dtype=dtype)
        key, value = torch.randn(2, batch, new, kv_heads, dim, device=device, dtype=dtype)

        def call(
            cache: Any = cache, query: Tensor = query, key: Tensor = key, value: Tensor = value
        ) -> object:
            return cache.attend(0, query, key, value)

        if device == "cuda":
            call()
            cache.reserve(tokens + 2048)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(8):
                    call()
            call = graph.replay
        lens = cache.seq_lens

        def crop(
            cache: Any = cache,
            tokens: int = tokens,
            lens: Tensor = lens,
            captured: tuple[Tensor, ...] = (query, key, value),  # the graph reads them
        ) -> None:
            if cache.device.type == "cuda":
                lens.fill_(tokens)
            else:
                cache.crop(tokens)

        found[name] = call, crop
    return found


SHAPES: dict[str, dict[str, tuple[int, int, int, int, int, int, int | None]]] = {
    "cuda": {  # batch, heads, KV heads, head_dim, tokens, new tokens, block_size
        "1 x 32768": (1, 32, 8, 128, 32768, 1, None),
        "8 x 4096": (8, 32, 8, 128, 4096, 1, None),
        "64 x 8192": (64, 32, 8, 128, 8192, 1, None),
        "64 x 8192 in blocks of 16": (64, 32, 8, 128, 8192, 1, 16),
        "32 x 2048, 32 KV heads": (32, 32, 32, 128, 2048, 1, None),
        "64 x 4096, head_dim 64": (64, 32, 8, 64, 4096, 1, None),
        "16 x 4096, head_dim 256": (16, 16, 8, 256, 4096, 1, None),
        "16 x 8192, 8 new tokens": (16, 32, 8, 128, 8192, 8, None),
        "4 x 8192, 256 new tokens": (4, 32, 8, 128, 8192, 256, None),
        "8 x 8192, 4 new tokens": (8, 32, 8, 128, 8192, 4, None),
        "64 x 8192, 8 new tokens": (64, 32, 8, 128, 8192, 8, None),
        "1 x 4096": (1, 32, 8, 128, 4096, 1, None),
        "256 x 1024": (256, 32, 8, 128, 1024, 1, None),
    },
    "cpu": {
        "1 x 4096": (1, 32, 8, 128, 4096, 1, None),
        "8 x 2048": (8, 32, 8, 128, 2048, 1, None),
        "8 x 2048 in blocks of 16": (8, 32, 8, 128, 2048, 1, 16),
        "4 x 1024, head_dim 64": (4, 32, 8, 64, 1024, 1, None),
        "1 x 2048, 64 new tokens": (1, 32, 8, 128, 2048, 64, None),
    },
}

PLANNED = "plan.run with append"  # of builds that have it; beside the others' attend with append


def serve(device: str, what: str) -> None:
    """Time a part whenever its name comes, as the least of some chunks of calls."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timed = (kernels if what == "kernels" else parts)(device)
    counts: dict[str, int] = {}

    def chunk(call: Call, crop: Call, calls: int) -> float:
        crop()
        call()
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if what == "kernels":
            wait()
        return (time.perf_counter() - start) / calls * 1e6

    print(json_module.dumps(list(timed)), flush=True)
    for line in sys.stdin:
        name = line.strip()
        call, crop = timed[name]
        if name not in counts:
            for _ in range(20):
                call()
            counts[name] = max(5, min(100, int(5_000 / chunk(call, crop, 5))))
        print(min(chunk(call, crop, counts[name]) for _ in range(10)), flush=True)


class _Build:
    """A process with the build in ``folder``, ahead of the one that is installed."""

    def __init__(self, device: str, what: str, folder: Path | None) -> None:
        root = str(Path(__file__).parents[1])
        code = f"import sys\nsys.path.append({root!r})\n"
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
        code += f"from benchmarks import host\nhost.serve({device!r}, {what!r})"
        self._child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        os.sched_setaffinity(self._child.pid, {max(os.sched_getaffinity(0))})
        self.parts: list[str] = json_module.loads(self._answer())

    def time(self, part: str) -> float:
        """Microseconds of a call."""
        assert self._child.stdin is not None
        print(part, file=self._child.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._child.stdout is not None
        if not (line := self._child.stdout.readline()):
            raise RuntimeError("the process that times a build has ended")
        return line


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    old: Annotated[
        Path | None, typer.Option(help="Another build, by pip install --target.")
    ] = None,
    new: Annotated[
        Path | None, typer.Option(help="Likewise; by default the installed one.")
    ] = None,
    kernels: Annotated[
        bool, typer.Option(help="Whole calls on long caches instead, in a graph on a GPU.")
    ] = False,
    rounds: int = 21,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print host time of decode steps, and its ratio to another build's.

    Example: python -m benchmarks host --json host.json
    """
    from benchmarks.common import Report

    what = "kernels" if kernels else "host"
    titles = {"host": "Host time of decode steps, us", "kernels": "Attention with append, us"}
    report = Report(titles[what], host=device)
    ours = _Build(device, what, new)
    if old is None:
        for name in ours.parts:
            report.add(part=name, us=min(ours.time(name) for _ in range(rounds)))
        report.finish(json)
        return
    theirs = _Build(device, what, old)
    for name in ours.parts:
        beside = name if name in theirs.parts else "attend with append"
        pairs = []
        for i in range(rounds + 1):  # in both orders: a machine that warms up would favour one
            if i % 2:
                before, after = theirs.time(beside), ours.time(name)
            else:
                after, before = ours.time(name), theirs.time(beside)
            pairs.append((before, after))
        ratios = [after / before for before, after in pairs[1:]]  # the first warms up
        report.add(
            part=name,
            old_us=min(before for before, _ in pairs),
            new_us=min(after for _, after in pairs),
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
        )
    report.finish(json)
