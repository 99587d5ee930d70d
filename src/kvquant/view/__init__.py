"""What a call is made of: memory, one step's batch, and numbers.

Each is checked when it is made, wherever its tensors come from; everything below trusts it. The
dataclasses are the one list of fields: torch's schemas are made from them, and the extension's
structs are compared with them.
"""

from .batch import HostLengths, Sequences
from .memory import CacheView, RowsView
from .options import Options
from .specs import SeqsSpec, ViewSpec

__all__ = [
    "CacheView",
    "HostLengths",
    "Options",
    "RowsView",
    "SeqsSpec",
    "Sequences",
    "ViewSpec",
]
