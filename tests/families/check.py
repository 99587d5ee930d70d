"""Whether a family's logits are right on the 8-bit cache."""

from __future__ import annotations

import inspect
import itertools
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import kvquant
from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache, handle

from .build import CannotBuild, build
from .replay import ReplayCache, distance

__all__ = ["STATES", "Verdict", "judge"]

STATES = ("right", "dequantized", "refused", "wrong")
TOLERANCE = 1e-4
QUANTIZATION = 0.1  # what 8 bits may change; positions or windows gone wrong change more
PACKAGE = str(Path(kvquant.__file__).parent)


@dataclass
class Verdict:
    """What became of a family.

    Attributes:
        name: The model type.
        state: One of `STATES`.
        reason: Why, in a sentence; empty for "right".
        errors: Of each scenario: the distance from the eager model on the same stored rows.
        rounding: The same, from the eager model on a cache that stores rows as they are.
        skipped: Scenarios that transformers does not serve with its own cache, and why.
    """

    name: str
    state: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One forward call: what goes in, and which tokens are not padding."""

    inputs: dict[str, Any]
    visible: Tensor


def judge(name: str) -> Verdict:
    """Compare a family on the 8-bit cache with the same weights, eager, on the same rows.

    Raises:
        CannotBuild: transformers cannot build the family, or not run it on text.
    """
    handle._warned.clear()
    peer = build(name, "eager")
    parameters = inspect.signature(peer.forward).parameters
    with _logged() as messages:
        try:
            model = build(name, "kvquant")
            KVQuantCache(model.config)
        except Exception as error:
            verdict = Verdict(name, "refused" if _is_refusal(error) else "wrong", _sentence(error))
            if "KVQuantCache then stores" in verdict.reason:
                _check_advice(verdict, peer, "position_ids" in parameters)
            return verdict
        verdict = Verdict(name, "right")
        for scenario, make in SCENARIOS.items():
            calls = [_fed(name, call) for call in make("position_ids" in parameters)]
            if name in WHOLE_TEXT:
                calls = _whole_text(calls)
            try:
                exact = _run(peer, DynamicCache(config=peer.config), calls)
            except Exception as error:  # transformers itself does not serve this
                verdict.skipped[scenario] = _sentence(error)
                continue
            try:
                _compare(verdict, scenario, model, peer, calls, exact)
            except Exception as error:
                verdict.errors[scenario] = float("nan")
                _blame(verdict, f"{scenario}: {_sentence(error)}")
        if len(verdict.skipped) == len(SCENARIOS):
            raise CannotBuild(f"does not run on text alone: {verdict.skipped['prompt']}")
        if verdict.state == "right" and messages:
            verdict.state, verdict.reason = "dequantized", "; ".join(messages)
    return verdict


def _run(model: Any, cache: Any, calls: list[Call]) -> Tensor:
    """Logits of one call after the other, of the tokens that are not padding."""
    with torch.no_grad():
        out = torch.cat([_logits(model, cache, call) for call in calls])
    if not cache.get_seq_length():
        raise ValueError("the cache stays empty")
    return out


def _compare(
    verdict: Verdict, scenario: str, model: Any, peer: Any, calls: list[Call], exact: Tensor
) -> None:
    cache = KVQuantCache(model.config, exact_prompt=False)
    replay = ReplayCache(cache, peer.config)
    ours, theirs = [], []
    with torch.no_grad():
        for call in calls:
            ours.append(_logits(model, cache, call))
            replay.visible = call.visible
            theirs.append(_logits(peer, replay, call))
    got, expected = torch.cat(ours), torch.cat(theirs)
    error, rounding = distance(got, expected), distance(expected, exact)
    verdict.errors[scenario], verdict.rounding[scenario] = error, rounding
    if not error <= TOLERANCE:
        _blame(verdict, f"{scenario}: logits are off by {error:.2g}")
    elif cache.get_seq_length() != replay.get_seq_length():
        lengths = f"{cache.get_seq_length()} tokens, not {replay.get_seq_length()}"
        _blame(verdict, f"{scenario}: the cache's length is {lengths}")
    elif not rounding <= QUANTIZATION:
        _blame(verdict, f"{scenario}: 8 bits change logits by {rounding:.2g}")
    elif scenario == "decode" and not _depends(theirs[-1]):
        _blame(verdict, "this model is no use: its logits do not depend on the cache")


def _check_advice(verdict: Verdict, peer: Any, with_positions: bool) -> None:
    """See that the eager model runs on our cache, as the refusal says."""
    calls = [_fed(verdict.name, call) for call in _decode(with_positions)]
    if verdict.name in WHOLE_TEXT:
        calls = _whole_text(calls)
    try:
        exact = _run(peer, DynamicCache(config=peer.config), calls)
    except Exception as error:  # transformers itself does not serve this
        verdict.skipped["decode"] = _sentence(error)
        return
    try:
        ours = _run(peer, KVQuantCache(peer, exact_prompt=False), calls)
    except Exception as error:
        _blame(verdict, f"eager: {_sentence(error)}")
        return
    if not distance(ours, exact) <= QUANTIZATION:
        _blame(verdict, f"eager: 8 bits change logits by {distance(ours, exact):.2g}")


def _fed(name: str, call: Call) -> Call:
    """The call with what a family needs besides."""
    feed = FEEDS.get(name)
    return call if feed is None else Call(feed(call.inputs), call.visible)


def _whole_text(calls: list[Call]) -> list[Call]:
    """The same calls for a model that takes all ids each time."""
    texts = itertools.accumulate(
        (call.inputs["input_ids"] for call in calls), lambda a, b: torch.cat([a, b], dim=1)
    )
    return [
        Call({**call.inputs, "input_ids": text}, call.visible)
        for call, text in zip(calls, texts, strict=True)
    ]


def _logits(model: Any, cache: Any, call: Call) -> Tensor:
    """Logits (tokens, vocabulary) of the tokens that are not padding."""
    out = model(**call.inputs, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
    out = out[:: out.shape[0] // call.visible.shape[0]]  # a codebook each
    return out[call.visible[:, -out.shape[1] :]]


def _depends(logits: Tensor) -> bool:
    """Whether two sequences that end alike got different logits."""
    return distance(logits[0], logits[1]) > 1e-2


def _blame(verdict: Verdict, reason: str) -> None:
    if verdict.state != "wrong":
        verdict.state, verdict.reason = "wrong", reason


def _is_refusal(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and frames[-1].filename.startswith(PACKAGE)


def _sentence(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if _is_refusal(error):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


@contextmanager
def _logged() -> Iterator[list[str]]:
    """What kvquant logs, each message once."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in messages:
                messages.append(record.getMessage())

    logger, collector = logging.getLogger("kvquant"), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate


