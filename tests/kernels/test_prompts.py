"""append_ of many rows: what a kernel of its own serves on CUDA, against the oracle."""

from __future__ import annotations

import pytest
import torch

import kvquant
import oracle
from appending import append_and_check, assert_same_rows, new_rows
from kvquant import append_
from support import BF16, DTYPES, FORMATS, FP16, Cache, empty_cache, parts, same_bits, snapshot

COUNTS = (700, 1, 0, 64, 256, 300, 257)
BEFORE = {  # tokens that are there already
    "empty": (0, 0, 0, 0, 0, 0, 0),
    "inside-a-group": (100, 3, 40, 255, 1, 17, 200),
    "groups-are-full": (256, 256, 0, 256, 512, 256, 0),
    "one-is-missing": (255, 255, 511, 255, 255, 511, 255),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("fmt", ["default", "mean64", "plain", "rotated"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_groups_that_open_in_the_call_and_before(native, dim, fmt, before):
    room = [a + b for a, b in zip(COUNTS, BEFORE[before], strict=True)]
    cache = empty_cache(room, k_dim=dim, fmt=FORMATS[fmt], block=16, device=native)
    for counts in (BEFORE[before], COUNTS):
        append_and_check(cache, *new_rows(cache, counts))


@pytest.mark.parametrize("key", ["int8", "int4"])
@pytest.mark.parametrize("layout", [None, 16, 64, 256])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_layouts_and_pairs_of_formats(native, dtype, layout, key):
    fmt = kvquant.CacheFormat(key=key, value="int4", value_rotation=True)
    cache = empty_cache([700, 300, 90], kv_heads=3, fmt=fmt, block=layout, device=native)
    for counts in ((400, 10, 20), (300, 290, 70)):
        append_and_check(cache, *new_rows(cache, counts, DTYPES[dtype]))


def test_the_row_kernel_writes_the_same_codes(native):
    """float32 rows of 16-bit numbers go to it; means are summed in another order there."""
    prompt, rows = (empty_cache([600, 64], fmt=FORMATS["rotated"], device=native) for _ in "ab")
    keys, values = new_rows(prompt, [600, 64])
    prompt.append(keys, values)
    rows.append([k.float() for k in keys], [v.float() for v in values])
    assert_same_rows(prompt, rows)


def dense(cache: Cache, key: torch.Tensor, value: torch.Tensor) -> None:
    append_(key, value, cache.view, block_table=cache.table, seq_lens=cache.lens)
    cache.lens = cache.lens + key.shape[1]


@pytest.mark.parametrize("form", ["transposed", "fused", "expanded", "at odd addresses"])
def test_rows_in_any_strides(native, form):
    batch, tokens, heads, dim = 3, 530, 2, 128
    x = torch.randn(batch, tokens, heads, 2 * dim + 8, device=native, dtype=BF16)
    key, value = x[..., :dim], x[..., dim : 2 * dim]
    if form == "transposed":
        key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    elif form == "expanded":
        key, value = (t[:1, :, :1].expand(batch, tokens, heads, dim) for t in (key, value))
    elif form == "at odd addresses":
        key, value = x[..., 1 : 1 + dim], x[..., dim + 1 : 2 * dim + 1]
    a, b = (empty_cache([2 * tokens] * batch, k_dim=dim, block=16, device=native) for _ in "ab")
    for _ in range(2):
        dense(a, key.contiguous(), value.contiguous())
        dense(b, key, value)
    if form == "at odd addresses":  # the row kernel: its sums have another order
        for i in range(batch):
            mine, theirs = a.rows(i), b.rows(i)
            assert same_bits(mine["v_data"], theirs["v_data"])
            step = mine["k_params"][..., 0].max().item()
            apart = (mine["k_mean"] - theirs["k_mean"]).abs()
            assert (apart <= 0.15 * step + 2.0**-10 * mine["k_mean"].abs()).all()
    else:
        assert_same_rows(a, b)


@pytest.mark.parametrize("bad", ["nan", "inf", "over"])
def test_rows_that_are_not_finite_are_left_out_of_means(native, bad):
    number = {"nan": torch.nan, "inf": torch.inf, "over": 70000.0}[bad]
    cache = empty_cache([1100, 600], block=64, device=native)
    keys, values = new_rows(cache, [1100, 600])
    keys[0][256:512, 0, 5] = number  # a whole group of one head: the next one takes its own mean
    keys[0][760:768, 1, 63] = number
    keys[1][:250, 1, 0] = number  # too few are left for the first mean, enough for the next
    values[1][3, 0, 40] = number
    append_and_check(cache, keys, values)


def test_padding_is_left_out_of_means(native):
    starts = (10, 300, 400, 690)  # the last two end in another block than their group begins in
    cache = empty_cache([1400] * 4, block=64, device=native, starts=starts)
    for counts in ((700, 700, 512, 700), (700, 650, 700, 100)):
        append_and_check(cache, *new_rows(cache, counts))


@pytest.mark.gpu
def test_blocks_that_are_none_are_not_written_and_not_in_the_mean(cuda):
    cache = empty_cache([1024], block=64, device=cuda)
    cache.table[0, 2] = -1
    cache.table[0, 4] = 10**6  # where the mean of the second group would be
    old = snapshot(cache.view)
    (key,), (value,) = new_rows(cache, [1024])
    dense(cache, key[None], value[None])
    kept = torch.ones(1024, dtype=torch.bool, device=cuda)
    kept[128:192] = kept[256:320] = False
    present = kept[:, None].expand(-1, key.shape[1])
    turned = key.double() @ oracle.rotation(True, key.shape[-1], key.device)
    wanted = oracle.new_means(turned[:0], turned, present, 256)
    named = parts(cache.view)
    for group in (0, 2, 3):
        home = cache.table[0, 4 * group]
        got = named["k_mean"][home, :, 0].double()
        torch.testing.assert_close(got, wanted[group], rtol=2.0**-10, atol=1e-4)
    unused = torch.ones(cache.view.num_blocks, dtype=torch.bool, device=cuda)
    unused[cache.table[0][(cache.table[0] >= 0) & (cache.table[0] < 10**6)].long()] = False
    for name, tensor in named.items():
        assert same_bits(tensor[unused], old[name][unused]), name


def test_more_groups_than_boxes_for_their_means(native):
    """Groups of 16 tokens: each block but the first waits for the one before it."""
    fmt, heads, tokens = kvquant.CacheFormat(key_mean=16), 40, 4096
    caches = [
        empty_cache([tokens], kv_heads=heads, k_dim=256, v_dim=256, fmt=fmt, device=native)
        for _ in range(2)
    ]
    assert tokens // 16 * heads > 2**20 // 256
    key, value = torch.randn(2, 1, tokens, heads, 256, device=native, dtype=FP16).unbind(0)
    for cache in caches:
        dense(cache, key, value)
    assert_same_rows(*caches)
    exact = (key[0].double() @ oracle.rotation(True, 256, key.device)).view(-1, 16, heads, 256)
    got = caches[0].rows(0)["k_mean"].view(-1, 16, *caches[0].rows(0)["k_mean"].shape[1:])[:, 0]
    torch.testing.assert_close(got[1:], exact[:-1].mean(1), rtol=2.0**-10, atol=1e-4)


@pytest.mark.gpu
def test_a_graph_of_appends_has_boxes_of_its_own(cuda):
    cache, eager = (empty_cache([2048] * 3, k_dim=128, block=16, device=cuda) for _ in "ab")
    key, value = torch.randn(2, 3, 1000, 2, 128, device=cuda, dtype=BF16).unbind(0)

    def append(to: Cache) -> None:
        append_(key, value, to.view, block_table=to.table, seq_lens=to.lens, advance=True)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(cache)
    for step in range(2):
        key.normal_()
        graph.replay()
        append(eager)
        assert cache.lengths == eager.lengths == [1000 * (step + 1)] * 3
    assert_same_rows(cache, eager)


@pytest.mark.gpu
def test_lengths_and_offsets_that_lie_do_no_harm(cuda):
    cache = empty_cache([600] * 3, k_dim=128, block=16, device=cuda)
    old = snapshot(cache.view)
    key, value = torch.randn(2, 600, 2, 128, device=cuda, dtype=BF16).unbind(0)
    for edges in ([0, 600, 300, 200], [500, 100, -7, 10**9], [0, 0, 10**9, 600]):
        for lens in ([0, 10**9, -5], [599, 2**31 - 1, 0]):
            append_(
                key, value, cache.view, block_table=cache.table,
                seq_lens=torch.tensor(lens, dtype=torch.int32, device=cuda),
                cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=cuda),
                max_seqlen=600,
            )  # fmt: skip
    unused = torch.ones(cache.view.num_blocks, dtype=torch.bool, device=cuda)
    unused[cache.table.flatten().long()] = False
    for name, tensor in parts(cache.view).items():
        assert same_bits(tensor[unused], old[name][unused]), name
    append_and_check(cache, *new_rows(cache, (600, 300, 64)))  # no box is left with anything
