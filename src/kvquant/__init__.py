"""kvquant: an 8-bit KV cache for transformer inference that attention reads as it is."""

from kvquant import backends as _backends  # noqa: F401  (registers the implementations)
from kvquant.cache import QuantizedKVCache
from kvquant.errors import CacheFullError
from kvquant.explain import Explanation, explain
from kvquant.formats import CacheFormat
from kvquant.functional import append_, attention, gather
from kvquant.ops import use_backend
from kvquant.plain import (
    dequantize_cache_torch,
    pv_matmul,
    qk_matmul,
    quantize_cache_v,
)
from kvquant.storage import LayerStorage

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
