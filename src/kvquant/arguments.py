"""Checks of one argument by itself: each error names it, what came and what is expected."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "INT32_MAX",
    "check_device",
    "check_flag",
    "check_float_dtype",
    "check_head_dim",
    "check_integer",
    "check_number",
    "check_tensor",
    "require",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT32_MAX = 2**31 - 1
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error(message)`` unless ``condition``."""
    if not condition:
        raise error(message)


def check_integer(name: str, x: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer of any type that Python takes for an index, within [low, high]."""
    if isinstance(x, bool) or (isinstance(x, Tensor) and x.dtype == torch.bool):
        raise TypeError(f"{name}: expected an integer, got {x}")
    if not isinstance(x, int):
        try:
            x = operator.index(x)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected an integer, got {_kind(x)}") from None
    number: int = x
    if (low is not None and number < low) or (high is not None and number > high):
        expected = f"{low} to {high}"
        if low in (0, 1) and number < low and (high is None or high > 2**20):
            expected = "a positive number" if low else "none or more"
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def check_number(name: str, x: Any, *, positive: bool = False) -> float:
    """A finite number that float32 holds, as a float."""
    if isinstance(x, bool) or not isinstance(x, (float, int, Real)):
        raise TypeError(f"{name}: expected a number, got {_kind(x)}")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    kind = "positive" if positive else "finite"
    if not (0 if positive else -math.inf) < number < math.inf:
        raise ValueError(f"{name}: expected a {kind} number, got {x}")
    if abs(number) > _FLOAT32_MAX or (positive and number < _FLOAT32_MIN):
        raise ValueError(f"{name}: expected a {kind} number within float32's range, got {x}")
    return number


def check_flag(name: str, x: Any) -> None:
    """True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {_kind(x)}")


def check_float_dtype(name: str, x: Any) -> None:
    """One of the dtypes that rows may have."""
    if not isinstance(x, torch.dtype) or x not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x!r}")


def check_device(name: str, x: Any) -> torch.device:
    """A device that is here, with its index; None is torch's default."""
    if isinstance(x, bool) or not (x is None or isinstance(x, (str, int, torch.device))):
        raise TypeError(f"{name}: expected a device, got {_kind(x)}")
    try:
        return torch.empty(0, device=x).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: {x!r} is no device to be used here ({error})") from error


def check_tensor(name: str, x: Any) -> None:
    """A tensor with an address for each element."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")


def check_head_dim(name: str, dim: Any) -> int:
    """Channels of a head: a positive multiple of 16."""
    number = check_integer(name, dim)
    require(0 < number <= INT32_MAX and number % 16 == 0, f"{name}: {dim} is not a multiple of 16")
    return number


def _kind(x: Any) -> str:
    return repr(x) if isinstance(x, (str, float, bool)) else type(x).__name__
