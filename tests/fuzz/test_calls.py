"""A short run of the fuzzer, in a process of its own: a crash is a failure, not the end."""

from __future__ import annotations

import pytest

from kvquant.ops import OPS

from . import run
from .moving import STAND_IN


def test_every_public_name_is_fuzzed():
    assert run.uncovered() == []


@pytest.mark.parametrize(
    ("device", "count", "jobs"), [("cpu", 600, 1), (STAND_IN, 200, 2)], ids=["cpu", "copied"]
)
def test_random_calls(device, count, jobs):
    total = run.run_all(seed=0, first=0, end=count, device=device, jobs=jobs)
    failures = [
        f"{': '.join(key)} ({times} times)\n  {details}\n"
        f"  python -m tests.fuzz calls --only {number} --seed 0 --device {device}"
        for key, (number, times, details) in sorted(total.failures.items())
    ]
    assert not failures, "\n".join(failures)
    assert total.numbers == count
    assert total.calls.total() >= count


def test_random_calls_of_operators():
    total = run.run_all(seed=0, first=0, end=300, what="ops")
    failures = [
        f"{': '.join(key)} ({times} times)\n  {details}\n"
        f"  python -m tests.fuzz ops --only {number} --seed 0"
        for key, (number, times, details) in sorted(total.failures.items())
    ]
    assert not failures, "\n".join(failures)
    assert set(total.accepted) == set(OPS)


def test_a_time_limit_ends_a_run():
    total = run.run_all(seed=0, first=0, end=10**6, seconds=0)
    assert not total.failures
    assert total.numbers == 0
