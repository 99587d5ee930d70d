"""Errors a caller may want to catch by name."""

__all__ = ["CacheFullError"]


class CacheFullError(ValueError):
    """New tokens do not fit; nothing was written."""
