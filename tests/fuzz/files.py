"""Damaged and forged files of caches: `load` refuses each, or gives exactly what is in it.

A refusal is a ValueError whose message starts with the path, within a second of CPU time and with
at most four times the file's size and 32 MiB. Memory is bounded by the address space that a child
process may have, so that an absurd allocation fails instead of being counted, whether it would be
touched or not; a crash or a hang costs a child and not the run.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load as load_tensors

from kvquant import CacheFormat, QuantizedKVCache

from .drafts import Draft
from .mutations import BYTE_EDITS, DRAFT_EDITS, edit_magic, edit_tree

MIB = 2**20
SECONDS, HANGS_AFTER = 1.0, 20.0
PAGE = resource.getpagesize()
NOW, LOADS, ACCEPTED, REFUSED, FIELDS = range(5)  # what a child counts where the parent sees it


# --------------------------------------------------------------------------------------- the corpus

DEFAULT, PLAIN = CacheFormat(), CacheFormat.plain()
MEANS = CacheFormat(key_mean=16, value_rotation=True)
STARTS = [1, 0, 2]
# name: (lengths a layer, options); a tuple of lists where the layers' lengths differ
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "contiguous": ([20, 0, 7], {"max_seq_len": 96, "starts": STARTS}),
    "contiguous-plain": ([5, 5, 5], {"max_seq_len": 96, "format": PLAIN}),
    "contiguous-means": ([37, 1, 16], {"max_seq_len": 400, "format": MEANS}),
    "growing": ([3, 19, 0], {"dtype": torch.bfloat16}),
    "growing-plain": ([18, 2, 18], {"format": PLAIN, "starts": STARTS}),
    "growing-means": ([33, 0, 32], {"format": MEANS}),
    "paged": ([20, 0, 7], {"max_seq_len": 96, "block_size": 16}),
    "paged-plain": ([17, 33, 0], {"max_seq_len": 96, "block_size": 32, "format": PLAIN}),
    "paged-means": (
        [16, 35, 1],
        {"max_seq_len": 96, "block_size": 16, "format": MEANS, "starts": STARTS},
    ),
    "paged-growing": ([20, 0, 40], {"block_size": 16, "dtype": torch.float32}),
    "paged-pool": ([20, 31, 7], {"block_size": 16, "num_blocks": 9, "format": MEANS}),
    "paged-pool-limit": ([9, 0, 17], {"block_size": 64, "num_blocks": 3, "max_seq_len": 64}),
    "shared": ([40, 9, 0], {"block_size": 16, "num_blocks": 20, "order": [0, 0, 0, 1]}),
    "shared-tight": ([40, 9, 0], {"block_size": 16, "num_blocks": 4, "order": [0, 0, 0, 1]}),
    "reordered-tight": (
        [33, 2, 1],
        {"block_size": 16, "num_blocks": 5, "order": [0, 0, 0], "format": MEANS},
    ),
    "k8v4": ([20, 0, 7], {"max_seq_len": 96, "format": CacheFormat.named("k8v4")}),
    "k4v4-paged": (
        [16, 35, 1],
        {"max_seq_len": 96, "block_size": 16, "format": CacheFormat.named("k4v4")},
    ),
    "uneven": (([21, 4, 9], [20, 3, 8]), {"max_seq_len": 64}),
    "empty": ([0, 0, 0], {"max_seq_len": 96}),
    "empty-growing": ([0, 0, 0], {"starts": STARTS}),
    "empty-paged": ([0, 0, 0], {"block_size": 16, "num_blocks": 6, "format": PLAIN}),
    "larger": ([150, 90, 149], {"block_size": 64, "max_seq_len": 256, "heads": 2}),
}


def corpus(folder: Path) -> dict[str, bytes]:
    """Caches of every layout as `save` writes them, the same in every run."""
    torch.manual_seed(0)
    return {name: _saved(folder / name, *case) for name, case in CASES.items()}


def _saved(path: Path, lengths: Any, options: dict[str, Any]) -> bytes:
    options = dict(options)
    starts, order, heads = (options.pop(k, None) for k in ("starts", "order", "heads"))
    layers, heads = lengths if isinstance(lengths, tuple) else (lengths, lengths), heads or 2
    cache = QuantizedKVCache(2, 3, heads, 32, v_head_dim=16, device="cpu", **options)
    for layer, counts in enumerate(layers):
        ends = torch.tensor([0, *counts]).cumsum(0).int()
        key, value = (torch.randn(sum(counts), heads, width) for width in (32, 16))
        cache.append(layer, key, value, cu_seqlens=ends)
    if starts:
        cache.set_seq_starts(torch.tensor(starts, dtype=torch.int32))
    if order:  # blocks are shared then, also where `order` is no longer than the batch
        cache.reorder(order) if len(order) == 3 else cache.select(order)
    cache.save(path)
    return bytes(Draft.of(path.read_bytes()).build())  # with the metadata in one order


# ----------------------------------------------------------------------------------------- one load


class Wrong(Exception):
    """What a load did against the rules."""


@dataclass
class Attempt:
    cache: QuantizedKVCache | None = None
    error: BaseException | None = None
    seconds: float = 0.0


def attempt(path: Path, budget: int) -> Attempt:
    """Load a file within ``budget`` more bytes of address space."""
    result = Attempt()
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * PAGE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    started = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (now + budget, hard))
    try:
        result.cache = QuantizedKVCache.load(path)
    except BaseException as error:  # a panic of Rust's is no Exception
        result.error = error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    result.seconds = time.process_time() - started
    return result


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was refused, also where that was made into another error."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(
            "allocate memory|out of memory|bad.?alloc", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def check(path: Path, data: bytes) -> str:
    """Say "accepted" or "refused"; raise `Wrong`, or what `load` should not have raised."""
    before = 4 * len(data) + 32 * MIB
    most = 256 * len(data) + 32 * MIB
    tried = attempt(path, before)
    if out_of_memory(tried.error):
        # Storage of an accepted file may take more than what is allowed to find out.
        tried = attempt(path, before + most)
        if tried.cache is None and out_of_memory(tried.error):
            raise Wrong(f"asked for too much memory: {tried.error!r}") from tried.error
        if tried.cache is None:
            raise Wrong(f"took too much memory to say: {tried.error!r}") from tried.error
    if tried.seconds > SECONDS:
        tried.seconds = min(tried.seconds, attempt(path, before + most).seconds)
        if tried.seconds > SECONDS:
            raise Wrong(f"took {tried.seconds:.1f} s")
    if isinstance(tried.error, ValueError):
        if not str(tried.error).startswith(str(path)):
            raise Wrong(f"no path: {tried.error!r}") from tried.error
        return "refused"
    if tried.error is not None:
        raise tried.error
    assert tried.cache is not None
    if tried.cache.nbytes > most:
        raise Wrong(f"accepted: {tried.cache.nbytes} bytes of storage for {len(data)} of file")
    compare(tried.cache.state_dict(), load_tensors(data))
    return "accepted"


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    if ours.keys() != theirs.keys():
        raise Wrong(f"accepted: other names: {sorted(ours.keys() ^ theirs.keys())}")
    for name, a in ours.items():
        b = theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            raise Wrong(f"accepted: {name}: {a.dtype} {a.shape}, in the file {b.dtype} {b.shape}")
        if a.numpy().tobytes() != b.numpy().tobytes():  # so that NaN equals NaN and 0 not -0
            raise Wrong(f"accepted: {name}: other bytes")


# ---------------------------------------------------------------------------------------- the cases


def case(files: dict[str, bytes], seed: int, i: int) -> tuple[bytes, list[str]]:
    """A file and what was done to which, from ``(seed, i)`` alone; below zero one as it is."""
    if i < 0:
        name = list(files)[-1 - i]
        return files[name], [name, "as it is"]
    rng = random.Random(f"{seed} {i}")
    name = rng.choice(list(files))
    log, data = [name], bytearray(files[name])
    drafts, plain = sum(DRAFT_EDITS.values()), sum(BYTE_EDITS.values())
    on_bytes = rng.random() * (drafts + plain) < plain
    if not on_bytes:
        draft = Draft.of(files[name])
        edit = rng.choices(list(DRAFT_EDITS), list(DRAFT_EDITS.values()))[0]
        log.append(edit(rng, draft))
        if edit not in (edit_tree, edit_magic) and rng.random() < 0.2:
            log.append(edit_tree(rng, draft))
        data = draft.build()
    if on_bytes or rng.random() < 0.05:
        log.append(rng.choices(list(BYTE_EDITS), list(BYTE_EDITS.values()))[0](rng, data))
    return bytes(data), log


def failure(i: int, log: list[str], error: BaseException, path: Path) -> dict[str, Any]:
    """What is told of a failed case, with a key that it shares with others of its kind."""
    cause = error.__cause__ if isinstance(error, Wrong) and error.__cause__ else error
    frames = [x for x in traceback.extract_tb(cause.__traceback__) if "/kvquant/" in x.filename]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
    text = str(error).replace(str(path), "PATH")
    pattern = re.sub(r"\[[^\]]*\]?", "[..]", re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", text))
    key = f"{type(error).__name__}{where}: {pattern[:110]}"
    return {"i": i, "key": ascii(key)[1:-1], "text": ascii(text)[1:601], "log": log}


def run_child(
    files: dict[str, bytes], seed: int, numbers: Iterable[int], counts: memoryview, folder: Path
) -> None:
    """Load every case; counts and failures are where they outlast a crash."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # Large memory comes from the system and goes back to it: none is kept that a later load
        # could use beside its limit. (M_MMAP_THRESHOLD and M_TRIM_THRESHOLD)
        libc.mallopt(-3, 2**16)
        libc.mallopt(-1, 2**17)
    parent, path = os.getppid(), folder / f"{os.getpid()}.safetensors"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it kills, also within compiled code
    with open(folder / "failures", "a", buffering=1) as told:
        for i in numbers:
            if os.getppid() != parent:
                break
            counts[NOW] = i
            data, log = case(files, seed, i)
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
            try:
                counts[LOADS] += 1
                verdict = check(path, data)
                if verdict == "refused" and i < 0:
                    raise Wrong(f"refused: {attempt(path, 2**30).error}")
                counts[ACCEPTED if verdict == "accepted" else REFUSED] += 1
            except KeyboardInterrupt:
                break
            except BaseException as error:
                told.write(json.dumps(failure(i, log, error, path)) + "\n")
            signal.setitimer(signal.ITIMER_REAL, 0)
            path.unlink()  # and a new one next time: the old one may still be mapped


