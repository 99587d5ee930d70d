"""Each mode as a function that returns tokens, for whatever model and cache it is given."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvquant
from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache, enable, graph_step
from kvquant.integrations.transformers.graphs import CUDAGraph
from recorded import RecordedGraph
from tiny import generate, logits, make

__all__ = ["MODES", "Case", "Mode"]

_NEW, _PROMPT = 24, 70  # tokens; the models' window is 16


@dataclass
class Case:
    """What a mode runs on.

    Attributes:
        name: The model's, in `tiny.CONFIGS`.
        model: The model.
        device: Where it is.
        exact_prompt: Of all caches: False, where tokens are compared with those of an attention
            that reads stored rows.
    """

    name: str
    model: Any
    device: str
    exact_prompt: bool = False

    def cache(self, **options: Any) -> KVQuantCache:
        """A new cache."""
        return KVQuantCache(self.model, exact_prompt=self.exact_prompt, **options)

    def prompt(self, batch: int = 1, tokens: int = _PROMPT) -> Tensor:
        """The same random tokens each time."""
        generator = torch.Generator().manual_seed(batch * 1000 + tokens)
        return torch.randint(2, 97, (batch, tokens), generator=generator).to(self.device)

    def generate(self, batch: int = 1, **options: Any) -> Tensor:
        """Tokens from a new cache."""
        torch.manual_seed(5)
        return generate(self.model, self.cache(), self.prompt(batch), _NEW, **options)


def _padded(case: Case) -> Tensor:
    ids = case.prompt(3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 9, 60)):
        mask[row, :padding] = 0
    # Eager attention does not tell the cache of padding, which key means would then include.
    cache = case.cache(format=kvquant.CacheFormat(key_mean=None))
    return generate(case.model, cache, ids * mask, _NEW, attention_mask=mask)


def _turns(case: Case) -> Tensor:
    cache, text = case.cache(), case.prompt()
    for _ in range(3):
        text = torch.cat([text, case.prompt(1, 7)], dim=1)
        mask = torch.ones_like(text)  # or transformers takes a generated 0 for padding
        text = generate(case.model, cache, text, 8, attention_mask=mask)
    return text


def _forks(case: Case) -> Tensor:
    prefix = case.cache(block_size=16)
    ids = case.prompt(1, 64)
    logits(case.model, prefix, ids)
    ends = [case.prompt(1, tokens)[:, -5:] for tokens in (20, 21)]
    texts = [
        generate(case.model, prefix.fork(), torch.cat([ids, end], dim=1), _NEW) for end in ends
    ]
    return torch.cat(texts)


def _assisted(case: Case) -> Tensor:
    torch.manual_seed(5)
    draft = make(case.name, case.device)
    for parameter in draft.parameters():  # like the model, but not in every token
        parameter.data.add_(torch.randn_like(parameter), alpha=0.002)
    enable(draft)
    return case.generate(assistant_model=draft)


def _fixed(case: Case) -> Tensor:
    cache = case.cache(max_cache_len=_PROMPT + _NEW)
    return generate(case.model, cache, case.prompt(2), _NEW, disable_compile=True)


def _enabled(case: Case) -> Tensor:
    attention = case.model.config._attn_implementation
    model = enable(case.model, exact_prompt=case.exact_prompt)
    model.set_attn_implementation(attention)
    return model.generate(case.prompt(), max_new_tokens=_NEW, do_sample=False)  # type: ignore[no-any-return]


def _compiled(case: Case) -> Tensor:
    torch._dynamo.reset()
    forward, cache = torch.compile(case.model, backend="eager"), case.cache()
    ids = case.prompt()
    found = [logits(forward, cache, ids)[:, -1:].argmax(-1)]
    for _ in range(6):
        found.append(logits(forward, cache, found[-1]).argmax(-1))
    return torch.cat(found, dim=1)


def _compiled_whole(case: Case) -> Tensor:
    torch._dynamo.reset()
    step, cache = case.model, case.cache(max_cache_len=_PROMPT + _NEW)
    if case.model.config._attn_implementation == "kvquant":  # eager attention is not to break
        step = torch.compile(case.model, fullgraph=True, backend="eager")
    found = [logits(case.model, cache, case.prompt(2))[:, -1:].argmax(-1)]
    for _ in range(6):
        found.append(logits(step, cache, found[-1]).argmax(-1))
    return torch.cat(found, dim=1)


def _graphed(case: Case) -> Tensor:
    cache = case.cache(max_cache_len=_PROMPT + _NEW)
    step = graph_step(
        case.model, cache, graph=CUDAGraph if case.device == "cuda" else RecordedGraph
    )
    tokens = generate(case.model, cache, case.prompt(2), _NEW)
    if case.model.config._attn_implementation == "kvquant":
        assert step.calls["replay"] >= _NEW - 4, step
    return tokens


def _offloaded(case: Case) -> Tensor:
    cache, text = case.cache(), case.prompt()
    for _ in range(2):
        text = torch.cat([text, case.prompt(1, 7)], dim=1)
        text = generate(case.model, cache, text, 8, attention_mask=torch.ones_like(text))
        cache.offload()
        assert all(layer.nbytes == 0 for layer in cache.layers if not layer.slides)
    return text


def _mapped(case: Case) -> Tensor:
    from accelerate import dispatch_model

    away = {"cpu": "disk", "cuda": "cpu"}[case.device]  # where weights wait between their layers
    places = {f"model.{name}": case.device for name, _ in case.model.model.named_children()}
    del places["model.layers"]
    layers = range(len(case.model.model.layers))
    places |= {f"model.layers.{i}": away if i % 2 else case.device for i in layers}
    with tempfile.TemporaryDirectory() as folder:
        main = torch.device(case.device)
        options = {"offload_dir": folder, "main_device": main, "force_hooks": True}
        case.model = dispatch_model(case.model, {**places, "lm_head": case.device}, **options)
        return case.generate(2)


def _trained(case: Case) -> Tensor:
    case.model.train().requires_grad_(True)
    return logits(case.model, case.cache(), case.prompt())


def _weights(case: Case) -> Tensor:
    return case.model(  # type: ignore[no-any-return]
        case.prompt(), output_attentions=True, use_cache=True, **{CACHE_ARGUMENT: case.cache()}
    ).logits


def _continuous(case: Case) -> Tensor:
    case.model.generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=3)
    raise AssertionError("it ran: compare its tokens")


@dataclass(frozen=True)
class Mode:
    """A mode, and what stands in for a part of it where it is judged.

    Attributes:
        run: Gives its tokens.
        always: What stands in on every device.
        on_cpu: What stands in on a CPU.
    """

    run: Callable[[Case], Tensor]
    always: str = ""
    on_cpu: str = ""


MODES = {
    "greedy": Mode(lambda case: case.generate(2)),
    "sampling (top-p)": Mode(lambda case: case.generate(2, do_sample=True, top_p=0.9)),
    "beam search": Mode(lambda case: case.generate(2, num_beams=3)),
    "assisted by a draft model on an 8-bit cache of its own": Mode(_assisted),
    "prompt lookup": Mode(lambda case: case.generate(prompt_lookup_num_tokens=4)),
    "chunked prefill": Mode(lambda case: case.generate(2, prefill_chunk_size=32)),
    "left-padded batch": Mode(_padded),
    "turns of a chat on one cache": Mode(_turns),
    "forks of a prefix": Mode(_forks),
    "`max_cache_len`": Mode(_fixed),
    "`enable(model)`": Mode(_enabled),
    "`torch.compile(model)`": Mode(
        _compiled, always="traced with breaks, run by torch's eager backend"
    ),
    "`torch.compile(model, fullgraph=True)`, `max_cache_len`": Mode(
        _compiled_whole, always="traced whole, run by torch's eager backend"
    ),
    "`graph_step`, or `enable(model, graph=True)`": Mode(
        _graphed, on_cpu="a recorder of operations for the graph"
    ),
    "`cache.offload()` between turns": Mode(_offloaded),
    "`device_map`: every other layer's weights on the CPU or disk": Mode(
        _mapped, on_cpu="weights on the disk"
    ),
    "training": Mode(_trained),
    "`output_attentions=True`": Mode(_weights),
    "`generate_batch`": Mode(_continuous),
}
