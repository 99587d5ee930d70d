"""The memory of all layers of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..formats import CacheFormat
from ..view import CacheView
from .blocks import index_tensor

__all__ = ["LayerMemory"]


class LayerMemory:
    """A view of each layer's tensors, which may lie under several caches at a time.

    Attributes:
        views: One a layer; a layer that grows gets a new one.
    """

    def __init__(self, views: Iterable[CacheView]) -> None:
        self.views = list(views)

    @classmethod
    def allocate(
        cls,
        formats: Iterable[CacheFormat],
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        v_head_dim: int,
        device: torch.device,
    ) -> LayerMemory:
        """Unwritten memory, a layer for each format."""
        return cls(
            CacheView.allocate(
                num_blocks, num_kv_heads, block_size, head_dim, v_head_dim,
                format=format, device=device,
            )
            for format in formats
        )  # fmt: skip

    @property
    def num_blocks(self) -> int:
        """Blocks that every layer has."""
        return min(view.num_blocks for view in self.views)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(view.nbytes for view in self.views)

    def resize(
        self, layer: int, *, num_blocks: int | None = None, block_size: int | None = None
    ) -> None:
        """Move one layer to larger tensors: its old ones live until the copy is complete."""
        old = self.views[layer]
        new = CacheView.allocate(
            num_blocks or old.num_blocks, old.num_kv_heads, block_size or old.block_size,
            old.k.head_dim, old.v.head_dim, format=old.format, device=old.device,
        )  # fmt: skip
        for name, tensor in new.tensors.items():
            part = old.tensors[name]
            tensor[: part.shape[0], :, : part.shape[2]].copy_(part)
        self.views[layer] = new

    def selected(self, blocks: Sequence[int]) -> LayerMemory:
        """A copy that holds ``blocks``, in that order."""
        at = index_tensor(blocks, self.views[0].device)
        return LayerMemory(
            view.replaced({name: x.index_select(0, at) for name, x in view.tensors.items()})
            for view in self.views
        )

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], rows: int | None = None) -> None:
        """Copy blocks (from, to) in every layer, as far as the first ``rows`` of each.

        No memory is asked for once the first block is written.
        """
        if not pairs:
            return
        device = self.views[0].device
        source, target = (index_tensor([pair[i] for pair in pairs], device) for i in (0, 1))
        parts = [
            tensor if name == "mean" else tensor[:, :, :rows]
            for view in self.views
            for name, tensor in view.tensors.items()
        ]
        between: dict[torch.Size, Tensor] = {}  # one of each shape serves all layers
        for part in parts:
            if part.shape[1:] not in between:
                between[part.shape[1:]] = part.new_empty(len(pairs), *part.shape[1:])
        for part in parts:
            rows_between = between[part.shape[1:]]
            torch.index_select(part, 0, source, out=rows_between)
            part.index_copy_(0, target, rows_between)