def _ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 65, (batch, tokens), generator=generator)


def _whole(ids: Tensor) -> list[Call]:
    return [Call({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))]


def _split(ids: Tensor, sizes: list[int]) -> list[Call]:
    return [call for part in ids.split(sizes, dim=1) for call in _whole(part)]


def _prompt(with_positions: bool) -> list[Call]:
    return _whole(_ids(2, 40))


def _chunks(with_positions: bool) -> list[Call]:
    return _split(_ids(2, 40), [23, 9, 8])


def _decode(with_positions: bool) -> list[Call]:
    ids = _ids(2, 33)
    ids[1, -3:] = ids[0, -3:]  # after two prompts the same tokens
    return _split(ids, [30, 1, 1, 1])


def _left_padding(with_positions: bool) -> list[Call]:
    """A prompt and two steps of a batch, its rows padded differently."""
    width, total = 24, 26
    ids = _ids(3, total)
    visible = torch.arange(total) >= torch.tensor([0, 15, 7]).view(-1, 1)
    ids[~visible] = 0
    positions = (visible.long().cumsum(1) - 1).clamp_min(0)
    calls = []
    for start, stop in ((0, width), (width, width + 1), (width + 1, total)):
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": visible[:, :stop].long()}
        if with_positions:
            inputs["position_ids"] = positions[:, start:stop].contiguous()
        calls.append(Call(inputs, visible[:, start:stop]))
    return calls


SCENARIOS: dict[str, Callable[[bool], list[Call]]] = {
    "prompt": _prompt,
    "chunks": _chunks,
    "left padding": _left_padding,
    "decode": _decode,
}


def _codebooks(inputs: dict[str, Any]) -> dict[str, Any]:
    """One sequence a codebook, as MusicGen has it."""
    return {**inputs, "input_ids": inputs["input_ids"].repeat_interleave(4, dim=0)}


def _channels(inputs: dict[str, Any]) -> dict[str, Any]:
    """A text id and those of the codebooks at each position."""
    return {**inputs, "input_ids": inputs["input_ids"].unsqueeze(-1).repeat(1, 1, 33)}


def _no_images(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    nothing = torch.zeros(len(ids), 0, 64)
    return {**inputs, "image_embeds": nothing, "image_embeds_position_mask": torch.zeros_like(ids)}


def _image_seen(inputs: dict[str, Any]) -> dict[str, Any]:
    """An image that every token sees."""
    batch, tokens = inputs["input_ids"].shape
    image = torch.linspace(-1, 1, 5 * 64).view(1, 1, 5, 64).expand(batch, 1, 5, 64)
    seen = torch.ones(batch, tokens, 1, dtype=torch.long)
    return {**inputs, "image_encoder_embeddings": image, "image_attention_mask": seen}


def _sound(inputs: dict[str, Any]) -> dict[str, Any]:
    """Four frames of sound a token."""
    batch, tokens = inputs["input_ids"].shape
    frames = torch.linspace(-1, 1, 64).view(1, 1, 64).expand(batch, 4 * tokens, 64)
    return {**inputs, "encoder_inputs_embeds": frames, "num_delay_tokens": 1}


WHOLE_TEXT = ("cpmant", "xlm")
FEEDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "idefics": _image_seen,
    "kosmos-2": _no_images,
    "kyutai_speech_to_text": _channels,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "voxtral_realtime": _sound,
}
