"""Decode steps in a CUDA graph: the model's forward is captured once and replayed at each token."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from ._version import CACHE_ARGUMENT
from .graphs import CUDAGraph, Graph
from .handle import warn_once
from .protocol import StepCache, StepLayer
from .support import NAME

__all__ = ["GraphStep"]

_MOST = 8  # kinds of calls that are captured: of other batches or other inputs
_POSITIONS, _MASK = "position_ids", "attention_mask"


class _Captured(NamedTuple):
    """A graph, and what it holds on to."""

    graph: Graph
    inputs: dict[str, Tensor]  # the tensors that it reads, by the argument's name
    output: Any
    parts: list[tuple[Any, Any]]  # of each layer: its memory and its batch
    weights: list[tuple[Tensor, Tensor]]  # each parameter or buffer, and its memory


class GraphStep:
    """The decode steps of a model on one cache, replayed from a CUDA graph.

    Made by `graph_step`. A call of the model with this cache and one new token a sequence is a
    replay where that gives what the model would; any other call runs the model as it is, and
    `reason` says why. The first step of a kind runs as it is, too; the second is captured. Every
    output is a copy: the next step does not write over it.

    A graph is captured anew where the cache or the weights have moved to other memory. What else
    changes the model's computation (adapters, hooks, settings of its config) needs a `clear`.

    Attributes:
        calls: How many calls took which path: "replay", "capture" or "model".
        reason: Why the last call ran the model itself; empty if it did not.
        seconds: Time that captures took, all together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StepCache,
        graph: Callable[[torch.device], Graph] = CUDAGraph,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.reason = ""
        self.seconds = 0.0
        self._model, self._cache, self._graph = model, weakref.ref(cache), graph
        self._captured: dict[Any, _Captured] = {}
        self._seen: set[Any] = set()
        self._was_replay = False
        self._is_checked = False  # for an obstacle
        self._obstacle: str | None = None
        self._device = next(model.parameters()).device

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphStep | None:
        """That of a copied cache, without graphs; None where the cache is not copied."""
        cache = memo.get(id(self._cache()))
        return None if cache is None else GraphStep(self._model, cache, self._graph)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a cache from a file has none

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.calls[path]} {path}" for path in ("replay", "capture", "model"))
        return f"GraphStep({counts}{f'; {self.reason}' if self.reason else ''})"

    def clear(self) -> None:
        """Forget the graphs and their memory: the next steps are captured anew."""
        self._captured.clear()
        self._seen.clear()
        self._is_checked = False

    def close(self) -> None:
        """Leave the cache: the model runs every step itself again."""
        self.clear()
        cache = self._cache()
        if cache is not None:
            cache.step = None

    def serves(self, model: PreTrainedModel) -> bool:
        """Whether the steps are those of ``model``."""
        return self._model is model

    # ------------------------------------------------------------------------------------ a call

    def __call__(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``forward(**arguments)``, which is the model's, by a replay if it can be.

        Raises:
            CacheFullError: A token more than ``max_cache_len``.
        """
        cache = self._cache()
        assert cache is not None
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        mask = tensors.pop(_MASK, None)
        key = None
        reason = self._refuses(cache, arguments, tensors, mask)
        if reason is None:
            key, reason = self._key(arguments, tensors)
        if key is None:
            return self._run(forward, arguments, reason or "")
        layers = cache.layers
        layers[0].check_room(1)
        length = layers[0].length
        tensors.setdefault(_POSITIONS, _one_position(length, self._device))
        for layer in layers:
            layer.make_ready()
        captured = self._captured.get(key)
        if captured is None or not self._holds(captured, layers):
            if captured is None and key not in self._seen:
                self._seen.add(key)
                return self._run(forward, arguments, "the first step of its kind")
            captured = self._capture(cache, forward, key, arguments, tensors)
            if captured is None:
                return self._run(forward, arguments, self._obstacle or "")
            path = "capture"
        else:
            path = "replay"
        output = self._replay(captured, cache, tensors)
        self.calls[path] += 1
        self.reason, self._was_replay = "", True
        return output

    def _run(self, forward: Callable[..., Any], arguments: dict[str, Any], reason: str) -> Any:
        """The model as it is."""
        self.calls["model"] += 1
        self.reason, self._was_replay = reason, False
        return forward(**arguments)

    def _refuses(
        self,
        cache: StepCache,
        arguments: dict[str, Any],
        tensors: dict[str, Tensor],
        mask: Tensor | None,
    ) -> str | None:
        """Why a call is no step that can be replayed, or None."""
        if not self._is_checked:
            self._is_checked, self._obstacle = True, self._find_obstacle(cache)
            if self._obstacle is not None:
                self._say(self._obstacle)
        if self._obstacle is not None:
            return self._obstacle
        new = tensors.get("input_ids", tensors.get("inputs_embeds"))
        if new is None or new.dim() < 2:
            return "no input_ids"
        length = cache.layers[0].length
        if new.shape[1] != 1 or not length:
            return f"{new.shape[1]} new tokens to {length} stored"
        if cache.layers[0].batch_size != new.shape[0]:
            return "another batch than the cache's"
        if arguments.get(_MASK) is not mask:
            return "an attention_mask that is no tensor"
        if not cache.batch.steps_alike(mask, length + 1):
            return "an attention_mask that says more than the prompt's left padding"
        if torch.is_autocast_enabled(self._device.type):
            return "torch.autocast is on"
        if self._model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            return "gradients are enabled"
        return None

    def _key(self, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, str | None]:
        """What calls of one kind have in common; None and why a call is of none."""
        others = {
            name: x for name, x in arguments.items()
            if name not in tensors and name not in (_MASK, CACHE_ARGUMENT) and x is not None
        }  # fmt: skip
        key = (
            tuple((name, x.shape, x.dtype) for name, x in sorted(tensors.items())),
            tuple(sorted(others.items())),
            self._model.config._attn_implementation,
        )
        elsewhere = [name for name, x in tensors.items() if x.device != self._device]
        if elsewhere:
            return None, f"{elsewhere[0]} is not on {self._device}"
        try:
            hash(key)
        except TypeError:
            return None, f"arguments that cannot be compared: {', '.join(others)}"
        if len(self._seen) >= _MOST and key not in self._seen:
            return None, f"a call of another kind than the {_MOST} before"
        return key, None

    # ------------------------------------------------------------------------------------ graphs

    def _find_obstacle(self, cache: StepCache) -> str | None:
        """Why no step of the model can be captured, or None."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        devices = {x.device for x in tensors}
        self._device = tensors[0].device
        if self._graph is CUDAGraph and self._device.type != "cuda":
            return f"the model is on {self._device}, and graphs are CUDA's"
        if len(devices) > 1:
            return f"the model is on several devices: {', '.join(sorted(map(str, devices)))}"
        if cache.layers[0].max_cache_len is None:
            return "a cache without max_cache_len moves as it grows"
        if self._model.config._attn_implementation != NAME:
            return f"the model's attention is not '{NAME}'"
        return None

    def _holds(self, captured: _Captured, layers: list[StepLayer]) -> bool:
        """Whether all that a graph reads is where it was."""
        for layer, (view, seqs) in zip(layers, captured.parts, strict=True):
            now = layer.parts()
            if now[0] is not view or now[1] is not seqs:
                return False
        if self._was_replay:
            return True
        return all(x.data_ptr() == memory.data_ptr() for x, memory in captured.weights)

    def _capture(
        self,
        cache: StepCache,
        forward: Callable[..., Any],
        key: Any,
        arguments: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> _Captured | None:
        """Capture a step; where it cannot be, note why and leave everything as it was."""
        begin, layers = time.perf_counter(), cache.layers
        self._captured.pop(key, None)
        with torch.inference_mode(mode=False):
            inputs = {name: torch.empty_like(x).copy_(x) for name, x in tensors.items()}
        lengths = [layer.length for layer in layers]
        graph = self._graph(self._device)
        call = {**arguments, **inputs, _MASK: None}
        try:
            with cache.batch.captured():
                output = graph.capture(lambda: forward(**call))
        except Exception as error:
            self._obstacle = f"the model's step cannot be captured: {error}"
            self._say(self._obstacle)
            return None
        finally:
            for layer, length in zip(layers, lengths, strict=True):
                layer.restore(length)
        weights = [*self._model.parameters(), *self._model.buffers()]
        captured = _Captured(
            graph, inputs, output, [layer.parts() for layer in layers],
            [(x, x.detach()) for x in weights],
        )  # fmt: skip
        self._captured[key] = captured
        self.seconds += time.perf_counter() - begin
        return captured

    def _replay(self, captured: _Captured, cache: StepCache, tensors: dict[str, Tensor]) -> Any:
        """A step of the model, counted on the host before it is launched."""
        for layer in cache.layers:
            layer.before_replay()
        for name, x in captured.inputs.items():
            x.copy_(tensors[name], non_blocking=True)
        captured.graph.replay()
        for layer in cache.layers:
            layer.length += 1
        cache.batch.note(tensors[_POSITIONS])
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.output)

    def _say(self, obstacle: str) -> None:
        warn_once(f"graph_step: {obstacle}. Each step runs the model as it is")


def _one_position(length: int, device: torch.device) -> Tensor:
    """What a model takes for position_ids that it is not given."""
    return torch.full((1, 1), length, device=device)
