"""What a release must have with it, checked in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvquant
import saved

ROOT = Path(__file__).parents[2]


def test_every_version_left_its_files() -> None:
    changelog = ROOT.joinpath("CHANGELOG.md").read_text()
    versions = {*re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.M), kvquant.__version__}
    for version in versions:
        kinds = sorted(path.name for path in (saved.DATA / version).glob("cache-*.safetensors"))
        assert kinds == sorted(f"cache-{kind}.safetensors" for kind in saved.KINDS), version


def test_a_release_saves_what_it_loads(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    saved.save(tmp_path / "new")
    for kind, cache in saved.caches():
        loaded = kvquant.QuantizedKVCache.load(tmp_path / "new" / f"cache-{kind}.safetensors")
        assert loaded.seq_lens.equal(cache.seq_lens)
        assert loaded.format == cache.format
    with pytest.raises(FileExistsError):
        saved.save(tmp_path / "new")
