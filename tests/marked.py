"""Text that programs write into the documentation, between two markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]


def write(path: Path, name: str, text: str) -> None:
    """Put ``text`` between a file's lines ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: The file lacks them.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text()
    if begin not in old or end not in old.split(begin, 1)[1]:
        raise ValueError(f"{path}: needs the lines '{begin}' and '{end}'")
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")
