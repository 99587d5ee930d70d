"""Decode steps from a graph: on a GPU a CUDA graph, on the CPU a recorder that stands in for it."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    GraphStep,
    KVQuantCache,
    disable,
    enable,
    graph_step,
)
from kvquant.integrations.transformers.graphs import CUDAGraph  # noqa: E402
from recorded import RecordedGraph  # noqa: E402
from support import no_waiting  # noqa: E402
from tiny import CONFIGS, assert_close, generate, ids_of, logits, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
LENGTH = 128


def graph_of(device: str) -> Any:
    return CUDAGraph if device == "cuda" else RecordedGraph


def stepped(model: Any, device: str, **options: Any) -> tuple[KVQuantCache, GraphStep]:
    cache = KVQuantCache(model, **{"max_cache_len": LENGTH, **options})
    return cache, graph_step(model, cache, graph=graph_of(device))


def both(
    model: Any, device: str, ids: Tensor, new: int = 30, *, format: Any = None, **options: Any
) -> GraphStep:
    """Tokens of generate are those without a graph; the step that made them."""
    cache, step = stepped(model, device, format=format)
    found = []
    for used in (KVQuantCache(model, max_cache_len=LENGTH, format=format), cache):
        torch.manual_seed(5)
        found.append(generate(model, used, ids, new, disable_compile=True, **options))
    assert torch.equal(*found)
    return step


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_model(name: str, device: str) -> None:
    step = both(make(name, device), device, ids_of(2, 9, device))  # past the window of 16
    assert step.calls == {"model": 2, "capture": 1, "replay": 27}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "several"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_modes_of_generate(name: str, options: dict[str, Any], device: str) -> None:
    step = both(make(name, device), device, ids_of(2, 20, device), 12, **options)
    assert step.calls["replay"] >= 8


def test_formats_by_layer(device: str) -> None:
    format = [
        "int8",
        kvquant.CacheFormat(key="int4", value="int4", key_mean=16, by_age=True),
        "plain",
    ]
    step = both(make("llama", device), device, ids_of(2, 20, device), format=format)
    assert step.calls == {"model": 2, "capture": 1, "replay": 27}


def test_a_large_batch(device: str) -> None:
    step = both(make("llama", device), device, ids_of(128, 5, device), 8)
    assert step.calls["replay"] == 5


def test_left_padding(device: str) -> None:
    model, ids = make("llama", device), ids_of(3, 20, device)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :19] = 0, 0
    step = both(model, device, ids * mask, 12, attention_mask=mask)
    assert step.calls["replay"] == 9


def test_logits_of_a_loop_without_positions(device: str) -> None:
    model, ids = make("llama", device), ids_of(2, 40, device)
    (cache, step), other = stepped(model, device), KVQuantCache(model, max_cache_len=LENGTH)
    kept = []
    for part in ids.split([20, *[1] * 20], dim=1):
        kept.append((logits(model, cache, part), logits(model, other, part)))
    for mine, expected in kept:  # outputs are not written over by later steps
        assert_close(mine, expected, 1e-4)
    assert step.calls == {"model": 2, "capture": 1, "replay": 18}
    assert cache.get_seq_length() == 40
    assert cache.layers[0].storage.max_length == 40
    assert cache.layers[2].storage.seq_lens.tolist() == [40, 40]


@pytest.mark.gpu
def test_replays_do_not_wait_for_the_device(cuda: str) -> None:
    model = make("llama", cuda)
    cache, step = stepped(model, cuda)
    ids = ids_of(2, 8, cuda)
    logits(model, cache, ids)
    for _ in range(2):
        logits(model, cache, ids[:, :1])
    with no_waiting():
        for _ in range(3):
            logits(model, cache, ids[:, :1])
    assert step.calls["replay"] == 3


@pytest.mark.parametrize("block_size", [None, 16], ids=["contiguous", "paged"])
def test_what_generation_does_to_a_cache_between_replays(
    block_size: int | None, device: str
) -> None:
    """Beams, other batches, crops, chunks, forks, a new text: tokens stay those of the model."""
    model = make("llama", device)
    cache, step = stepped(model, device, block_size=block_size)
    other = KVQuantCache(model, max_cache_len=LENGTH, block_size=block_size)

    def go(batch: int, *tokens: int) -> None:
        for count in tokens:
            ids = ids_of(batch, count, device)
            assert_close(logits(model, cache, ids), logits(model, other, ids), 1e-4)

    def change(method: str, *arguments: Any) -> None:
        for one in (cache, other):
            getattr(one, method)(*arguments)

    go(4, 20, 1, 1, 1, 1)
    change("reorder_cache", torch.tensor([2, 2, 0, 1], device=device))
    go(4, 1, 1, 1)
    change("crop", -3)
    go(4, 1, 5, 1, 1)
    change("batch_select_indices", torch.tensor([0, 3], device=device))
    go(2, 1, 1, 1, 1)
    change("batch_repeat_interleave", 2)
    go(4, 1, 1, 1, 1)
    fork = cache.fork()
    assert fork.step is not None
    assert fork.step is not step
    go(4, 1, 1)
    change("reset")
    replays = step.calls["replay"]
    go(4, 30, 1, 1, 1)
    assert step.calls["replay"] > replays
    if block_size is None:
        assert step.calls["capture"] == 3  # of the batches of 4, of 2, and of other 4


def test_padding_of_a_new_text(device: str) -> None:
    model = make("llama", device)
    (cache, step), other = stepped(model, device), KVQuantCache(model, max_cache_len=LENGTH)
    for padding in (0, 6, 3, 0):
        for used in (cache, other):
            used.reset()
        mask = torch.ones(2, 12, dtype=torch.long, device=device)
        mask[1, :padding] = 0
        for new in (12, 1, 1, 1, 1):
            if new == 1:
                mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            ids = ids_of(2, new, device)
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -new:]}
            mine, expected = (logits(model, x, ids, **options) for x in (cache, other))
            assert_close(mine[:, -1], expected[:, -1], 1e-4)
    assert step.calls["replay"] >= 8


def test_a_full_cache_is_refused_and_keeps_its_tokens(device: str) -> None:
    model = make("llama", device)
    cache, step = stepped(model, device, max_cache_len=16)
    ids = ids_of(2, 12, device)
    logits(model, cache, ids)
    for _ in range(4):
        logits(model, cache, ids[:, :1])
    with pytest.raises(kvquant.CacheFullError, match="max_cache_len: 16 tokens"):
        logits(model, cache, ids[:, :1])
    assert cache.get_seq_length() == 16
    assert cache.layers[1].storage.seq_lens.tolist() == [16, 16]
    assert step.calls["replay"] == 2


def test_weights_that_moved_are_captured_anew(device: str) -> None:
    model, ids = make("llama", device), ids_of(2, 12, device)
    (cache, step), other = stepped(model, device), KVQuantCache(model, max_cache_len=LENGTH)
    for turn in range(2):
        for part in ids.split([8, 1, 1, 1, 1], dim=1):
            mine, expected = logits(model, cache, part), logits(model, other, part)
            assert_close(mine, expected, 1e-4)
        for used in (cache, other):
            used.reset()
        for parameter in model.parameters():
            parameter.data = parameter.data * (1.1 if turn == 0 else 1)
    assert step.calls["capture"] == 2


class HostReads(torch.nn.Module):
    """A part of a model that lets the host look at a tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * (1.0 if float(x.flatten()[0]) < 1e9 else 2.0)


