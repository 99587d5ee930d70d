"""What ``update`` hands to the attention function: a tensor by type, a reference by content."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .protocol import CacheLayer
from .support import NAME

__all__ = ["QuantizedHandle", "Snapshot", "handles", "warn_once"]

logger = logging.getLogger(__name__.split(".integrations.")[0])
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning the first time it comes."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)


class Snapshot:
    """A layer and how many of its tokens a pair of handles stands for.

    Attributes:
        layer: The cache's layer.
        length: Tokens a sequence, the newest among them.
    """

    __slots__ = ("_dense", "layer", "length")

    def __init__(self, layer: CacheLayer, length: int) -> None:
        self.layer = layer
        self.length = length
        self._dense: tuple[Tensor, Tensor] | None = None

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, ``(batch, kv_heads, length, head_dim)``; made once, freed with self."""
        if self._dense is None or self._dense[0].dtype != dtype:
            self._dense = self.layer.dequantize(self.length, dtype)
        return self._dense


class QuantizedHandle(Tensor):
    """Keys or values in the 8-bit cache, to anyone else a tensor (batch, kv_heads, tokens, dim).

    The attention function "kvquant" takes `snapshot` and reads the 8-bit rows. Any other function
    that touches the handle, another attention or the model's own code, gets the dequantized rows:
    correct, slow, and reported once.
    """

    snapshot: Snapshot
    is_value: bool

    @staticmethod
    def __new__(
        cls, snapshot: Snapshot, is_value: bool, shape: tuple[int, ...], like: Tensor
    ) -> QuantizedHandle:
        """A handle of ``shape`` with the dtype and device of ``like``."""
        handle: QuantizedHandle = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        handle.snapshot = snapshot
        handle.is_value = is_value
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, dtype and device: printing must not dequantize."""
        kind = "value" if self.is_value else "key"
        return f"QuantizedHandle({kind}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def dequantize(self) -> Tensor:
        """The rows in the handle's dtype."""
        return self.snapshot.dequantize(self.dtype)[self.is_value]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the dequantized rows."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, QuantizedHandle):
                x.snapshot.layer.batch.is_plain = False
        warn_once(_reason(args, kwargs))

        def plain(x: Any) -> Any:
            return x.dequantize() if isinstance(x, QuantizedHandle) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _reason(*calls: Any) -> str:
    """Why a handle is touched: by another attention, or by a model that computes with it."""
    found = [x for x in tree_leaves(calls) if isinstance(x, QuantizedHandle)]
    if any(x.snapshot.layer.batch.masked for x in found):
        return (
            "the model computes with keys or values between its cache and its attention: each step "
            "runs on a dequantized copy of the 8-bit cache, correct but slow"
        )
    return (
        f"an attention function other than '{NAME}' reads a dequantized copy of the 8-bit cache: "
        f"correct but slow. Load the model with attn_implementation='{NAME}'"
    )


def handles(
    layer: CacheLayer,
    length: int,
    key_shape: tuple[int, int, int],
    value_shape: tuple[int, int, int],
    key: Tensor,
    value: Tensor,
) -> tuple[QuantizedHandle, QuantizedHandle]:
    """A pair for ``length`` tokens of ``layer``; shapes are (batch, kv_heads, dim).

    Their dtypes and devices are those of ``key`` and ``value``.
    """
    snapshot = Snapshot(layer, length)
    return (
        QuantizedHandle(snapshot, False, (*key_shape[:2], length, key_shape[2]), key),
        QuantizedHandle(snapshot, True, (*value_shape[:2], length, value_shape[2]), value),
    )
