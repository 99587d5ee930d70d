"""A cache as tensors by name, the same whatever its blocks; files of them, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from kvquant._checks import check_affine, require
from kvquant._config import CacheConfig
from kvquant._state import CacheState
from kvquant.errors import CacheFullError
from kvquant.formats import CacheFormat
from kvquant.storage import LayerStorage

if TYPE_CHECKING:
    from kvquant.cache import QuantizedKVCache

    Cache = TypeVar("Cache", bound=QuantizedKVCache)

AffineRows: TypeAlias = tuple[Tensor, Tensor, Tensor]
LayerPast: TypeAlias = tuple[AffineRows, AffineRows]

__all__ = [
    "LayerPast",
    "check_state",
    "fill",
    "from_layer_past",
    "layer_past",
    "load",
    "read_layer",
    "save",
    "state_dict",
]

_MAGIC, _VERSION = "kvquant", 1
_DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float16, torch.bfloat16, torch.float32)}


# ------------------------------------------------------------------------------- rows in and out


def _mean_groups(config: CacheConfig, tokens: int) -> int:
    group = config.format.mean_group
    return -(-tokens // group) if group else 0


def _shapes(config: CacheConfig, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of a layer's tensors in a state dict."""
    lead = config.batch_size, config.kv_heads
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "k_data": ((*lead, tokens, config.k_dim), torch.uint8),
        "k_params": ((*lead, tokens, 2), torch.float16),
        "v_data": ((*lead, tokens, config.v_dim), torch.uint8),
        "v_params": ((*lead, tokens, 2), torch.float16),
    }
    if config.format.key_mean is not None:
        shapes["k_mean"] = (*lead, _mean_groups(config, tokens), config.k_dim), torch.float16
    return shapes


