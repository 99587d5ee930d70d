"""The same prompts through the engine with each cache, run when first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conftest import LONG
from .offline import Job, Report, differences, run

# Blocks of 64 tokens for about half of what 16 requests hold at once.
ENGINE = {"block_size": 64, "num_gpu_blocks_override": 40}
# vLLM's own cache has 16 bits only where the whole model has.
OWN, OWN16 = "the engine's own", "the engine's own, 16 bits"
OURS = ["KVQUANT_PLAIN", "KVQUANT"] if LONG else ["KVQUANT"]
#: How near the two best logits are where answers may differ.
TOLERANCE = {"KVQUANT_PLAIN": 1e-2, "KVQUANT": 5e-2, OWN: 1e-2, OWN16: 1e-2}


class Reports(dict[str, Report]):
    """By cache.

    Args:
        scratch: A folder: in the long version each cache leaves its logits there, ``<cache>.pt``.
        **job: See `Job`.
    """

    def __init__(self, scratch: Path, **job: Any) -> None:
        super().__init__()
        self._scratch, self._job = scratch, job

    def __missing__(self, name: str) -> Report:
        self[name] = run(
            Job(
                backend=name if name in OURS else None, again=4, alone=len(self._job["prompts"]),
                engine={**ENGINE, "dtype": "bfloat16" if name == OWN16 else "float32"},
                logits=str(self._scratch / f"{name}.pt") if LONG else None, **self._job,
            )
        )  # fmt: skip
        tell(name, self[name])
        return self[name]


def tell(name: str, report: Report) -> None:
    ties, wrong = differences(report.batch, report.alone, TOLERANCE[name])
    print(
        f"\n{name}: {len(report.batch)} requests, {report.preemptions} preemptions, "
        f"{sum(a.cached for a in report.batch)} tokens from the prefix cache, {ties} differ at "
        f"near-equal logits, {len(wrong)} elsewhere"
    )
