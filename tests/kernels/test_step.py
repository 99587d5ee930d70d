"""A repeated decode step, which may be one launch, leaves and returns what two calls do."""

from __future__ import annotations

import pytest
import torch

import kvquant
from kvquant import Sequences, append_, attention, plan
from support import (
    BF16,
    DTYPES,
    FORMATS,
    LAYOUTS,
    filled_cache,
    index,
    parts,
    random_rows,
    rebuilt,
    same_bits,
    snapshot,
)

LENS = (255, 1, 530, 700, 16)
ROOM = (360, 100, 640, 1100, 120)

CASES = [  # dtype, (q_heads, kv_heads), (k_dim, v_dim), layout, format, tokens of a step, options
    ("fp16", (8, 2), (128, 128), "contiguous", "default", 1, {}),
    ("bf16", (8, 2), (128, 128), "paged16", "default", 1, {"sliding_window": 100}),
    ("bf16", (4, 2), (64, 64), "paged64", "mean64", 3, {}),
    ("fp16", (4, 1), (64, 128), "contiguous", "mean16", 4, {"softcap": 20.0}),
    ("fp16", (2, 2), (128, 64), "paged32", "mean16", 16, {}),
    ("fp32", (4, 2), (128, 128), "paged16", "default", 2, {"sliding_window": 2}),
    ("bf16", (3, 1), (96, 80), "contiguous", "plain", 5, {"causal": False}),
    ("fp16", (6, 2), (256, 256), "paged256", "rotated", 2, {}),
    ("bf16", (8, 1), (192, 192), "paged16", "mean64", 2, {}),
    ("bf16", (8, 2), (128, 128), "paged64", "default", 4, {"split_size": 256}),
    ("fp16", (100, 100), (128, 128), "paged16", "default", 1, {}),  # a GPU has no room for them all
    ("bf16", (8, 1), (64, 64), "paged16", "default", 40, {}),  # more rows than a block takes
    ("fp16", (8, 2), (128, 128), "contiguous", "default", 8, {}),
    ("bf16", (8, 2), (128, 128), "paged16", "mean64", 16, {"sliding_window": 100}),
    ("fp16", (4, 1), (64, 64), "paged64", "k8v4", 32, {}),
    ("bf16", (8, 2), (128, 128), "paged32", "k4v4", 5, {"softcap": 20.0}),
]


def _name(case) -> str:
    dtype, heads, dims, layout, fmt, tokens, _ = case
    return f"{dtype}-{heads[0]}of{heads[1]}-d{dims[0]}v{dims[1]}-{layout}-{fmt}-{tokens}tokens"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_step_is_an_append_and_an_attention(native, case, padded):
    dtype, (heads, kv_heads), (k_dim, v_dim), layout, fmt, tokens, options = case
    cache = filled_cache(
        LENS, room=ROOM, dtype=DTYPES[dtype], kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim,
        block=LAYOUTS[layout], fmt=FORMATS[fmt], device=native,
        starts=(0, 2, 300, 0, 40) if padded else None,
    )  # fmt: skip
    view, lens = cache.view, cache.lens.clone()
    apart = rebuilt(view, snapshot(view))
    seqs = Sequences(cache.table, cache.lens, cache.starts, advance=True)
    step = None
    for _ in range(2 + 32 // tokens):  # over the edges of groups, blocks and splits
        query = torch.randn(len(LENS), tokens, heads, k_dim).to(DTYPES[dtype]).to(native)
        key = random_rows(len(LENS), tokens, kv_heads, k_dim, dtype=DTYPES[dtype], device=native)
        value = torch.randn(len(LENS), tokens, kv_heads, v_dim).to(DTYPES[dtype]).to(native)
        if step is None:
            step = plan(query, view, seqs, key, value, **options)
        got = step.run(query, view, seqs, key, value)
        where = {"block_table": cache.table, "seq_lens": lens, "seq_starts": cache.starts}
        append_(key, value, apart, **where, advance=True)
        expected = attention(query, apart, **where, **options)
        assert torch.equal(cache.lens, lens)
        for name, tensor in parts(apart).items():
            assert same_bits(parts(view)[name], tensor), name
        assert same_bits(got, expected)


@pytest.mark.gpu
def test_a_step_beyond_the_room_drops_what_has_no_place(cuda):
    """Lengths on a device are not checked on the host."""
    cache = filled_cache((30, 20), room=(32, 32), k_dim=64, device=cuda)
    view = cache.view
    before = snapshot(view)
    query, key, value = (torch.randn(2, 3, n, 64, device=cuda).bfloat16() for n in (4, 2, 2))
    seqs = Sequences(cache.table, cache.lens, advance=True)
    plan(query, view, seqs, key, value).run(query, view, seqs, key, value)
    assert cache.lens.tolist() == [33, 23]
    apart, lens = rebuilt(view, before), index((30, 20), cuda)
    append_(key, value, apart, block_table=cache.table, seq_lens=lens)
    for name, tensor in parts(apart).items():
        assert same_bits(parts(view)[name], tensor), name


def test_keys_of_another_dtype_than_queries_are_read_as_what_they_are(native):
    """Repeated calls, which may take a prepared step, give what single operations do."""
    cache = kvquant.QuantizedKVCache(1, 1, 2, 64, dtype=BF16, device=native)
    apart = kvquant.QuantizedKVCache(1, 1, 2, 64, dtype=BF16, device=native)
    for tokens in (20, 1, 1, 1):
        query = torch.randn(1, tokens, 4, 64, device=native)
        key, value = torch.randn(2, 1, tokens, 2, 64, device=native).to(BF16)
        got = cache.attend(0, query, key, value, exact_prompt=False)
        apart.append(0, key, value)
        assert same_bits(got, apart.attend(0, query))
    for name, tensor in parts(apart.layer(0)[0]).items():
        assert same_bits(parts(cache.layer(0)[0])[name][:, :, :1], tensor[:, :, :1]), name


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_where_nothing_can_be_stored_nothing_is_seen(backend, device, blocks, sinks):
    """A table without columns, or a view without blocks."""
    view = kvquant.CacheView.allocate(blocks, 2, 16, 64, device=device)
    table = torch.full((2, 0 if blocks else 1), -1, dtype=torch.int32, device=device)
    query = torch.randn(2, 1, 4, 64, device=device)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device) if sinks else None
    out, lse = attention(
        query, view, block_table=table, seq_lens=index((0, 0), device), sinks=weights,
        return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))
    expected = (
        weights.expand(2, 1, 4) if sinks else torch.full((2, 1, 4), -torch.inf, device=device)
    )
    assert torch.equal(lse, expected)
