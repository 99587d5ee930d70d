"""Appends against the oracle: every row, mean and untouched byte."""

from __future__ import annotations

import torch

import oracle
from support import BF16, Cache, parts, random_rows, same_bits, snapshot


def new_rows(cache: Cache, counts, dtype=BF16):
    heads, k_dim = cache.view.num_kv_heads, cache.view.k.head_dim
    v_dim = cache.view.v.head_dim
    keys = [random_rows(n, heads, k_dim, dtype=dtype, device=cache.device) for n in counts]
    return keys, [torch.randn(n, heads, v_dim).to(dtype).to(cache.device) for n in counts]


def check_rows(exact, codes, params, usable, name):
    """Half a step everywhere, and no larger a step than the row needs; NaN where not usable.

    A channel beyond float16 counts as the largest float16.
    """
    assert params[~usable].isnan().all()
    assert params[usable].isfinite().all()
    scale, offset = oracle.ROW_FORMATS[name].affine(params[usable])
    exact, codes = exact[usable].clamp(-oracle.MAX_ABS, oracle.MAX_ABS), codes[usable]
    codes = oracle.ROW_FORMATS[name].unpack(codes).double()
    low, high = exact.amin(-1), exact.amax(-1)
    slack = 2.0**-21 * exact.abs().amax(-1) + 2.0**-30 if len(exact) else 0  # fp32's rotation
    error = (scale[:, None] * codes + offset[:, None] - exact).abs().amax(-1)
    assert (error <= scale * (0.5 + 1e-3) + slack).all()
    oracle.ROW_FORMATS[name].check(low, high, params[usable], slack)


def append_and_check(cache: Cache, keys, values, **options):
    """Appends and compares every row, mean and untouched byte with the oracle."""
    view, old, lengths = cache.view, snapshot(cache.view), cache.lengths
    before = [oracle.stored(view, cache.table, b, n)[0] for b, n in enumerate(lengths)]
    cache.append(keys, values, **options)
    rest = snapshot(view)  # what was written is put back, sequence by sequence
    for b, length in enumerate(lengths):
        assert cache.lengths[b] == length + len(keys[b])
        block, row = _check_new_rows(cache, b, length, keys[b], values[b])
        for name in ("k_data", "k_params", "v_data", "v_params"):
            rest[name][block, :, row] = old[name][block, :, row]
        if view.format.key_mean:
            for home, slot in _check_new_means(cache, b, before[b], keys[b]):
                rest["k_mean"][home, :, slot] = old["k_mean"][home, :, slot]
    for name, tensor in rest.items():
        assert same_bits(tensor, old[name]), f"{name}: written outside the new rows"


def _check_new_rows(cache: Cache, sequence, length, key, value):
    """Returns where the rows are."""
    view, total = cache.view, length + len(key)
    block, row = (x[length:] for x in oracle.places(view, cache.table, sequence, total))
    mean = oracle.means(view, cache.table, sequence, total)[length:]
    for name, rows, x, shift in (("k", view.k, key, mean), ("v", view.v, value, 0)):
        exact = x.double() @ oracle.rotation(rows.format.rotated, x.shape[-1], x.device) - shift
        codes, params = (parts(view)[f"{name}_{part}"] for part in ("data", "params"))
        stored = codes[block, :, row], params[block, :, row], oracle.finite_rows(x)
        check_rows(exact, *stored, rows.format.name)
    return block, row


def _check_new_means(cache: Cache, sequence, before, key):
    """Returns where the means of the groups are that the rows open."""
    fmt, places = cache.view.format, []
    start = 0 if cache.starts is None else cache.starts[sequence].item()
    incoming = key.double() @ oracle.rotation(fmt.key_rotation, key.shape[-1], key.device)
    incoming[~oracle.finite_rows(key)] = torch.nan
    present = torch.ones(len(before) + len(key), key.shape[1], dtype=torch.bool, device=key.device)
    wanted = oracle.new_means(before, incoming, present, fmt.key_mean, start)
    for group, exact in wanted.items():
        token = group * fmt.key_mean
        block, row = oracle.places(cache.view, cache.table, sequence, token + 1)
        home, slot = block[-1], row[-1] // fmt.key_mean
        error = (cache.view.mean.view(torch.float16)[home, :, slot].double() - exact).abs()
        summed = 4e-6 * incoming.nan_to_num(0).abs().max()  # in fp32
        assert (error <= 2.0**-11 * 1.01 * exact.abs() + 2.0**-25 + summed).all(), f"mean {group}"
        places.append((home, slot))
    return places


def assert_same_rows(a: Cache, b: Cache, sequences=None):
    for sequence in range(len(a.lengths)) if sequences is None else sequences:
        theirs = b.rows(sequence)
        for name, tensor in a.rows(sequence).items():
            assert same_bits(tensor, theirs[name]), f"{name} of sequence {sequence}"
