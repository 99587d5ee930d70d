"""Caches as safetensors files; nothing is allocated on the word of a file's header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..arguments import FLOATS, check_device, check_integer, require
from ..errors import CacheFullError
from ..formats import CacheFormat
from .blocks import ceil_to
from .config import CacheConfig, check_layers
from .serialize import (
    ANY_ROWS,
    BY_LAYER,
    INT8,
    blocks_for,
    check_state,
    restore,
    state_dict,
    version_of,
)
from .state import CacheState

__all__ = ["load", "save"]

_MAGIC = "kvquant"
_DTYPES = {str(x).removeprefix("torch."): x for x in FLOATS}
_SIZES = (  # in the header, as in CacheConfig
    "num_layers", "batch_size", "num_kv_heads", "head_dim", "v_head_dim", "max_seq_len",
    "block_size", "num_blocks",
)  # fmt: skip
_OPTIONS = ("key_rotation", "key_mean", "value_rotation")
_ROWS = ("key", "value", *_OPTIONS, "by_age")
_FORMAT = {INT8: ("bits", *_OPTIONS), ANY_ROWS: _ROWS, BY_LAYER: _ROWS}  # by version
# A cache may take this many times the bytes of its file, and some: blocks of 256 tokens with one
# in each are the natural worst case.
_MOST_TIMES, _MOST_MORE = 256, 32 << 20


def _safetensors() -> tuple[ModuleType, ModuleType]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "QuantizedKVCache.save and load need safetensors: pip install safetensors"
        ) from error
    return safetensors, safetensors.torch


def _name_of(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None


def save(state: CacheState, dtype: torch.dtype, path: str | os.PathLike[str]) -> None:
    """See `QuantizedKVCache.save`. The file appears complete or not at all."""
    name = _name_of(path)
    _, files = _safetensors()
    config = state.config
    version = version_of(config)
    formats = [
        {field: getattr(format, field, 8) for field in _FORMAT[version]}
        for format in config.formats
    ]
    header = {
        "version": version,
        "format": formats[0] if config.is_uniform else formats,
        **{field: getattr(config, field) for field in _SIZES},
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {key: x.cpu() for key, x in state_dict(state).items()}
    part = f"{name}.{os.getpid()}.part"
    try:
        files.save_file(tensors, part, {"magic": _MAGIC, "cache": json.dumps(header)})
        os.replace(part, name)
    finally:
        if os.path.exists(part):
            os.remove(part)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except RuntimeError as error:  # torch's word on a shape that no tensor can have
            raise ValueError(f"{name}: {error}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | int | None,
    sizes: Mapping[str, int | None],
) -> tuple[CacheState, torch.dtype]:
    """See `QuantizedKVCache.load`; ``sizes``: what takes the place of the header's."""
    name = _name_of(path)
    chosen = {key: check_integer(key, x, 1) for key, x in sizes.items() if x is not None}
    target = check_device("device", device)
    package, _ = _safetensors()
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    try:
        with package.safe_open(name, framework="pt") as file:
            config, dtype = _read_header(file.metadata() or {}, chosen, target)
            tensors = _Tensors(file)
            check_state(tensors, replace(config, max_seq_len=None, num_blocks=None))
            _check_fit(config, tensors, chosen)
            _check_memory(config, tensors["seq_lens"], os.path.getsize(name))
            at_once = "max_seq_len" in chosen or "num_blocks" in chosen
            return restore(config, tensors, allocate=at_once), dtype
    except package.SafetensorError as error:
        raise ValueError(f"{name}: cut off, or no safetensors file ({error})") from error
    except CacheFullError as error:
        raise CacheFullError(f"{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _read_header(
    metadata: Mapping[str, str], chosen: Mapping[str, int], device: torch.device
) -> tuple[CacheConfig, torch.dtype]:
    """What a file says of itself; every field is there, and of its type."""
    require(metadata.get("magic") == _MAGIC, "not a file of kvquant's")
    try:
        header = json.loads(metadata["cache"])
        require(isinstance(header, dict), "it is no object")
        version = header.pop("version")
        require(
            type(version) is int and version in _FORMAT,
            f"file version {version}, but this kvquant reads {', '.join(map(str, _FORMAT))}",
        )
        format, dtype = header.pop("format"), _DTYPES[header.pop("dtype")]
        require(
            isinstance(format, list) == (version == BY_LAYER),
            f"format: expected {'a list' if version == BY_LAYER else 'an object'}",
        )
        of_layers = format if isinstance(format, list) else [format]
        require(all(isinstance(of, dict) for of in of_layers), "format is no object")
        for found, wanted in (
            (header.keys(), {*_SIZES}),
            *((of.keys(), {*_FORMAT[version]}) for of in of_layers),
        ):
            missing, unknown = sorted(wanted - found), sorted(found - wanted)
            require(not (missing or unknown), f"missing {missing}, unknown {unknown}")
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the header does not hold together ({error!r:.200})") from error
    size, blocks = header["block_size"], header["num_blocks"]
    if "block_size" in chosen and isinstance(size, int) and isinstance(blocks, int):
        header["num_blocks"] = ceil_to(blocks * size, chosen["block_size"]) // chosen["block_size"]
    sizes = {key: chosen.get(key, x) for key, x in header.items()}
    formats = [_read_format(fields) for fields in of_layers]
    config = CacheConfig(
        formats=CacheFormat.of_layers(
            formats if version == BY_LAYER else formats[0], check_layers(sizes["num_layers"])
        ),
        device=device,
        **sizes,
    )
    require(
        version_of(config) == version,
        f"file version {version}, but a cache of {_pairs(config)} has {version_of(config)}",
    )
    return config, dtype


