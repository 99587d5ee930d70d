"""Laws of attention on a cache, each on every case of the covering array."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvquant
from attending import assert_as_good, assert_lse, expected, torch_own
from kvquant import Sequences, plan
from matrix import AXES, cases, name_of
from support import (
    Cache,
    assert_unchanged,
    filled_cache,
    foreign,
    index,
    parts,
    random_rows,
    rebuilt,
    relocated,
    same_bits,
    snapshot,
    starts_of,
)

LENS = (300, 17, 0, 255)
SHORT = {"softmax_scale": "scale", "sliding_window": "window", "alibi_slopes": "alibi"}


class Case:
    """A cache with its call, new keys included."""

    def __init__(self, values: dict[str, str], device: str) -> None:
        chosen = {name: AXES[name][value] for name, value in values.items()}
        (k_dim, v_dim), (heads, kv_heads) = chosen["dims"], chosen["heads"]
        self.tokens, self.options = chosen["queries"], dict(chosen["feature"])
        padded = self.options.pop("padded", False)
        for name in ("sinks", "alibi_slopes"):
            if self.options.get(name):
                self.options[name] = torch.rand(heads, device=device)
        self.cache = filled_cache(
            LENS, room=[n + 2 * self.tokens for n in LENS], dtype=chosen["dtype"],
            kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, block=chosen["layout"],
            fmt=chosen["format"], device=device,
            starts=(5, 17, 0, 2) if padded else None,
        )  # fmt: skip
        self.packed = chosen["form"] == "packed"
        lead = (len(LENS) * self.tokens,) if self.packed else (len(LENS), self.tokens)
        kind = {"dtype": chosen["dtype"], "device": device}
        self.query = torch.randn(*lead, heads, k_dim).to(**kind)
        self.key = random_rows(*lead, kv_heads, k_dim, **kind)
        self.value = torch.randn(*lead, kv_heads, v_dim).to(**kind)

    @property
    def where(self) -> dict[str, Any]:
        """The call's batch."""
        found = {"seq_starts": self.cache.starts}
        if self.packed:
            edges = index(starts_of([self.tokens] * len(LENS)), self.cache.device)
            found |= {"cu_seqlens_q": edges, "max_seqlen_q": self.tokens}
        return found

    def run(
        self, view: kvquant.CacheView, lens: Tensor, *, table: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and attend by a plan; ``lens`` advance."""
        table = self.cache.table if table is None else table
        seqs = Sequences(table, lens, **self.where, advance=True)
        numbers = {k: v for k, v in self.options.items() if k not in ("sinks", "alibi_slopes")}
        vectors = {k: v for k, v in self.options.items() if k in ("sinks", "alibi_slopes")}
        made = plan(
            self.query, view, seqs, self.key, self.value, return_lse=True, **numbers,
            **{name: True for name in vectors},
        )  # fmt: skip
        return made.run(self.query, view, seqs, self.key, self.value, **vectors, **more)

    def copy(self) -> kvquant.CacheView:
        """The same memory, elsewhere."""
        return rebuilt(self.cache.view, snapshot(self.cache.view))


CASES = list(cases())


@pytest.fixture(params=range(len(CASES)), ids=[name_of(case) for case in CASES])
def case(request, native) -> Case:
    return Case(CASES[request.param], native)


def test_it_is_the_oracles_attention_on_what_is_stored(case):
    view, lens = case.cache.view, case.cache.lens.clone()
    out, lse = case.run(view, lens)
    after = Cache(view, case.cache.table, lens, starts=case.cache.starts)
    queries = list(case.query.reshape(-1, *case.query.shape[-2:]).split(case.tokens))
    plain = {SHORT.get(name, name): x for name, x in case.options.items() if name != "split_size"}
    ref, ref_lse = expected(after, queries, **plain)
    own, own_lse = torch_own(after, queries, **plain)
    assert_as_good(out.reshape(ref.shape), ref, own)
    assert_lse(lse.reshape(ref_lse.shape), ref_lse, own_lse, case.query.dtype)


def test_run_is_an_append_and_an_attention(case):
    apart, lens, once = case.copy(), case.cache.lens.clone(), case.cache.lens.clone()
    got = case.run(case.cache.view, once)
    where = {"block_table": case.cache.table, "seq_starts": case.cache.starts}
    packed = {"cu_seqlens": case.where["cu_seqlens_q"]} if case.packed else {}
    kvquant.append_(case.key, case.value, apart, **where, seq_lens=lens, **packed, advance=True)
    wanted = kvquant.attention(
        case.query, apart, block_table=case.cache.table, seq_lens=lens, return_lse=True,
        **case.where, **case.options,
    )  # fmt: skip
    assert torch.equal(once, lens)
    assert all(map(same_bits, got, wanted))
    for name, tensor in parts(apart).items():
        assert same_bits(parts(case.cache.view)[name], tensor), name


def test_it_repeats_and_a_slab_is_as_good_as_our_own_memory(case):
    views = [case.copy(), foreign(case.cache.view), case.cache.view]
    found = []
    for view in views:
        lens = case.cache.lens.clone()
        found.append((*case.run(view, lens), lens, *parts(view).values()))
    for other in found[1:]:
        assert all(map(same_bits, found[0], other))


def test_the_reference_agrees(case):
    apart, lens, once = case.copy(), case.cache.lens.clone(), case.cache.lens.clone()
    out, lse = case.run(case.cache.view, once)
    with kvquant.use_backend("reference"):
        ref, ref_lse = case.run(apart, lens)
    # A mean summed in another order moves codes that are close to a tie.
    eps = max(1e-3, torch.finfo(case.query.dtype).eps)
    scale = max(1.0, float(ref.float().abs().max()))
    torch.testing.assert_close(out, ref, atol=4 * eps * scale, rtol=4 * eps)
    torch.testing.assert_close(lse, ref_lse, atol=4e-3, rtol=1e-3)
    assert torch.equal(once, lens)


def test_a_permuted_batch_is_the_batch_permuted(case):
    order = torch.tensor([2, 0, 3, 1], device=case.cache.device)
    if torch.device(case.cache.device).type == "cuda" and not case.options.get("split_size"):
        pytest.skip("without a split_size the splits are the batch's")
    view, lens = case.copy(), case.cache.lens.clone()
    whole = case.run(view, lens)
    moved = relocated(case.cache, order.tolist())
    case.cache = moved
    for name in ("query", "key", "value"):
        x = getattr(case, name)
        by_sequence = x.reshape(len(LENS), case.tokens, *x.shape[-2:])[order]
        setattr(case, name, by_sequence.reshape(x.shape).contiguous())
    found = case.run(moved.view, moved.lens)
    for x, y in zip(whole, found, strict=True):
        of = x.reshape(len(LENS), case.tokens, *x.shape[len(case.query.shape) - 2 :])[order]
        assert same_bits(of.reshape(y.shape), y)


def test_a_refused_call_leaves_every_byte(case):
    before, lens = snapshot(case.cache.view), case.cache.lens.clone()
    for bad in ({"out": case.query[:1]}, {"lse": torch.zeros(1, device=case.cache.device)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            case.run(case.cache.view, lens, **bad)
    assert_unchanged(case.cache.view, before)
    assert torch.equal(lens, case.cache.lens)