def test_a_model_that_cannot_be_captured_runs_as_it_is(
    device: str, warnings_of: pytest.LogCaptureFixture
) -> None:
    model, ids = make("llama", device), ids_of(2, 12, device)
    norm = model.model.norm
    model.model.norm = torch.nn.Sequential(norm, HostReads())
    (cache, step), other = stepped(model, device), KVQuantCache(model, max_cache_len=LENGTH)
    for part in ids.split([8, 1, 1, 1, 1], dim=1):
        assert_close(logits(model, cache, part), logits(model, other, part), 1e-4)
    assert step.calls == {"model": 5}
    assert step.reason.startswith("the model's step cannot be captured: ")
    assert step.reason in warnings_of.text
    assert cache.layers[0].storage.seq_lens.tolist() == [12, 12]
    assert torch.rand(8, device=device).unique().numel() > 1  # the generator still draws
    model.model.norm = norm
    step = both(model, device, ids)
    assert step.calls["replay"] == 27


@pytest.mark.gpu
def test_garbage_of_the_time_of_a_capture(cuda: str) -> None:
    """A graph in a reference cycle, dropped while another is captured, is freed behind that."""
    model, ids, graphs = make("llama", cuda), ids_of(2, 12, cuda), []
    graphs.append(CUDAGraph(torch.device(cuda)))
    graphs[0].capture(lambda: torch.ones(4, device=cuda))

    def drop(*_: Any) -> None:
        if graphs and torch.cuda.is_current_stream_capturing():
            cycle = [graphs.pop()]
            cycle.append(cycle)

    model.model.layers[0].register_forward_pre_hook(drop)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        step = both(model, cuda, ids)
    finally:
        gc.set_threshold(*before)
    assert not graphs
    assert step.calls == {"model": 2, "capture": 1, "replay": 27}