def _read_format(fields: dict[str, Any]) -> CacheFormat:
    """A format as a header has it."""
    if "bits" in fields:
        bits = check_integer("bits", fields.pop("bits"))
        require(bits == 8, f"bits: expected 8, got {bits}")
    require(fields["value_rotation"] is not None, "value_rotation: expected a flag, got None")
    return CacheFormat(**fields)


def _pairs(config: CacheConfig) -> str:
    """The row formats of keys and values, each pair once."""
    pairs = dict.fromkeys(f"{format.key} and {format.value}" for format in config.formats)
    return ", ".join(pairs)


def _check_fit(
    config: CacheConfig, tensors: Mapping[str, Tensor], chosen: Mapping[str, int]
) -> None:
    """Refuse sizes that the stored tokens do not fit."""
    longest, capacity = int(tensors["seq_lens"].max()), config.capacity
    if capacity is not None and longest > capacity:
        name = next((key for key in ("max_seq_len", "num_blocks") if key in chosen), "seq_lens")
        raise CacheFullError(f"{name}: {longest} tokens are stored, but it would take {capacity}")
    if "num_blocks" in chosen and (needed := blocks_for(config, tensors)) > chosen["num_blocks"]:
        raise CacheFullError(
            f"num_blocks: the stored tokens take {needed} blocks, got {chosen['num_blocks']}"
        )


def _check_memory(config: CacheConfig, lengths: Tensor, file_bytes: int) -> None:
    """Refuse blocks so large that a small file would ask for a lot of memory."""
    size = config.block_size
    if size is None:
        return
    rows = sum(ceil_to(n, size) for n in lengths.amax(0).tolist())
    each = (
        rows * format.row_bytes(config.head_dim, config.v_head_dim)
        + format.mean_slots(size) * 2 * config.head_dim * rows // size
        for format in config.formats
    )
    wanted = config.num_kv_heads * sum(each)
    require(
        wanted <= _MOST_TIMES * file_bytes + _MOST_MORE,
        f"block_size: blocks of {size} tokens would take {wanted} bytes for a file of "
        f"{file_bytes}: give load() a smaller block_size",
    )
