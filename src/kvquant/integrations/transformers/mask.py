"""The mask function "kvquant": what the kernels know by themselves stays unwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ._version import CACHE_ARGUMENT
from .compiled import HANDOFF
from .handle import warn_once
from .support import NAME, check_config

__all__ = ["CausalMask", "is_step_mask", "kvquant_mask"]


_aten = torch.ops.aten
_KEEPING = (  # what may leave a mask as it is: a model slices to the keys' length, or moves it
    _aten.alias.default, _aten.clone.default, _aten.detach.default, _aten.expand.default,
    _aten.slice.Tensor, _aten.view.default, _aten._to_copy.default, _aten._unsafe_view.default,
)  # fmt: skip


class CausalMask(Tensor):
    """A 4D mask ``(batch, 1, queries, keys)`` that is causal, with a window and left padding.

    The attention function "kvquant" takes `window`; causality and the padding are the cache's and
    the kernels' affair. Any other function that touches it gets the mask itself: bool, True where
    a query sees a key.
    """

    window: int | None
    kv_length: int
    _write: Callable[[], Tensor]
    _written: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        window: int | None,
        write: Callable[[], Tensor],
    ) -> CausalMask:
        """A mask of ``shape`` that ``write()`` makes when it is needed."""
        mask: CausalMask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.bool, device=device, requires_grad=False
        )
        mask.window, mask.kv_length = window, shape[3]
        mask._write, mask._written = write, None
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and window: printing must not write the mask."""
        return f"CausalMask({tuple(self.shape)}, window={self.window}, {self.device})"

    def dense(self) -> Tensor:
        """The mask as a tensor; made once."""
        if self._written is None:
            self._written = self._write()
        return self._written

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the mask itself, unless it changes nothing but the device."""
        if func in _KEEPING and isinstance(args[0], CausalMask):
            mask, device = args[0], (kwargs or {}).get("device") or args[0].device
            like = torch.empty(mask.shape, dtype=mask.dtype, device="meta")
            options = {name: x for name, x in (kwargs or {}).items() if name != "device"}
            out = func(like, *args[1:], **options)
            if out.shape == mask.shape and out.dtype == mask.dtype:
                return CausalMask(
                    tuple(mask.shape), device, mask.window, lambda: mask.dense().to(device)
                )

        def written(x: Any) -> Any:
            return x.dense() if isinstance(x, CausalMask) else x

        return func(*tree_map(written, args), **tree_map(written, kwargs or {}))


def kvquant_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A `CausalMask` where causality, a window and left padding say it all; else a 4D mask.

    The padding of a 2D mask goes to the cache (through the length that its layer gave out), which
    passes it to the kernels. With another cache this is transformers' own mask. Where steps may be
    compiled, that of a decode step is a stand-in of shape (1, 1, 1, 1), or None in compiled code.
    """
    if torch.compiler.is_compiling() and HANDOFF.batch is not None:
        batch, HANDOFF.batch = HANDOFF.batch, None
        batch.masked = True
        if batch.regular and kwargs.get("mask_function", causal_mask_function) is not None:
            return None
    mask: Tensor | None = _kvquant_mask(*args, **kwargs)
    return mask


@torch.compiler.disable
def _kvquant_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if (config := kwargs.get("config")) is not None:
        kind: Any = type(config)
        check_config(kind)
    length = kwargs["kv_length"]
    batch = getattr(length, "batch", None)
    causal, window = _causal_window(kwargs.get("mask_function", causal_mask_function))
    kwargs["kv_length"] = kv_length = int(length)
    query_length = kwargs["q_length"]
    if batch is None:
        if causal and kv_length > query_length:
            warn_once(
                f"attn_implementation='{NAME}', but the cache is another one, which keeps keys and "
                f"values in 16 bits or more. Pass {CACHE_ARGUMENT}=KVQuantCache(model)"
            )
        mask: Any = sdpa_mask(*args, **kwargs)
        return mask if isinstance(mask, Tensor) else None
    of_tokens = kwargs.get("attention_mask")
    regular = batch.read(of_tokens, query_length, kv_length, is_exact=length.is_exact)
    kwargs["allow_is_causal_skip"] = False

    def write() -> Tensor:
        if batch.is_captured:
            raise RuntimeError("the step reads a mask, which grows with the text")
        mask: Any = sdpa_mask(*args, **kwargs)
        assert isinstance(mask, Tensor)
        return mask

    offset = kwargs.get("q_offset", kv_length - query_length)
    follows = isinstance(offset, Tensor) or offset == kv_length - query_length
    if not (regular and causal and follows):
        return write()
    device = torch.device(kwargs.get("device", "cpu") if of_tokens is None else of_tokens.device)
    if query_length == 1 and kv_length > 1 and batch.steps_like_layers(window):
        return batch.step_mask(device)  # type: ignore[no-any-return]
    shape = kwargs["batch_size"], 1, query_length, kv_length
    return CausalMask(shape, device, window, write)


def is_step_mask(mask: Any) -> bool:
    """Whether a mask is the stand-in of `Batch.step_mask`, or says no more than that."""
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (1, 1, 1, 1)


def _causal_window(function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is transformers' causal one, and its sliding window if any."""
    if function is causal_mask_function:
        return True, None
    window, causal = None, False
    for part in _cells(function, "and_masks.").get("mask_functions", ()):
        if part is causal_mask_function:
            causal = True
        elif cells := _cells(part, "sliding_window_overlay."):
            window = min(cells["sliding_window"], window or cells["sliding_window"])
        else:
            return False, None
    return causal, window


def _cells(function: Callable[..., Any], maker: str) -> dict[str, Any]:
    """What a function that ``maker`` returned has closed over; nothing of any other."""
    if not str(getattr(function, "__qualname__", "")).startswith(maker):
        return {}
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in closure}
