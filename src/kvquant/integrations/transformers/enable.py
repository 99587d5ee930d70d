"""One line for a model: its ``generate()`` runs on an 8-bit cache without being passed one."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ... import LayerFormats
from ._version import CACHE_ARGUMENT
from .cache import KVQuantCache
from .forward import Forward, graph_step
from .support import NAME

__all__ = ["disable", "enable"]

_CACHE_ARGUMENTS = ("cache", "past_key_values")
_Model = TypeVar("_Model", bound=PreTrainedModel)


class _Generate:
    """A model's ``generate`` with a new 8-bit cache in every call that brings no cache."""

    def __init__(
        self, model: PreTrainedModel, attention: Any, options: dict[str, Any], graph: bool = False
    ) -> None:
        self.model, self.attention, self.options, self.graph = model, attention, options, graph
        self._kept: list[KVQuantCache] = []  # with its graphs, of a call that is over
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the model's class."""
        if not self._needs_cache(args, kwargs):
            return type(self.model).generate(self.model, *args, **kwargs)
        cache = kwargs[CACHE_ARGUMENT] = self._new_cache()
        output = type(self.model).generate(self.model, *args, **kwargs)
        if self.graph and isinstance(output, Tensor):  # nobody else has seen the cache
            cache.reset()
            self._kept[:] = [cache]
        return output

    def _new_cache(self) -> KVQuantCache:
        """A cache without tokens."""
        try:
            return self._kept.pop()
        except IndexError:
            cache = KVQuantCache(self.model, **self.options)
        if self.graph:
            graph_step(self.model, cache)
        return cache

    def _needs_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call leaves the cache to transformers' default."""
        if any(kwargs.get(name) is not None for name in _CACHE_ARGUMENTS):
            return False
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = self.model.generation_config if given is None else given

        def setting(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        return setting("use_cache") is not False and setting("cache_implementation") is None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        """A copied model generates by itself, not by the one that it was copied from."""
        model = memo.get(id(self.model), self.model)
        return _Generate(model, self.attention, dict(self.options), self.graph)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self.model, self.attention, self.options, self.graph)


def _attention_of(model: PreTrainedModel) -> dict[str, Any]:
    """The attention implementations of a model and its parts, as its setter takes them."""
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    found = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **found}


def enable(
    model: _Model,
    *,
    max_cache_len: int | None = None,
    block_size: int | None = None,
    format: LayerFormats | None = None,
    exact_prompt: bool = True,
    check_positions: bool = True,
    compileable: bool = False,
    graph: bool = False,
) -> _Model:
    """Let a model's ``generate()``, and pipelines of it, use an 8-bit cache.

    Sets the attention implementation "kvquant". Each call of ``generate`` then gets a new
    `KVQuantCache` with the options given here. A call that passes a cache of its own, a
    ``cache_implementation`` or ``use_cache=False`` goes through as it is. Enabling again replaces
    the options.

    Args:
        model: A model of transformers that can generate.
        max_cache_len: See `KVQuantCache`, as for the other options.
        block_size: Tokens of a block.
        format: How rows are stored: a format or its name, or one per layer.
        exact_prompt: Whether a prompt's own attention uses its exact keys and values.
        check_positions: Whether positions that go back are refused.
        compileable: Whether ``generate`` compiles the decode steps.
        graph: Replay decode steps from a CUDA graph, see `graph_step`; needs a ``max_cache_len``.
            The cache and its graph are kept for the next call, until `disable`, unless a call
            hands its cache out (``return_dict_in_generate=True``).

    Returns:
        The model.

    Raises:
        TypeError: Something else than a model that can generate.
        ValueError: A model that the 8-bit cache, or its attention, does not serve; ``graph``
            without a ``max_cache_len``.
    """
    if not (isinstance(model, PreTrainedModel) and hasattr(type(model), "generate")):
        raise TypeError(
            f"model: expected a transformers model that can generate, got {type(model).__name__}"
        )
    options: dict[str, Any] = {
        "max_cache_len": max_cache_len,
        "block_size": block_size,
        "format": format,
        "exact_prompt": exact_prompt,
        "check_positions": check_positions,
        "compileable": compileable,
    }
    if graph and max_cache_len is None:
        raise ValueError("graph: needs a max_cache_len: a cache that grows moves in memory")
    KVQuantCache(model, **options)  # refuses what it does not serve
    before = vars(model).get("generate")
    attention = _attention_of(model)
    if isinstance(before, _Generate):
        attention = before.attention
    else:
        model.set_attn_implementation(NAME)
    vars(model)["generate"] = _Generate(model, attention, options, graph)
    return model


def disable(model: _Model) -> _Model:
    """Undo `enable`: the model has its former attention and transformers' own cache again.

    Returns:
        The model, which may never have been enabled.
    """
    generate = vars(model).get("generate")
    if isinstance(generate, _Generate):
        del vars(model)["generate"]
        Forward.remove(model)
        model.set_attn_implementation(generate.attention)
    return model