@pytest.mark.gpu
def test_in_a_graph_of_the_callers_the_model_runs_as_it_is(cuda: str) -> None:
    model, ids = make("llama", cuda), ids_of(2, 12, cuda)
    (cache, step), other = stepped(model, cuda), KVQuantCache(model, max_cache_len=LENGTH)
    for part in ids.split([9, 1, 1, 1], dim=1):
        logits(model, cache, part)
        logits(model, other, part)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = logits(model, cache, ids[:, -1:])
    assert step.reason == "a CUDA graph of the caller's is being captured"
    graph.replay()
    assert_close(found, logits(model, other, ids[:, -1:]), 1e-4)


def test_why_a_call_is_no_replay(device: str) -> None:
    model, ids = make("llama", device), ids_of(2, 12, device)
    cache, step = stepped(model, device)
    assert repr(step) == "GraphStep(0 replay, 0 capture, 0 model)"
    logits(model, cache, ids)
    assert step.reason == "12 new tokens to 0 stored"
    logits(model, cache, ids[:, :1])
    assert step.reason == "the first step of its kind"
    logits(model, cache, ids[:, :3])
    assert step.reason == "3 new tokens to 13 stored"
    holes = torch.ones(2, 17, dtype=torch.long, device=device)
    holes[0, 3] = 0
    logits(model, cache, ids[:, :1], attention_mask=holes[:, None, None].bool())
    assert step.reason == "an attention_mask that says more than the prompt's left padding"
    logits(model, cache, ids[:, :1])
    assert step.reason == ""
    assert repr(step) == "GraphStep(0 replay, 1 capture, 4 model)"
    with pytest.raises(ValueError, match="output_attentions"):
        logits(model, cache, ids[:, :1], output_attentions=True)
    assert cache.get_seq_length() == 18
    step.close()
    assert cache.step is None


def test_where_there_is_no_graph(warnings_of: pytest.LogCaptureFixture, device: str) -> None:
    model, ids = make("llama", device), ids_of(1, 8, device)
    growing = KVQuantCache(model)
    step = graph_step(model, growing, graph=graph_of(device))
    expected = generate(model, KVQuantCache(model), ids)
    assert torch.equal(generate(model, growing, ids), expected)
    assert step.reason == "a cache without max_cache_len moves as it grows"
    assert "graph_step: a cache without max_cache_len" in warnings_of.text
    if device == "cpu":
        cache = KVQuantCache(model, max_cache_len=LENGTH)
        step = graph_step(model, cache)
        assert torch.equal(generate(model, cache, ids), expected)
        assert step.reason == "the model is on cpu, and graphs are CUDA's"
    sdpa = make("llama", device, "sdpa")
    cache, step = stepped(sdpa, device)
    assert torch.equal(generate(sdpa, cache, ids), expected)
    assert step.reason == "the model's attention is not 'kvquant'"
    assert "the model's attention is not 'kvquant'" in warnings_of.text


def test_bad_arguments() -> None:
    model = make("llama", "cpu")
    with pytest.raises(TypeError, match="model: expected a transformers model, got int"):
        graph_step(3, KVQuantCache(model))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache: expected a KVQuantCache, got DynamicCache"):
        graph_step(model, transformers.DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="graph: needs a max_cache_len"):
        enable(model, graph=True)


def test_enable_keeps_the_cache_and_its_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GraphStep] = []

    def stand_in(model: Any, cache: Any) -> GraphStep:
        made.append(graph_step(model, cache, graph=graph_of(device)))
        return made[-1]

    module = sys.modules["kvquant.integrations.transformers.enable"]
    monkeypatch.setattr(module, "graph_step", stand_in)
    model, ids = make("llama", device, "sdpa"), ids_of(2, 10, device)
    enable(model, max_cache_len=LENGTH)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    expected = model.generate(ids, **options)
    enable(model, max_cache_len=LENGTH, graph=True)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(made) == 1
    assert made[0].calls == {"model": 3, "capture": 1, "replay": 12}
    out = [model.generate(ids, return_dict_in_generate=True, **options) for _ in range(2)]
    caches = [x.get(CACHE_ARGUMENT) if CACHE_ARGUMENT in x else x.past_key_values for x in out]
    assert caches[0] is not caches[1]  # handed out, so not used again
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.generate(ids, **options), expected)
    disable(model)
    assert "forward" not in vars(model)
    assert "generate" not in vars(model)
