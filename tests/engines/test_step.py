"""Steps as vLLM's scheduler describes them, on pages as it allocates them; no engine is started."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace, customize_attention_spec

import kvquant
from kvquant.integrations.vllm import FORMATS, backend, cache_dtype
from kvquant.integrations.vllm.formats import format_of
from kvquant.integrations.vllm.metadata import Step, StepBuilder

HEADS, KV_HEADS, DIM, BLOCKS, WIDTH = 4, 2, 64, 24, 6
POISON = 0xA5


def config(mode: CUDAGraphMode = CUDAGraphMode.NONE, drafts: int = 0) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        if drafts
        else None,
    )


def spec(name: str, block_size: int) -> FullAttentionSpec:
    plain = FullAttentionSpec(
        block_size=block_size, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.int8
    )
    return customize_attention_spec(getattr(backend, name), plain)


def pages_of(name: str, block_size: int, layout: KVCacheLayout, layers: int = 2) -> list[Tensor]:
    """What vLLM allocates for some layers, poisoned."""
    of = spec(name, block_size)
    size = layers * BLOCKS * of.page_size_bytes
    layer_stride, block_stride, *_ = compute_layout_strides(of, BLOCKS, layers, layout)
    raw = torch.full((size,), POISON, dtype=torch.uint8).view(torch.int8)
    tensor = KVCacheTensor(
        size=size, layers=[f"layers.{i}" for i in range(layers)], layer_stride=layer_stride,
        block_stride=block_stride,
    )  # fmt: skip
    return create_kv_cache_views(raw, of, BLOCKS, layout, tensor)


@dataclass
class Engine:
    """The host's side of some requests: lengths and blocks."""

    name: str = "KVQUANT"
    block_size: int = 64
    layout: KVCacheLayout = KVCacheLayout.LBHNC
    drafts: int = 0
    mode: CUDAGraphMode = CUDAGraphMode.NONE

    def __post_init__(self) -> None:
        self.pages = pages_of(self.name, self.block_size, self.layout)[0]
        self.view = getattr(backend, self.name).view(self.pages, DIM, DIM)
        self.builder = StepBuilder(
            spec(self.name, self.block_size), ["layers.0"], config(self.mode, self.drafts),
            torch.device("cpu"),
        )  # fmt: skip
        order = 1 + torch.randperm(BLOCKS - 1)[: 3 * WIDTH]  # block 0 is nobody's
        self.table = order.to(torch.int32).view(3, WIDTH)
        self.lengths = [0, 0, 0]

    def common(self, counts: list[int], padding: int = 0, most: int = 0) -> CommonAttentionMetadata:
        """A step in which requests get so many tokens, and ``padding`` rows pad a graph."""
        after = [n + new for n, new in zip(self.lengths, counts, strict=True)]
        most = most or max(counts)
        starts = torch.tensor([0, *counts]).cumsum(0)
        starts = torch.cat([starts, starts[-1:].expand(padding)]).to(torch.int32)
        table = torch.cat([self.table, torch.zeros(padding, WIDTH, dtype=torch.int32)])
        total = sum(counts) + padding * most
        return CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts.clone(),
            seq_lens=torch.tensor([*after, *[0] * padding], dtype=torch.int32),
            num_reqs=3 + padding, num_actual_tokens=total, max_query_len=most,
            max_seq_len=WIDTH * self.block_size, block_table_tensor=table,
            slot_mapping=torch.zeros(total, dtype=torch.int64),
            # Where rows pad a graph, vLLM's host may hold anything.
            seq_lens_cpu_upper_bound=torch.tensor([*after, *[7] * padding], dtype=torch.int32),
        )  # fmt: skip

    def step(self, counts: list[int], padding: int = 0, **options: Any) -> tuple[Step, Any, Tensor]:
        """Random rows through a step: the step, the rows and the output of all rows."""
        common = self.common(counts, padding)
        made = self.builder.build(0, common)
        rows = [torch.randn(common.num_actual_tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
        out = torch.full_like(rows[0], torch.nan)
        attend(made, self.view, rows, out, **options)
        self.lengths = [n + new for n, new in zip(self.lengths, counts, strict=True)]
        return made, rows, out


def attend(step: Step, view: kvquant.CacheView, rows: Any, out: Tensor, **options: Any) -> None:
    query, key, value = rows
    options = {"sinks": False, "alibi_slopes": False, **options}
    step.attend(view, query, key, value, out, options=options, sinks=None, alibi_slopes=None)


def expected(engine: Engine, counts: list[int], rows: Any, view: kvquant.CacheView) -> Tensor:
    """kvquant's own packed call on other memory."""
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(engine.lengths, dtype=torch.int32)
    total = sum(counts)
    query, key, value = (x[:total] for x in rows)
    return kvquant.attention(
        query, view, key, value, block_table=engine.table, seq_lens=lengths, cu_seqlens_q=starts,
        max_seqlen_q=max(counts),
    )  # fmt: skip


STEPS = ([70, 5, 130], [1, 1, 1], [1, 40, 1], [1, 1, 1], [17, 1, 90], [1, 1, 1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize(
    "layout", backend.KVQUANT.supported_kv_cache_layouts(), ids=lambda x: x.name
)
def test_steps_are_kvquant_s_own_calls(name: str, block_size: int, layout: KVCacheLayout) -> None:
    engine = Engine(name, block_size, layout)
    other = kvquant.CacheView.allocate(
        BLOCKS, KV_HEADS, block_size, DIM, format=format_of(FORMATS[name], block_size)
    )
    for counts in STEPS:
        engine_lengths = list(engine.lengths)
        made, rows, out = engine.step(counts)
        engine.lengths = engine_lengths
        assert torch.equal(out, expected(engine, counts, rows, other))
        assert made.tokens == (1 if max(counts) == 1 else 0)
        engine.lengths = [n + new for n, new in zip(engine.lengths, counts, strict=True)]


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3, 3]])
def test_padding_of_a_graph_writes_and_attends_to_nothing(counts: list[int]) -> None:
    torch.manual_seed(1)
    padded, bare = (Engine(drafts=2) for _ in range(2))
    bare.table = padded.table
    for engine in (padded, bare):
        torch.manual_seed(2)
        engine.step([50, 3, 100])
    torch.manual_seed(3)
    made, rows, out = padded.step(counts, padding=2)
    total = sum(counts)
    common = bare.common(counts)
    step = bare.builder.build(0, common)
    other = torch.full_like(rows[0][:total], torch.nan)
    attend(step, bare.view, [x[:total] for x in rows], other)
    assert made.tokens == step.tokens == counts[0]
    assert torch.equal(out[:total], other)
    assert not out[total:].any()  # a sequence without tokens sees nothing
    assert torch.equal(padded.pages, bare.pages)
    assert (padded.pages[0].view(torch.uint8) == POISON).all()


def test_a_mixed_step_with_padding_leaves_other_pages_alone() -> None:
    engine = Engine()
    made, _, out = engine.step([64, 2, 9], padding=1)
    assert made.tokens == 0
    assert out[:75].isfinite().all()
    assert (engine.pages[0].view(torch.uint8) == POISON).all()


@pytest.mark.parametrize(
    ("mode", "most"), [(CUDAGraphMode.FULL, 1), (CUDAGraphMode.FULL_AND_PIECEWISE, 3)]
)
def test_what_counts_as_a_uniform_decode(mode: CUDAGraphMode, most: int) -> None:
    engine = Engine(drafts=2, mode=mode)
    engine.lengths = [10, 20, 30]
    assert engine.builder.build(0, engine.common([1, 1, 1])).tokens == 1
    assert engine.builder.build(0, engine.common([3, 3, 3])).tokens == (3 if most == 3 else 0)
    assert engine.builder.build(0, engine.common([3, 2, 3])).tokens == 0
    assert engine.builder.build(0, engine.common([1, 2, 1], padding=1, most=2)).tokens == 0
    # As vLLM captures a graph of mixed batches: one token each, but any number is promised.
    assert engine.builder.build(0, engine.common([1, 1, 1], most=3)).tokens == 0


def test_what_a_graph_reads_stays_in_place() -> None:
    engine = Engine()
    first, _, _ = engine.step([5, 6, 7])
    second, _, _ = engine.step([1, 1, 1])
    for name in ("block_table", "seq_lens"):
        assert getattr(first.seqs, name).data_ptr() == getattr(second.seqs, name).data_ptr()
    assert second.seqs.seq_lens.tolist() == [5, 6, 7]


def test_a_step_with_prompts_says_what_the_host_knows() -> None:
    engine = Engine()
    engine.step([50, 3, 100])
    made, _, _ = engine.step([20, 1, 1], padding=1)
    assert made.seqs.on_host == kvquant.HostLengths((50, 3, 100, 0), rows=(20, 1, 1, 0))
    assert made.seqs.seq_lens.tolist() == [50, 3, 100, 0]
    assert made.stored.on_host == kvquant.HostLengths((70, 4, 101, 0), rows=(20, 1, 1, 0))
    made, _, _ = engine.step([1, 1, 1])
    assert made.seqs.on_host is made.stored.on_host is None
    # With drafts, vLLM's host counts on all being accepted.
    made, _, _ = Engine(drafts=2).step([20, 1, 1])
    assert made.seqs.on_host is None


def test_a_layer_that_shares_another_s_cache_appends_nothing() -> None:
    engine = Engine()
    engine.step([50, 3, 100])
    made, rows, out = engine.step([1, 1, 1])
    before = engine.pages.clone()
    again = torch.full_like(out, torch.nan)
    attend(made, engine.view, [rows[0], None, None], again)
    assert torch.equal(engine.pages, before)
    torch.testing.assert_close(again, out)


def test_a_layer_keeps_no_memory_that_the_engine_gave_up() -> None:
    kind = backend.KVQUANT
    layer = SimpleNamespace(get_attn_backend=lambda: kind, head_size_v=DIM)
    attention = kind.get_impl_cls()(HEADS, DIM, 0.1, KV_HEADS, kv_cache_dtype=cache_dtype())
    pages = pages_of("KVQUANT", 64, KVCacheLayout.LBHNC, layers=1)[0].clone()
    view = attention.view_of(layer, pages)
    assert attention.view_of(layer, pages) is view
    memory = weakref.ref(view.k.codes)
    del view, pages
    assert memory() is None


def test_attention_that_is_not_causal_is_refused() -> None:
    engine = Engine()
    common = engine.common([1, 1, 1])
    common.causal = False
    with pytest.raises(ValueError, match="causal"):
        engine.builder.build(0, common)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block_size", [64, 256])
def test_pages_carry_all_that_is_needed_to_read_them(name: str, block_size: int) -> None:
    """Copied by vLLM to other blocks, or out to other memory and back, they read the same."""
    engine = Engine(name, block_size)
    engine.step([300 if block_size > 64 else 200, 64, 100])
    common = engine.common([1, 1, 1])
    rows = [torch.randn(3, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    kept = engine.pages.clone()

    def attended() -> Tensor:
        out = torch.full_like(rows[0], torch.nan)
        attend(engine.builder.build(0, common), engine.view, rows, out)
        return out

    first = attended()
    engine.pages.copy_(kept)
    used = engine.table.unique().tolist()
    free = [block for block in range(1, BLOCKS) if block not in used]
    moved = dict(zip(used[: len(free)], free, strict=True))
    copy_kv_cache_blocks_inplace([engine.pages], BLOCKS, list(moved.items()))
    for source, target in moved.items():
        engine.pages[source].fill_(-1)
        common.block_table_tensor[common.block_table_tensor == source] = target
    assert torch.equal(attended(), first)
    # Swapped out, and in where other pages were.
    order = 1 + torch.randperm(BLOCKS - 1)
    out = kept.clone().view(BLOCKS, -1)
    engine.pages.fill_(-1)
    for source, target in enumerate(order.tolist(), start=1):
        engine.pages.view(BLOCKS, -1)[target] = out[source]
    common.block_table_tensor = order.to(torch.int32)[engine.table.long() - 1]
    assert torch.equal(attended(), first)


def test_pages_of_a_prefix_may_come_from_different_requests() -> None:
    """Two requests computed the same tokens in different chunks; a third gets pages of both."""
    total, block_size = 192, 64
    query, key, value = (torch.randn(total, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    key += 20 * torch.randn(DIM)  # so that means matter, which depend on chunks
    engine = Engine("KVQUANT", block_size)
    for request, chunks in ((0, [total]), (1, [20, 44, 100, 28])):
        for chunk in chunks:
            begin = engine.lengths[request]
            counts = [chunk if i == request else 0 for i in range(3)]
            step = engine.builder.build(0, engine.common(counts))
            rows = [x[begin : begin + chunk] for x in (query, key, value)]
            attend(step, engine.view, rows, torch.empty_like(rows[0]))
            engine.lengths[request] += chunk
    engine.table[2] = engine.table[0]
    engine.table[2, 1] = engine.table[1, 1]
    engine.lengths[2] = total
    keys, values = kvquant.gather(
        engine.view,
        block_table=engine.table,
        seq_lens=torch.tensor(engine.lengths, dtype=torch.int32),
        tokens=total,
    )
    for request in range(3):
        torch.testing.assert_close(keys[request], key, atol=0.08, rtol=0)
        torch.testing.assert_close(values[request], value, atol=0.02, rtol=0)


def test_bytes_that_the_engine_counts() -> None:
    for name, format in FORMATS.items():
        for block_size in (64, 128, 256, 512):
            of = spec(name, block_size)
            size = min(block_size, 256)
            slab = format_of(format, size).slab_bytes(DIM, DIM, size)
            assert 0 <= of.state_content_bytes * size - slab < size
            assert of.page_size_bytes == KV_HEADS * block_size * of.state_content_bytes
