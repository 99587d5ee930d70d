"""The reference's young rows: which tokens have one, and what becomes of it. See docs/by-age.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..formats import SPARE_TOKENS, CacheFormat, open_start
from ..formats.affine import AffineRows
from ..view import CacheView, RowsView, Sequences

__all__ = ["Held", "YoungRows", "append_by_age", "young_rows"]


@dataclass(frozen=True, slots=True)
class Held:
    """A sequence's tokens: its row of the table, and from where on they are young."""

    table: Tensor
    sequence: int = 0
    young_from: int = 0


@dataclass(frozen=True, slots=True)
class YoungRows:
    """A call's young rows, as a view with a block a sequence, and how many tokens are a group."""

    view: CacheView
    group: int

    def row(self, tokens: Tensor) -> Tensor:
        """Where tokens lie in their sequence's block."""
        ring = self.group + tokens % (self.group + SPARE_TOKENS)
        return ring.where(tokens >= self.group, tokens)

    def read(self, rows: RowsView, held: Held, tokens: Tensor, old: Tensor) -> Tensor:
        """``old`` (tokens, heads, dim), with the young ones of ``tokens`` in their place."""
        at = self.row(tokens)
        young = rows.format.decode(
            rows.codes[held.sequence][:, at], rows.params[held.sequence][:, at]
        ).transpose(0, 1)
        is_young = (tokens < self.group) | (tokens >= held.young_from)
        return young.where(is_young[:, None, None], old)


def young_rows(view: CacheView, seqs: Sequences | None) -> YoungRows | None:
    """Those of a call by age."""
    if seqs is None or seqs.young is None:
        return None
    format: CacheFormat = replace(view.format, by_age=True)
    slabs = CacheView.slab(
        seqs.young, view.k.head_dim, v_head_dim=view.v.head_dim,
        block_size=format.young_tokens, format=format.young,
    )  # fmt: skip
    return YoungRows(slabs, format.age_group)


def append_by_age(
    young: YoungRows,
    rows: tuple[RowsView, RowsView],
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    sequence: int,
    length: int,
    total: int,
    new: Tensor,
    finite: Tensor,
) -> None:
    """Store a sequence's new rows, ``(tokens, heads, dim)``.

    ``rows``: the view's, and the young ones. ``places``: token, block, row in it and whether there
    is one, of the new tokens.
    """
    old, held = rows
    tokens, block, row, there = places
    group, was_open = young.group, open_start(young.group, length)
    assert isinstance(old.format, AffineRows)
    assert isinstance(held.format, AffineRows)
    codes, params = held.format.encode(new, finite)
    keeps = there & ((tokens < group) | (tokens >= open_start(group, max(0, total - SPARE_TOKENS))))
    at = young.row(tokens[keeps])
    held.codes[sequence][:, at] = codes[keeps].transpose(0, 1)
    held.params[sequence][:, at] = params[keeps].transpose(0, 1)
    goes = there & (tokens >= group)
    began = (tokens < was_open + group) & (length > 0)
    by_8_bits = (keeps | began)[:, None, None]  # so that cuts make no difference
    pairs = zip(
        old.format.narrow(held.format, codes, params),
        old.format.encode(new, finite),
        strict=True,
    )
    old.codes[block[goes], :, row[goes]], old.params[block[goes], :, row[goes]] = (
        x.where(by_8_bits, y)[goes] for x, y in pairs
    )
