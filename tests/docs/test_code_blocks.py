"""The code in README and docs runs as it stands, on whatever device is here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOWNLOADS = ("from_pretrained", "model.generate")  # such a block is compiled, not run
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in FILES
    for i, block in enumerate(BLOCK.findall(path.read_text()))
]


def surroundings(device: str) -> dict[str, Any]:
    """What the blocks take for granted: a layer's number, rows, an engine's batch."""
    new = {"device": device, "dtype": torch.float16 if device == "cuda" else torch.float32}

    def index(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return {
        "i": 3,
        "query": torch.randn(1, 5, 32, 128, **new),
        "key": torch.randn(1, 5, 8, 128, **new),
        "value": torch.randn(1, 5, 8, 128, **new),
        "block_table": torch.randperm(16, device=device).to(torch.int32).view(2, 8),
        "seq_lens": index(20, 3),
        "query_start_loc": index(0, 3, 5),
        "longest": 3,
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = compile(block.replace('device="cuda"', f'device="{device}"'), "block", "exec")
    if any(word in block for word in DOWNLOADS):
        return
    names = surroundings(device)
    if "query_start_loc" in block:  # packed rows
        names |= {name: names[name].flatten(0, 1) for name in ("query", "key", "value")}
        names["output"] = torch.empty_like(names["query"])
    with torch.no_grad():
        exec(code, names)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5
