"""A model's forward that hands the decode steps of some caches to their graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import KVQuantCache
from .graphs import CUDAGraph, Graph
from .steps import GraphStep

__all__ = ["Forward", "graph_step"]

_CACHE_ARGUMENTS = ("cache", "past_key_values")


class Forward:
    """In the place of ``model.forward``: caches that have a `GraphStep` go by it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._own = vars(model).get("forward")  # of accelerate, or of a caller
        functools.update_wrapper(self, model.forward)
        self._names = tuple(inspect.signature(model.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, or a replay of it."""
        forward = self._own or functools.partial(type(self._model).forward, self._model)
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = next((arguments[x] for x in _CACHE_ARGUMENTS if arguments.get(x) is not None), None)
        step = cache.step if isinstance(cache, KVQuantCache) else None
        if step is None or not step.serves(self._model):
            return forward(*args, **kwargs)
        return step(forward, arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """That of a copied model."""
        new = Forward(memo.get(id(self._model), self._model))
        new._own = deepcopy(self._own, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self._model,)

    @classmethod
    def install(cls, model: PreTrainedModel) -> None:
        """Put it in its place, once."""
        if not isinstance(vars(model).get("forward"), cls):
            vars(model)["forward"] = cls(model)

    @classmethod
    def remove(cls, model: PreTrainedModel) -> None:
        """Give the model back what was there."""
        found = vars(model).get("forward")
        if isinstance(found, cls):
            del vars(model)["forward"]
            if found._own is not None:
                vars(model)["forward"] = found._own


def graph_step(
    model: PreTrainedModel,
    cache: KVQuantCache,
    *,
    graph: Callable[[torch.device], Graph] = CUDAGraph,
) -> GraphStep:
    """Let a model's decode steps on ``cache`` be replayed from a CUDA graph.

    From then on every call ``model(..., cache=cache)`` of one new token a sequence, those of
    ``model.generate(..., cache=cache)`` among them, replays the model's forward, which is captured
    at the second such call. Other calls, and models that cannot be captured, run as before: see
    `GraphStep.reason`. After ``cache.reset()`` the graph serves the next text.

    Args:
        model: A model with ``attn_implementation="kvquant"``, on one GPU.
        cache: A cache with a ``max_cache_len``.
        graph: What to capture in; a stand-in, in tests.

    Returns:
        The step: it says what ran and why.

    Raises:
        TypeError: Another model or cache.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if not isinstance(cache, KVQuantCache):
        raise TypeError(f"cache: expected a KVQuantCache, got {type(cache).__name__}")
    Forward.install(model)
    cache.step = GraphStep(model, cache, graph)
    return cache.step
