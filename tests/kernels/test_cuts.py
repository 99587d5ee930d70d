"""How long chunks are cut into dense pieces: a pure function, tested against the rule of who sees
what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from kvquant.backends import cuts
from kvquant.backends.cuts import CAUSAL, EDGE, FULL, Call, Costs, Run
from pieced import RATES

TOKEN = 2 * 8 * 256
MEMORY = 256 << 20


def costs(heads: int = 32, memory: int = MEMORY) -> Costs:
    return Costs(heads * 260, TOKEN, memory, 2 * heads * 256, heads)


def coverage(run: Run, call: Call, passes: tuple[cuts.Pass, ...]) -> torch.Tensor:
    """How often each sequence's row meets each token, ``(sequences, rows, tokens)``."""
    met = torch.zeros(run.batch, run.rows, run.length, dtype=torch.int8)
    for part in passes:
        of = slice(part.first - run.first, part.first - run.first + part.batch)
        rows = torch.arange(part.end - part.begin)
        for piece in part.pieces:
            tokens = torch.arange(piece.end - piece.first)
            seen = torch.ones(len(rows), len(tokens), dtype=torch.bool)
            if piece.kind != FULL:
                assert len(tokens) == len(rows)
                i, j = rows[:, None], tokens[None]
                seen = j <= i if piece.kind == CAUSAL else j >= i
            met[of, part.begin : part.end, piece.first : piece.end] += seen.to(torch.int8)
    return met


def taken(run: Run, part: cuts.Pass, of: Costs, is_whole: bool) -> int:
    rows, results = part.end - part.begin, len(part.pieces)
    filled = cuts.size_from(rows)
    kept = results if results <= cuts.FOLD else cuts.FOLD + 2
    if is_whole and results == 1 and part.batch == run.batch and rows == run.rows == filled:
        kept = 0
    widest = max(piece.end - piece.first if piece.kind == FULL else filled for piece in part.pieces)
    return part.batch * (widest * of.token + kept * filled * of.row)


@settings(deadline=None)
@given(
    batch=st.integers(1, 5),
    rows=st.integers(1, 700),
    before=st.integers(0, 3000),
    start=st.integers(0, 900),
    causal=st.booleans(),
    window=st.one_of(st.just(0), st.integers(1, 1500)),
    memory=st.sampled_from([13 << 20, 20 << 20, MEMORY]),
    whole=st.booleans(),
)
def test_every_row_meets_what_it_sees_once(
    batch, rows, before, start, causal, window, memory, whole
):
    call, run = Call(causal, window), Run(3, batch, rows, before + rows, start, True)
    of = costs(memory=memory)
    assert cuts.least_memory(of) <= memory
    passes = cuts.cut(run, call, of, whole)
    seen = oracle.visible(rows, run.length, start, causal, window or None)
    assert cuts.pairs_of(run, call) == seen.sum()
    assert torch.equal(coverage(run, call, passes), seen.to(torch.int8).expand(batch, -1, -1))
    blind = cuts.blind_rows(run, call)
    assert not seen[:blind].any()
    for part in passes:
        assert part.begin >= blind
        assert part.pieces
        assert taken(run, part, of, whole) <= memory


