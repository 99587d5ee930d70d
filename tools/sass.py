"""Whether two builds have the same machine code for GPUs: ``python tools/sass.py OLD.so NEW.so``.

A change of names or layout alone must leave every kernel's hash as it was. Needs cuobjdump, which
comes with the CUDA toolkit.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")


def hashes(extension: Path, cuobjdump: str) -> dict[str, str]:
    """Of each kernel's instructions, by its mangled name."""
    text = subprocess.run(
        [cuobjdump, "-sass", extension], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = {}
    name, digest = "", hashlib.sha256()
    for line in text.splitlines():
        if match := _FUNCTION.search(line):
            name, digest = match[1], hashlib.sha256()
        elif name and (match := _INSTRUCTION.match(line)):
            digest.update(match[1].encode())
            found[name] = digest.hexdigest()[:16]
    return found


def main(
    old: Path,
    new: Path,
    cuobjdump: Annotated[str, typer.Option(help="The program.")] = "cuobjdump",
) -> None:
    """Compare the kernels of two builds, whatever they are called; exit with 1 if any differs."""
    before, after = hashes(old, cuobjdump), hashes(new, cuobjdump)
    others = Counter(after.values()) - Counter(before.values())
    for name, digest in after.items():
        if digest in others:
            print(f"differs: {name}")
    print(f"{len(before)} kernels before, {len(after)} after, {sum(others.values())} differ")
    raise typer.Exit(bool(others) or len(before) != len(after))


if __name__ == "__main__":
    typer.run(main)
