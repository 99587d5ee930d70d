"""append_ over several calls: running means, padding, and rows that are not finite."""

from __future__ import annotations

import pytest
import torch

import oracle
from appending import append_and_check, assert_same_rows, new_rows
from kvquant import append_
from support import DEFAULT, FORMATS, FP32, LAYOUTS, empty_cache, index, parts, same_bits, snapshot

CHUNKS = {  # per call: new tokens of four sequences
    "first-group-too-short": [(15, 16, 0, 1), (1, 0, 17, 255), (300, 256, 240, 1)],
    "group-partly-stored": [(200, 255, 256, 257), (100, 2, 0, 300), (1, 256, 1, 0)],
    "token-by-token": [(254, 255, 256, 510), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)],
}


@pytest.mark.parametrize("layout", ["contiguous", "paged16", "paged64", "paged256"])
@pytest.mark.parametrize("fmt", ["default", "mean64"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_means_of_appends_in_chunks(backend, device, chunks, fmt, layout):
    room = torch.tensor(CHUNKS[chunks]).sum(0).tolist()
    cache = empty_cache(room, fmt=FORMATS[fmt], block=LAYOUTS[layout], device=device)
    for counts in CHUNKS[chunks]:
        append_and_check(cache, *new_rows(cache, counts))


@pytest.mark.parametrize("fmt", FORMATS)
def test_chunked_equals_at_once(backend, device, fmt):
    counts, once = (530, 300), empty_cache((530, 300), fmt=FORMATS[fmt], device=device)
    chunked = empty_cache(counts, fmt=FORMATS[fmt], block=16, device=device)
    keys, values = new_rows(once, counts)
    once.append(keys, values)
    for begin, end in ((0, 100), (100, 101), (101, 290), (290, 530)):
        part = slice(begin, end)
        chunked.append([k[part] for k in keys], [v[part] for v in values])
    if FORMATS[fmt].key_mean is None:
        assert_same_rows(once, chunked)
        return
    for b in range(2):
        a, c = once.rows(b), chunked.rows(b)
        assert torch.equal(a["v_data"], c["v_data"])
        step = a["k_params"][..., 0].max().item()
        later = slice(FORMATS[fmt].key_mean, None)  # the first group's mean is of its first call
        apart = (a["k_mean"] - c["k_mean"]).abs()[later]
        assert (apart <= 0.15 * step + 2.0**-10 * a["k_mean"].abs()[later]).all()


def test_skipped_slots_are_not_written_and_not_in_the_mean(backend, device):
    cache = empty_cache([64], block=32, fmt=FORMATS["mean16"], device=device)
    (key,), (value,) = new_rows(cache, [40], FP32)
    block, row = oracle.places(cache.view, cache.table, 0, 40)
    slots = block * 32 + row
    skipped = torch.zeros(40, dtype=torch.bool, device=device)
    skipped[[3, 4, 16, 30, 39]] = True
    slots[skipped] = -1
    old = snapshot(cache.view)
    append_(
        key, value, cache.view, block_table=cache.table, seq_lens=cache.lens,
        cu_seqlens=index([0, 40], device), slot_mapping=slots,
    )  # fmt: skip
    for name in ("k_data", "k_params", "v_data", "v_params"):
        new = parts(cache.view)[name][block, :, row]
        assert same_bits(new[skipped], old[name][block, :, row][skipped])
    present = ~skipped[:, None].expand(-1, key.shape[1])
    wanted = oracle.new_means(key.double()[:0], key.double(), present, 16)
    cache.lens = index([40], device)
    got = oracle.means(cache.view, cache.table, 0, 40)
    assert (got[0] == 0).all()  # 14 usable rows: too few for a first mean
    for g in (1, 2):
        torch.testing.assert_close(got[g * 16], wanted[g], rtol=2.0**-10, atol=1e-5)


@pytest.mark.parametrize("fmt", ["default", "mean16"])
def test_padding_is_left_out_of_means(backend, device, fmt):
    room = (600, 600, 900, 20)  # the third's padding ends in another block than its group begins in
    cache = empty_cache(room, block=64, fmt=FORMATS[fmt], device=device, starts=(10, 280, 400, 17))
    for counts in ((270, 290, 512, 19), (330, 310, 300, 1)):
        keys, values = new_rows(cache, counts)
        append_and_check(cache, keys, values)


SPECIAL = {
    "zero": 0.0,
    "constant": 3.3,
    "subnormal": 1e-7,
    "huge": 6e4,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "over": 70000.0,
}


@pytest.mark.parametrize("whole", [True, False], ids=["row", "element"])
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("fmt", ["plain", "default", "rotated"])
def test_special_rows_have_a_meaning_and_touch_nothing_else(backend, device, fmt, value, whole):
    clean, dirty = (
        empty_cache([40, 33], block=16, fmt=FORMATS[fmt], device=device) for _ in range(2)
    )
    keys, values = new_rows(clean, [40, 33], FP32)
    clean.append([k.clone() for k in keys], [v.clone() for v in values])
    where = slice(None) if whole else 7
    keys[0][20, 1, where] = SPECIAL[value]
    values[1][5, 0, where] = SPECIAL[value]
    append_and_check(dirty, keys, values)
    wanted = [clean.rows(b) for b in range(2)]
    got = [dirty.rows(b) for b in range(2)]
    if FORMATS[fmt].key_mean is None:
        same = torch.ones(40, 2, dtype=torch.bool, device=device)
        same[20, 1] = False
        assert torch.equal(got[0]["k_data"][same], wanted[0]["k_data"][same])
        assert torch.equal(got[0]["k_params"][same], wanted[0]["k_params"][same])
    same = torch.ones(33, 2, dtype=torch.bool, device=device)
    same[5, 0] = False
    assert torch.equal(got[1]["v_data"][same], wanted[1]["v_data"][same])
    assert torch.equal(got[1]["v_params"][same], wanted[1]["v_params"][same])
    assert torch.equal(got[1]["k_data"], wanted[1]["k_data"])


@pytest.mark.parametrize("last", [1, 2, 3])
def test_nan_rows_in_storage_are_left_out_of_later_means(backend, device, last):
    """With two at last a head has no group before and 16 rows of its own; with three, 15."""
    cache = empty_cache([64], fmt=FORMATS["mean16"], device=device)
    for count, bad in ((16, slice(2, 9)), (14, slice(0, 14)), (20, slice(0, last))):
        keys, values = new_rows(cache, [count])
        keys[0][bad, 0, 3] = torch.nan
        append_and_check(cache, keys, values)


def test_group_longer_than_the_sequence_has_no_mean(backend, device):
    cache = empty_cache([15], fmt=DEFAULT, device=device)
    append_and_check(cache, *new_rows(cache, [15]))
    assert (oracle.means(cache.view, cache.table, 0, 15) == 0).all()
