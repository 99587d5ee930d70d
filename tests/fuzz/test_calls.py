"""A short run of the fuzzer, in a process of its own: a crash is a failure, not the end."""

from __future__ import annotations

from . import run


def test_every_public_name_is_fuzzed():
    assert run.uncovered() == []


def test_random_calls():
    total = run.run_all(seed=0, first=0, end=600)
    failures = [
        f"{': '.join(key)} ({times} times)\n  {details}\n"
        f"  python -m tests.fuzz calls --only {number} --seed 0"
        for key, (number, times, details) in sorted(total.failures.items())
    ]
    assert not failures, "\n".join(failures)
    assert total.calls.total() >= 600
