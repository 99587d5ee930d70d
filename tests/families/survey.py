"""Many families, judged in several processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

__all__ = ["Result", "survey"]

Result = tuple[str, str, str]  # the model type, its state, why


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def _judged(name: str) -> Result:
    """One family's result; nothing it does ends the survey."""
    from . import build, check

    try:
        verdict = check.judge(name)
    except build.CannotBuild as reason:
        return name, "not tried", str(reason)
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        return name, "wrong", f"the survey itself: {type(error).__name__}: {text}"
    skipped = "; ".join(f"{key} not tried: {why}" for key, why in verdict.skipped.items())
    return name, verdict.state, verdict.reason or skipped


def survey(families: list[str], workers: int = 2) -> list[Result]:
    """The results in order, from ``workers`` processes of one thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        return list(pool.map(_judged, families, chunksize=4))