@pytest.mark.parametrize(
    ("batch", "rows", "length"),
    [(1, 2048, 32768), (1, 512, 131072), (8, 4096, 4096), (1, 8192, 8192), (8, 2048, 10240)],
)
def test_usual_shapes_are_few_large_pieces(batch, rows, length):
    of = costs()
    run = Run(0, batch, rows, length, 0, True)
    passes = cuts.cut(run, Call(True, 0), of, True)
    assert all(taken(run, part, of, True) <= MEMORY for part in passes)
    assert all(piece.recurs for part in passes for piece in part.pieces)
    pieces = sum(len(part.pieces) for part in passes)
    tokens = batch * (length - rows) * TOKEN
    assert pieces <= 3 + batch + 2 * (tokens // (128 << 20))


def test_sizes_are_few():
    """Over all histories and chunks up to 16384 tokens a kernel is made for few sizes."""
    sizes = set()
    for rows in range(64, 4096, 97):
        for before in range(0, 16384, 501):
            run = Run(0, 1 + before % 7, rows, before + rows, 0, True)
            for part in cuts.cut(run, Call(True, 0), costs(), True):
                for a, b, kind, recurs in part.pieces:
                    if recurs:
                        tokens = cuts.size_from(b - a)
                        sizes.add((part.batch, cuts.size_from(part.end - part.begin), tokens))
                        assert kind != FULL or tokens == b - a
    assert len({tokens for _, _, tokens in sizes}) <= 24
    assert len({rows for _, rows, _ in sizes}) <= 16


@pytest.mark.parametrize("window", [0, 4096])
def test_small_pieces_are_read_together(window):
    """In order, and in no more memory than the widest one takes."""
    run, call = Run(0, 1, 2000, 131072, 0, True), Call(True, window)
    for part in cuts.cut(run, call, costs(), True):
        groups = cuts.together(part, 4)
        assert tuple(piece for group in groups for piece in group) == part.pieces
        for group in groups:
            assert len(group) <= 4
            assert sum(cuts.tokens_of(piece, 2048) for piece in group) <= cuts.widest(part)
        assert window or len(groups) < len(part.pieces)
        assert cuts.together(part, 1) == tuple((piece,) for piece in part.pieces)


@pytest.mark.parametrize(("x", "size"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (12, 12),
                                         (13, 16), (2048, 2048), (2049, 3072)])  # fmt: skip
def test_sizes(x, size):
    assert cuts.size_from(x) == size


def test_memory_does_not_grow_with_the_history():
    of = costs()
    for length in (8192, 131072, 1 << 20):
        run = Run(0, 1, 512, length, 0, True)
        for part in cuts.cut(run, Call(True, 0), of, True):
            assert taken(run, part, of, True) <= MEMORY


def test_a_window_leaves_out_what_lies_before_it():
    for length in (6144, 131072):
        (part,) = cuts.cut(Run(0, 1, 2048, length, 0, True), Call(True, 4096), costs(), True)
        kinds = [(b - a, kind) for a, b, kind, _ in part.pieces]
        assert kinds == [(2048, EDGE), (2047, FULL), (2048, CAUSAL)]


def test_runs_are_of_neighbours_that_are_alike():
    lengths, rows = [5000, 5000, 9000, 80, 90, 7000], [2048, 2048, 2048, 1, 1, 256]
    starts = [0] * 6
    assert cuts.runs_of(lengths, rows, starts) == [
        Run(0, 2, 2048, 5000, 0, True),
        Run(2, 1, 2048, 9000, 0, True),
        Run(3, 2, 1, 90, 0, False),
        Run(5, 1, 256, 7000, 0, True),
    ]
    assert len(cuts.runs_of([500, 500], [64, 64], [0, 3])) == 2


@pytest.mark.parametrize(
    ("batch", "rows", "length", "faster"),
    [  # measured on an H200, in milliseconds: pieces, and the kernel that reads codes
        (1, 64, 131072, False),  # 2.03, 0.39: their 32 tiles leave most multiprocessors idle
        (1, 256, 131072, False),  # 2.10, 1.42
        (1, 512, 131072, True),  # 2.21, 2.74
        (1, 256, 32768, False),  # 0.87, 0.38
        (1, 512, 32768, True),  # 0.61, 0.71
        (1, 2048, 32768, True),  # 1.92, 2.82
        (8, 64, 8192, False),  # 0.47, 0.21
        (8, 512, 8192, True),  # 1.16, 1.40
        (8, 4096, 4096, True),  # 2.09, 3.30
        (32, 256, 2048, False),  # 0.93, 0.75
        (32, 512, 2048, True),  # 1.26, 1.35
    ],
)
def test_pieces_are_taken_where_they_are_faster(batch, rows, length, faster):
    run = Run(0, batch, rows, length, 0, True)
    assert cuts.is_worth_it(run, Call(True, 0), costs(), RATES) is faster
    if faster:  # the more so beside a kernel of half the speed
        assert cuts.is_worth_it(run, Call(True, 0), costs(), RATES._replace(codes=2e14))
        assert cuts.may_be_worth_it(run, Call(True, 0), costs(), RATES)


def test_little_work_is_left_to_the_kernel_that_reads_codes():
    call, of = Call(True, 0), costs()
    assert not cuts.is_worth_it(Run(0, 1, 64, 1024, 0, True), call, of, RATES)
    assert not cuts.may_be_worth_it(Run(0, 1, 64, 1 << 20, 0, True), call, of, RATES)
    assert not cuts.is_worth_it(Run(0, 64, 1, 8192, 0, False), call, of, RATES)
    # A window hides most of a long history, and cuts a long chunk into many pieces.
    window = Call(True, 1024)
    assert not cuts.is_worth_it(Run(0, 1, 512, 131072, 0, True), window, of, RATES)
    assert not cuts.is_worth_it(Run(0, 8, 8192, 16384, 0, True), Call(True, 512), of, RATES)
    # So does padding.
    padded = Run(0, 8, 4096, 4096, 3000, True)
    assert not cuts.is_worth_it(padded, call, of, RATES)
    assert cuts.is_worth_it(padded._replace(start=0), call, of, RATES)
