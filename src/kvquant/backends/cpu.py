"""The compiled CPU kernels: instruction set chosen at load, threads as torch has them set."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .compiled import Compiled

__all__ = ["CPU"]


class _Cpu(Compiled):
    name = "cpu"

    def queue(self, x: Tensor) -> tuple[int, int]:
        return -1, torch.get_num_threads()

    def unavailable(self, device: torch.device) -> str | None:
        return None if native.module else f"the extension is not there ({native.error})"


CPU = _Cpu()
