"""The functions of the extension of this name that Qwen's modeling code compiled and imported.

They keep its names, argument order and results, and take what it did not: any device, float32 and
bfloat16, any number of heads and channels. Products are accumulated in float32.
"""

from __future__ import annotations

from torch import Tensor

from ... import pv_matmul, qk_matmul

__all__ = [
    "vecquant8matmul_batched_column_compression_faster_old",
    "vecquant8matmul_batched_faster_old",
]


def vecquant8matmul_batched_faster_old(
    vec: Tensor, mat: Tensor, mul: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """Add scores of queries against quantized keys to ``mul``.

    Args:
        vec: Queries, ``(batch, heads, queries, head_dim)``.
        mat: uint8 keys, ``(batch, heads, head_dim, tokens)``: ``qk.transpose(-1, -2)``, contiguous
            as in the original's call or (without its copy) not.
        mul: ``(batch, heads, queries, tokens)``, of any float dtype; written in place.
        scales: ``(batch, heads, tokens, 1)``, as `kvquant.quantize_cache_v` gives them.
        zeros: Likewise.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Shapes or devices that do not belong together.
    """
    _check_matrix("mat", mat)
    keys = mat.transpose(-1, -2)
    _add(mul, qk_matmul(vec, keys if keys.stride(-1) == 1 else keys.contiguous(), scales, zeros))


def vecquant8matmul_batched_column_compression_faster_old(
    vec: Tensor, mat: Tensor, mul: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """Add probabilities times quantized values to ``mul``.

    Args:
        vec: Probabilities, ``(batch, heads, queries, tokens)``.
        mat: uint8 values, ``(batch, heads, tokens, head_dim)``.
        mul: ``(batch, heads, queries, head_dim)``, of any float dtype; written in place.
        scales: ``(batch, heads, tokens, 1)``, as `kvquant.quantize_cache_v` gives them.
        zeros: Likewise.

    Raises:
        TypeError: An argument of another type, a dtype that is not supported.
        ValueError: Shapes or devices that do not belong together.
    """
    _check_matrix("mat", mat)
    _add(mul, pv_matmul(vec, mat, scales, zeros))


def _check_matrix(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got shape {list(x.shape)}")


def _add(mul: Tensor, product: Tensor) -> None:
    if not isinstance(mul, Tensor):
        raise TypeError(f"mul: expected a tensor, got {type(mul).__name__}")
    if not mul.is_floating_point():
        raise TypeError(f"mul: expected a floating-point tensor, got {mul.dtype}")
    if mul.shape != product.shape or mul.device != product.device:
        raise ValueError(
            f"mul: expected shape {list(product.shape)} on {product.device}, got "
            f"{list(mul.shape)} on {mul.device}"
        )
    mul.add_(product)
