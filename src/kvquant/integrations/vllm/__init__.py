"""kvquant inside vLLM: a quantized KV cache, chosen on vLLM's command line.

Installed beside vLLM, it is found by itself (entry point group ``vllm.general_plugins``)::

    vllm serve MODEL --attention-backend KVQUANT --kv-cache-dtype kvquant

This module imports nothing of vLLM until vLLM calls `register`.
"""

from ._version import cache_dtype
from .formats import FORMATS
from .plugin import register

__all__ = ["FORMATS", "cache_dtype", "register"]
