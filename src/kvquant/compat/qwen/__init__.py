"""What the documentation of Qwen's first models says about their quantized cache, for any model.

::

    from kvquant.compat.qwen import from_pretrained, generate_batch

    model = from_pretrained(NAME, use_cache_quantization=True)
    answers = generate_batch(model, tokenizer, prompts)

`from_pretrained`, `apply_switches` and `generate_batch` need transformers. The functions of the
original modeling code need torch alone::

    from kvquant.compat.qwen import cache_autogptq_cuda_256
    from kvquant.compat.qwen import dequantize_cache_torch, quantize_cache_v
"""

from ... import dequantize_cache_torch, quantize_cache_v
from . import cache_autogptq_cuda_256
from .batches import generate_batch
from .switches import Switches, apply_switches, from_pretrained

__all__ = [
    "Switches",
    "apply_switches",
    "cache_autogptq_cuda_256",
    "dequantize_cache_torch",
    "from_pretrained",
    "generate_batch",
    "quantize_cache_v",
]
