"""wheel_symbols.py WHEEL: every name that the wheel's extension modules take from elsewhere has a
version of some library, or is Python's.

auditwheel compares versions. A name without one, such as glibc 2.38's ``__isoc23_strtol`` in a link
against stubs of an older glibc, it does not see, and the wheel would fail to import there.
"""

from __future__ import annotations

import io
import sys
import zipfile

from elftools.elf.elffile import ELFFile


def strangers(file: ELFFile) -> list[str]:
    """Undefined names, neither weak nor versioned, that Python does not have."""
    names = file.get_section_by_name(".dynsym")
    versions = file.get_section_by_name(".gnu.version")
    return [
        symbol.name
        for i, symbol in enumerate(names.iter_symbols())
        if symbol["st_shndx"] == "SHN_UNDEF"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and not (versions and isinstance(versions.get_symbol(i)["ndx"], int))  # else a word
        and not symbol.name.startswith(("Py", "_Py"))
    ]


def main(path: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        modules = [name for name in wheel.namelist() if name.endswith(".so")]
        if not modules:
            raise SystemExit(f"{path}: no extension module")
        for name in modules:
            if found := strangers(ELFFile(io.BytesIO(wheel.read(name)))):
                raise SystemExit(f"{path}: {name} needs {', '.join(found)}, of no known library")


if __name__ == "__main__":
    main(sys.argv[1])
