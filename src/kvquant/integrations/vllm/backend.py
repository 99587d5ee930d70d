"""What vLLM asks of an attention backend: what it serves, and how it lays out its pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from ... import CacheFormat, CacheView
from ._version import cache_dtype, check_version
from .attention import KVQuantAttention
from .formats import BLOCK_SIZES, FORMATS, block_size_of, content_bytes, format_of
from .metadata import StepBuilder
from .support import refusals

__all__ = ["KVQuantBackend"]

check_version()


class KVQuantBackend(AttentionBackend):
    """A cache of one of the formats; each has a subclass here, by the name in `FORMATS`.

    vLLM's memory for a layer is (blocks, heads, tokens, bytes). A block of a head is contiguous:
    `CacheView.slab` divides its bytes into codes, parameters and the key mean, so that
    whatever copies, shares or moves a page takes all of it along.
    """

    format: ClassVar[CacheFormat]
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = [cache_dtype()]  # noqa: RUF012
    forward_includes_kv_cache_update = True

    @classmethod
    def get_name(cls) -> str:
        """The name in vLLM's list of backends."""
        return cls.__name__

    @staticmethod
    def get_impl_cls() -> type[KVQuantAttention]:
        """What a layer runs."""
        return KVQuantAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """What a step is prepared by."""
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Tokens of a block; vLLM divides its own blocks into these."""
        return list(BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user leaves the block size out."""
        return BLOCK_SIZES[0]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """The orders of vLLM's dimensions in which a block of a head is contiguous."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LHBNC, KVCacheLayout.BHLNC

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The engine's spec of a layer's memory, with the bytes of a token of one head.

        Raises:
            ValueError: A block size that no kernel serves.
        """
        if spec.state_content_bytes is not None:
            return spec
        # vLLM asks for blocks of one token to compare layers by bytes a token.
        size = BLOCK_SIZES[-1] if spec.block_size == 1 else block_size_of(spec.block_size)
        content = content_bytes(cls.format, spec.head_size, spec.head_size_v, size)
        return replace(spec, state_content_bytes=content)

    @classmethod
    def view(cls, pages: Tensor, head_dim: int, v_head_dim: int) -> CacheView:
        """A layer's memory.

        Args:
            pages: vLLM's ``(blocks, heads, tokens, bytes)``, of one byte an element.
            head_dim: Channels of a key.
            v_head_dim: Channels of a value.
        """
        blocks, heads, size, content = pages.shape
        slabs = pages.view(torch.uint8).view(blocks, heads, size * content)
        return CacheView.slab(
            slabs,
            head_dim,
            v_head_dim=v_head_dim,
            block_size=size,
            format=format_of(cls.format, size),
        )

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Why kvquant cannot serve this, a sentence each; vLLM then ends with them."""
        device = torch.device(current_platform.device_type)
        reasons = refusals(cls.format, device=device, **asked)
        if reasons:
            return reasons
        others: list[str] = super().validate_configuration(**asked)
        return others

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """See `refusals`, which says it with more words; so do those below."""
        return True

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Whether kernels can divide such blocks."""
        return block_size is None or block_size % BLOCK_SIZES[-1] == 0

    @classmethod
    def supports_sink(cls) -> bool:
        """A logit a head that joins the softmax (GPT-OSS)."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Of any length."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """The host's numbers decide whether a step is a uniform decode."""
        return False


for _name, _format in FORMATS.items():
    globals()[_name] = type(
        _name,
        (KVQuantBackend,),
        {"format": _format, "__module__": __name__, "__doc__": f"A cache of {_format}."},
    )
