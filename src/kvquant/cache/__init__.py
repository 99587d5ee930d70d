"""A cache object for a whole model."""

from .cache import QuantizedKVCache

__all__ = ["QuantizedKVCache"]
