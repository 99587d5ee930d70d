"""The operations as torch sees them: schemas, fakes, compilation, gradients, choosing a backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import kvquant
from kvquant import Sequences, backends, ops
from kvquant.fields import flatten
from kvquant.view import Options
from support import BF16, DEFAULT, FORMATS, filled_cache, index, parts, snapshot

OPS = list(ops.OPS)


def plain_parts(device):
    x = torch.randn(2, 2, 20, 32, device=device)
    q, scale, zero = kvquant.quantize_cache_v(x, granularity="channel", group_size=16)
    return x, q, scale, zero


def arguments(name, device, fmt=DEFAULT):
    """Positional arguments of an operation; view without NaN, which no check could compare."""
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
    view = cache.view
    for tensor in parts(view).values():
        torch.nan_to_num(tensor, out=tensor) if tensor.is_floating_point() else None
    if name == "gather_":
        out = [torch.zeros(2, 48, 2, n, device=device, dtype=BF16) for n in (64, 48)]
        seqs = Sequences(cache.table, cache.lens, index([2, 0], device))
        return *out, *flatten(view), *flatten(seqs)
    if name == "append_":
        key, value = (torch.randn(6, 2, n, device=device, dtype=BF16) for n in (64, 48))
        seqs = Sequences(
            cache.table, index([30, 5], device), None, index([0, 4, 6], device), 4, advance=True
        )
        return key, value, None, *flatten(view), *flatten(seqs)
    query = torch.randn(2, 3, 4, 64, device=device, dtype=BF16)
    key, value = (torch.randn(2, 3, 2, n, device=device, dtype=BF16) for n in (64, 48))
    out, lse = query.new_zeros(2, 3, 4, 48), torch.zeros(2, 3, 4, device=device)
    seqs = Sequences(cache.table, index([30, 2], device), advance=True)
    options = Options(0.125, True, 20, 30.0, 512)
    sinks = torch.rand(4, device=device)
    call = (query, key, value, sinks, None, out, lse)
    return *call, *flatten(view), *flatten(seqs), *flatten(options)


def test_every_operation_is_tested():
    assert {"quantize", "dequantize", "qk_matmul", "pv_matmul"} | {
        "append_", "gather_", "attend_"
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
    view = cache.view
    return {
        "quantize": (kvquant.quantize_cache_v, x),
        "dequantize": (
            lambda q: kvquant.dequantize_cache_torch(q, scale, zero, group_size=16), q,
        ),
        "qk_matmul": (lambda x: kvquant.qk_matmul(x, q, scale, zero, group_size=16), x),
        "pv_matmul": (
            lambda p: kvquant.pv_matmul(p, q, scale, zero, group_size=16), x[..., :20].contiguous(),
        ),
        "append_": (lambda key: kvquant.append_(key, value, view, **where), key),
        "gather_": (lambda lens: kvquant.gather(view, **{**where, "seq_lens": lens}), lens),
        "attend_": (
            lambda query: kvquant.attention(query, view, **where, return_lse=True), query,
        ),
        "fused": (
            lambda query: kvquant.attention(query, view, **where, key=key, value=value), query,
        ),
    }, view  # fmt: skip


@pytest.mark.parametrize("name", [*OPS, "fused"])
def test_compiles_whole(backend, device, name):
    torch._dynamo.reset()
    (table, view) = functions(device)
    function, argument = table[name]
    before = snapshot(view)
    eager = function(argument)
    changed = snapshot(view)
    for key, tensor in parts(view).items():
        tensor.copy_(before[key])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(argument)
    torch.testing.assert_close(compiled, eager, atol=0, rtol=0)
    for key, tensor in parts(view).items():
        torch.testing.assert_close(tensor, changed[key], atol=0, rtol=0, equal_nan=True)


def test_compiled_decode_step_mutates_storage_and_lengths(backend, device):
    torch._dynamo.reset()
    caches = [filled_cache([40, 7], block=16, device=device) for _ in range(2)]
    caches[1].view.k.codes.copy_(caches[0].view.k.codes)
    for name, tensor in parts(caches[1].view).items():
        tensor.copy_(parts(caches[0].view)[name])
    caches[1].table.copy_(caches[0].table)

    def step(cache, lens, query, key, value):
        where = {"block_table": cache.table, "seq_lens": lens}
        kvquant.append_(key, value, cache.view, **where, advance=True)
        return kvquant.attention(query, cache.view, **where)

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

    real = arguments("quantize", "cpu")
    attend = arguments("attend_", "cpu")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real]
        q, scale, _ = torch.ops.kvquant.quantize(*fake)
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in attend]
        torch.ops.kvquant.attend_(*fake)
    assert (q.shape, q.dtype) == ((2, 2, 20, 32), torch.uint8)
    assert scale.shape == (2, 2, 2, 32)


def test_gradients_are_refused_by_name(backend, device):
    x, q, scale, zero = plain_parts(device)
    cache = filled_cache([4, 4], block=16, device=device)
    where = {"block_table": cache.table, "seq_lens": cache.lens}
    rows = torch.randn(2, 1, 2, 64, device=device)
    loose = rows.clone().requires_grad_()
    calls = {
        "x": lambda t: kvquant.quantize_cache_v(t),
        "query": lambda t: kvquant.qk_matmul(t, q, scale, zero, group_size=16),
        "key": lambda _: kvquant.append_(loose, rows, cache.view, **where),
        "value": lambda _: kvquant.append_(rows, loose, cache.view, **where),
    }
    for name, function in calls.items():
        with pytest.raises(ValueError, match=f"{name}: requires grad"):
            function(x.requires_grad_())
    with pytest.raises(ValueError, match="query: requires grad"):
        kvquant.attention(loose, cache.view, **where)
    with torch.no_grad():
        out = kvquant.attention(loose, cache.view, **where)
    assert not out.requires_grad
    with torch.inference_mode():
        kvquant.attention(loose, cache.view, **where)


def test_use_backend_is_a_scope(device):
    where = torch.empty(0, device=device).device
    usual = backends.choose(where)[0].name
    with kvquant.use_backend("reference"):
        assert backends.choose(where) == (
            backends.REFERENCE, "forced by use_backend or KVQUANT_BACKEND"
        )  # fmt: skip
    assert backends.choose(where)[0].name == usual
    with pytest.raises(RuntimeError, match="inside"), kvquant.use_backend("reference"):
        raise RuntimeError("inside")
    assert backends.choose(where)[0].name == usual


def test_use_backend_refuses_unknown_names():
    with pytest.raises(ValueError, match="name: expected 'auto' or 'reference', got 'cuda'"):
        kvquant.use_backend("cuda").__enter__()


@pytest.mark.parametrize("value", ["reference", "nonsense"])
def test_environment_forces_a_backend(value):
    code = (
        "import torch; from kvquant import backends;"
        "print(backends.choose(torch.device('cpu'))[0].name)"
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
    monkeypatch.setattr(backends, "_reported", set())
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
    assert kvquant.attention(query, cache.view, **where).isfinite().all()
    backend, reason = backends.choose(cache.view.device, cache.view.spec)
    assert backend.name == "reference"
    assert "272" in reason
