"""The operations as torch sees them: schemas, fakes, compilation, gradients, choosing a backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import kvquant
from kvquant import ops
from support import BF16, DEFAULT, FORMATS, filled_cache, index, snapshot

OPS = list(ops.OPS)


def plain_parts(device):
    x = torch.randn(2, 2, 20, 32, device=device)
    q, scale, zero = kvquant.quantize_cache_v(x, granularity="channel", group_size=16)
    return x, q, scale, zero


def arguments(name, device, fmt=DEFAULT):
    """Positional arguments of an operation; storage without NaN, which no check could compare."""
    x, q, scale, zero = plain_parts(device)
    if name == "quantize":
        return x, 0.0, 255.0, "channel", 16
    if name == "dequantize":
        return q, scale, zero, 16, BF16
    if name == "qk_matmul":
        return torch.randn(2, 4, 3, 32, device=device), q, scale, zero, 16
    if name == "pv_matmul":
        return torch.rand(2, 4, 3, 20, device=device), q, scale, zero, 16
    cache = filled_cache([40, 7], block=16, fmt=fmt, v_dim=48, device=device)
    storage = cache.storage
    for tensor in storage.tensors.values():
        torch.nan_to_num(tensor, out=tensor) if tensor.is_floating_point() else None
    layer = (storage.k_data, storage.k_params, storage.k_mean, storage.v_data, storage.v_params)
    form = (fmt.mean_group, fmt.k_rotation(64), fmt.v_rotation(48))
    if name == "gather":
        return *layer, cache.table, cache.lens, index([2, 0], device), *form, 48, BF16
    if name == "append_":
        key, value = (torch.randn(6, 2, n, device=device, dtype=BF16) for n in (64, 48))
        rows = index([0, 4, 6], device)
        lens = index([30, 5], device)
        return key, value, *layer, cache.table, lens, rows, None, None, *form, 4, True
    query = torch.randn(2, 3, 4, 64, device=device, dtype=BF16)
    sinks = torch.rand(4, device=device)
    rest = (3, 0.125, True, 20, 30.0, 512, True)
    return query, *layer, cache.table, cache.lens, None, None, sinks, None, *form, *rest


def test_every_operation_is_tested():
    assert {"quantize", "dequantize", "qk_matmul", "pv_matmul"} | {
        "append_", "gather", "attention"
    } == set(OPS)  # fmt: skip


@pytest.mark.parametrize("fmt", ["plain", "default"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend, device, name, fmt):
    operation = getattr(torch.ops.kvquant, name).default
    torch.library.opcheck(operation, arguments(name, device, FORMATS[fmt]))


def test_opcheck_of_strided_input(backend, device):
    x = torch.randn(2, 20, 3, 32, device=device).transpose(1, 2)
    for granularity in ("token", "head", "channel"):
        torch.library.opcheck(torch.ops.kvquant.quantize.default, (x, 0.0, 255.0, granularity, 16))


def functions(device):
    """Each public function as a closure over its tensors, to be compiled whole."""
    x, q, scale, zero = plain_parts(device)
    cache = filled_cache([40, 7], block=16, v_dim=48, device=device)
    lens = index([30, 5], device)
    key, value = (torch.randn(2, 2, 2, n, device=device, dtype=BF16) for n in (64, 48))
    query = torch.randn(2, 2, 4, 64, device=device, dtype=BF16)
    where = {"block_table": cache.table, "seq_lens": lens}
    storage = cache.storage
    return {
        "quantize": (kvquant.quantize_cache_v, x),
        "dequantize": (
            lambda q: kvquant.dequantize_cache_torch(q, scale, zero, group_size=16), q,
        ),
        "qk_matmul": (lambda x: kvquant.qk_matmul(x, q, scale, zero, group_size=16), x),
        "pv_matmul": (
            lambda p: kvquant.pv_matmul(p, q, scale, zero, group_size=16), x[..., :20].contiguous(),
        ),
        "append_": (lambda key: kvquant.append_(key, value, storage, **where), key),
        "gather": (lambda lens: kvquant.gather(storage, **where | {"seq_lens": lens}), lens),
        "attention": (
            lambda query: kvquant.attention(query, storage, **where, return_lse=True), query,
        ),
        "fused": (
            lambda query: kvquant.attention(query, storage, **where, key=key, value=value), query,
        ),
    }, storage  # fmt: skip


@pytest.mark.parametrize("name", [*OPS, "fused"])
def test_compiles_whole(backend, device, name):
    torch._dynamo.reset()
    (table, storage) = functions(device)
    function, argument = table[name]
    before = snapshot(storage)
    eager = function(argument)
    changed = snapshot(storage)
    for key, tensor in storage.tensors.items():
        tensor.copy_(before[key])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(argument)
    torch.testing.assert_close(compiled, eager, atol=0, rtol=0)
    for key, tensor in storage.tensors.items():
        torch.testing.assert_close(tensor, changed[key], atol=0, rtol=0, equal_nan=True)


def test_compiled_decode_step_mutates_storage_and_lengths(backend, device):
    torch._dynamo.reset()
    caches = [filled_cache([40, 7], block=16, device=device) for _ in range(2)]
    caches[1].storage.k_data.copy_(caches[0].storage.k_data)
    for name, tensor in caches[1].storage.tensors.items():
        tensor.copy_(getattr(caches[0].storage, name))
    caches[1].table.copy_(caches[0].table)

    def step(cache, lens, query, key, value):
        where = {"block_table": cache.table, "seq_lens": lens}
        kvquant.append_(key, value, cache.storage, **where, advance=True)
        return kvquant.attention(query, cache.storage, **where)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    lens = [index([30, 5], device) for _ in range(2)]
    for _ in range(2):
        key, value = torch.randn(2, 2, 1, 2, 64, device=device, dtype=BF16)
        query = torch.randn(2, 1, 4, 64, device=device, dtype=BF16)
        a = step(caches[0], lens[0], query, key, value)
        b = compiled(caches[1], lens[1], query, key, value)
        assert torch.equal(a, b)
    assert lens[0].tolist() == lens[1].tolist() == [32, 7]


def test_fakes_need_no_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = arguments("attention", "cpu")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real]
        out, lse = torch.ops.kvquant.attention(*fake)
    assert (out.shape, out.dtype) == ((2, 3, 4, 48), BF16)
    assert (lse.shape, lse.dtype) == ((2, 3, 4), torch.float32)


def test_gradients_are_refused_by_name(backend, device):
    x, q, scale, zero = plain_parts(device)
    cache = filled_cache([4, 4], block=16, device=device)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    rows = torch.randn(2, 1, 2, 64, device=device)
    loose = rows.clone().requires_grad_()
    calls = {
        "x": lambda t: kvquant.quantize_cache_v(t),
        "query": lambda t: kvquant.qk_matmul(t, q, scale, zero, group_size=16),
        "key": lambda _: kvquant.append_(loose, rows, cache.storage, **where),
        "value": lambda _: kvquant.append_(rows, loose, cache.storage, **where),
    }
    for name, function in calls.items():
        with pytest.raises(ValueError, match=f"{name}: requires grad"):
            function(x.requires_grad_())
    with pytest.raises(ValueError, match="query: requires grad"):
        kvquant.attention(loose, cache.storage, **where)
    with torch.no_grad():
        out = kvquant.attention(loose, cache.storage, **where)
    assert not out.requires_grad
    with torch.inference_mode():
        kvquant.attention(loose, cache.storage, **where)


def test_use_backend_is_a_scope(device):
    x = torch.empty(1, 1, 1, 16, device=device)
    usual = ops.choose("quantize", (x,))[0].name
    with kvquant.use_backend("reference"):
        assert ops.choose("quantize", (x,)) == (
            ops._backends["reference"], "forced by use_backend or KVQUANT_BACKEND"
        )  # fmt: skip
    assert ops.choose("quantize", (x,))[0].name == usual
    with pytest.raises(RuntimeError, match="inside"), kvquant.use_backend("reference"):
        raise RuntimeError("inside")
    assert ops.choose("quantize", (x,))[0].name == usual


def test_use_backend_refuses_unknown_names():
    with pytest.raises(ValueError, match="name: expected 'auto' or 'reference', got 'cuda'"):
        kvquant.use_backend("cuda").__enter__()


@pytest.mark.parametrize("value", ["reference", "nonsense"])
def test_environment_forces_a_backend(value):
    code = (
        "import torch; from kvquant import ops;"
        "print(ops.choose('quantize', (torch.empty(1, 1, 1, 16),))[0].name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KVQUANT_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    if value == "reference":
        assert result.stdout.strip() == "reference", result.stderr
    else:
        assert "KVQUANT_BACKEND: expected 'auto' or 'reference', got 'nonsense'" in result.stderr


def test_the_reference_says_once_that_it_serves(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_reported", set())
    x = torch.randn(1, 1, 4, 16)
    with caplog.at_level(logging.WARNING, "kvquant"), kvquant.use_backend("reference"):
        for _ in range(3):
            q, scale, zero = kvquant.quantize_cache_v(x)
        assert [r.getMessage() for r in caplog.records] == [
            "quantize runs on the torch reference: forced by use_backend or KVQUANT_BACKEND"
        ]
        kvquant.dequantize_cache_torch(q, scale, zero)
    assert len(caplog.records) == 2


def test_a_head_dim_without_kernels_takes_the_reference(native):
    cache = filled_cache([5], k_dim=272, v_dim=272, device=native)
    query = torch.randn(1, 1, 2, 272, device=native, dtype=BF16)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    assert kvquant.attention(query, cache.storage, **where).isfinite().all()
    backend, reason = ops.choose("append_", (query, query, *[cache.storage.k_data] * 4))
    assert backend.name == "reference"
    assert "272" in reason
