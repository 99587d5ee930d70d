"""Formats by age: what is young, what is old, and that nothing else can be told from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from kvquant import CacheFormat, QuantizedKVCache, attention
from support import same_bits

HEADS, DIM, GROUP, SPARE = 2, 32, 256, 32
K4V4 = CacheFormat(
    key="int4", value="int4", by_age=True, key_mean=None, key_rotation=False, value_rotation=False
)
FORMATS = {"k4v4": K4V4, "k8v4": replace(K4V4, key="int8")}
LAYOUTS = {"contiguous": {"max_seq_len": 1024}, "growing": {}, "paged16": {"block_size": 16},
           "paged256": {"block_size": 256}, "paged512": {"block_size": 512}}  # fmt: skip
TOKENS = 600
UNEVEN = [200, 56, 1, 30, 225, 33, 31, 24]


def make(fmt: CacheFormat, layout: str, batch: int = 2, device: str = "cpu") -> QuantizedKVCache:
    return QuantizedKVCache(1, batch, HEADS, DIM, format=fmt, device=device, **LAYOUTS[layout])


def rows(tokens: int = TOKENS, batch: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, batch, tokens, HEADS, DIM)
    return key.to(device), value.to(device)


def append(cache: QuantizedKVCache, pair: tuple[Tensor, Tensor], cuts: list[int]) -> None:
    """The rows behind the cache's tokens, in pieces of these lengths."""
    begin = cache.max_length
    for count in filter(None, cuts):
        cache.append(0, *(x[:, begin : begin + count] for x in pair))
        begin += count


def assert_same(a: QuantizedKVCache, b: QuantizedKVCache) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert same_bits(x, theirs[name]), name


