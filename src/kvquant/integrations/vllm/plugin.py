"""What vLLM calls in each of its processes, before it reads its command line."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ._version import CACHE_DTYPE, check_version
from .formats import FORMATS

__all__ = ["register"]

_PACKAGE = __name__.removesuffix(".plugin")
_logger = logging.getLogger(__name__)
#: Backends of vLLM's CPU platform, which takes no other by name; see `cpu`.
_OF_CPU = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")


class _Path(str):
    """The path of a backend's class.

    vLLM sends the chosen backend to its processes as a member of an enum. One that is started
    afresh looks that member up before it loads plugins: so reading the value registers it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (str(self),)


def _registered(path: str) -> _Path:
    register()
    return _Path(path)


def register() -> None:
    """Register backends and cache dtype with vLLM; to do so again changes nothing.

    Where the installed vLLM is not served, the reason is logged and nothing is registered, so that
    vLLM itself still runs.
    """
    try:
        version = check_version()
    except ImportError as unserved:
        _logger.error("%s", unserved)
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in FORMATS:
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, _Path(f"{_PACKAGE}.backend.{name}"))
    if current_platform.is_cpu():
        for name in _OF_CPU:
            register_backend(AttentionBackendEnum[name], f"{_PACKAGE}.cpu.{name}")
    if version >= (0, 33):
        _register_cache_dtype()


def _register_cache_dtype() -> None:
    from vllm.config.cache import KV_CACHE_DTYPES, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    if CACHE_DTYPE in KV_CACHE_DTYPES:
        return

    @register_kv_cache_dtype(CACHE_DTYPE)
    class Bytes:
        """Pages are bytes; the backend knows what they mean."""

        name = CACHE_DTYPE

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return KVQuantMode.CUSTOM
