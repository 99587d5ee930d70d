"""The calls in a child process, which may die: the parent starts another at the next call."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

import kvquant
from kvquant import QuantizedKVCache

from .caches import CONSTRUCTOR
from .calls import Failure, Report, plain, run_function, where_from
from .dice import Dice
from .direct import run_direct
from .lives import run_life
from .methods import FROM_LAYER_PAST, METHODS
from .moving import STAND_IN
from .others import FUNCTIONS

ROOT = Path(__file__).parents[2]
DEVICE_ERROR = 77  # a child's status when its CUDA context is lost
START_LIMIT = 300.0  # seconds until a child's first call: a tool around it may be slow

_ALL = (*FUNCTIONS, CONSTRUCTOR, FROM_LAYER_PAST)
_OFTEN = [
    operation
    for operation in _ALL
    if operation.name in ("append_", "attention", "gather", "Plan.run")
]


def uncovered() -> list[str]:
    """Public names that no operation is about; what files.py fuzzes apart."""
    operations = (*_ALL, *METHODS)
    known = {operation.name for operation in operations}
    known.update(name for operation in operations for name in operation.covers)
    methods = [
        f"{cls.__name__}.{name}"
        for cls in (QuantizedKVCache, kvquant.CacheView, kvquant.Plan)
        for name in dir(cls)
        if not name.startswith("_") and callable(getattr(cls, name))
    ]
    known |= {"__version__", "QuantizedKVCache.save", "QuantizedKVCache.load"}
    return [name for name in (*kvquant.__all__, *methods) if name not in known]


def run_one(seed: int, number: int, device: str, report: Report, what: str = "calls") -> None:
    """Call number ``number``: of a function or the life of a cache; or of an operator ("ops")."""
    dice = Dice(seed, number, device)
    torch.manual_seed(dice.random.getrandbits(60))
    if what == "ops":
        run_direct(dice, report)
        return
    if dice.chance(0.2):
        run_life(dice, report)
        return
    operation = dice.among(_OFTEN if dice.chance(0.4) else _ALL)
    mistakes = dice.number(1, 3) if dice.flag() and operation.kinds else 0
    run_function(dice, operation, report, mistakes)


# ---------------------------------------------------------------------------------------- the child


def child(
    path: str, what: str, seed: int, first: int, end: int, step: int, device: str, until: float
) -> None:
    """Run calls ``first``, ``first + step``, .. below ``end``, and write what happens to ``path``.

    No call begins at the time ``until`` or later. Each thing that happens is a line.
    """
    torch.set_num_threads(1)
    faulthandler.enable()
    file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(**line: Any) -> None:
        os.write(file, (json.dumps(line) + "\n").encode())

    def announce(number: int, call: str) -> None:
        write(at=number, what=call)

    if device not in ("cpu", STAND_IN):  # a context takes its time, most of all within a tool
        kvquant.quantize_cache_v(torch.empty(1, 1, 1, 64).to(device))
        torch.cuda.synchronize()
    for number in range(first, end, step):
        if time.time() >= until:
            break
        report = Report(begin=partial(announce, number))
        announce(number, "")
        try:
            run_one(seed, number, device, report, what)
        except Exception as error:  # in the fuzzer, or in what it calls to make arguments
            if "CUDA error" in str(error):  # nothing works in this process any more
                write(lost=str(error).split("\n")[0])
                os._exit(DEVICE_ERROR)
            where = "".join(traceback.format_exception(error))
            text = f"{type(error).__name__}: {plain(str(error))} ({where_from(error)})"
            report.failures.append(Failure("(making or checking)", "error", text, where))
        write(
            calls=report.calls,
            accepted=report.accepted,
            failures=[vars(failure) for failure in report.failures],
        )
    write(done=True)


# --------------------------------------------------------------------------------------- the parent


@dataclass
class Total:
    """What all children saw: a failure's smallest call, how often, and how it looked first."""

    calls: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str, str], list[Any]] = field(default_factory=dict)
    numbers: int = 0
    children: int = 0
    seconds: float = 0.0

    def add(self, number: int, failure: Failure) -> None:
        key = failure.operation, failure.kind, failure.message
        known = self.failures.setdefault(key, [number, 0, failure.details])
        known[1] += 1


@dataclass
class _Progress:
    """What a child has written so far."""

    total: Total
    number: int
    what: str = ""
    started: bool = False
    done: bool = False
    lost: str = ""
    _rest: bytes = b""

    def take(self, new: bytes) -> None:
        *lines, self._rest = (self._rest + new).split(b"\n")
        for text in lines:
            line = json.loads(text)
            if "at" in line:
                self.number, self.what, self.started = line["at"], line["what"], True
            elif "done" in line:
                self.done = True
            elif "lost" in line:
                self.lost = line["lost"]
            else:
                self.total.numbers += 1
                self.total.calls.update(line["calls"])
                self.total.accepted.update(line["accepted"])
                for failure in line["failures"]:
                    self.total.add(self.number, Failure(**failure))


