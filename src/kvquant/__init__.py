"""kvquant: an 8-bit KV cache for transformer inference, with attention on the 8-bit data."""

from .backends import use_backend
from .cache.cache import QuantizedKVCache
from .errors import CacheFullError
from .explain import Explanation, explain
from .formats import CacheFormat, LayerFormats
from .functional import append_, attention, gather
from .plain import (
    dequantize_cache_torch,
    pv_matmul,
    qk_matmul,
    quantize_cache_v,
)
from .plan import Plan, plan
from .version import __version__
from .view import CacheView, HostLengths, RowsView, Sequences

__all__ = [
    "CacheFormat",
    "CacheFullError",
    "CacheView",
    "Explanation",
    "HostLengths",
    "LayerFormats",
    "Plan",
    "QuantizedKVCache",
    "RowsView",
    "Sequences",
    "__version__",
    "append_",
    "attention",
    "dequantize_cache_torch",
    "explain",
    "gather",
    "plan",
    "pv_matmul",
    "qk_matmul",
    "quantize_cache_v",
    "use_backend",
]
