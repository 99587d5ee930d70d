"""A step's batch as kvquant takes it: made once a step, for all layers alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import add
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)

from ... import CacheView, HostLengths, Plan, Sequences, plan

__all__ = ["Step", "StepBuilder"]


@dataclass
class Step(AttentionMetadata):
    """One step's batch, and the plans of its layers.

    Attributes:
        seqs: Its sequences, with their lengths before the step.
        seq_lens: int32 ``(sequences,)``: their lengths with the step's tokens.
        tokens: Of each sequence, if all have as many; 0: packed rows.
    """

    seqs: Sequences
    seq_lens: Tensor
    tokens: int
    _plans: dict[Any, Plan] = field(default_factory=dict)

    @cached_property
    def stored(self) -> Sequences:
        """The sequences for a layer that appends nothing: another one has stored the tokens."""
        seqs, known = self.seqs, self.seqs.on_host
        if known is not None and known.rows is not None:
            known = known._replace(seq_lens=tuple(map(add, known.seq_lens, known.rows)))
        return Sequences(
            seqs.block_table,
            self.seq_lens,
            cu_seqlens_q=seqs.cu_seqlens_q,
            max_seqlen_q=seqs.max_seqlen_q,
            on_host=known,
        )

    def attend(
        self,
        view: CacheView,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        out: Tensor,
        *,
        options: Mapping[str, Any],
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> None:
        """Append ``key`` and ``value``, if given, and attend, in one call.

        Args:
            view: The layer's memory.
            query: ``(rows, heads, channels)``; rows behind the step's are padding.
            key: Likewise.
            value: Likewise.
            out: Likewise, written.
            options: Of `kvquant.plan`.
            sinks: As `kvquant.Plan.run` takes them.
            alibi_slopes: Likewise.
        """
        seqs = self.seqs if key is not None else self.stored
        if self.tokens:
            batch = seqs.block_table.shape[0]
            query, out = self._dense(query, batch), self._dense(out, batch)
            key = None if key is None else self._dense(key, batch)
            value = None if value is None else self._dense(value, batch)
        at = (
            tuple(options.values()), view.spec, query.shape[-2:], query.stride(), query.dtype,
            None if key is None else key.stride(), None if value is None else value.stride(),
        )  # fmt: skip
        planned = self._plans.get(at)
        if planned is None:
            planned = self._plans[at] = plan(query, view, seqs, key, value, **options)
        planned.run(
            query, view, seqs, key, value, sinks=sinks, alibi_slopes=alibi_slopes, out=out
        )  # fmt: skip

    def _dense(self, rows: Tensor, batch: int) -> Tensor:
        dense: Tensor = rows[: batch * self.tokens].unflatten(0, (batch, self.tokens))
        return dense


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes a `Step` of what vLLM's scheduler decided; nothing is read back from the device.

    A captured CUDA graph reads lengths and block tables where they were at capture: vLLM's own
    stay in place, and what is computed from them here goes to memory of the builder's.
    """

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Where graphs of mixed batches are captured, a step that looks uniform at capture may not
        # be when it is replayed, unless it has one token.
        mixed = vllm_config.compilation_config.cudagraph_mode.mixed_mode()
        self._most = 1 if mixed == CUDAGraphMode.FULL else max_decode_query_len(vllm_config)
        # With drafts, vLLM's host may not know yet how many of them were accepted.
        self._guesses = vllm_config.speculative_config is not None
        most = vllm_config.scheduler_config.max_num_seqs
        self._before = torch.zeros(most, dtype=torch.int32, device=device)
        self._table = torch.zeros(most, 0, dtype=torch.int32, device=device)
        self._numbers = torch.arange(most + 1, dtype=torch.int32)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """The step; see vLLM's `AttentionMetadataBuilder`.

        Raises:
            ValueError: Attention that is not causal.
        """
        common, batch = common_attn_metadata, common_attn_metadata.num_reqs
        if common.causal is not True:
            raise ValueError("kvquant serves causal attention only: leave --attention-backend out")
        starts, table = common.query_start_loc[: batch + 1], common.block_table_tensor
        if self._table.shape[1] != table.shape[1]:
            self._table = table.new_zeros(len(self._before), table.shape[1])
        after, before, own_table = (
            common.seq_lens[:batch], self._before[:batch], self._table[:batch],
        )  # fmt: skip
        counts = starts.diff()
        torch.sub(after, counts, out=before)
        # Rows that pad a graph are sequences without a token, and without a block.
        own_table.copy_(table.masked_fill(counts[:, None] <= 0, -1))
        tokens = self._uniform(common)
        seqs = Sequences(
            own_table,
            before,
            cu_seqlens_q=None if tokens else starts,
            max_seqlen_q=0 if tokens else common.max_query_len,
            on_host=None if tokens else self._on_host(common),
        )
        return Step(seqs, after, tokens)

    def _on_host(self, common: CommonAttentionMetadata) -> HostLengths | None:
        """The lengths of a step with prompts, if vLLM knows them exactly."""
        after, batch = common.seq_lens_cpu_upper_bound, common.num_reqs
        if after is None or self._guesses:
            return None
        rows = common.query_start_loc_cpu[: batch + 1].diff()
        before = ((after[:batch] - rows) * (rows > 0)).clamp_(min=0).tolist()
        return HostLengths(tuple(before), rows=tuple(rows.tolist()))

    def _uniform(self, common: CommonAttentionMetadata) -> int:
        """Tokens of each sequence of a decode step, padding aside; 0: it is none."""
        tokens, batch = common.max_query_len, common.num_reqs
        if tokens > self._most or batch * tokens > common.num_actual_tokens:
            return 0
        starts = common.query_start_loc_cpu[: batch + 1]
        total = int(starts[-1])
        alike = torch.equal(starts, (self._numbers[: batch + 1] * tokens).clamp_(max=total))
        return tokens if alike and total % tokens == 0 else 0
