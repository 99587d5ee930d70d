"""The original extension's functions, and a layer that uses them as the original code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvquant
from compat.qwen_attention import QwenAttention
from kvquant.compat.qwen import cache_autogptq_cuda_256 as original

QK = original.vecquant8matmul_batched_faster_old
PV = original.vecquant8matmul_batched_column_compression_faster_old


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_into_mul(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 4, 37, 64, device=device)
    q, scale, zero = kvquant.quantize_cache_v(x)
    rows = kvquant.dequantize_cache_torch(q, scale, zero).double()
    query = torch.randn(2, 4, 3, 64, device=device, dtype=dtype)
    probs = torch.rand(2, 4, 3, 37, device=device, dtype=dtype).softmax(-1)
    eps = torch.finfo(dtype).eps
    for function, vec, mat, exact in (
        (QK, query, q.transpose(-1, -2).contiguous(), query.double() @ rows.mT),
        (QK, query, q.transpose(-1, -2), query.double() @ rows.mT),
        (PV, probs, q, probs.double() @ rows),
    ):
        mul = torch.ones_like(exact, dtype=dtype)
        assert function(vec, mat, mul, scale, zero) is None
        error = (mul.double() - 1 - exact).abs().max()
        assert error <= (4 * eps + 1e-5) * (1 + exact.abs().max())


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    [
        (QK, {"mat": 3}, TypeError, "mat: expected a tensor, got int"),
        (QK, {"mat": torch.zeros(3, dtype=torch.uint8)}, ValueError, "mat: expected 4 dimensions"),
        (QK, {"mul": torch.zeros(1, 2, 1, 4)}, ValueError, r"mul: expected shape \[1, 2, 1, 8\]"),
        (PV, {"mul": torch.zeros(1, 2, 1, 16).int()}, TypeError, "mul: expected a floating-point"),
        (PV, {"mul": None}, TypeError, "mul: expected a tensor, got NoneType"),
        (PV, {"scales": torch.ones(1, 2, 8, 2)}, ValueError, "scale"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    function: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    q = torch.zeros(1, 2, 8, 16, dtype=torch.uint8)
    pair = torch.ones(1, 2, 8, 1)
    if function is QK:
        arguments = {"vec": torch.ones(1, 2, 1, 16), "mat": q.mT, "mul": torch.zeros(1, 2, 1, 8)}
    else:
        arguments = {"vec": torch.ones(1, 2, 1, 8), "mat": q, "mul": torch.zeros(1, 2, 1, 16)}
    arguments |= {"scales": pair, "zeros": pair, **changed}
    with pytest.raises(error, match=message):
        function(**arguments)
    if isinstance(arguments["mul"], torch.Tensor):
        assert not arguments["mul"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_original_layer_runs(dtype: torch.dtype, device: str, record_property: Any) -> None:
    torch.manual_seed(7)
    layers = [
        QwenAttention(256, 4, use_cache_kernel=use).to(device, dtype) for use in (True, False)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 50, 256, device=device, dtype=dtype)
    pasts: list[Any] = [None, None]
    errors = []
    for tokens in (30, *[1] * 20):  # a prompt and decode steps
        new, x = x[:, :tokens], x[:, tokens:]
        outs = []
        for i, layer in enumerate(layers):
            out, pasts[i] = layer(new, pasts[i])
            outs.append(out.float())
        errors.append(((outs[0] - outs[1]).norm() / outs[1].norm()).item())
    assert all(
        torch.equal(*pair) for of in zip(*pasts, strict=True) for pair in zip(*of, strict=True)
    )
    (qk, scale, zero), _ = pasts[0]
    assert (qk.shape, scale.shape, zero.shape) == ((2, 4, 50, 64), (2, 4, 50, 1), (2, 4, 50, 1))
    record_property("relative_error", max(errors))
    print(f"{device} {dtype}: relative error to the torch path {max(errors):.1e}")
    assert max(errors) < (2e-2 if dtype == torch.bfloat16 else 4e-3)  # the kernels' side is fp16