def run(
    files: dict[str, bytes], seed: int, numbers: range, jobs: int, folder: Path
) -> tuple[list[int], list[dict[str, Any]]]:
    """All cases in child processes: (loads, accepted, refused) and the failures."""
    shared = memoryview(mmap.mmap(-1, 8 * FIELDS * jobs)).cast("q")
    running: dict[int, int] = {}
    failures: list[dict[str, Any]] = []

    def start(job: int, todo: range) -> None:
        counts = shared[FIELDS * job : FIELDS * (job + 1)]
        sys.stdout.flush()
        if pid := os.fork():
            running[pid] = job
            return
        status = 1
        try:
            run_child(files, seed, todo, counts, folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    for job in range(jobs):
        start(job, numbers[job::jobs])
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        job = running.pop(pid)
        if not status:
            continue
        i = shared[FIELDS * job + NOW]
        code = os.waitstatus_to_exitcode(status)
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        said = "hangs" if name == "SIGALRM" else f"crashes ({name})"
        _, log = case(files, seed, i)
        failures.append({"i": i, "key": said, "text": said, "log": log})
        start(job, range(i + jobs, numbers.stop, jobs))
    if (folder / "failures").exists():
        failures += map(json.loads, (folder / "failures").read_text().splitlines())
    totals = [sum(shared[field::FIELDS]) for field in (LOADS, ACCEPTED, REFUSED)]
    return totals, sorted(failures, key=lambda x: x["i"])


def report(failures: list[dict[str, Any]]) -> None:
    """Each kind of failure once, the most frequent first, with its smallest case."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in failures:
        kinds.setdefault(one["key"], []).append(one)
    for key, ones in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        print(f"FAILED {len(ones)}x: {key}")
        print(f"    --only {ones[0]['i']}: {'; '.join(ones[0]['log'])[:300]}")


def show(files: dict[str, bytes], seed: int, i: int) -> None:
    """What was done in one case, and the file, which is kept."""
    data, log = case(files, seed, i)
    path = Path(tempfile.gettempdir()) / f"kvquant-fuzz-{seed}-{i}.safetensors"
    path.write_bytes(data)
    print(f"case {i} of seed {seed}: {len(data)} bytes, kept as {path}")
    for line in log:
        print(f"    {line}")
    print(f"    begins with {data[:1600]!r}")


def main(count: int = 100_000, seed: int = 0, jobs: int = 2, only: int | None = None) -> None:
    """Load ``count`` mutated files and the corpus they come from; ``only``: one of them."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    shm = "/dev/shm"
    base = shm if os.path.isdir(shm) and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvquant-fuzz-", dir=base) as name:
        folder = Path(name)
        files = corpus(folder)
        numbers = range(-len(files), count) if only is None else range(only, only + 1)
        if only is not None:
            show(files, seed, only)
        totals, failures = run(files, seed, numbers, min(jobs, len(numbers)), folder)
    loads, accepted, refused = totals
    seconds = time.perf_counter() - begun
    print(
        f"files: {loads} loads in {seconds:.0f} s ({loads / seconds:.0f}/s, {jobs} jobs, seed "
        f"{seed}): {accepted} accepted, {refused} refused, {len(failures)} failed"
    )
    if only is not None:
        for one in failures:
            print(one["text"])
    report(failures)
    if failures or loads != len(numbers):
        _fail()


def _fail() -> NoReturn:
    raise SystemExit(1)
