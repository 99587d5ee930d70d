"""attention of every dtype, layout and feature: at most twice the error of torch's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvquant
from attending import check_attention
from support import DTYPES, FORMATS, LAYOUTS, RAGGED, filled_cache

MIXED = (257, 0, 1, 17, 300, 530)  # histories of packed queries of these numbers:
PACKED = (257, 0, 1, 3, 40, 17)


@dataclass(frozen=True)
class Case:
    """One row of the table below; ``queries`` is per sequence, an int the same for all."""

    dtype: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    layout: str
    fmt: str = "default"
    queries: int | tuple[int, ...] = 1
    lens: tuple[int, ...] = RAGGED
    starts: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        share = self.heads[0] // self.heads[1]
        heads = "mqa" if self.heads[1] == 1 else f"gqa{share}" if share > 1 else "mha"
        k_dim, v_dim = self.dims
        dims = f"d{k_dim}" if k_dim == v_dim else f"d{k_dim}v{v_dim}"
        queries = f"q{self.queries}" if isinstance(self.queries, int) else "packed"
        extras = [*self.options, *(["padded"] if self.starts else [])]
        return "-".join([self.dtype, heads, dims, self.layout, self.fmt, queries, *extras])


PADDED = (3, 0, 1, 0, 16, 2, 200, 256, 300)  # starts of RAGGED: some have nothing but padding
CASES = [
    # One query a sequence: decode.
    Case("bf16", (8, 2), (128, 128), "paged16"),
    Case("fp16", (4, 4), (64, 64), "contiguous"),
    Case("fp32", (14, 2), (80, 80), "paged256"),
    Case("bf16", (8, 1), (256, 256), "paged64", "plain"),
    Case("fp16", (7, 1), (16, 16), "contiguous", "mean64"),
    Case("fp32", (2, 2), (48, 96), "paged32", "rotated"),
    Case("bf16", (14, 2), (192, 128), "contiguous", "mean16"),
    Case("fp16", (8, 2), (64, 256), "paged16", "mean64"),
    Case("bf16", (4, 2), (64, 64), "paged64", lens=(2100, 1025)),
    Case("fp32", (4, 2), (64, 64), "contiguous", queries=20, lens=(2100, 1025)),
    # A few: speculative decoding. Sequences with fewer tokens have queries that see nothing.
    Case("fp16", (8, 2), (96, 96), "paged32", "rotated", 3),
    Case("bf16", (14, 2), (128, 64), "paged64", queries=4),
    Case("fp32", (4, 1), (64, 64), "contiguous", queries=17),
    # Chunks over a history, packed.
    Case("bf16", (8, 2), (128, 128), "paged16", "default", PACKED, MIXED),
    Case("fp16", (2, 2), (80, 48), "paged256", "mean64", PACKED, MIXED),
    Case("fp32", (7, 1), (48, 48), "contiguous", "mean16", PACKED, MIXED),
    # Features.
    Case("bf16", (8, 2), (64, 64), "paged16", options={"sliding_window": 40}),
    Case("fp32", (8, 2), (128, 128), "contiguous", "default", PACKED, MIXED,
         options={"sliding_window": 300}),
    Case("fp16", (2, 2), (64, 64), "paged64", "plain", 5, options={"sliding_window": 1}),
    Case("fp16", (8, 2), (128, 128), "paged256", "plain", options={"softcap": 30.0}),
    Case("bf16", (2, 2), (256, 256), "contiguous", "default", PACKED, MIXED,
         options={"softcap": 5.0, "sliding_window": 100}),
    Case("bf16", (16, 2), (64, 64), "paged16", options={"sinks": None, "sliding_window": 128}),
    Case("fp32", (4, 4), (96, 96), "contiguous", "rotated", 6, options={"sinks": None}),
    Case("bf16", (4, 4), (80, 80), "paged32", options={"alibi_slopes": None}),
    Case("fp32", (8, 1), (64, 64), "paged16", "mean64", PACKED, MIXED,
         options={"alibi_slopes": None}),
    Case("bf16", (8, 2), (128, 128), "paged32", starts=PADDED),
    Case("fp16", (4, 4), (64, 64), "contiguous", "mean64", 4, starts=PADDED,
         options={"sliding_window": 50}),
    Case("bf16", (8, 2), (64, 64), "paged64", queries=5, options={"causal": False}),
    Case("fp32", (7, 1), (128, 128), "contiguous", "plain", options={"causal": False}),
    Case("fp16", (2, 2), (96, 64), "paged16", "default", PACKED, MIXED,
         options={"causal": False, "sliding_window": 60, "alibi_slopes": None}),
    Case("fp32", (4, 2), (64, 64), "paged16", options={"softmax_scale": 0.3}),
    Case("bf16", (8, 2), (128, 128), "paged64", lens=(2100, 1025, 3),
         options={"split_size": 512}),
    Case("fp16", (8, 2), (64, 256), "contiguous", queries=4, lens=(2100, 256, 257),
         options={"split_size": 256}),
    Case("fp32", (4, 1), (192, 80), "paged16", "default", PACKED, MIXED, (9, 0, 0, 16, 290, 3),
         options={"split_size": 256, "sliding_window": 300, "sinks": None}),
    Case("fp16", (14, 2), (128, 128), "paged32", "default", PACKED, MIXED, (9, 0, 0, 16, 290, 3),
         options={"sliding_window": 200, "softcap": 20.0, "sinks": None, "alibi_slopes": None}),
]  # fmt: skip


def run(case: Case, device: str, **more: Any) -> None:
    cache = filled_cache(
        case.lens, dtype=DTYPES[case.dtype], kv_heads=case.heads[1], k_dim=case.dims[0],
        v_dim=case.dims[1], block=LAYOUTS[case.layout], fmt=FORMATS[case.fmt], starts=case.starts,
        device=device,
    )  # fmt: skip
    counts = case.queries
    counts = [counts] * len(case.lens) if isinstance(counts, int) else counts
    queries = [
        torch.randn(n, case.heads[0], case.dims[0]).to(DTYPES[case.dtype]).to(device)
        for n in counts
    ]
    options = case.options | more
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = (torch.rand(case.heads[0]) * (3 if name == "sinks" else 0.1)).to(device)
    check_attention(cache, queries, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention(backend, device, case):
    run(case, device)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(list(DTYPES)),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 3)).map(lambda n: (n[0] * n[1], n[1])),
    dims=st.tuples(*[st.integers(1, 16).map(lambda n: 16 * n)] * 2),
    layout=st.sampled_from(list(LAYOUTS)),
    fmt=st.sampled_from(list(FORMATS)),
    sizes=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 20), st.integers(0, 40)),
        min_size=1,
        max_size=4,
    ),
    window=st.one_of(st.none(), st.integers(1, 300)),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 8.0]),
)
def test_any_shape(
    backend, device, dtype, heads, dims, layout, fmt, sizes, window, causal, softcap
):
    lens, queries, starts = zip(*sizes, strict=True)
    options = {"causal": causal, "sliding_window": window, "softcap": softcap}
    run(Case(dtype, heads, dims, layout, fmt, queries, lens, starts, options), device)


def test_a_nan_is_not_hidden_by_a_sink(backend, device):
    cache = filled_cache((1,), dtype=DTYPES["fp16"], kv_heads=1, k_dim=64, device=device)
    query = torch.full((1, 1, 1, 64), torch.nan, dtype=DTYPES["fp16"], device=device)
    out = kvquant.attention(
        query,
        cache.view,
        block_table=cache.table,
        seq_lens=cache.lens,
        sinks=torch.zeros(1, device=device),
    )
    assert out.isnan().all()
