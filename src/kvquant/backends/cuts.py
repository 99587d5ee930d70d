"""How a long chunk's attention is cut into dense pieces: pure functions of numbers.

A chunk of ``rows`` new tokens at the end of a sequence sees its history, a rectangle of scores, and
itself, a triangle. With a sliding window, the far end of the history is a triangle, too, which
becomes a causal one if rows and tokens are taken in reverse order. So kernels that know nothing but
full and causal attention serve all of them, a bounded number of tokens at a time.

cuDNN makes a kernel for every size that it meets, which takes 70 ms (H200, cuDNN 9.19). So sizes
are few: numbers of rows (filled up) and of tokens are 2**k or 3 * 2**k, of sequences 2**k. What is
left of a history is a piece for a kernel that knows no sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

__all__ = [
    "CAUSAL",
    "EDGE",
    "FOLD",
    "FULL",
    "MIN_PIECE",
    "MIN_ROWS",
    "MIN_WINDOW",
    "Call",
    "Costs",
    "Pass",
    "Piece",
    "Rates",
    "Run",
    "blind_rows",
    "cut",
    "is_worth_it",
    "least_memory",
    "may_be_worth_it",
    "pairs_of",
    "runs_of",
    "size_from",
    "together",
    "tokens_of",
    "widest",
]

MIN_ROWS = 64  # shorter chunks go to the kernels that read codes
MIN_WINDOW = 512  # of narrower windows, triangles are too small
MIN_PIECE = 1024  # tokens; what is left of a history is one piece that is shorter
# Results that are kept before they are merged into one of float32: what a merge takes at once.
FOLD = 6

_FEW_ROWS = 128
# Measured on an H200: rows of a dense kernel's tile, bytes a second of dequantized rows, seconds of
# a call's launches, and of the host for each piece.
_TILE, _READ, _LAUNCH, _PIECE = 128, 2e12, 5e-5, 1e-4
_MOST_KNOWN = 256  # answers that are remembered

FULL = "full"  # every row sees every token
CAUSAL = "causal"  # as many tokens as rows: row i sees the tokens 0 .. i
EDGE = "edge"  # as many tokens as rows: row i sees the tokens i ..


class Run(NamedTuple):
    """Neighbouring sequences with as many new rows each; alike: of one length and padding, too."""

    first: int
    batch: int
    rows: int
    length: int  # with the rows; of sequences that are not alike, the longest
    start: int  # tokens of padding
    alike: bool


class Call(NamedTuple):
    """What the numbers of the call say about who sees what."""

    causal: bool
    window: int  # 0: none


class Costs(NamedTuple):
    """Bytes, and operations."""

    row: int  # of a row's result: its heads' outputs and log-sum-exps
    token: int  # of a token's dequantized keys and values
    memory: int  # of all that a pass may take beside the output
    work: int  # operations of a row and token: 2 * heads * (head_dim + v_head_dim)
    heads: int  # of queries


class Rates(NamedTuple):
    """How fast kernels are, on an H200: what counts elsewhere is their ratio."""

    multiprocessors: int  # the device's
    dense: float  # operations a second of a dense kernel that fills them
    codes: float  # of the kernel that reads codes


class Piece(NamedTuple):
    """Tokens [first, end) of each of the pass's sequences."""

    first: int
    end: int
    kind: str
    recurs: bool  # its size is one of few


class Pass(NamedTuple):
    """Rows [begin, end) of the run's sequences from ``first`` on."""

    first: int
    batch: int
    begin: int
    end: int
    pieces: tuple[Piece, ...]


def runs_of(lengths: list[int], rows: list[int], starts: list[int]) -> list[Run]:
    """A batch as runs: long chunks are grouped by length, all others by their rows alone.

    Args:
        lengths: Of every sequence, its new rows included.
        rows: New ones of each.
        starts: Tokens of padding of each.
    """
    found, at = [], 0
    numbers = list(zip(rows, lengths, starts, strict=True))
    for key, group in groupby(numbers, lambda x: x if x[0] >= MIN_ROWS else (x[0], -1, -1)):
        members = list(group)
        longest, least = max(x[1] for x in members), min(x[2] for x in members)
        found.append(Run(at, len(members), key[0], longest, least, key[1] >= 0))
        at += len(members)
    return found


