"""kvquant in Hugging Face transformers: an 8-bit cache, with attention on the 8-bit data.

Importing this module registers the attention implementation "kvquant"::

    from . import KVQuantCache

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvquant")
    model.generate(**inputs, past_key_values=KVQuantCache(model))
"""

from ._version import CACHE_ARGUMENT  # first: checks the version
from .attention import kvquant_attention, register
from .cache import KVQuantCache
from .enable import disable, enable
from .forward import graph_step
from .handle import QuantizedHandle
from .mask import kvquant_mask
from .steps import GraphStep

__all__ = [
    "CACHE_ARGUMENT",
    "GraphStep",
    "KVQuantCache",
    "QuantizedHandle",
    "disable",
    "enable",
    "graph_step",
    "kvquant_attention",
    "kvquant_mask",
    "register",
]

register()
