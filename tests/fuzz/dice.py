"""All that is random: numbers as callers may write them, and tensors of every layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .moving import STAND_IN

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 48, 64, 64, 80, 128, 128, 256, 272)


class Whole:
    """An integer of no type that anybody knows."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"Whole({self.number})"


class Dice:
    """Everything random about one call, from (seed, number of the call) alone.

    Attributes:
        target: Where the call under test has its tensors; they are made on the CPU.
        moves: They are copied there for the call alone.
        places: Whether arguments are copied, by name, where that is not as usual for their kind.
        spelling: How often an integer is not an int.
    """

    def __init__(self, seed: int, number: int, device: str = "cpu") -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.target = "cpu" if device == STAND_IN else device
        self.moves = device != "cpu"
        self.places: dict[str, bool] = {}
        self.spelling = 0.3

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def among(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, max(low, high))

    def flag(self) -> bool:
        return self.chance(0.5)

    def head_dim(self) -> int:
        """On a device none that the kernels do not serve: all of the reference would run there."""
        dim = self.among(HEAD_DIMS)
        return min(dim, 256) if self.moves else dim

    # The same number as callers may write it.

    def integer(self, number: int) -> Any:
        if not self.chance(self.spelling):
            return number
        as_type = np.int32 if -(2**31) <= number < 2**31 else np.int64
        return self.among([np.int64, as_type, torch.tensor, Whole])(number)

    def real(self, number: float) -> Any:
        return self.among([float, float, np.float64, np.float32])(number)

    # Tensors.

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def rows(self, *shape: int, dtype: torch.dtype | None = None, clean: bool = False) -> Tensor:
        """Rows as models have them, in any layout with a contiguous last dimension."""
        dtype = self.among(FLOATS) if dtype is None else dtype

        def base(*size: int) -> Tensor:
            x = self.normal(*size)
            x[..., 1:2] += 6
            x[..., size[-1] // 2] -= 4
            return x.to(dtype)

        *lead, heads, dim = shape
        layout = self.number(0, 6)
        if layout == 1 and lead:  # heads in front of tokens, as models transpose them
            x = base(*lead[:-1], heads, lead[-1], dim).transpose(-3, -2)
        elif layout == 2:  # part of a fused projection
            x = base(*lead, heads + 1, dim + 16)[..., 1:, :dim]
        elif layout == 3:  # aligned to nothing but its elements
            count = int(np.prod(shape))
            x = base(count + 1 + dim)[1 : 1 + count].view(shape)
        elif layout == 4 and lead and lead[0] > 1:
            x = base(1, *lead[1:], heads, dim).expand(shape)
        else:
            x = base(*shape)
        if not clean and x.numel() and self.chance(0.04):
            at = tuple(self.number(0, n - 1) for n in shape)
            x = x.clone() if layout == 4 else x  # an expanded one has no element of its own
            x[at] = self.among([torch.nan, torch.inf, -torch.inf, 60000.0])
        return x

    def index(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)
