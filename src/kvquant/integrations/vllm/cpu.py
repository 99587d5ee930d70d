"""vLLM's CPU platform takes no backend by name: it asks for CPU_ATTN (CPU_MLA, AMX_MLA for latent
attention) whatever was chosen. These names therefore lead here, and from here to the chosen one.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .formats import FORMATS

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """The backend's class by the name of one of vLLM's for the CPU.

    Raises:
        ValueError: kvquant was chosen for latent attention.
    """
    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = AttentionBackendEnum[name]
    chosen = get_current_vllm_config().attention_config.backend
    if chosen is None or chosen.name not in FORMATS:
        return resolve_obj_by_qualname(own.value)
    if name != "CPU_ATTN":
        from .support import LATENT

        raise ValueError(LATENT)
    return chosen.get_class()
