"""kvquant in Hugging Face transformers: an 8-bit cache that the attention reads as it is.

Importing this module registers the attention implementation "kvquant"::

    from kvquant.integrations.transformers import KVQuantCache

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvquant")
    model.generate(**inputs, past_key_values=KVQuantCache(model))
"""

from kvquant.integrations.transformers._version import CACHE_ARGUMENT  # first: checks the version
from kvquant.integrations.transformers.attention import kvquant_attention, register
from kvquant.integrations.transformers.cache import KVQuantCache
from kvquant.integrations.transformers.handle import QuantizedHandle
from kvquant.integrations.transformers.mask import kvquant_mask

__all__ = [
    "CACHE_ARGUMENT",
    "KVQuantCache",
    "QuantizedHandle",
    "kvquant_attention",
    "kvquant_mask",
    "register",
]

register()
