"""A stand-in for a CUDA graph on any device: operations are recorded, undone and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["RecordedGraph"]


class _Recorder(TorchDispatchMode):
    """Notes each operation with the very tensors that it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was written, and what it held
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a tensor, which a graph cannot capture")
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            x = args[at] if at < len(args) else kwargs.get(argument.name)
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._made:
                self.before.append((x, x.clone()))
        out = func(*args, **kwargs)
        read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _plain(x)}
        for x in tree_leaves(out):
            if _plain(x) and x.untyped_storage().data_ptr() not in read:
                self._made.add(x.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, out))
        return out


def _plain(x: Any) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


class RecordedGraph:
    """`kvquant.integrations.transformers.graphs.Graph` for tests on a CPU.

    As in a capture, nothing is done while it records: what was written is put back. Values that the
    host knew then stay as they are in every replay, as those of a CUDA graph do.
    """

    def __init__(self, device: torch.device) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def capture(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` and undo it."""
        recorder = _Recorder()
        try:
            with recorder:
                out = call()
        finally:
            for x, held in reversed(recorder.before):
                x.copy_(held)
        self._calls = recorder.calls
        return out

    def replay(self) -> None:
        """Do what was recorded, into the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                new = func(*args, **kwargs)
                tree_map(_put, out, new)


def _put(old: Any, new: Any) -> None:
    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
        old.copy_(new)