def _pieces(
    state: CacheState, storage: LayerStorage, name: str, sequence: int, tokens: int
) -> list[tuple[Tensor, int, int]]:
    """Views (heads, rows, width) of a sequence's rows, each with its (begin, end) in order."""
    config, blocks = state.config, state.tables.owned[sequence]
    size, count, every = storage.block_size, tokens, 1
    if name == "k_mean":
        group = config.format.mean_group
        count, every = _mean_groups(config, tokens), max(1, group // size)
        size = max(1, -(-size // group))
    tensor = storage.tensors[name]
    starts = range(0, count, size)
    return [
        (tensor[block, :, : min(size, count - start)], start, min(start + size, count))
        for block, start in zip(blocks[::every], starts, strict=False)
    ]


def read_layer(state: CacheState, layer: int) -> dict[str, Tensor]:
    """A layer's tensors in the order of tokens, zero where a sequence has none."""
    storage, lengths = state.pool.layers[layer], state.bounds(layer)
    result = {}
    for name, (shape, dtype) in _shapes(state.config, state.high[layer]).items():
        rows = torch.zeros(shape, dtype=dtype, device=state.config.device)
        for b, length in enumerate(lengths):
            for part, begin, end in _pieces(state, storage, name, b, length):
                rows[b, :, begin:end] = part
        result[name] = rows
    return result


def state_dict(state: CacheState) -> dict[str, Tensor]:
    """See `QuantizedKVCache.state_dict`."""
    state.settle()
    result = {"format": _format_tensor(state.config.format), "seq_lens": state.seq_lens.clone()}
    if state.seq_starts is not None:
        result["seq_starts"] = state.seq_starts.clone()
    for layer in range(state.config.num_layers):
        for name, rows in read_layer(state, layer).items():
            result[f"layers.{layer}.{name}"] = rows
    return result


def _format_tensor(format: CacheFormat) -> Tensor:
    fields = (
        format.bits, int(format.key_rotation), format.mean_group, int(format.value_rotation)
    )  # fmt: skip
    return torch.tensor([_VERSION, *fields], dtype=torch.int64)


def check_state(tensors: Mapping[str, Tensor], config: CacheConfig) -> None:
    """Refuse a state dict that is not whole, or not of ``config``'s shapes and format."""

    def expect(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require(name in tensors, f"{name}: missing")
        x = tensors[name]
        require(x.dtype == dtype, f"{name}: expected {dtype}, got {x.dtype}", TypeError)
        require(
            tuple(x.shape) == shape, f"{name}: expected shape {list(shape)}, got {list(x.shape)}"
        )
        return x

    wanted, (batch, layers) = {"format", "seq_lens"}, (config.batch_size, config.num_layers)
    ours, theirs = _format_tensor(config.format), expect("format", (5,), torch.int64)
    require(
        torch.equal(ours, theirs.cpu()),
        f"format: expected {ours.tolist()}, got {theirs.tolist()} "
        "(version, bits, key_rotation, key_mean, value_rotation)",
    )
    lengths = expect("seq_lens", (layers, batch), torch.int32).tolist()
    require(min(map(min, lengths)) >= 0, f"seq_lens: expected no negative length, got {lengths}")
    longest, capacity = max(map(max, lengths)), config.capacity
    require(
        capacity is None or longest <= capacity,
        f"seq_lens: {longest} tokens, but the cache takes {capacity}",
        CacheFullError,
    )
    if "seq_starts" in tensors:
        expect("seq_starts", (batch,), torch.int32)
        wanted.add("seq_starts")
    for layer, of_layer in enumerate(lengths):
        for name, (shape, dtype) in _shapes(config, max(of_layer)).items():
            expect(f"layers.{layer}.{name}", shape, dtype)
            wanted.add(f"layers.{layer}.{name}")
    unknown = sorted(tensors.keys() - wanted)
    require(not unknown, f"unexpected tensors: {', '.join(unknown[:5])}")


def fill(state: CacheState, tensors: Mapping[str, Tensor]) -> None:
    """Write a checked state dict into an empty state."""
    lengths: list[list[int]] = tensors["seq_lens"].tolist()
    for layer, of_layer in enumerate(lengths):
        state.make_room(layer, of_layer)
    for layer, of_layer in enumerate(lengths):
        storage = state.pool.layers[layer]
        for name in _shapes(state.config, 0):
            rows = tensors[f"layers.{layer}.{name}"]
            for b, length in enumerate(of_layer):
                for part, begin, end in _pieces(state, storage, name, b, length):
                    part.copy_(rows[b, :, begin:end])
    state.seq_lens.copy_(tensors["seq_lens"])
    starts = tensors.get("seq_starts")
    state.seq_starts = None if starts is None else starts.to(state.config.device, copy=True)
    state.set_bounds(lengths)


# -------------------------------------------------------------------------------------- Qwen's form


def layer_past(state: CacheState, layer: int) -> LayerPast:
    """See `QuantizedKVCache.layer_past`."""
    require(
        state.config.format.is_plain,
        "format: (q, scale, zero) exist only for a cache with CacheFormat.plain()",
    )
    state.settle()
    lengths = state.bounds(layer)
    require(len(set(lengths)) == 1, f"seq_lens: expected sequences of one length, got {lengths}")
    rows = read_layer(state, layer)
    return _affine(rows["k_data"], rows["k_params"]), _affine(rows["v_data"], rows["v_params"])


def _affine(q: Tensor, params: Tensor) -> AffineRows:
    scale, offset = params.float().split(1, -1)
    return q, scale, -offset / scale


def from_layer_past(
    cls: type[Cache],
    past: Sequence[LayerPast],
    max_seq_len: int | None,
    block_size: int | None,
    dtype: torch.dtype,
) -> Cache:
    """See `QuantizedKVCache.from_layer_past`."""
    require(len(past) > 0, "past: expected at least one layer")
    first_key, first_value = past[0][0][0], past[0][1][0]
    tensors: dict[str, Tensor] = {}
    for layer, pair in enumerate(past):
        for letter, (q, scale, zero), first in zip(
            "kv", pair, (first_key, first_value), strict=True
        ):
            name = f"past[{layer}]: {letter}"
            check_affine(f"{name}: q", q, scale, zero, None)
            b, h, s, _ = q.shape
            require(
                q.shape == (*first_key.shape[:3], first.shape[3]) and q.device == first_key.device,
                f"{name}: expected shape {[*first_key.shape[:3], first.shape[3]]} on "
                f"{first_key.device}, got {list(q.shape)} on {q.device}",
            )
            require(
                scale.shape[2:] in ((s, 1), (1, 1)),
                f"{name}: expected a scale a token or a head, got shape {list(scale.shape)}",
            )
            params = torch.stack([scale.float(), -zero.float() * scale.float()], -1)
            half = params.half()
            require(
                not bool((half.isinf() | (half.isnan() != params.isnan())).any()),
                f"{name}: scale, or scale * zero, is beyond float16",
            )
            half = half.where(~half.isnan().any(-1, keepdim=True), torch.nan)
            tensors[f"layers.{layer}.{letter}_data"] = q
            tensors[f"layers.{layer}.{letter}_params"] = half[..., 0, :].expand(b, h, s, 2)
    b, h, s, k_dim = first_key.shape
    tensors["seq_lens"] = torch.full((len(past), b), s, dtype=torch.int32)
    cache = cls(
        len(past),
        b,
        h,
        k_dim,
        v_head_dim=first_value.shape[3],
        max_seq_len=max_seq_len,
        block_size=block_size,
        format=CacheFormat.plain(),
        dtype=dtype,
        device=first_key.device,
    )
    fill(cache._state, tensors)
    return cache


# -------------------------------------------------------------------------------------------- files


def _safetensors() -> tuple[ModuleType, ModuleType]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "QuantizedKVCache.save and load need safetensors: pip install safetensors"
        ) from error
    return safetensors, safetensors.torch


def save(state: CacheState, dtype: torch.dtype, path: str | os.PathLike[str]) -> None:
    """See `QuantizedKVCache.save`. The file appears complete or not at all."""
    _, files = _safetensors()
    config = state.config
    header = {
        "version": _VERSION,
        "format": {
            "bits": config.format.bits,
            "key_rotation": config.format.key_rotation,
            "key_mean": config.format.key_mean,
            "value_rotation": config.format.value_rotation,
        },
        "num_layers": config.num_layers,
        "batch_size": config.batch_size,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.k_dim,
        "v_head_dim": config.v_dim,
        "max_seq_len": config.max_seq_len,
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {name: x.cpu() for name, x in state_dict(state).items()}
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        files.save_file(tensors, part, {"magic": _MAGIC, "cache": json.dumps(header)})
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load(
    cls: type[Cache], path: str | os.PathLike[str], device: torch.device | str | int | None
) -> Cache:
    """See `QuantizedKVCache.load`."""
    package, _ = _safetensors()
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    try:
        with package.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            options = _options(metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"{name}: cut off, or no safetensors file ({error})") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        check_state(tensors, _config(options))
        cache = cls(**options, device=device)
        fill(cache._state, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return cache


def _config(options: Mapping[str, Any]) -> CacheConfig:
    """What a file says about itself, before anything is allocated for it."""
    names = {"num_kv_heads": "kv_heads", "head_dim": "k_dim", "v_head_dim": "v_dim"}
    fields = {names.get(key, key): x for key, x in options.items() if key != "dtype"}
    return CacheConfig(**fields, device=torch.device("cpu"))


def _options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The constructor's arguments from a file's metadata."""
    require(metadata.get("magic") == _MAGIC, "not a file of kvquant's")
    try:
        header: dict[str, Any] = json.loads(metadata["cache"])
        version = header.pop("version")
        require(version == _VERSION, f"file version {version}, but this kvquant reads {_VERSION}")
        header["format"] = CacheFormat(**header["format"])
        header["dtype"] = _DTYPES[header["dtype"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the header does not hold together ({error!r})") from error
    return header
