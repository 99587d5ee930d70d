"""A cache object for a whole model: append, attend, and what generation does with sequences."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .. import functional
from ..arguments import check_flag, check_float_dtype, check_number, check_tensor
from ..checks import check_index, check_packed, check_split_size, check_window
from ..ops import call, forced, is_plain, prepare_step, refuse_splits
from . import files, serialize
from .calls import check_call, look, ragged
from .config import CacheConfig
from .prompt import exact_attention
from .sequences import CacheSequences
from .serialize import LayerPast
from .state import CacheState

__all__ = ["QuantizedKVCache"]


class QuantizedKVCache(CacheSequences):
    """Keys and values of a model as 8-bit rows, which attention reads as they are.

    Contiguous, or paged with ``block_size``; without a ``max_seq_len`` (and ``num_blocks``) it
    grows layer by layer. Lengths live on the device, and `append` and `attend` never wait for it:
    the host checks the capacity by upper bounds. So decode steps can be captured in a CUDA graph;
    replays advance the lengths on the device only (the kernels drop rows past the capacity): call
    `reserve` before the capture and `sync_lengths` after the replays.

    A call that fails changes nothing. Methods that need exact lengths (all but `append`, `attend`,
    `crop` and `reset`) wait for a device that is not the CPU.

    Args:
        num_layers: Layers of the model.
        batch_size: Sequences.
        num_kv_heads: Heads of keys and values.
        head_dim: Channels of a key, a multiple of 16.
        v_head_dim: Channels of a value; ``head_dim`` by default.
        max_seq_len: Most tokens of a sequence, rounded up to a multiple of 16 or ``block_size``.
        block_size: Tokens of a block, a power of two from 16; None: contiguous.
        num_blocks: Blocks of the pool; by default enough for every sequence's ``max_seq_len``.
        format: What is stored; ``CacheFormat()`` by default.
        dtype: What `dequantize` gives by default.
        device: Where; torch's default device by default.

    Raises:
        ValueError: An argument outside the range above.
    """

    # -------------------------------------------------------------------------- append and attend

    def append(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        """Quantise keys and values and store them behind a layer's tokens, in one launch.

        Args:
            layer: Which one.
            key: ``(batch, tokens, kv_heads, head_dim)``, or packed ``(total, kv_heads, head_dim)``
                with ``cu_seqlens``; float16, bfloat16 or float32, last dimension contiguous.
            value: Likewise, with ``v_head_dim``.
            cu_seqlens: int32 ``(batch + 1,)``: where each sequence's packed rows begin. On the CPU
                it tells the host exact lengths whatever the cache's device.
            max_seqlen: With ``cu_seqlens``, most packed rows of one sequence; by default their
                total.

        Raises:
            TypeError: An argument of another type, a dtype that is not supported.
            ValueError: Arguments that do not fit.
            CacheFullError: No room; nothing was written.
        """
        layer = self._accept(layer, None, key, value, cu_seqlens)
        if cu_seqlens is None:
            check_packed("cu_seqlens", None, self.batch_size, 0, self.device, max_seqlen)
            self._append_dense(layer, key, value)
        else:
            self._append_packed(
                layer, key, value, *ragged(self._state, "cu_seqlens", cu_seqlens, key, max_seqlen)
            )

    def _append_dense(self, layer: int, key: Tensor, value: Tensor) -> None:
        state, tokens = self._state, key.shape[1]
        if state.room[layer] < tokens:
            state.make_room(layer, [tokens] * key.shape[0])
        call(
            "append_", key, value, *state.pool.args[layer], state.tables.device, state.lens[layer],
            None, state.seq_starts, None, *self._rotations, tokens, True,
        )  # fmt: skip
        state.high[layer] += tokens
        state.room[layer] -= tokens

    def _append_packed(
        self, layer: int, key: Tensor, value: Tensor, cu: Tensor, counts: list[int], most: int
    ) -> None:
        state = self._state
        if state.room[layer] < max(counts):
            state.make_room(layer, counts)
        call(
            "append_", key, value, *state.pool.args[layer], state.tables.device, state.lens[layer],
            cu, state.seq_starts, None, *self._rotations, most, True,
        )  # fmt: skip
        state.add(layer, counts)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        split_size: int | None = None,
        return_lse: bool = False,
        exact_prompt: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append ``key`` and ``value`` if given, then attend to all of a layer's tokens.

        Args:
            layer: Which one.
            query: ``(batch, tokens, q_heads, head_dim)``, or packed ``(total, q_heads, head_dim)``
                with ``cu_seqlens_q``; its last token is the last of the cache.
            key: New keys, as in `append`.
            value: New values.
            cu_seqlens_q: int32 ``(batch + 1,)``: where each sequence's packed rows begin.
            max_seqlen_q: With ``cu_seqlens_q``, most packed rows of one sequence; by default their
                total.
            softmax_scale: ``head_dim**-0.5`` by default.
            causal: A query sees no token behind its own position.
            sliding_window: A query at ``i`` sees tokens ``j > i - sliding_window``.
            softcap: Scores become ``softcap * tanh(score / softcap)``.
            sinks: float32 ``(q_heads,)``: a logit a head that joins the softmax with no value.
            alibi_slopes: float32 ``(q_heads,)``: scores lose ``slope * |i - j|``.
            split_size: On CUDA, tokens of every split (a positive multiple of 256), so that a
                sequence's result does not depend on the batch it is in; it can cost speed. See
                `kvquant.attention`. What ``exact_prompt`` leaves to torch is torch's affair.
            return_lse: Also return the log-sum-exp of the scores.
            exact_prompt: The first tokens of an empty layer attend to the keys and values as they
                are given, by torch, where no other option asks for more than that.

        Returns:
            The output in query's dtype and shape (with ``v_head_dim``), and with ``return_lse``
            float32 ``query.shape[:-1]``. Packed rows of no sequence are zero, and -inf.

        Raises:
            TypeError: An argument of another type, a dtype that is not supported.
            ValueError: Arguments that do not fit.
            CacheFullError: No room; nothing was written.
        """
        flags: Any = causal, return_lse, exact_prompt
        if not (type(flags[0]) is type(flags[1]) is type(flags[2]) is bool):
            check_flag("causal", causal)
            check_flag("return_lse", return_lse)
            check_flag("exact_prompt", exact_prompt)
        seen: tuple[Any, ...] = ()
        if (
            cu_seqlens_q is None and max_seqlen_q is None and sinks is None
            and alibi_slopes is None and not return_lse
        ):  # fmt: skip
            seen = (look(query), look(key), look(value), softmax_scale, causal, sliding_window,
                    softcap, split_size, forced())  # fmt: skip
            known, state = self._step, self._state
            if (
                known is not None and type(layer) is int and 0 <= layer < len(state.lens)
                and _equal(seen, known[0])
            ):  # fmt: skip
                tokens, room = query.shape[1], state.room[layer]
                exact = exact_prompt and tokens > 1 and not state.high[layer]
                if room >= tokens and not exact and is_plain(query):
                    return self._take_step(known[1], layer, query, key, value)
        check_tensor("query", query)
        layer = self._accept(layer, query, key, value, cu_seqlens_q)
        scale = self._scale
        if softmax_scale is not None:
            scale = check_number("softmax_scale", softmax_scale)
        window = check_window(sliding_window)
        cap = 0.0 if softcap is None else check_number("softcap", softcap, positive=True)
        split = check_split_size(split_size)
        if cu_seqlens_q is None:
            check_packed("cu_seqlens_q", None, self.batch_size, 0, self.device, max_seqlen_q)
        if sinks is not None or alibi_slopes is not None:
            check_index("sinks", sinks, query.shape[-2], self.device, torch.float32)
            check_index("alibi_slopes", alibi_slopes, query.shape[-2], self.device, torch.float32)
        state, counts, tokens = self._state, None, query.shape[1]
        if cu_seqlens_q is not None:
            cu_seqlens_q, counts, tokens = ragged(
                self._state, "cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q
            )
        before = None
        if key is not None and value is not None:
            if split:
                self._check_splits(layer, query, counts or [key.shape[1]] * key.shape[0], split)
            if exact_prompt and not (
                state.high[layer] or return_lse or window or cap or tokens < 2
                or counts is not None or tokens != key.shape[1] or query.dtype != key.dtype
                or sinks is not None or alibi_slopes is not None or state.seq_starts is not None
            ):  # fmt: skip
                out = exact_attention(query, key, value, scale, causal)
                self._append_dense(layer, key, value)
                return out
            before = state.mark(layer)
            if cu_seqlens_q is None or counts is None:
                self._append_dense(layer, key, value)
                added: int | Tensor = key.shape[1]
            else:
                self._append_packed(layer, key, value, cu_seqlens_q, counts, tokens)
                added = cu_seqlens_q
        try:
            out, lse = call(
                "attention", query, *state.pool.args[layer], state.tables.device,
                state.lens[layer], cu_seqlens_q, state.seq_starts, sinks, alibi_slopes,
                *self._rotations, tokens, scale, causal, window, cap, split, return_lse,
            )  # fmt: skip
        except BaseException:
            if before is not None:
                state.undo(layer, before, added, tokens)
            raise
        repeats = seen and self._accepted is not None
        if repeats and key is not None and value is not None and tokens == key.shape[1]:
            step = prepare_step(
                state.pool.args[layer], query, key, value, self._rotations, scale, causal, window,
                cap, split,
            )  # fmt: skip
            self._step = None if step is None else (seen, step)
        return (out, lse) if return_lse else out

    def _take_step(
        self,
        step: Callable[..., Tensor],
        layer: int,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
    ) -> Tensor:
        """Append and attend as the last call did, with other tensors that look like its own."""
        state, tokens = self._state, query.shape[1]
        before = state.mark(layer)
        state.high[layer] += tokens
        state.room[layer] -= tokens
        try:
            return step(
                layer, state.pool.args[layer], state.tables.device, state.lens[layer],
                state.seq_starts, query, key, value,
            )  # fmt: skip
        except BaseException:
            state.undo(layer, before, 0, tokens)
            raise

    # ------------------------------------------------------------------------------------- checks

    def _check_splits(self, layer: int, query: Tensor, counts: list[int], split_size: int) -> None:
        """Make room for new tokens, then see whether attention can merge the splits of it all."""
        state = self._state
        if state.room[layer] < max(counts):
            state.make_room(layer, counts)
        capacity = state.tables.device.shape[1] * state.pool.layers[layer].block_size
        refuse_splits((query, *state.pool.args[layer]), split_size, capacity)

    def _accept(
        self,
        layer: int,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> int:
        """Check a call's tensors, unless they look like the last accepted ones; the layer."""
        if type(layer) is not int or not 0 <= layer < len(self._state.lens):
            layer = self._check_layer(layer)
        seen = (cu_seqlens is None, look(query), look(key), look(value))
        if seen == self._accepted:
            return layer
        check_call(
            self._state.config,
            self._state.pool.layers[layer],
            query,
            key,
            value,
            packed=cu_seqlens is not None,
        )
        grad = any(x is not None and x.requires_grad for x in (query, key, value))
        self._accepted = None if grad else seen
        return layer

    # ------------------------------------------------------------------------------- what is stored

    def dequantize(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as attention sees them.

        Args:
            layer: Which one.
            dtype: Of the result; the cache's by default.

        Returns:
            key ``(batch, tokens, kv_heads, head_dim)`` and value, zero where a sequence has no
            token or padding.
        """
        storage, state = self.storage(layer), self._state
        dtype = self.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        state.settle()
        return functional.gather(
            storage,
            block_table=state.tables.device,
            seq_lens=state.lens[layer],
            seq_starts=state.seq_starts,
            tokens=state.high[layer],
            dtype=dtype,
        )

    def layer_past(self, layer: int) -> LayerPast:
        """A layer as Qwen's original code has it: ``x ~ scale * (q - zero)``.

        Returns:
            (q, scale, zero) of the keys and of the values: uint8 ``(batch, kv_heads, tokens,
            head_dim)`` and float32 ``(batch, kv_heads, tokens, 1)``, copies.

        Raises:
            ValueError: Another format than ``CacheFormat.plain()``, or sequences of several
                lengths.
        """
        return serialize.layer_past(self._state, self._check_layer(layer))

    @classmethod
    def from_layer_past(
        cls,
        past: Sequence[LayerPast],
        *,
        max_seq_len: int | None = None,
        block_size: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """A cache in ``CacheFormat.plain()`` from `layer_past` of every layer.

        Args:
            past: ((qk, ks, kz), (qv, vs, vz)) a layer; scales and zeros of shape (b, h, s, 1), or
                (b, h, 1, 1) where a head shares them. They are rounded to float16.
            max_seq_len: As for a new cache.
            block_size: As for a new cache.
            dtype: As for a new cache.

        Raises:
            TypeError: Another structure, a dtype that is not supported.
            ValueError: Shapes that do not belong together, or scales beyond float16.
        """
        return serialize.from_layer_past(cls, past, max_seq_len, block_size, dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is stored, sequence by sequence, the same whatever the blocks.

        Returns:
            "format", "seq_lens", "seq_starts" if there are any, and of each layer
            "layers.0.k_data" (batch, kv_heads, tokens, head_dim) and so on: copies on the cache's
            device.
        """
        return serialize.state_dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tokens by those of a `state_dict` of the same format and shapes.

        Raises:
            TypeError: A dtype is another.
            ValueError: Something is missing, of another shape, or of another format.
            CacheFullError: More tokens than the capacity, or more blocks than ``num_blocks``:
                sequences that shared blocks each have their own then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of tensors, got {type(state).__name__}")
        try:
            serialize.check_state(state, self._state.config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state: {error}") from None
        new = CacheState.empty(self._state.config)
        serialize.fill(new, state)
        self._adopt(new)

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._state
        return _unpickle, (type(self), state.config, self.dtype, self.state_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file.

        Raises:
            ImportError: safetensors is not installed.
        """
        files.save(self._state, self.dtype, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str | int | None = None,
        *,
        max_seq_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
    ) -> Self:
        """A cache from a file that `save` wrote.

        Its capacity and its blocks are those of the saved cache, but memory is taken for the
        stored tokens only: more comes by growth, up to the capacity, or at once if ``max_seq_len``
        or ``num_blocks`` is given. A file is checked as a whole before memory is taken for it.

        Args:
            path: The file.
            device: Where; torch's default device by default.
            max_seq_len: In place of the saved cache's, allocated at once.
            block_size: In place of the saved cache's, whose ``num_blocks`` are then as many tokens.
            num_blocks: In place of the saved cache's, allocated at once.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: No such file.
            TypeError: An argument of another type.
            CacheFullError: The stored tokens do not fit the sizes given.
            ValueError: The file is cut off, from another version or another program, or does not
                hold together.
        """
        sizes = {"max_seq_len": max_seq_len, "block_size": block_size, "num_blocks": num_blocks}
        return files.load(cls, path, device, sizes)


def _unpickle(
    cls: type[QuantizedKVCache], config: CacheConfig, dtype: torch.dtype, state: dict[str, Tensor]
) -> QuantizedKVCache:
    return serialize.restore(cls, config, dtype, state, allocate=True)


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two calls look alike; a tensor or an array in the place of a number never does."""
    try:
        return a == b
    except (RuntimeError, ValueError):
        return False
