"""``kvquant fit``: what a model's cache takes, and the largest batch and length that fit."""

from .layers import LayerShape, ModelShape, shape_of, uses_kvquant
from .models import MODELS, read_config
from .sizes import FORMATS, Layout, Peer, cache_bytes, gib, largest, peer_bytes

__all__ = [
    "FORMATS",
    "MODELS",
    "LayerShape",
    "Layout",
    "ModelShape",
    "Peer",
    "cache_bytes",
    "gib",
    "largest",
    "peer_bytes",
    "read_config",
    "shape_of",
    "uses_kvquant",
]
