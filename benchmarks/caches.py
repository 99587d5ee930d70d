"""Random caches of a given shape: those of ``kvquant bench``."""

from kvquant.bench.caches import RandomCache

__all__ = ["RandomCache"]