@dataclass(frozen=True)
class _Task:
    """What all children of a run have in common.

    Attributes:
        what: "calls" of what is public, or "ops".
        until: The time when no further call begins.
        limit: Seconds of one call.
        stop: Set where a run is over early: children are killed.
        lock: Of the total.
    """

    total: Total
    what: str
    seed: int
    end: int
    step: int
    device: str
    wrap: str
    limit: float
    until: float
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_all(
    seed: int,
    first: int,
    end: int,
    *,
    what: str = "calls",
    device: str = "cpu",
    wrap: str = "",
    limit: float = 20.0,
    jobs: int = 1,
    seconds: float = math.inf,
    told: Callable[[Total], None] = lambda total: None,
) -> Total:
    """All calls that begin within ``seconds``, in as many children as it takes.

    ``jobs`` children run at a time; ``told`` hears several times a second how far they are.
    """
    begin, total = time.monotonic(), Total()
    task = _Task(total, what, seed, end, jobs, device, wrap, limit, time.time() + seconds)
    with ThreadPoolExecutor(jobs) as threads:
        waiting = {threads.submit(_run_part, task, first + job) for job in range(jobs)}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for part in done:
                    part.result()
                with task.lock:
                    told(total)
        finally:
            task.stop.set()
    total.seconds = time.monotonic() - begin
    return total


def _run_part(task: _Task, first: int) -> None:
    """One job's calls: a child, and another behind each call that ends one."""
    while first < task.end and time.time() < task.until and not task.stop.is_set():
        first = _run_child(task, first)
        with task.lock:
            task.total.children += 1


def _run_child(task: _Task, first: int) -> int:
    """One child; returns the call that the next one begins with."""
    progress = _Progress(task.total, first)
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder, "lines"), Path(folder, "output")
        lines.touch()
        command = [*shlex.split(task.wrap), sys.executable, "-m", "tests.fuzz", "child"]
        command += [
            str(lines),
            task.what,
            f"--seed={task.seed}",
            f"--first={first}",
            f"--end={task.end}",
        ]
        command += [f"--step={task.step}", f"--device={task.device}", f"--until={task.until}"]
        with output.open("wb") as out, lines.open("rb") as source:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                hung = _follow(task, process, source, progress)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its own group: see start_new_session
                status = process.wait()
        text = output.read_text(errors="replace")
    if task.stop.is_set():
        return task.end
    if not progress.started and not progress.done:
        raise RuntimeError(f"the child did not start (status {status}):\n{text[-3000:]}")
    with task.lock:
        return _ended(task, progress, hung, status, text)


def _follow(
    task: _Task, process: subprocess.Popen[bytes], source: BinaryIO, progress: _Progress
) -> bool:
    """Listen to a child until it ends; whether it hangs instead."""
    last = time.monotonic()
    while not task.stop.is_set():
        ended = process.poll() is not None
        if new := source.read():
            with task.lock:
                progress.take(new)
            last = time.monotonic()
        elif ended:
            break
        else:
            begun = progress.started and not progress.done
            if time.monotonic() - last > (task.limit if begun else START_LIMIT):
                return True
            time.sleep(0.02)
    return False


def _ended(task: _Task, progress: _Progress, hung: bool, status: int, text: str) -> int:
    """Count how a child has ended; the call that the next one begins with."""
    total = task.total
    if progress.done:
        if status:  # a tool around it that found something
            failure = Failure("(the whole run)", f"status {status}", _last(text), text)
            total.add(progress.number, failure)
        return task.end
    if hung:
        kind, message = "hang", f"over {task.limit:g} s"
    elif progress.lost:
        kind, message = "device lost", progress.lost
    elif status < 0:
        kind, message = signal.Signals(-status).name, _frame(text)
    else:
        kind, message = f"exit status {status}", _last(text)
    name = progress.what.split("(")[0] or "(making the arguments)"
    total.calls[name] += 1
    total.numbers += 1
    total.add(progress.number, Failure(name, kind, message, f"{progress.what}\n{text[-9000:]}"))
    return progress.number + task.step


def _frame(text: str) -> str:
    """The innermost line of Python that is the library's, from what faulthandler wrote."""
    found = re.search(r'File "[^"]*/kvquant/([\w/]+\.py)", line \d+ in (\w+)', text)
    return f"in {found[1]}:{found[2]}" if found else "outside of the library"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "nothing was written"
