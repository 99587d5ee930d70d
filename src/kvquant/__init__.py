"""kvquant: an 8-bit KV cache for transformer inference that attention reads as it is."""

from . import backends as _backends  # noqa: F401  (registers the implementations)
from .cache.cache import QuantizedKVCache
from .errors import CacheFullError
from .explain import Explanation, explain
from .formats import CacheFormat
from .functional import append_, attention, gather
from .ops import use_backend
from .plain import (
    dequantize_cache_torch,
    pv_matmul,
    qk_matmul,
    quantize_cache_v,
)
from .storage import LayerStorage

__version__ = "0.1.0"

__all__ = [
    "CacheFormat",
    "CacheFullError",
    "Explanation",
    "LayerStorage",
    "QuantizedKVCache",
    "append_",
    "attention",
    "dequantize_cache_torch",
    "explain",
    "gather",
    "pv_matmul",
    "qk_matmul",
    "quantize_cache_v",
    "use_backend",
]
