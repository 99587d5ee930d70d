"""The calls in a child process, which may die: the parent starts another at the next call."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvquant
from kvquant import QuantizedKVCache

from .arguments import Dice
from .caches import CONSTRUCTOR
from .calls import Failure, Report, plain, run_function, where_from
from .lives import run_life
from .methods import FROM_LAYER_PAST, METHODS
from .others import FUNCTIONS

ROOT = Path(__file__).parents[2]
DEVICE_ERROR = 77  # a child's status when its CUDA context is lost
START_LIMIT = 300.0  # seconds until a child's first call: a tool around it may be slow

_ALL = (*FUNCTIONS, CONSTRUCTOR, FROM_LAYER_PAST)
_OFTEN = [operation for operation in _ALL if operation.name in ("append_", "attention", "gather")]


def uncovered() -> list[str]:
    """Public names that no operation is about; what files.py fuzzes apart."""
    operations = (*_ALL, *METHODS)
    known = {operation.name for operation in operations}
    known.update(name for operation in operations for name in operation.covers)
    methods = [
        f"QuantizedKVCache.{name}"
        for name in dir(QuantizedKVCache)
        if not name.startswith("_") and callable(getattr(QuantizedKVCache, name))
    ]
    known |= {"QuantizedKVCache.save", "QuantizedKVCache.load"}
    return [name for name in (*kvquant.__all__, *methods) if name not in known]


def run_one(seed: int, number: int, device: str, report: Report) -> None:
    """Call number ``number``: of a function, or the life of a cache."""
    dice = Dice(seed, number, device)
    torch.manual_seed(dice.random.getrandbits(60))
    if dice.chance(0.2):
        run_life(dice, report)
        return
    operation = dice.among(_OFTEN if dice.chance(0.4) else _ALL)
    mistakes = dice.number(1, 3) if dice.flag() and operation.kinds else 0
    run_function(dice, operation, report, mistakes)


# ---------------------------------------------------------------------------------------- the child


def child(path: str, seed: int, first: int, end: int, device: str) -> None:
    """Run calls ``first`` to ``end`` and write what happens to ``path``, a line each."""
    torch.set_num_threads(1)
    faulthandler.enable()
    file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(**line: Any) -> None:
        os.write(file, (json.dumps(line) + "\n").encode())

    def announce(number: int, what: str) -> None:
        write(at=number, what=what)

    for number in range(first, end):
        report = Report(begin=partial(announce, number))
        announce(number, "")
        try:
            run_one(seed, number, device, report)
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
                self.total.calls.update(line["calls"])
                self.total.accepted.update(line["accepted"])
                for failure in line["failures"]:
                    self.total.add(self.number, Failure(**failure))


def run_all(
    seed: int,
    first: int,
    end: int,
    *,
    device: str = "cpu",
    wrap: str = "",
    limit: float = 20.0,
    told: Callable[[int, Total], None] = lambda number, total: None,
) -> Total:
    """All calls, in as many children as it takes; ``told`` hears how far they are."""
    total, begin = Total(), time.monotonic()
    while first < end:
        first = _run_child(total, seed, first, end, device, wrap, limit, told)
        total.children += 1
    total.seconds = time.monotonic() - begin
    return total


def _run_child(
    total: Total,
    seed: int,
    first: int,
    end: int,
    device: str,
    wrap: str,
    limit: float,
    told: Callable[[int, Total], None],
) -> int:
    """One child; returns the call that the next one begins with."""
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder, "lines"), Path(folder, "output")
        lines.touch()
        command = [*shlex.split(wrap), sys.executable, "-m", "tests.fuzz", "child", str(lines)]
        command += [f"--seed={seed}", f"--first={first}", f"--end={end}", f"--device={device}"]
        progress = _Progress(total, first)
        with output.open("wb") as out, lines.open("rb") as source:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            hung, last = False, time.monotonic()
            try:
                while True:
                    ended = process.poll() is not None
                    if new := source.read():
                        progress.take(new)
                        last = time.monotonic()
                        told(progress.number, total)
                    elif ended:
                        break
                    elif time.monotonic() - last > (limit if progress.started else START_LIMIT):
                        hung = True
                        break
                    else:
                        time.sleep(0.02)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its own group: see start_new_session
                status = process.wait()
        text = output.read_text(errors="replace")
    if not progress.started:
        raise RuntimeError(f"the child did not start (status {status}):\n{text[-3000:]}")
    if progress.done:
        if status:  # a tool around it that found something
            total.add(end - 1, Failure("(the whole run)", f"status {status}", _last(text), text))
        return end
    if hung:
        kind, message = "hang", f"over {limit:g} s"
    elif progress.lost:
        kind, message = "device lost", progress.lost
    elif status < 0:
        kind, message = signal.Signals(-status).name, _frame(text)
    else:
        kind, message = f"exit status {status}", _last(text)
    name = progress.what.split("(")[0] or "(making the arguments)"
    total.calls[name] += 1
    total.add(progress.number, Failure(name, kind, message, f"{progress.what}\n{text[-2000:]}"))
    return progress.number + 1


def _frame(text: str) -> str:
    """The innermost line of Python that is the library's, from what faulthandler wrote."""
    found = re.search(r'File "[^"]*/kvquant/([\w/]+\.py)", line \d+ in (\w+)', text)
    return f"in {found[1]}:{found[2]}" if found else "outside of the library"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "nothing was written"
