"""Many prompts at once: batches by length, as large as the free memory takes."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import LayerFormats
from ...fit import Layout, ModelShape, cache_bytes, peer_bytes, shape_of, uses_kvquant

__all__ = ["batch_size_for", "generate_batch"]

_MOST = 256  # sequences of a batch
_SHARE = 0.85  # of the free memory: the allocator's rounding and fragments take the rest
_logger = logging.getLogger(__name__.split(".compat.")[0])
_shapes: weakref.WeakKeyDictionary[Any, ModelShape] = weakref.WeakKeyDictionary()


@torch.no_grad()
def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 512,
    batch_size: int | None = None,
    format: LayerFormats | None = None,
    exact_prompt: bool = True,
    return_tokens: bool = False,
    progress: bool = True,
    **options: Any,
) -> list[Any]:
    """Answer prompts of any length, in batches of similar length.

    With the attention "kvquant" (`apply_switches`, `enable`) each batch has an 8-bit cache, else
    transformers' own. A batch that runs out of memory all the same is halved, which is logged.

    Args:
        model: A model of transformers.
        tokenizer: Its tokenizer; its padding side does not matter.
        prompts: Texts, with the chat template applied if the model wants one.
        max_new_tokens: Most new tokens of each.
        batch_size: Most sequences at once; None: what the free memory takes, 256 at most.
        format: How rows are stored: a format or its name, or one per layer.
        exact_prompt: See `kvquant.integrations.transformers.KVQuantCache`. Prompts that are padded
            read stored rows in any case.
        return_tokens: Give the new tokens instead of texts.
        progress: Show a bar on the standard error.
        **options: For ``model.generate``: ``do_sample``, ``eos_token_id`` and so on.

    Returns:
        The answers in the order of the prompts: texts without special tokens, or int64 tensors
        on the CPU that end with the end-of-sequence token if there is one.

    Raises:
        TypeError: Prompts that are no texts, numbers of another type.
        ValueError: A prompt without a token, numbers out of range, options of one sequence for
            several.
    """
    rows = _tokens(tokenizer, prompts)
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected an integer, got {number!r}")
        if number < 1:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError(f"num_return_sequences: expected 1, got {options['num_return_sequences']}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # what does not fit comes first
    answers: list[Any] = [None] * len(rows)
    with _bar(len(rows) * max_new_tokens, progress) as advance:
        while order:
            longest = len(rows[order[0]])
            size = batch_size or batch_size_for(
                model, longest, max_new_tokens, format=format, num_beams=options.get("num_beams", 1)
            )
            now = order[:size]
            try:
                found = _generate(
                    model, tokenizer, [rows[i] for i in now], max_new_tokens,
                    format, exact_prompt, advance, options,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                if len(now) == 1:
                    raise
                batch_size = len(now) // 2
                _logger.warning(
                    "generate_batch: out of memory with %d prompts of %d tokens; going on with "
                    "batches of %d", len(now), longest, batch_size,
                )  # fmt: skip
                torch.cuda.empty_cache()
                continue
            order = order[size:]
            for i, tokens in zip(now, found, strict=True):
                answers[i] = tokens if return_tokens else _text(tokenizer, tokens)
    return answers


def batch_size_for(
    model: Any,
    length: int,
    max_new_tokens: int,
    *,
    format: LayerFormats | None = None,
    num_beams: int = 1,
    free: int | None = None,
) -> int:
    """Sequences of ``length`` tokens, and ``max_new_tokens`` more, that ``free`` bytes take.

    Counted are the cache, as it allocates, the activations of the prompt and the logits of a step.

    Args:
        model: A model of transformers.
        length: Tokens of a prompt.
        max_new_tokens: Tokens behind it.
        format: How rows are stored: a format or its name, or one per layer.
        num_beams: Sequences of a prompt.
        free: Bytes; None: those that the model's device has free.

    Raises:
        ValueError: A model whose cache cannot be sized from its config.
    """
    try:
        shape = _shape(model)
    except ValueError as error:
        raise ValueError(f"batch_size: cannot be worked out, pass a number ({error})") from error
    total = length + max_new_tokens
    if uses_kvquant(model):
        layout = Layout(
            reserved=_reserves(shape),
            format=format,
            generated=0 if _reserves(shape) else min(max_new_tokens, 512),
        )
        cache = sum(cache_bytes(shape, 1, total, layout).values())
    else:
        cache = 2 * peer_bytes(shape, 1, total)  # it is copied at each step: two layers' worth more
    text, itemsize = shape.config, int(model.dtype.itemsize)
    width: int = 8 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 0)
    each: int = cache + length * width * itemsize + 4 * text.vocab_size * 4
    room = _free(model.device) if free is None else free
    return max(1, min(_MOST, int(room * _SHARE) // (each * num_beams)))


def _shape(model: Any) -> ModelShape:
    """What a model's layers keep, worked out once.

    Raises:
        ValueError: That cannot be told from its config.
    """
    return _shapes.get(model) or _shapes.setdefault(model, shape_of(model.config))


def _free(device: torch.device) -> int:
    """Bytes that a device has free, those that torch's allocator keeps among them."""
    if device.type != "cuda":
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - taken
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    room: int = min(free + kept, int(total * share) - taken)
    return max(0, room)