@lru_cache(_MOST_KNOWN)
def is_worth_it(run: Run, call: Call, costs: Costs, rates: Rates) -> bool:
    """Whether dense pieces beat the kernel that reads codes, the host's time included.

    A multiprocessor takes `_TILE` rows of a head at once, and few of them leave others idle.
    """
    if not run.alike:
        return False
    tiles = run.batch * costs.heads * -(-run.rows // _TILE)
    slots = rates.multiprocessors
    filled = run.batch * costs.heads * run.rows / (-(-tiles // slots) * slots * _TILE)
    dense, codes = _seconds(run, call, costs, rates)
    if dense > codes * filled:
        return False
    passes = cut(run, call, costs, False)
    tokens = sum(part.batch * (x.end - x.first) for part in passes for x in part.pieces)
    pieces = sum(len(part.pieces) for part in passes)
    device = dense / filled + tokens * costs.token / _READ + _LAUNCH
    return max(device, pieces * _PIECE) < codes


def may_be_worth_it(run: Run, call: Call, costs: Costs, rates: Rates) -> bool:
    """Whether `is_worth_it` may say so of some of the run's sequences, or of shorter ones.

    As if all multiprocessors were busy and the host took no time.
    """
    dense, codes = _seconds(run, call, costs, rates)
    seen = run.length - run.start
    if call.window:
        seen = min(seen, call.window + run.rows)
    return dense + run.batch * seen * costs.token / _READ < codes


def pairs_of(run: Run, call: Call) -> int:
    """Pairs of a row and a token that it sees, of one of the run's sequences."""

    def sum_to(x: int) -> int:
        return x * (x + 1) // 2 if x > 0 else 0

    # Without a window, row by row from `first` to `last` tokens.
    last = run.length - run.start
    first = last - run.rows + 1
    seen = sum_to(last) - sum_to(first - 1) if call.causal else run.rows * max(0, last)
    if call.window:
        seen -= sum_to(last - call.window) - sum_to(first - 1 - call.window)
    return seen


def _seconds(run: Run, call: Call, costs: Costs, rates: Rates) -> tuple[float, float]:
    """Seconds of the multiplications alone: by dense kernels, and by the one that reads codes."""
    work = run.batch * pairs_of(run, call) * costs.work
    return work / rates.dense, work / rates.codes


@lru_cache(_MOST_KNOWN)
def cut(run: Run, call: Call, costs: Costs, is_whole: bool) -> tuple[Pass, ...]:
    """The passes of a run of sequences that are alike, none of which takes more than the memory.

    Args:
        run: The sequences.
        call: Who sees what.
        costs: What rows and tokens take.
        is_whole: The run is all of the call: a pass of one piece computes the output itself.
    """
    begin = blind_rows(run, call)
    passes: list[Pass] = []
    for first, end in _row_blocks(run, call, begin):
        passes += _fit(run, call, costs, first, end, is_whole and not begin)
    return tuple(passes)


def tokens_of(piece: Piece, filled: int) -> int:
    """How many tokens a kernel takes of a piece, with ``filled`` rows."""
    return piece.end - piece.first if piece.kind == FULL else filled


@lru_cache(_MOST_KNOWN)
def widest(part: Pass) -> int:
    """The most tokens of a pass's pieces."""
    filled = size_from(part.end - part.begin)
    return max(tokens_of(piece, filled) for piece in part.pieces)


@lru_cache(_MOST_KNOWN)
def together(part: Pass, most: int) -> tuple[tuple[Piece, ...], ...]:
    """A pass's pieces in order, as they fit in the widest one's place: at most ``most`` at once."""
    filled, room = size_from(part.end - part.begin), widest(part)
    found: list[list[Piece]] = []
    left = 0
    for piece in part.pieces:
        tokens = tokens_of(piece, filled)
        if tokens > left or len(found[-1]) == most:
            found.append([])
            left = room
        found[-1].append(piece)
        left -= tokens
    return tuple(tuple(pieces) for pieces in found)


def blind_rows(run: Run, call: Call) -> int:
    """How many of a run's rows, the first ones, see nothing but padding."""
    if call.causal:
        return max(0, min(run.rows, run.start - (run.length - run.rows)))
    return run.rows if run.start >= run.length else 0


def least_memory(costs: Costs) -> int:
    """Bytes that serve any run: `_fit` may cut its rows, but not further."""
    return _FEW_ROWS * (FOLD + 2) * costs.row + MIN_PIECE * costs.token


def _row_blocks(run: Run, call: Call, begin: int) -> Iterator[tuple[int, int]]:
    """Rows that one pass may take together: those of a window are fewer than it is wide.

    Rows whose window begins in the padding have no edge; they are taken for themselves.
    """
    if not call.window:
        if begin < run.rows:
            yield begin, run.rows
        return
    most = max(1, _size_to(call.window - 1))
    # Row i sees the tokens from length - rows + i - window + 1 on.
    open_end = min(run.rows, max(begin, run.start + call.window - (run.length - run.rows)))
    for low, high in ((begin, open_end), (open_end, run.rows)):
        for first in range(low, high, most):
            yield first, min(first + most, high)


def _fit(run: Run, call: Call, costs: Costs, begin: int, end: int, is_whole: bool) -> list[Pass]:
    """Passes over rows [begin, end): of as many sequences at once as the memory takes."""
    best: tuple[int, int, list[Pass]] | None = None
    most = 1 << run.batch.bit_length() - 1
    while most:
        direct = is_whole and most == run.batch and (begin, end) == (0, run.rows)
        found = _pieces(run, call, costs, begin, end, most, direct)
        if found is not None:
            pieces, taken = found
            passes = [
                Pass(run.first + at, batch, begin, end, pieces)
                for at, batch in _batches(run.batch, most)
            ]
            cost = len(passes) * len(pieces), taken
            if best is None or cost < best[:2]:
                best = (*cost, passes)
        most //= 2
    if best is not None:
        return best[2]
    assert end - begin > _FEW_ROWS, "less than least_memory"
    rows = end - begin
    half = begin + (rows // 2 if rows == _size_to(rows) else _size_to(rows))
    halves = ((begin, half), (half, end))
    return [x for low, high in halves for x in _fit(run, call, costs, low, high, False)]


def _pieces(
    run: Run, call: Call, costs: Costs, begin: int, end: int, batch: int, direct: bool
) -> tuple[tuple[Piece, ...], int] | None:
    """The pieces of a pass of ``batch`` sequences, and the bytes that it takes; None: too many."""
    rows, before = end - begin, run.length - run.rows
    filled = size_from(rows)
    first_row, past = before + begin, before + end  # positions
    edge = first_row - call.window + 1 if call.window else run.start
    has_edge = bool(call.window) and edge > run.start and rows > 1
    if has_edge:
        low = edge + rows
    else:  # all rows see from the padding on, or there is but one
        low = max(run.start, edge) if rows == 1 or not call.window else run.start
    high = first_row if call.causal else run.length
    others = int(has_edge) + int(call.causal)
    total = max(0, high - low)
    is_same = has_edge and filled == rows  # as a window is, in every call
    size = total if is_same else max(MIN_PIECE, _size_to(total))
    while True:
        spans = list(_spans(low, high, size, is_same and size == total))
        results = others + len(spans)
        kept = results if results <= FOLD else FOLD + 2  # one of them in float32
        most = max([filled if others else 0, *(b - a for a, b in spans)])
        taken = batch * (most * costs.token + kept * filled * costs.row)
        if direct and results == 1 and filled == rows:
            taken -= batch * rows * costs.row
        if taken <= costs.memory:
            break
        if size <= MIN_PIECE:
            return None
        size = _size_to(size - 1)
    pieces = [Piece(edge, edge + rows, EDGE, True)] if has_edge else []
    for a, b in spans:
        recurs = (is_same and size == total) or b - a == _size_to(b - a) >= MIN_PIECE
        pieces.append(Piece(a, b, FULL, recurs))
    if call.causal:
        pieces.append(Piece(first_row, past, CAUSAL, True))
    return tuple(pieces), taken


def _batches(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``count`` sequences in powers of two up to ``most``: (first, how many)."""
    at = 0
    while at < count:
        batch = min(most, 1 << (count - at).bit_length() - 1)
        yield at, batch
        at += batch


def _spans(low: int, high: int, most: int, at_once: bool) -> Iterator[tuple[int, int]]:
    """[low, high) in pieces of few sizes up to ``most``, and a rest that is shorter than any."""
    while low < high:
        left = high - low
        size = left if at_once or left < MIN_PIECE else _size_to(min(left, most))
        yield low, low + size
        low += size


def _size_to(x: int) -> int:
    """The largest 2**k or 3 * 2**k up to ``x``; 0 of 0."""
    if x < 2:
        return x
    top = 1 << x.bit_length() - 1
    return top + top // 2 if x >= top + top // 2 else top


def size_from(x: int) -> int:
    """The least 2**k or 3 * 2**k from ``x`` on."""
    size = _size_to(x)
    if size == x:
        return x
    top = 1 << x.bit_length() - 1
    return top + top // 2 if size == top else 2 * top
