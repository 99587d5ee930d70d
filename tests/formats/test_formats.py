"""CacheFormat and CacheView: options, bytes, shapes; and the oracle's own building blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvquant
import oracle
from kvquant import CacheFormat, CacheView
from kvquant.formats import rotation_length
from support import parts


@pytest.mark.parametrize(
    ("head_dim", "length"),
    [(16, 16), (64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256)],
)
def test_rotation_length_is_the_largest_power_of_two_that_divides(head_dim, length):
    assert rotation_length(head_dim) == length
    key, value = CacheFormat().rows
    assert (key.rotation(head_dim), value.rotation(head_dim)) == (length, 1)
    assert CacheFormat(value_rotation=True).rows[1].rotation(head_dim) == length
    assert CacheFormat.plain().rows[0].rotation(head_dim) == 1


def test_default_rotates_keys_and_takes_a_running_mean():
    fmt = CacheFormat()
    assert (fmt.key, fmt.value) == ("int8", "int8")
    assert (fmt.key_rotation, fmt.key_mean, fmt.value_rotation) == (True, 256, False)
    assert fmt.mean_group == 256
    assert not fmt.is_plain


def test_plain_is_plain():
    assert CacheFormat.plain().is_plain
    assert CacheFormat.plain().mean_group == 0
    for option in ({"key_rotation": True}, {"key_mean": 16}, {"value_rotation": True}):
        assert not dataclasses.replace(CacheFormat.plain(), **option).is_plain


def test_names():
    for name in ("int8", "plain", "k8v4", "k4v4"):
        assert CacheFormat.named(name).name == name
    assert CacheFormat.named("int8") == CacheFormat()
    assert CacheFormat(key_mean=64).name is None
    k8v4 = CacheFormat.named("k8v4")
    assert (k8v4.key, k8v4.value, k8v4.value_rotation) == ("int8", "int4", True)
    assert not CacheFormat(value="int4", value_rotation=False).value_rotation
    with pytest.raises(ValueError, match=r"name: expected one of int8, plain, k8v4.*got 'k3v3'"):
        CacheFormat.named("k3v3")
    with pytest.raises(TypeError, match="name: expected a string, got 8"):
        CacheFormat.named(8)


def test_format_is_a_frozen_value():
    assert CacheFormat() == CacheFormat()
    assert len({CacheFormat(), CacheFormat(), CacheFormat.plain()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheFormat().key = "int4"
    with pytest.raises(TypeError):
        CacheFormat(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "int3"}, "key: expected one of int8, int4, got 'int3'"),
        ({"key_mean": 8}, "key_mean: expected None or a power of two from 16 to 2\\*\\*30, got 8"),
        ({"key_mean": 48}, "key_mean: .* got 48"),
        ({"key_mean": 0}, "key_mean: .* got 0"),
        ({"key_mean": -16}, "key_mean: .* got -16"),
    ],
)
def test_format_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CacheFormat(**options)


def test_bytes_of_a_row():
    assert CacheFormat().row_bytes(128, 128) == 2 * 132
    assert CacheFormat().row_bytes(192, 128) == 196 + 132
    assert CacheFormat.named("k8v4").row_bytes(128, 128) == 200
    assert CacheFormat.named("k4v4").row_bytes(128, 128) == 136


@pytest.mark.parametrize(
    ("block_size", "group", "slots"), [(16, 256, 1), (256, 256, 1), (512, 256, 2), (272, 256, 2),
                                       (64, 16, 4), (48, 16, 3), (64, None, 0)]
)  # fmt: skip
def test_mean_slots_of_a_block(block_size, group, slots):
    assert CacheFormat(key_mean=group).mean_slots(block_size) == slots


@pytest.mark.parametrize("fmt", [CacheFormat(), CacheFormat.plain()], ids=["default", "plain"])
def test_storage_shapes_and_bytes(fmt):
    view = CacheView.allocate(3, 2, 32, 64, 128, format=fmt)
    shapes = {name: tuple(tensor.shape) for name, tensor in parts(view).items()}
    wanted = {
        "k_data": (3, 2, 32, 64),
        "k_params": (3, 2, 32, 2),
        "k_mean": (3, 2, 1, 64),
        "v_data": (3, 2, 32, 128),
        "v_params": (3, 2, 32, 2),
    }
    if fmt.is_plain:
        del wanted["k_mean"]
        assert view.mean is None
    assert shapes == wanted
    assert view.block_size == 32
    means = 0 if fmt.is_plain else 3 * 2 * 64 * 2
    assert view.nbytes == 3 * 2 * 32 * fmt.row_bytes(64, 128) + means
    dtypes = {name: tensor.dtype for name, tensor in parts(view).items()}
    assert all(
        dtypes[name] == (torch.uint8 if "data" in name else torch.float16) for name in dtypes
    )


def test_storage_defaults():
    view = CacheView.allocate(1, 1, 16, 64)
    assert view.format == CacheFormat()
    assert view.v.codes.shape[3] == 64


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
def test_oracle_rotation_is_orthonormal_and_its_own_inverse(dim):
    h = oracle.hadamard(dim)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(h @ h.T, eye, atol=1e-14, rtol=0)
    torch.testing.assert_close(h, h.T, atol=0, rtol=0)


def test_oracle_attention_is_softmax_attention():
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64) for n in (3, 5, 5))
    out, _ = oracle.attention(q, k, v)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=oracle.visible(3, 5)
    )
    torch.testing.assert_close(out.transpose(0, 1), wanted)


BAD_VIEWS = {
    "dims": ("k.codes", lambda x: x[0], ValueError, "k.codes: expected 4 dimensions"),
    "dtype": ("k.params", lambda x: x.float(), TypeError, "k.params: expected torch.uint8"),
    "codes": ("v.codes", lambda x: x.char(), TypeError, "v.codes: expected torch.uint8"),
    "rows": ("k.params", lambda x: x[:, :, :8], ValueError, "k.params: expected shape"),
    "blocks": ("v.codes", lambda x: x[:1], ValueError, "v.codes: expected shape"),
    "heads": ("v.params", lambda x: x[:, :1], ValueError, "v.params: expected shape"),
    "slots": ("mean", lambda x: x.repeat(1, 1, 2, 1), ValueError, "mean: expected shape"),
    "mean": ("mean", lambda x: None, ValueError, "mean: expected a tensor with a mean_group"),
    "no tensor": ("v.codes", lambda x: 3, TypeError, "v.codes: expected a tensor, got int"),
    "device": (
        "v.params", lambda x: x.to("meta"), ValueError, "v.params: on meta, but k.codes on",
    ),
    "strides": (
        "k.codes", lambda x: x.repeat(1, 1, 1, 2)[..., :64], ValueError, "k.codes: the rows",
    ),
    "align": (
        "v.codes",
        lambda x: torch.zeros(x.numel() + 1, dtype=torch.uint8)[1:].view_as(x),
        ValueError,
        "v.codes: the rows of a block and head must be contiguous and 16-byte aligned",
    ),
}  # fmt: skip


def test_a_view_of_memory_at_an_odd_address_is_refused(native):
    """A storage may begin anywhere: what its offset does not tell, its address does."""
    view = CacheView.allocate(1, 1, 16, 64, format=CacheFormat.plain(), device=native)
    base = torch.zeros(16 * 64 + 16, dtype=torch.uint8, device=native)
    odd = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(base[8:-8]))
    assert odd.storage_offset() == 0
    wrong = view.replaced(view.tensors | {"v.codes": odd.view(1, 1, 16, 64)})
    index = torch.zeros(1, 1, dtype=torch.int32, device=native)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        kvquant.gather(wrong, block_table=index, seq_lens=index[0])


def test_a_slab_is_laid_out_as_told():
    fmt = CacheFormat(key_mean=16)
    width = fmt.slab_bytes(64, 32, 32)
    assert width == 32 * (64 + 4 + 32 + 4) + 2 * 2 * 64
    buffer = torch.arange(3 * 2 * width).reshape(3, 2, width).to(torch.uint8)
    view = CacheView.slab(buffer, 64, v_head_dim=32, block_size=32, format=fmt)
    assert view.format == fmt
    flat = [view.k.codes, view.v.codes, view.k.params, view.v.params, view.mean]
    assert torch.equal(torch.cat([x.flatten(2) for x in flat], 2), buffer)
    assert view.k.codes.data_ptr() == buffer.data_ptr()


BAD_SLABS = [
    (torch.zeros(2, 2, 100, dtype=torch.uint8), {}, ValueError, "buffer: expected .*at least"),
    (torch.zeros(2, 2, 9999), {}, TypeError, "buffer: expected torch.uint8"),
    (torch.zeros(2, 9999, dtype=torch.uint8), {}, ValueError, "buffer: expected"),
    (torch.zeros(2, 2, 9999, dtype=torch.uint8), {}, ValueError, "buffer: expected slabs at"),
    (torch.zeros(2, 2, 9984, dtype=torch.uint8), {"block_size": 20}, ValueError, "block_size: 20"),
    (torch.zeros(2, 2, 9984, dtype=torch.uint8), {"head_dim": 20}, ValueError, "head_dim: 20"),
    (torch.zeros(2, 2, 9984, dtype=torch.uint8), {"format": 8}, TypeError, "format: expected"),
    ("buffer", {}, TypeError, "buffer: expected a tensor, got str"),
]


@pytest.mark.parametrize(("buffer", "options", "error", "message"), BAD_SLABS)
def test_slabs_that_are_refused(buffer, options, error, message):
    with pytest.raises(error, match=message):
        CacheView.slab(buffer, **{"head_dim": 32, "block_size": 16} | options)


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_a_view_refuses_what_does_not_belong_together(case):
    name, change, error, message = BAD_VIEWS[case]
    view = CacheView.allocate(3, 2, 16, 64, 80)
    with pytest.raises(error, match=message):
        view.replaced(view.tensors | {name: change(view.tensors[name])})
