"""CacheFormat and LayerStorage: options, bytes, shapes; and the oracle's own building blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import oracle
from kvquant import CacheFormat, LayerStorage
from kvquant.formats import rotation_length


@pytest.mark.parametrize(
    ("head_dim", "length"),
    [(16, 16), (64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256)],
)
def test_rotation_length_is_the_largest_power_of_two_that_divides(head_dim, length):
    assert rotation_length(head_dim) == length
    assert CacheFormat().k_rotation(head_dim) == length
    assert CacheFormat().v_rotation(head_dim) == 1
    assert CacheFormat(value_rotation=True).v_rotation(head_dim) == length
    assert CacheFormat.plain().k_rotation(head_dim) == 1


def test_default_rotates_keys_and_takes_a_running_mean():
    fmt = CacheFormat()
    assert (fmt.bits, fmt.key_rotation, fmt.key_mean, fmt.value_rotation) == (8, True, 256, False)
    assert fmt.mean_group == 256
    assert not fmt.is_plain


def test_plain_is_plain():
    assert CacheFormat.plain().is_plain
    assert CacheFormat.plain().mean_group == 0
    for option in ({"key_rotation": True}, {"key_mean": 16}, {"value_rotation": True}):
        assert not dataclasses.replace(CacheFormat.plain(), **option).is_plain


def test_format_is_a_frozen_value():
    assert CacheFormat() == CacheFormat()
    assert len({CacheFormat(), CacheFormat(), CacheFormat.plain()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheFormat().bits = 4
    with pytest.raises(TypeError):
        CacheFormat(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "bits: expected 8, got 4"),
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


@pytest.mark.parametrize(
    ("block_size", "group", "slots"), [(16, 256, 1), (256, 256, 1), (512, 256, 2), (272, 256, 2),
                                       (64, 16, 4), (48, 16, 3), (64, None, 0)]
)  # fmt: skip
def test_mean_slots_of_a_block(block_size, group, slots):
    assert CacheFormat(key_mean=group).mean_slots(block_size) == slots


@pytest.mark.parametrize("fmt", [CacheFormat(), CacheFormat.plain()], ids=["default", "plain"])
def test_storage_shapes_and_bytes(fmt):
    storage = LayerStorage.allocate(3, 2, 32, 64, 128, format=fmt)
    shapes = {name: tuple(tensor.shape) for name, tensor in storage.tensors.items()}
    wanted = {
        "k_data": (3, 2, 32, 64),
        "k_params": (3, 2, 32, 2),
        "k_mean": (3, 2, 1, 64),
        "v_data": (3, 2, 32, 128),
        "v_params": (3, 2, 32, 2),
    }
    if fmt.is_plain:
        del wanted["k_mean"]
        assert storage.k_mean is None
    assert shapes == wanted
    assert storage.block_size == 32
    means = 0 if fmt.is_plain else 3 * 2 * 64 * 2
    assert storage.nbytes == 3 * 2 * 32 * fmt.row_bytes(64, 128) + means
    dtypes = {name: tensor.dtype for name, tensor in storage.tensors.items()}
    assert all(
        dtypes[name] == (torch.uint8 if "data" in name else torch.float16) for name in dtypes
    )


def test_storage_defaults():
    storage = LayerStorage.allocate(1, 1, 16, 64)
    assert storage.format == CacheFormat()
    assert storage.v_data.shape[3] == 64


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


def changed(**parts):
    storage = LayerStorage.allocate(3, 2, 16, 64, 80)
    return {name: part(getattr(storage, name)) for name, part in parts.items()}


BAD_STORAGE = {
    "dims": ({"k_data": lambda x: x[0]}, ValueError, "k_data: expected 4 dimensions"),
    "dtype": ({"k_params": lambda x: x.float()}, TypeError, "k_params: expected torch.float16"),
    "codes": ({"v_data": lambda x: x.char()}, TypeError, "v_data: expected torch.uint8"),
    "rows": ({"k_params": lambda x: x[:, :, :8]}, ValueError, "k_params: expected shape"),
    "blocks": ({"v_data": lambda x: x[:1]}, ValueError, "v_data: expected shape"),
    "heads": ({"v_params": lambda x: x[:, :1]}, ValueError, "v_params: expected shape"),
    "slots": ({"k_mean": lambda x: x.repeat(1, 1, 2, 1)}, ValueError, "k_mean: expected shape"),
    "mean": ({"k_mean": lambda x: None}, ValueError, "k_mean: does not go with"),
    "device": (
        {"v_params": lambda x: x.to("meta")},
        ValueError,
        "v_params: on meta, but k_data on",
    ),
    "strides": (
        {"k_data": lambda x: x.repeat(1, 1, 1, 2)[..., :64]},
        ValueError,
        "k_data: the rows",
    ),
    "align": (
        {"v_data": lambda x: torch.zeros(x.numel() + 1, dtype=torch.uint8)[1:].view_as(x)},
        ValueError,
        "v_data: the rows of a block and head must be contiguous and 16-byte aligned",
    ),
}


@pytest.mark.parametrize("name", BAD_STORAGE)
def test_storage_refuses_what_does_not_belong_together(name):
    parts, error, message = BAD_STORAGE[name]
    with pytest.raises(error, match=message):
        dataclasses.replace(LayerStorage.allocate(3, 2, 16, 64, 80), **changed(**parts))
