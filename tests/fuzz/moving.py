"""Tensors on another device than the one that they are made and compared on: bytes are copied.

A device under a sanitizer is slow, and slowest where torch launches a kernel that it has not
launched before. So arguments are made on the CPU, where the reference runs too, and all that
happens on the device is the call, with whole buffers copied there and back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import kvquant

from .compare import memory_of, own_fields, tensors_in

STAND_IN = "stand-in"  # in the place of a GPU: all is copied as for one, to the CPU


def moved(x: Any, device: str, memo: dict[tuple[int, int], Tensor] | None = None) -> Any:
    """The same with its tensors copied to ``device``: strides, offsets and shared buffers stay.

    ``memo``: the buffers copied so far, by address and size.
    """
    memo = {} if memo is None else memo
    if isinstance(x, Tensor):
        return _moved_tensor(x, device, memo)
    if isinstance(x, kvquant.CacheView):
        return x.replaced(moved(x.tensors, device, memo))
    if isinstance(x, (kvquant.RowsView, kvquant.Sequences)):
        fields = {name: moved(part, device, memo) for name, part in own_fields(x)}
        return dataclasses.replace(x, **fields)
    if type(x) is dict:
        return {key: moved(value, device, memo) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(moved(value, device, memo) for value in x)
    return x


def _moved_tensor(x: Tensor, device: str, memo: dict[tuple[int, int], Tensor]) -> Tensor:
    if x.is_meta:
        return x
    if x.layout is not torch.strided:
        return x.to(device, copy=True)
    storage = x.untyped_storage()
    key = storage.data_ptr(), storage.nbytes()
    if key not in memo:
        memo[key] = memory_of(x.detach()).to(device, copy=True)
    new = torch.empty(0, dtype=x.dtype, device=device)
    new.set_(memo[key].untyped_storage(), x.storage_offset(), x.shape, x.stride())
    return new.requires_grad_(x.requires_grad)


def elsewhere(x: Any, device: str) -> str | None:
    """A tensor of a result that is not on ``device``."""
    wanted = torch.device(device).type
    for name, tensor in tensors_in(x):
        if tensor.device.type != wanted:
            return f"the result{name} is on {tensor.device.type}"
    return None
