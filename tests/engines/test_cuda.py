"""Decode steps in CUDA graphs, on pages as vLLM allocates them; no engine is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvquant.integrations.vllm import FORMATS, backend
from kvquant.integrations.vllm.metadata import StepBuilder

from .test_step import config, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HEADS, KV_HEADS, DIM, BLOCK, WIDTH, BATCH, LAYERS = 32, 8, 128, 256, 16, 4, 2


class Engine:
    """Requests on the device: buffers that stay in place, as vLLM's do."""

    def __init__(self, name: str, drafts: int, dtype: torch.dtype) -> None:
        blocks, of = BATCH * WIDTH + 1, spec_of(name)
        shape = (LAYERS, blocks, KV_HEADS, BLOCK, of.state_content_bytes)
        self.pages = torch.zeros(shape, dtype=torch.int8, device="cuda")
        self.views = [getattr(backend, name).view(pages, DIM, DIM) for pages in self.pages]
        mode = CUDAGraphMode.FULL_AND_PIECEWISE
        self.builder = StepBuilder(of, ["layers.0"], config(mode, drafts), torch.device("cuda"))
        order = 1 + torch.randperm(blocks - 1, device="cuda")
        self.table = torch.zeros(BATCH, WIDTH, dtype=torch.int32, device="cuda")
        self.ids = order.to(torch.int32).view(BATCH, WIDTH)
        self.starts = torch.zeros(BATCH + 1, dtype=torch.int32, device="cuda")
        self.lens = torch.zeros(BATCH, dtype=torch.int32, device="cuda")
        self.dtype = dtype

    def common(self, lengths: list[int], counts: list[int]) -> CommonAttentionMetadata:
        """The step in which requests of such lengths get so many tokens; those with none pad."""
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        real = torch.tensor(counts) > 0
        after = [(n + new) * bool(new) for n, new in zip(lengths, counts, strict=True)]
        self.starts.copy_(starts)
        self.lens.copy_(torch.tensor(after))
        self.table.copy_(self.ids * real[:, None].cuda())
        total = BATCH * max(counts)
        return CommonAttentionMetadata(
            query_start_loc=self.starts, query_start_loc_cpu=starts, seq_lens=self.lens,
            num_reqs=BATCH, num_actual_tokens=total, max_query_len=max(counts),
            max_seq_len=WIDTH * BLOCK, block_table_tensor=self.table,
            slot_mapping=torch.zeros(total, dtype=torch.int64, device="cuda"),
            seq_lens_cpu_upper_bound=torch.tensor(after, dtype=torch.int32),
        )  # fmt: skip

    def build(self, lengths: list[int], counts: list[int]) -> Any:
        return self.builder.build(0, self.common(lengths, counts))

    def rows(self, total: int) -> list[Tensor]:
        return [
            torch.randn(total, h, DIM, dtype=self.dtype, device="cuda")
            for h in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def run(self, step: Any, rows: list[Tensor], out: Tensor) -> None:
        options = {"sinks": False, "alibi_slopes": False}
        for view in self.views:
            step.attend(view, *rows, out, options=options, sinks=None, alibi_slopes=None)


def spec_of(name: str) -> Any:
    from dataclasses import replace

    plain = replace(spec(name, BLOCK), num_kv_heads=KV_HEADS, head_size=DIM, head_size_v=DIM)
    return getattr(backend, name).customize_spec(replace(plain, state_content_bytes=None))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_captured_decode_grows_by_replay_as_eager_steps_do(
    name: str, tokens: int, dtype: torch.dtype
) -> None:
    prompts = [700, 33, 1500, 250]
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        engine = Engine(name, tokens - 1, dtype)
        rows = engine.rows(sum(prompts))
        common = engine.build([0] * BATCH, prompts)
        engine.run(common, rows, torch.empty_like(rows[0]))
        engines.append(engine)
    eager, captured = engines
    buffers = captured.rows(BATCH * tokens)
    out = torch.empty_like(buffers[0])
    step = captured.build([0] * BATCH, [tokens] * BATCH)  # as at capture: no context
    kept = captured.pages.clone()
    assert step.tokens == tokens
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.run(step, buffers, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(step, buffers, out)
    captured.pages.copy_(kept)  # the warm-up wrote at position 0
    lengths = list(prompts)
    for turn in range(12):
        torch.manual_seed(100 + turn)
        counts = [tokens] * BATCH if turn % 3 else [*[tokens] * (BATCH - 1), 0]
        rows = eager.rows(BATCH * tokens)
        expected = torch.full_like(rows[0], torch.nan)
        eager.run(eager.build(lengths, counts), rows, expected)
        for buffer, new in zip(buffers, rows, strict=True):
            buffer.copy_(new)
        captured.build(lengths, counts)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected), turn
        lengths = [n + new for n, new in zip(lengths, counts, strict=True)]
    assert torch.equal(eager.pages[:, 1:], captured.pages[:, 1:])


@pytest.mark.parametrize("name", FORMATS)
def test_uniform_decodes_and_packed_rows_agree(name: str) -> None:
    results = []
    for limit in (1, 0):
        torch.manual_seed(0)
        engine = Engine(name, 0, torch.float16)
        engine.builder._most = limit
        rows = engine.rows(1000)
        engine.run(engine.build([0] * BATCH, [250] * BATCH), rows, torch.empty_like(rows[0]))
        rows = engine.rows(BATCH)
        out = torch.empty_like(rows[0])
        step = engine.build([250] * BATCH, [1] * BATCH)
        assert step.tokens == limit
        engine.run(step, rows, out)
        results.append((out, engine.pages.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-3, rtol=2e-3)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("counts", [[1] * BATCH, [2000, 1, 1, 1]], ids=str)
def test_nothing_waits_for_the_device(counts: list[int]) -> None:
    engine = Engine("KVQUANT", 0, torch.float16)
    rows = engine.rows(sum(counts))
    out = torch.empty_like(rows[0])
    engine.run(engine.build([1500, 9, 9, 9], counts), rows, out)
    common = engine.common([1500, 9, 9, 9], counts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run(engine.builder.build(0, common), rows, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
