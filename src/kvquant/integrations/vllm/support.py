"""Which models and options are served: the one place that decides, and says why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ... import CacheFormat, explain
from ._version import cache_dtype
from .formats import block_size_of

__all__ = ["LATENT", "MAX_HEAD_DIM", "refusals"]

MAX_HEAD_DIM = 256
LATENT = (
    "kvquant serves keys and values, and this model caches a latent vector (MLA): leave out "
    "--attention-backend and --kv-cache-dtype"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of vLLM's own questions: what kvquant does not serve, and what to do.
_UNSERVED = {
    "use_mla": LATENT,
    "use_sparse": "kvquant serves no sparse attention: leave --attention-backend out",
    "use_mm_prefix": "kvquant serves causal attention, and this model's images attend both ways: "
    "leave --attention-backend out",
    "use_per_head_quant_scales": "kvquant computes scales itself, a row at a time: this checkpoint "
    "brings scales for each head, for which leave --attention-backend out",
    "use_non_causal": "kvquant serves causal attention only: leave --attention-backend out",
    "use_batch_invariant": "kvquant's results on a GPU depend on how long the batch's queries are: "
    "unset VLLM_BATCH_INVARIANT, or leave --attention-backend out",
    "use_pcp": "kvquant serves no context parallelism of prompts: leave "
    "--prefill-context-parallel-size out",
    "use_dcp": "kvquant serves no context parallelism of decode steps: leave "
    "--decode-context-parallel-size out",
    "use_adaptive_verification": "kvquant needs to know each request's tokens on the host: turn "
    "adaptive verification off",
    "use_rswa": "kvquant serves no window with a reference (R-SWA): leave --attention-backend out",
}


def refusals(
    format: CacheFormat,
    *,
    device: torch.device,
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    v_head_size: int | None = None,
    attn_type: str = "decoder",
    block_size: int | None = None,
    **asked: Any,
) -> list[str]:
    """Why attention of this kind is not served, a sentence each; empty if it is.

    Args:
        format: Of the cache.
        device: Where it runs.
        head_size: Channels of a key.
        dtype: Of queries, keys and values.
        kv_cache_dtype: As it was chosen.
        v_head_size: Channels of a value; ``head_size`` by default.
        attn_type: One of vLLM's.
        block_size: Tokens of a block if chosen.
        **asked: vLLM's further questions, by its names.
    """
    return list(
        _refusals(
            format, device, head_size, v_head_size or head_size, dtype, kv_cache_dtype, attn_type,
            block_size, asked,
        )
    )  # fmt: skip


def _refusals(
    format: CacheFormat,
    device: torch.device,
    head_size: int,
    v_head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    attn_type: str,
    block_size: int | None,
    asked: dict[str, Any],
) -> Iterator[str]:
    for name, sentence in _UNSERVED.items():
        if asked.get(name):
            yield sentence
    if asked.get("use_mla"):
        return
    if attn_type != "decoder":
        yield (
            f"kvquant serves decoders, and this model has attention of type '{attn_type}': leave "
            "--attention-backend out"
        )
    if kv_cache_dtype != cache_dtype():
        yield f"kvquant needs --kv-cache-dtype {cache_dtype()}, got {kv_cache_dtype}"
    if dtype not in _DTYPES:
        yield f"kvquant serves float16, bfloat16 and float32, got {dtype}: pass --dtype bfloat16"
    served = True
    for dim, name in {v_head_size: "head_size of values", head_size: "head_size"}.items():
        if dim % 16 or not 0 < dim <= MAX_HEAD_DIM:
            served = False
            yield (
                f"kvquant serves a head_size that is a multiple of 16 up to {MAX_HEAD_DIM}, and "
                f"this model's {name} is {dim}: leave --attention-backend out"
            )
    if block_size is not None:
        try:
            block_size_of(block_size)
        except ValueError as why:
            yield str(why)
    if served and dtype in _DTYPES:
        found = explain(
            device=device, head_dim=head_size, v_head_dim=v_head_size, dtype=dtype, format=format
        )
        if found.backend == "reference":
            yield f"kvquant has no kernels for this: {found.reason}"
