"""``kvquant demo``: a small language model on an 8-bit cache, with figures and a picture."""

from .assets import AssetError
from .run import Options, run

__all__ = ["AssetError", "Options", "run"]