def _reserves(shape: ModelShape) -> bool:
    """Whether to allocate a batch's memory at once: not where layers keep their window only."""
    return all(layer.window is None for layer in shape.layers)


def _can_reserve(model: Any) -> bool:
    """Likewise, for a model that may be one whose layers cannot be told."""
    try:
        return _reserves(_shape(model))
    except ValueError:
        return False


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts: expected a sequence of texts, got {prompts!r:.80}")
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts: number {i} has no token: {prompts[i]!r:.80}")
    return rows


def _text(tokenizer: Any, tokens: Tensor) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _generate(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    max_new_tokens: int,
    format: LayerFormats | None,
    exact_prompt: bool,
    advance: Any,
    options: dict[str, Any],
) -> list[Tensor]:
    """New tokens of one left-padded batch."""
    from ...integrations.transformers import CACHE_ARGUMENT, KVQuantCache, graph_step

    device, longest = model.device, max(map(len, rows))
    pad = _first(tokenizer.pad_token_id, tokenizer.eos_token_id)
    ids = torch.full((len(rows), longest), pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[longest - len(tokens) :] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in rows])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    step = None
    if uses_kvquant(model):
        whole = longest + max_new_tokens if _can_reserve(model) else None
        cache = KVQuantCache(model, max_cache_len=whole, format=format, exact_prompt=exact_prompt)
        options = {**options, CACHE_ARGUMENT: cache}
        if device.type == "cuda" and whole is not None:
            step = graph_step(model, cache)
    steps = 0

    def count(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        nonlocal steps
        steps += 1
        advance(len(rows))
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    criteria = [*options.pop("stopping_criteria", ()), count]
    try:
        out = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=criteria,
            **options,
        )
    finally:
        if step is not None:
            step.close()
    advance(len(rows) * (max_new_tokens - steps))
    ends = _ends(model, options)
    return [_until(row, ends) for row in out[:, longest:].cpu()]


def _first(*values: int | None) -> int:
    return next((value for value in values if value is not None), 0)


def _ends(model: Any, options: dict[str, Any]) -> Tensor:
    """The tokens that end a sequence."""
    config = options.get("generation_config", model.generation_config)
    ends = options.get("eos_token_id", config.eos_token_id)
    return torch.tensor([] if ends is None else ends, dtype=torch.int64).view(-1)


def _until(row: Tensor, ends: Tensor) -> Tensor:
    """A row up to its first end, that one included; padding behind it is none of the answer."""
    found = torch.isin(row, ends).nonzero()
    return row[: int(found[0]) + 1] if len(found) else row


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm  # transformers needs it, too

    with tqdm(total=total, disable=not shown, unit=" tokens", desc="generating") as bar:
        yield bar.update
