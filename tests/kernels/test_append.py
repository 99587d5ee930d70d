"""append_: codes, params and running means of every layout against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from appending import append_and_check, assert_same_rows, new_rows
from kvquant import append_, use_backend
from support import (
    BF16,
    DTYPES,
    FORMATS,
    LAYOUTS,
    PLAIN,
    RAGGED,
    Cache,
    empty_cache,
    foreign,
    index,
    parts,
    same_bits,
    snapshot,
)

PAIRS = sorted({(fmt.key, fmt.value) for fmt in FORMATS.values()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_plain_codes_are_exact(backend, device, pair, dtype, layout):
    fmt = replace(PLAIN, key=pair[0], value=pair[1])
    cache = empty_cache(RAGGED, fmt=fmt, block=LAYOUTS[layout], v_dim=128, device=device)
    keys, values = new_rows(cache, RAGGED, DTYPES[dtype])
    cache.append(keys, values)
    for b in range(len(RAGGED)):
        rows = cache.rows(b)
        for name, x, of in (("k", keys[b], fmt.key), ("v", values[b], fmt.value)):
            codes, params = oracle.encode(x, of)
            assert torch.equal(rows[f"{name}_data"], codes)
            assert torch.equal(rows[f"{name}_params"], params)


@pytest.mark.parametrize(
    ("dtype", "fmt", "layout", "k_dim", "v_dim"),
    [
        ("bf16", "default", "paged16", 128, 128),
        ("fp16", "default", "contiguous", 64, 80),
        ("fp32", "default", "paged256", 80, 64),
        ("fp32", "rotated", "contiguous", 48, 96),
        ("bf16", "rotated", "paged64", 256, 16),
        ("fp16", "mean64", "paged32", 96, 192),
        ("bf16", "mean64", "paged256", 16, 256),
        ("fp32", "mean16", "paged16", 192, 48),
        ("bf16", "mean16", "contiguous", 64, 64),
    ],
    ids=lambda value: str(value),
)
def test_rows_and_means_in_one_call(backend, device, dtype, fmt, layout, k_dim, v_dim):
    cache = empty_cache(
        RAGGED, fmt=FORMATS[fmt], block=LAYOUTS[layout], k_dim=k_dim, v_dim=v_dim, device=device
    )
    append_and_check(cache, *new_rows(cache, RAGGED, DTYPES[dtype]))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_equals_contiguous_bit_for_bit(backend, device, dtype, fmt):
    calls = [(300, 17, 256), (1, 1, 1), (230, 255, 14)]
    room = torch.tensor(calls).sum(0).tolist()
    caches = [
        empty_cache(room, fmt=FORMATS[fmt], block=block, device=device)
        for block in LAYOUTS.values()
    ]
    for counts in calls:
        keys, values = new_rows(caches[0], counts, DTYPES[dtype])
        for cache in caches:
            cache.append(keys, values)
    for cache in caches[1:]:
        assert_same_rows(caches[0], cache)


def dense(cache: Cache, keys, values, **options):
    """The same rows for every sequence's equal count, as (batch, tokens, heads, dim)."""
    append_(
        keys, values, cache.view, block_table=cache.table, seq_lens=cache.lens,
        seq_starts=cache.starts, **options,
    )  # fmt: skip
    if not options.get("advance"):
        cache.lens = cache.lens + keys.shape[1]


@pytest.mark.parametrize("view", ["bshd", "bhsd", "fused", "expanded"])
def test_dense_strided_equals_packed(backend, device, view):
    batch, tokens, heads, dim = 3, 37, 2, 64
    x = torch.randn(batch, tokens, heads, 2 * dim, device=device, dtype=BF16)
    key, value = x[..., :dim], x[..., dim:]  # fused
    if view == "bshd":
        key, value = key.contiguous(), value.contiguous()
    elif view == "bhsd":
        key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    elif view == "expanded":
        key, value = (t[:1, :, :1].expand(batch, tokens, heads, dim) for t in (key, value))
    options = {"block": 16, "fmt": FORMATS["mean16"], "device": device}
    a, b = (empty_cache([tokens * 2] * batch, **options) for _ in range(2))
    for _ in range(2):
        a.append(list(key.contiguous()), list(value.contiguous()))
        dense(b, key, value)
    b.lens = a.lens
    assert_same_rows(a, b)