def old_rows(cache: QuantizedKVCache, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and params of the closed groups, as the state dict has them, (tokens, heads, ..)."""
    state, closed = cache.state_dict(), slice(GROUP, (x.shape[1] - 1) // GROUP * GROUP)
    return {
        at: tuple(state[f"layers.0.{at}_{part}"][0, :, closed].transpose(0, 1)
                  for part in ("data", "params"))
        for at in "kv"
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_encoded_once_at_the_precision_of_its_age(backend, device, name, layout):
    fmt, pair = FORMATS[name], rows(device=device)
    cache = make(fmt, layout, device=device)
    append(cache, pair, [TOKENS])
    stored = old_rows(cache, pair[0])
    key, value = cache.dequantize(0, torch.float32)
    for at, of, x, found in (("k", fmt.key, pair[0], key), ("v", fmt.value, pair[1], value)):
        codes, params = oracle.encode(x[0, GROUP : 2 * GROUP], of)
        assert torch.equal(stored[at][0], codes)
        assert torch.equal(stored[at][1], params)
        codes, params = oracle.encode(x, "int8")
        scale, offset = oracle.Int8.affine(params)
        exact = scale[..., None] * codes + offset[..., None]
        for young in (slice(GROUP), slice(2 * GROUP, TOKENS)):
            torch.testing.assert_close(found[:, young].double(), exact[:, young], rtol=0, atol=1e-6)


def test_rows_that_were_young_are_encoded_from_what_was_stored(backend, device):
    pair = rows(device=device)
    cache = make(K4V4, "paged16", device=device)
    append(cache, pair, UNEVEN)
    for at, x in zip("kv", pair, strict=True):
        codes, params = oracle.encode(x[0, GROUP : 2 * GROUP], "int8")
        scale, offset = oracle.Int8.affine(params)
        codes, params = oracle.encode(
            (scale[..., None] * codes + offset[..., None]).float(), "int4"
        )
        stored = old_rows(cache, x)[at]
        assert torch.equal(stored[0], codes)
        assert torch.equal(stored[1], params)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_does_not_depend_on_the_cuts(native, name):
    pair = rows(device=native)
    caches = [make(FORMATS[name], layout, device=native) for layout in LAYOUTS]
    cuts = [UNEVEN, [1] * TOKENS, [7] * 85 + [5], [32] * 18 + [24], [GROUP, GROUP, 88]]
    for cache, pieces in zip(caches, cuts, strict=True):
        append(cache, pair, pieces)
        assert_same(cache, caches[0])


@pytest.mark.parametrize("tokens", [1, 20, 32, 33, 100])
@pytest.mark.parametrize("before", [GROUP, 2 * GROUP - 10, 2 * GROUP, 2 * GROUP + 1])
def test_attention_reads_every_group_at_its_age(backend, device, before, tokens):
    """Up to 32 new tokens find the group that was open in 8 bits."""
    pair = rows(before + tokens, device=device)
    cache = make(K4V4, "paged16", device=device)
    append(cache, pair, [before])
    cache.append(0, *(x[:, before:] for x in pair))
    last = before if tokens <= SPARE else before + tokens
    young_from = max(0, last - 1) // GROUP * GROUP
    seen = []
    for x in pair:
        wide = _decoded(x, "int8")
        narrow = _decoded(wide.float(), "int4")  # by way of its 8 bits
        token = torch.arange(x.shape[1], device=x.device)[:, None, None]
        seen.append(wide.where((token < GROUP) | (token >= young_from), narrow))
    query = torch.randn(2, tokens, 2 * HEADS, DIM, device=device)
    out = cache.attend(0, query)
    for b in range(2):
        wanted, _ = oracle.attention(query[b], *(x[b] for x in seen))
        torch.testing.assert_close(out[b].double(), wanted, atol=2e-5, rtol=0)


def _decoded(x: Tensor, name: str) -> Tensor:
    codes, params = oracle.encode(x, name)
    of = oracle.ROW_FORMATS[name]
    scale, offset = of.affine(params)
    return scale[..., None] * of.unpack(codes).double() + offset[..., None]


def test_a_long_chunk_reads_the_groups_that_it_fills_in_8_bits(device):
    pair, query = rows(700, device=device), torch.randn(2, 700, HEADS, DIM, device=device)
    whole, pieces = (make(K4V4, "paged16", device=device) for _ in range(2))
    out, lse = whole.attend(0, query, *pair, exact_prompt=False, return_lse=True)
    parts = [
        pieces.attend(0, *(x[:, begin:end] for x in (query, *pair)), exact_prompt=False)
        for begin, end in ((0, 256), (256, 512), (512, 700))
    ]
    assert torch.equal(out, torch.cat(parts, 1))
    assert lse.shape == (2, 700, HEADS)
    assert_same(whole, pieces)


class Stumbling(QuantizedKVCache):
    """Fails within the call that feeds the third piece."""

    calls = 0

    def attend(self, layer: int, query: Tensor, *rows: Any, **options: Any) -> Any:
        self.calls += 1
        result = super().attend(layer, query, *rows, **options)
        if self.calls == 4:  # the whole call, and its pieces
            raise RuntimeError("stumbles")
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_that_fail_leave_the_cache_as_it_was(backend, device, layout):
    pair, query = rows(900, device=device), torch.randn(2, 600, HEADS, DIM, device=device)
    wanted = make(K4V4, layout, device=device)
    cache = Stumbling(1, 2, HEADS, DIM, format=K4V4, device=device, **LAYOUTS[layout])
    for one in (cache, wanted):
        append(one, pair, [200, 100])
    with pytest.raises(RuntimeError, match="stumbles"):
        cache.attend(0, query, *(x[:, 300:] for x in pair), exact_prompt=False)
    assert cache.max_length == 300
    assert_same(cache, wanted)
    for one in (cache, wanted):
        append(one, pair, [1, 599])
    assert_same(cache, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("longest", "kept"), [(514, 510), (800, 300), (800, 515), (1000, 257),
                                               (520, 200), (513, 512)])  # fmt: skip
def test_crop_across_groups_and_the_same_rows_again(device, layout, longest, kept):
    """A row that returns to 8 bits keeps its codes, and those in the blocks stay as they are."""
    pair = rows(longest, device=device)
    cache, wanted = (make(K4V4, layout, device=device) for _ in range(2))
    for one in (cache, wanted):
        append(one, pair, [100] * (longest // 100) + [longest % 100])
    before = cache.dequantize(0, torch.float32)[0][:, :kept]
    cache.crop(kept)
    after = cache.dequantize(0, torch.float32)[0]
    open_group = (kept - 1) // GROUP * GROUP
    assert torch.equal(after[:, :open_group], before[:, :open_group])
    append(cache, pair, [100] * ((longest - kept) // 100) + [(longest - kept) % 100])
    assert_same(cache, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_cache_goes_on_as_if_it_had_not_been_saved(native, name, layout):
    """A file has no old rows of the open group: a loaded cache makes them."""
    pair = rows(800, device=native)
    cache = make(FORMATS[name], layout, device=native)
    append(cache, pair, [UNEVEN[0], 100, 230])
    loaded = make(FORMATS[name], "paged16" if layout == "contiguous" else layout, device=native)
    loaded.load_state_dict(cache.state_dict())
    query = torch.randn(2, 1, HEADS, DIM, device=native)
    for one in (cache, loaded):
        append(one, pair, [1, 17, 200, 52])
    assert_same(cache, loaded)
    assert torch.equal(cache.attend(0, query), loaded.attend(0, query))


def test_sequences_of_unlike_lengths_are_loaded(native):
    cache = make(K4V4, "paged16", batch=3, device=native)
    key, value = rows(800, batch=1, device=native)
    edges = torch.tensor([0, 0, 256, 786], dtype=torch.int32, device=native)
    cache.append(0, key[0, :786], value[0, :786], cu_seqlens=edges)
    loaded = make(K4V4, "growing", batch=3, device=native)
    loaded.load_state_dict(cache.state_dict())
    more = rows(300, batch=3, device=native)
    for one in (cache, loaded):
        one.append(0, *more)
    assert_same(cache, loaded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forks_and_beams_are_as_if_each_were_alone(device, layout):
    pair = rows(batch=3, device=device)
    other = rows(batch=3, device=device)
    order = [1, 1, 0]
    cache = make(K4V4, layout, batch=3, device=device)
    append(cache, pair, [250, 250])
    fork = cache.fork()
    cache.reorder(order)
    mixed = [torch.cat([x[order, :500], y[:, 500:]], 1) for x, y in zip(pair, other, strict=True)]
    append(cache, tuple(mixed), [100])
    append(fork, pair, [100])
    for one, x in ((cache, mixed), (fork, pair)):
        alone = make(K4V4, layout, batch=3, device=device)
        append(alone, tuple(x), [250, 250, 100])
        assert_same(one, alone)


def test_behind_a_window_nothing_changes(device):
    pair, query = rows(device=device), torch.randn(2, 1, HEADS, DIM, device=device)
    caches = [make(K4V4, "paged16", device=device) for _ in range(2)]
    for cache in caches:
        append(cache, pair, [300, 250])
    caches[0].slide(64)
    for i in range(20):
        new = [x[:, 550 + i : 551 + i] for x in pair]
        outs = [cache.attend(0, query, *new, sliding_window=64) for cache in caches]
        assert torch.equal(*outs)


def test_slots_and_plain_rows_have_no_age(device):
    with pytest.raises(ValueError, match="by_age: expected False for keys and values in int8"):
        CacheFormat(by_age=True)
    with pytest.raises(ValueError, match="by_age: expected a key_mean of at most 4096, got 8192"):
        CacheFormat(value="int4", by_age=True, key_mean=8192)


@pytest.mark.parametrize("name", ["young", "k_data", "v_params"])
def test_rows_that_do_not_count_must_be_zero(name):
    pair, cache = rows(), make(K4V4, "contiguous")
    append(cache, pair, [TOKENS])
    state = cache.state_dict()
    x = state[f"layers.0.{name}"].view(torch.uint8)
    at = (0, 0, (GROUP + 32) * DIM) if name == "young" else (0, 0, 3, 0)  # of token 3; 512 % 288
    if name == "young":
        live = torch.nonzero(x[0, 0, : (2 * GROUP + SPARE) * DIM].view(-1, DIM).any(1) == 0)
        at = (0, 0, int(live[0]) * DIM)
    assert not x[at]
    x[at] = 1
    with pytest.raises(ValueError, match=f"layers.0.{name}: expected zeros but for the 600 tokens"):
        make(K4V4, "contiguous").load_state_dict(state)


@pytest.mark.parametrize("layout", ["contiguous", "paged16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_call_on_tensors_reads_and_writes_young_rows(fmt: str, layout: str, device: str) -> None:
    """Steps across a group's edge by the function are those of the cache."""
    cache, twin = (make(FORMATS[fmt], layout, device=device) for _ in range(2))
    for one in (cache, twin):
        one.reserve(TOKENS)
    pair = rows(520, device=device)
    for one in (cache, twin):
        append(one, pair, [500])
    view, seqs = twin.layer(0)
    tables = {
        "block_table": seqs.block_table, "seq_lens": seqs.seq_lens, "young": seqs.young
    }  # fmt: skip
    for at in range(500, 520):
        key, value = (x[:, at : at + 1] for x in pair)
        query = torch.randn(2, 1, 2 * HEADS, DIM, device=device)
        out = attention(query, view, key, value, advance=True, **tables)
        assert torch.equal(out, cache.attend(0, query, key, value))
    twin.sync_lengths()
    assert_same(cache, twin)
    with pytest.raises(ValueError, match="young: expected slabs of 2 heads"):
        attention(query, view, key, value, **{**tables, "young": seqs.young[:, :1]})
