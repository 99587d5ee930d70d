"""What may be wrong with a machine: pure functions of what ``kvquant info`` collects."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from .. import explain

__all__ = ["Finding", "State", "examine", "serves_arch"]

#: "stops": what was asked for does not run; "slow": it runs, correct and slow; "note": to know.
State = Literal["ok", "note", "slow", "stops"]
_TRANSFORMERS = (5, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One row of the doctor's table.

    Attributes:
        check: What was looked at.
        state: How it is.
        what: In words.
        advice: What to do, if there is something.
    """

    check: str
    state: State
    what: str
    advice: str = ""


def examine(info: dict[str, Any], *, transformers: str | None = "") -> list[Finding]:
    """All rows about this machine.

    Args:
        info: What ``kvquant info`` collects.
        transformers: Its version, None: not installed; by default what is installed.
    """
    if transformers == "":
        transformers = _version("transformers")
    return [
        _extension(info),
        *(check(info) for check in _OF_CUDA),
        *(_backend(device) for device in ("cpu", "cuda") if device == "cpu" or _gpus(info)),
        _library(transformers),
    ]


def _gpus(info: dict[str, Any]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = info["cuda"]["devices"]
    return devices


def _sees_gpu(info: dict[str, Any]) -> bool:
    """Whether there is a GPU, for torch or for the extension."""
    return bool(_gpus(info) or info["extension"].get("devices"))


def _extension(info: dict[str, Any]) -> Finding:
    built = info["extension"]
    error = built.get("error")
    if error is None:
        what = f"version {built.get('version')}, compiled; nothing is compiled at run time"
        return Finding(check="extension", state="ok", what=what)
    if "but this package" in error:
        return Finding(
            check="extension",
            state="stops",
            what=f"a stale build of kvquant._C is in the way: {error}",
            advice="build it again: pip install . in the source, or make build",
        )
    return Finding(
        check="extension",
        state="stops",
        what=f"the compiled kernels are not there: {error}",
        advice="install a wheel of kvquant for this Python, or build it: pip install . in the "
        "source. Until then the torch reference runs, which is slow",
    )


def _device(info: dict[str, Any]) -> Finding:
    if _sees_gpu(info):
        names = ", ".join(device["name"] for device in _gpus(info)) or "seen by the driver"
        return Finding(check="GPU", state="ok", what=names)
    return Finding(
        check="GPU",
        state="note",
        what="none: kvquant runs on the CPU",
        advice="if this machine has one, check nvidia-smi and, in a container, its GPU option",
    )


def _driver(info: dict[str, Any]) -> Finding:
    built = info["extension"]
    needed, found = built.get("cuda_runtime") or 0, built.get("cuda_driver") or 0
    if not found or not needed:
        what = "no NVIDIA driver" if not found else "no CUDA in this build to need one"
        return Finding(check="driver", state="note", what=what)
    if found // 1000 < needed // 1000:
        return Finding(
            check="driver",
            state="stops",
            what=f"it is for CUDA {_cuda(found)}, but this build of kvquant needs {_cuda(needed)}",
            advice=f"update the NVIDIA driver to one for CUDA {needed // 1000}, or build kvquant "
            f"with the toolkit of CUDA {found // 1000}: pip install . in the source",
        )
    return Finding(check="driver", state="ok", what=f"for CUDA {_cuda(found)}")


def _build(info: dict[str, Any]) -> Finding:
    built = info["extension"]
    if built.get("error") or built.get("cuda"):
        archs = built.get("cuda_archs") or "nothing"
        return Finding(check="CUDA build", state="ok", what=f"for {archs}")
    seen = _sees_gpu(info)
    return Finding(
        check="CUDA build",
        state="stops" if seen else "note",
        what="this build of kvquant has no CUDA kernels",
        advice="install a wheel, or build with KVQUANT_CUDA=ON where nvcc is" if seen else "",
    )


def _architecture(info: dict[str, Any]) -> Finding:
    archs = info["extension"].get("cuda_archs") or ""
    for device in _gpus(info):
        capability = device["compute_capability"]
        if archs and not serves_arch(archs, capability):
            number = capability.replace(".", "")
            return Finding(
                check="architecture",
                state="stops",
                what=f"{device['name']} has compute capability {capability}, but this build is for "
                f"{archs}",
                advice=f"build it for this GPU: KVQUANT_CUDA_ARCHS={number}-real pip install . in "
                "the source (7.5 is the least)",
            )
    state: State = "ok" if _gpus(info) and archs else "note"
    what = "every GPU here is in the build" if state == "ok" else "no GPU to compare with the build"
    return Finding(check="architecture", state=state, what=what)


def _torch(info: dict[str, Any]) -> Finding:
    version, cuda = info["versions"]["torch"], info["cuda"]["torch"]
    if not _sees_gpu(info) or (cuda and _gpus(info)):
        return Finding(check="torch", state="ok", what=f"{version}, CUDA {cuda or 'none'}")
    if not cuda:
        return Finding(
            check="torch",
            state="stops",
            what=f"there is a GPU, but torch {version} is a CPU build",
            advice="install a CUDA build of torch",
        )
    return Finding(
        check="torch",
        state="stops",
        what=f"there is a GPU, but torch {version} (CUDA {cuda}) does not see it",
        advice="check that torch's CUDA fits the driver, and CUDA_VISIBLE_DEVICES",
    )


_OF_CUDA: tuple[Callable[[dict[str, Any]], Finding], ...] = (
    _device, _driver, _build, _architecture, _torch,
)  # fmt: skip


def _backend(device: str) -> Finding:
    found = explain(device=device)
    check = f"attention on {'the CPU' if device == 'cpu' else 'the GPU'}"
    if found.backend != "reference":
        return Finding(check=check, state="ok", what=found.reason)
    forced = "KVQUANT_BACKEND" in found.reason
    return Finding(
        check=check,
        state="slow" if forced else "stops",
        what=f"runs on the torch reference: {found.reason}",
        advice="unset KVQUANT_BACKEND, leave use_backend('reference')"
        if forced
        else "see the other rows",
    )


def _library(version: str | None) -> Finding:
    least = ".".join(map(str, _TRANSFORMERS))
    if version is None:
        return Finding(
            check="transformers",
            state="note",
            what="not installed: KVQuantCache and kvquant.compat need it",
            advice="pip install 'kvquant[transformers]'",
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _TRANSFORMERS:
        return Finding(
            check="transformers",
            state="stops",
            what=f"{version} is too old: KVQuantCache needs {least} or newer",
            advice="pip install --upgrade transformers",
        )
    return Finding(check="transformers", state="ok", what=version)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def serves_arch(archs: str, capability: str) -> bool:
    """Whether a build for ``archs``, as CMake names them, runs on a GPU of this capability.

    Machine code ("90-real") serves its own major version from its minor version on, "90a" and
    "120f" that version alone; "virtual", and a bare number, also every later GPU, through PTX.

    >>> serves_arch("80-real;90-virtual", "12.0"), serves_arch("80-real", "9.0")
    (True, False)
    """
    major, minor = (int(part) for part in capability.split("."))
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch.strip())
        if match is None:
            continue
        of_major, of_minor = int(match[1]), int(match[2])
        if match[3]:
            if (of_major, of_minor) == (major, minor):
                return True
        elif (of_major == major and of_minor <= minor) or (
            match[4] != "-real" and (of_major, of_minor) <= (major, minor)
        ):
            return True
    return False
