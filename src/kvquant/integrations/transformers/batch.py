"""What a model says about the batch that a cache holds, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .protocol import CacheLayer

__all__ = ["Batch", "KVLength"]

_ONE_TEXT = "A cache continues one text: reset() it or make a new one for another"


class Batch:
    """The padding and the positions of a cache's tokens; one for all its layers.

    Masks are made before the layers see a call's tokens. So what a mask says is kept aside until
    the first layer has taken them, and a call that fails leaves everything as it was.

    Attributes:
        layers: The cache's layers.
        starts: int32 ``(batch,)``: tokens of left padding, None without padding.
        regular: False where the last 2D mask hid more than left padding. Attention then goes by
            the mask itself, over dequantized rows.
        masked: Whether the model has asked for a mask of "kvquant", its attention's name.
        is_plain: False once the model was seen to compute with what the cache handed out, or to
            attend to a layer twice: compiled code then goes by the handles, too.
        positions: position_ids of the last call; None: not known.
        may_compile: ``generate`` may compile the decode steps: their masks are all alike then.
        replays: Steps that graphs have replayed; each layer counts them when it is looked at next.
        is_settled: Nothing has touched the layers since they were made ready for replays.
        is_captured: A decode step is being captured in a graph, which will be replayed at other
            lengths: what is known of padding holds, and lengths are the device's.
    """

    def __init__(self, check_positions: bool, may_compile: bool = False) -> None:
        self.may_compile = may_compile
        self.layers: list[CacheLayer] = []
        self.starts: Tensor | None = None
        self.regular = True
        self.masked = False
        self.is_plain = True
        self._step_mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.replays = 0
        self.is_settled = False
        self.is_captured = False
        self._checks = check_positions
        self._version: int | None = None  # of the tensor of positions; None: not known
        self._all_padding = False  # of a sequence at least, as far as masks have been looked at
        self.waits = True  # to see which layer takes a call's tokens first
        self._next: tuple[Tensor | None, bool] | None = None
        self._before: tuple[Tensor | None, bool, Tensor | None] = None, True, None

    def read(
        self, mask: Tensor | None, query_length: int, kv_length: int, *, is_exact: bool = True
    ) -> bool:
        """Look at a 2D mask (True: a token); says whether left padding is all that it hides.

        On an accelerator a decode step leaves things as the prompt's mask set them: its mask only
        adds tokens, and looking at it would wait for the device. Prompts are looked at, and so are
        chunks of more than one token and steps while a sequence has had nothing but padding. Where
        the host does not know the length (``is_exact`` False) no step is.

        Raises:
            ValueError: No new token, or a mask of fewer tokens than the cache then holds.
        """
        self.masked = True
        if self.is_captured or not is_exact:
            return self.regular
        if query_length == 0:
            raise ValueError(f"input_ids: no token is new to a cache of {kv_length}. {_ONE_TEXT}")
        if mask is None:
            self._next = None, True
            return True
        if mask.shape[1] < kv_length:
            raise ValueError(
                f"attention_mask: of {mask.shape[1]} tokens, but {kv_length - query_length} are in "
                f"the cache and {query_length} more came. {_ONE_TEXT}"
            )
        is_step = query_length == 1 and kv_length > 1 and not self._all_padding
        if is_step and mask.device.type != "cpu":
            return self.regular
        hidden = ~mask[:, :kv_length].bool()
        starts = hidden.sum(-1, dtype=torch.int32)
        left = hidden.cumprod(-1).bool()
        facts = (hidden == left).all(), starts.any(), hidden.all(-1).any()
        regular, is_padded, self._all_padding = torch.stack(facts).tolist()
        if not (regular and is_padded):
            self._next = None, regular
        elif self.starts is None or not torch.equal(self.starts, starts):
            self._next = starts, True
        else:
            self._next = self.starts, True
        return bool(regular)

    def steps_like_layers(self, window: int | None) -> bool:
        """Whether the layers know by themselves what a decode step's mask hides."""
        known = window is None or window in (layer.sliding_window for layer in self.layers)
        return known and self.is_plain and self.may_compile and not self.is_captured

    def step_mask(self, device: torch.device) -> Tensor:
        """A 4D mask that stands for "causal, with the layer's window and the cache's padding".

        The same tensor for every decode step, whatever their lengths: compiled code takes no
        subclass of a tensor, and is compiled anew for another shape.
        """
        if self._step_mask is None or self._step_mask.device != device:
            with torch.inference_mode(mode=False):
                self._step_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
            torch._dynamo.mark_static_address(self._step_mask)
        return self._step_mask

    def steps_alike(self, mask: Tensor | None, kv_length: int) -> bool:
        """Whether a decode step with this mask leaves things as they are, whatever is in it.

        That of `generate` does: it adds a token to the prompt's.
        """
        if not self.regular or self._all_padding:
            return False
        if mask is None:
            return self.starts is None
        return mask.dim() == 2 and mask.shape[1] >= kv_length

    @contextmanager
    def captured(self) -> Iterator[None]:
        """While a decode step is being captured; leaves what is known of the batch as it was."""
        before = self.starts, self.regular, self._next, self._before, self.positions, self._version
        self.is_captured = True
        try:
            yield
        finally:
            self.is_captured = False
            (
                self.starts, self.regular, self._next, self._before, self.positions, self._version
            ) = before  # fmt: skip

    def take(self, layer: CacheLayer) -> None:
        """Note that ``layer`` has taken a call's tokens: what the masks said holds now."""
        if self.waits:
            self.waits, layer.leads = False, True
        if layer.leads:
            self._before = self.starts, self.regular, self.positions
        if self._next is not None:
            (self.starts, self.regular), self._next = self._next, None

    def follow(self, layer: CacheLayer, positions: Any, tokens: int) -> None:
        """Refuse tokens whose positions go back behind the last ones: of another text.

        A decode step is not looked at: on an accelerator that would wait for the device. Positions
        are kept as they came, uncopied.

        Raises:
            ValueError: A position that is smaller than the last one of its sequence.
        """
        before, self.positions = self.positions, None
        if not isinstance(positions, Tensor):
            return
        if self._checks and tokens > 1 and before is not None and self._holds(before, positions):
            self._compare(before[..., -1], positions[..., 0], layer.length - tokens)
        self.note(positions)

    def note(self, positions: Tensor | None) -> None:
        """Keep the positions of the last call."""
        self.positions = positions
        if positions is None or positions.is_inference():
            self._version = None
        else:
            self._version = positions._version

    def _holds(self, before: Tensor, positions: Tensor) -> bool:
        """Whether the last call's positions are still there: a loop may write over them."""
        if before.data_ptr() != positions.data_ptr():
            return True
        return self._version is not None and self._version == positions._version

    def _compare(self, last: Tensor, first: Tensor, stored: int) -> None:
        if last.shape != first.shape:
            return
        back = first < last
        if self.starts is not None:  # padding has any position
            back = back & (self.starts.to(back.device) < stored)
        if bool(back.any()):
            raise ValueError(
                f"position_ids: from {int(first.min())} on, but the cache holds tokens up to "
                f"position {int(last.max())}. {_ONE_TEXT}, or let positions go back with "
                "KVQuantCache(..., check_positions=False)"
            )

    def undo(self, length: int, *, taken: bool) -> None:
        """Leave ``length`` tokens in all layers: a call that brought more has failed in one.

        ``taken``: whether that one had taken its tokens.
        """
        longer = [layer for layer in self.layers if layer.length > length]
        for layer in longer:
            try:
                layer.crop(length - layer.length)
            except ValueError:  # its window has moved on: nothing is left to go on from
                layer.reset()
        self._next = None
        if taken or longer:
            self.starts, self.regular, self.positions = self._before

    def reset(self) -> None:
        """Forget everything about the tokens."""
        self.starts = self.positions = self._next = None
        self.regular, self._all_padding = True, False

    def restore(self, starts: Tensor | None, length: int) -> None:
        """Take over a batch of ``length`` tokens a sequence with this padding."""
        self.reset()
        self.starts = starts
        self._all_padding = starts is not None and bool((starts >= length).any())

    def select(self, index: Tensor) -> None:
        """Follow a change of the batch's rows."""
        self.positions = None
        if self.starts is not None:
            self.starts = self.starts[index.to(self.starts.device)]

    def repeat_interleave(self, repeats: int) -> None:
        """Follow a repetition of the batch's rows."""
        self.positions = None
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(repeats)


class KVLength(int):
    """The length that a layer gives to the mask function, with the batch to be told of padding.

    Attributes:
        batch: The cache's.
        is_exact: False where the host does not know the length: then it is the capacity.
    """

    batch: Batch
    is_exact: bool

    def __new__(cls, length: int, batch: Batch, *, is_exact: bool = True) -> KVLength:
        """``length`` with ``batch`` attached."""
        number = super().__new__(cls, length)
        number.batch, number.is_exact = batch, is_exact
        return number