@pytest.mark.parametrize("fmt", ["plain", "default", "mean16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_slots_equal_block_table(backend, device, packed, fmt):
    batch, tokens = 3, 40
    by_table, by_slot = (
        empty_cache([tokens * 2] * batch, block=32, fmt=FORMATS[fmt], device=device)
        for _ in range(2)
    )
    for call in range(2):
        keys, values = new_rows(by_table, [tokens] * batch)
        by_table.append(keys, values)
        places = [
            oracle.places(by_slot.view, by_slot.table, b, (call + 1) * tokens) for b in range(batch)
        ]
        slots = torch.cat([(block * 32 + row)[call * tokens :] for block, row in places])
        key, value = torch.stack(keys), torch.stack(values)
        options = {"slot_mapping": slots}
        if FORMATS[fmt].key_mean:
            options |= {"block_table": by_slot.table, "seq_lens": by_slot.lens}
            if packed:
                options["cu_seqlens"] = index([0, tokens, 2 * tokens, 3 * tokens], device)
        if packed:
            key, value = key.flatten(0, 1), value.flatten(0, 1)
        append_(key, value, by_slot.view, **options)
        by_slot.lens = by_slot.lens + tokens
    assert_same_rows(by_table, by_slot)


def test_slots_of_packed_rows_without_a_table(backend, device):
    cache = empty_cache([64], fmt=PLAIN, device=device)
    (key,), (value,) = new_rows(cache, [5])
    slots = torch.tensor([9, 3, 40, 0, 1], device=device)
    append_(key, value, cache.view, slot_mapping=slots)
    codes, params = oracle.encode(key)
    at = cache.view.k.codes[slots // 64, :, slots % 64]
    assert torch.equal(at, codes)
    assert torch.equal(cache.view.k.params.view(torch.float16)[slots // 64, :, slots % 64], params)


def test_all_slots_skipped_writes_no_row(backend, device):
    cache = empty_cache([64], fmt=PLAIN, device=device)
    (key,), (value,) = new_rows(cache, [5])
    old = snapshot(cache.view)
    slots = torch.full((5,), -1, dtype=torch.int64, device=device)
    append_(key, value, cache.view, slot_mapping=slots)
    for name, tensor in parts(cache.view).items():
        assert same_bits(tensor, old[name])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_advance_adds_the_new_tokens(backend, device, packed):
    counts = (3, 0, 20) if packed else (4, 4, 4)
    a, b = (empty_cache([60] * 3, block=16, device=device) for _ in range(2))
    pointer = a.lens.data_ptr()
    for _ in range(2):
        keys, values = new_rows(a, counts)
        if packed:
            a.append(keys, values, advance=True)
        else:
            dense(a, torch.stack(keys), torch.stack(values), advance=True)
        b.append(keys, values)
    assert a.lens.data_ptr() == pointer
    assert a.lengths == [2 * n for n in counts] == b.lengths
    assert_same_rows(a, b)


def test_lengths_stay_without_advance(backend, device):
    cache = empty_cache([60], device=device)
    lens = cache.lens
    cache.append(*new_rows(cache, [7]))
    assert lens.tolist() == [0]


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 5, 0)], ids=["none", "one"])
def test_sequences_without_new_tokens(backend, device, counts):
    cache = empty_cache([60] * 3, block=16, device=device)
    append_and_check(cache, *new_rows(cache, (5, 6, 7)))
    append_and_check(cache, *new_rows(cache, counts), max_seqlen=max(counts))


def test_foreign_strides(backend, device):
    plain = empty_cache([300, 40], block=16, device=device)
    view = Cache(foreign(plain.view), plain.table, plain.lens)
    for counts in ((200, 40), (100, 0)):
        keys, values = new_rows(plain, counts)
        plain.append(keys, values)
        append_and_check(view, keys, values)
    assert_same_rows(plain, view)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_reference_write_the_same_codes(native, dtype, fmt):
    ours, theirs = (
        empty_cache([300, 17, 60], block=32, fmt=FORMATS[fmt], v_dim=80, device=native)
        for _ in range(2)
    )
    keys, values = new_rows(ours, [300, 17, 60], DTYPES[dtype])
    values[2][1:4, 0], keys[2][7, 1, 3] = 1.5, torch.nan
    ours.append(keys, values)
    with use_backend("reference"):
        theirs.append(keys, values)
    for b in range(3):
        a, c = ours.rows(b), theirs.rows(b)
        for name in a if not FORMATS[fmt].key_mean else ("v_data", "v_params"):
            assert same_bits(a[name], c[name])
        if FORMATS[fmt].key_mean:
            usable = a["k_params"].isfinite().all(-1)
            unpack = oracle.ROW_FORMATS[FORMATS[fmt].key].unpack
            apart = (unpack(a["k_data"]).int() - unpack(c["k_data"]).int()).abs()[usable]
            assert apart.max() <= 1
            assert (apart > 0).double().mean() < 0.05


@pytest.mark.parametrize("k_dim", [48, 80, 192])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_group_behind_the_first_opens_in_a_later_call(backend, device, layout, k_dim):
    """A warp has no row for some of its lanes, which must not look before the first token."""
    cache = empty_cache(
        (28, 28), k_dim=k_dim, v_dim=80, block=LAYOUTS[layout], fmt=FORMATS["mean16"], device=device
    )
    for counts in ((8, 16), (20, 12)):
        append_and_check(cache, *new_rows(cache, counts, torch.float16))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    heads=st.integers(1, 3),
    dims=st.tuples(*[st.integers(1, 16).map(lambda n: 16 * n)] * 2),
    block=st.sampled_from([None, 16, 32, 64, 256]),
    fmt=st.sampled_from(list(FORMATS)),
    calls=st.lists(st.lists(st.integers(0, 70), min_size=2, max_size=2), min_size=1, max_size=3),
    start=st.integers(0, 40),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_shape(backend, device, heads, dims, block, fmt, calls, start, dtype):
    room = torch.tensor(calls).sum(0).tolist()
    cache = empty_cache(
        room, kv_heads=heads, k_dim=dims[0], v_dim=dims[1], block=block, fmt=FORMATS[fmt],
        device=device, starts=[start, 0],
    )  # fmt: skip
    for counts in calls:
        append_and_check(cache, *new_rows(cache, counts, DTYPES[dtype]))
