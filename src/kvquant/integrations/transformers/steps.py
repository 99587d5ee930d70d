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

from .graphs import CUDAGraph, Graph
from .handle import warn_once
from .protocol import StepCache, StepLayer
from .support import NAME

__all__ = ["GraphStep"]

_MOST = 8  # kinds of calls that are captured: of other batches or other inputs
_POSITIONS, _MASK = "position_ids", "attention_mask"
_APART = (_MASK, "cache", "past_key_values")  # not among what calls have in common


class _Captured(NamedTuple):
    """A graph, and what it holds on to."""

    key: tuple[Any, ...]
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
        self._last: _Captured | None = None  # of the last call, if that was a replay
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
        self._last = None
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
        mask = arguments.get(_MASK)
        key = self._key(arguments)
        reason = self._refuses(cache, mask)
        if reason is not None:
            return self._run(forward, arguments, reason)
        lead = cache.layers[0]
        lead.check_room(1)
        captured, path = self._last, "replay"
        if captured is None or not cache.batch.is_settled or captured.key != key:
            tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
            if (reason := self._refuses_inputs(cache, key, tensors)) is not None:
                return self._run(forward, arguments, reason)
            for layer in cache.layers:
                layer.make_ready()
            cache.batch.is_settled = lead.stays
            captured = self._captured.get(key)
            if captured is None or not self._holds(captured, cache.layers):
                if captured is None and key not in self._seen:
                    self._seen.add(key)
                    return self._run(forward, arguments, "the first step of its kind")
                captured, path = self._capture(cache, forward, key, arguments), "capture"
                if captured is None:
                    return self._run(forward, arguments, self._obstacle or "")
        output = self._replay(captured, cache, arguments)
        self.calls[path] += 1
        self.reason, self._last = "", captured
        return output

    def _run(self, forward: Callable[..., Any], arguments: dict[str, Any], reason: str) -> Any:
        """The model as it is."""
        self.calls["model"] += 1
        self.reason, self._last = reason, None
        return forward(**arguments)

    @staticmethod
    def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What calls of one kind have in common."""
        return tuple(
            (name, x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (name, x)
            for name, x in arguments.items()
            if x is not None and name not in _APART
        )

    def _refuses(self, cache: StepCache, mask: Any) -> str | None:
        """Why a call is no step that can be replayed, as far as that may change at each step."""
        if not self._is_checked:
            self._is_checked, self._obstacle = True, self._find_obstacle(cache)
            if self._obstacle is not None:
                self._say(self._obstacle)
        if self._obstacle is not None:
            return self._obstacle
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph of the caller's is being captured"
        if mask is not None and not isinstance(mask, Tensor):
            return "an attention_mask that is no tensor"
        if not cache.batch.steps_alike(mask, cache.layers[0].length + 1):
            return "an attention_mask that says more than the prompt's left padding"
        if torch.is_autocast_enabled(self._device.type):
            return "torch.autocast is on"
        if self._model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            return "gradients are enabled"
        return None

    def _refuses_inputs(
        self, cache: StepCache, key: tuple[Any, ...], tensors: dict[str, Tensor]
    ) -> str | None:
        """Likewise, as far as a call of the same key cannot differ in it."""
        new = tensors.get("input_ids", tensors.get("inputs_embeds"))
        if new is None or new.dim() < 2:
            return "no input_ids"
        lead = cache.layers[0]
        if new.shape[1] != 1 or not lead.length:
            return f"{new.shape[1]} new tokens to {lead.length} stored"
        if lead.batch_size != new.shape[0]:
            return "another batch than the cache's"
        for name, x in tensors.items():
            if x.device != self._device and name != _MASK:
                return f"{name} is on {x.device}, the model on {self._device}"
        try:
            hash(key)
        except TypeError:
            return "arguments that cannot be compared with those of other calls"
        if len(self._seen) >= _MOST and key not in self._seen:
            return f"a call of another kind than the {_MOST} before"
        return None

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
        return all(x.data_ptr() == memory.data_ptr() for x, memory in captured.weights)

    def _capture(
        self,
        cache: StepCache,
        forward: Callable[..., Any],
        key: tuple[Any, ...],
        arguments: dict[str, Any],
    ) -> _Captured | None:
        """Capture a step; where it cannot be, note why and leave everything as it was."""
        begin, layers = time.perf_counter(), cache.layers
        self._captured.pop(key, None)
        lengths = [layer.length for layer in layers]
        with torch.inference_mode(mode=False):
            inputs = {
                name: torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
                for name, x in arguments.items()
                if isinstance(x, Tensor) and name != _MASK
            }
            if _POSITIONS not in inputs:  # as models have them that are given none
                inputs[_POSITIONS] = torch.full((1, 1), lengths[0], device=self._device)
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
            cache.batch.is_settled = layers[0].stays
        weights = [*self._model.parameters(), *self._model.buffers()]
        captured = _Captured(
            key, graph, inputs, output, [layer.parts() for layer in layers],
            [(x, x.detach()) for x in weights],
        )  # fmt: skip
        self._captured[key] = captured
        self.seconds += time.perf_counter() - begin
        return captured

    def _replay(self, captured: _Captured, cache: StepCache, arguments: dict[str, Any]) -> Any:
        """A step of the model, counted on the host before it is launched."""
        batch, positions = cache.batch, arguments.get(_POSITIONS)
        if positions is None:
            captured.inputs[_POSITIONS].fill_(cache.layers[0].length)
        batch.replays += 1
        for name, x in captured.inputs.items():
            if (given := arguments.get(name)) is not None:
                x.copy_(given, non_blocking=True)
        captured.graph.replay()
        batch.note(positions)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.output)

    def _say(self, obstacle: str) -> None:
        warn_once(f"graph_step: {obstacle}. Each step runs the model as it is")
