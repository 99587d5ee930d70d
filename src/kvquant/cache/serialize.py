"""A cache as tensors by name, the same whatever its blocks; and in Qwen's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_tensor, require
from ..checks import check_affine
from ..errors import CacheFullError
from ..formats import CacheFormat
from .config import CacheConfig
from .state import CacheState
from .young import aged, live_old, live_young, slabs

AffineRows: TypeAlias = tuple[Tensor, Tensor, Tensor]
LayerPast: TypeAlias = tuple[AffineRows, AffineRows]

__all__ = [
    "ANY_ROWS",
    "BY_LAYER",
    "INT8",
    "LayerPast",
    "blocks_for",
    "check_state",
    "fill",
    "from_layer_past",
    "layer_past",
    "read_layer",
    "restore",
    "state_dict",
    "version_of",
]

# Versions of what a state dict holds: the first knows int8 rows alone, the last has a format per
# layer. Each is written where no earlier one will do.
INT8, ANY_ROWS, BY_LAYER = 1, 2, 3


# ------------------------------------------------------------------------------- rows in and out


def _mean_groups(format: CacheFormat, tokens: int) -> int:
    group = format.mean_group
    return -(-tokens // group) if group else 0


# Names of a layer's tensors in a state dict: in its view, and what its bytes are.
_PARTS = {
    "k_data": ("k.codes", torch.uint8),
    "k_params": ("k.params", torch.float16),
    "v_data": ("v.codes", torch.uint8),
    "v_params": ("v.params", torch.float16),
    "k_mean": ("mean", torch.float16),
}
_YOUNG = "young"  # of a format by age: the slabs, zero but for the rows that count


def _shapes(
    config: CacheConfig, layer: int, tokens: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of a layer's tensors in a state dict."""
    format = config.formats[layer]
    widths = {"k_mean": (_mean_groups(format, tokens), 2 * config.head_dim)}
    for x, rows, dim in zip("kv", format.rows, (config.head_dim, config.v_head_dim), strict=True):
        widths[f"{x}_data"] = tokens, rows.code_bytes(dim)
        widths[f"{x}_params"] = tokens, rows.params_bytes(dim)
    lead = config.batch_size, config.num_kv_heads
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: ((*lead, widths[name][0], widths[name][1] // dtype.itemsize), dtype)
        for name, (_, dtype) in _PARTS.items()
        if name != "k_mean" or format.key_mean is not None
    }
    if format.by_age:
        size = format.young_bytes(config.head_dim, config.v_head_dim)
        shapes[_YOUNG] = (*lead, size), torch.uint8
    return shapes


def _pieces(
    state: CacheState, layer: int, name: str, sequence: int, tokens: int
) -> list[tuple[Tensor, int, int]]:
    """Views (heads, rows, width) of a sequence's rows, each with its (begin, end) in order."""
    if not tokens:
        return []
    view, format, blocks = (
        state.view(layer),
        state.config.formats[layer],
        state.blocks.ids[sequence],
    )
    size, count, every = view.block_size, tokens, 1
    if name == "k_mean":
        group = format.mean_group
        count, every = _mean_groups(format, tokens), max(1, group // size)
        size = max(1, -(-size // group))
    at, dtype = _PARTS[name]
    tensor = view.tensors[at].view(dtype)
    starts = range(0, count, size)
    return [
        (tensor[block, :, : min(size, count - start)], start, min(start + size, count))
        for block, start in zip(blocks[::every], starts, strict=False)
    ]


def read_layer(state: CacheState, layer: int) -> dict[str, Tensor]:
    """A layer's tensors in the order of tokens, zero where a sequence has none."""
    require(
        not any(-1 in of for of in state.blocks.ids),
        "the cache has given back tokens behind its sliding window: only whole caches can be saved",
    )
    format, young, lengths = state.config.formats[layer], state.young[layer], state.lengths
    result = {}
    for name, (shape, dtype) in _shapes(state.config, layer, lengths.high[layer]).items():
        if name == _YOUNG and young is not None:
            result[name] = young.clone()
            _clear_young(state.config, format, result[name], lengths.bounds(layer))
            continue
        rows = torch.zeros(shape, dtype=dtype, device=state.config.device)
        for b, length in enumerate(lengths.bounds(layer)):
            counts = _counting(format, name, length)
            for part, begin, end in _pieces(state, layer, name, b, counts.stop):
                rows[b, :, begin:end] = part
            rows[b, :, : counts.start] = 0
        result[name] = rows
    return result


def _counting(format: CacheFormat, name: str, length: int) -> range:
    """Which tokens of a sequence have a row that counts in a part of a view."""
    return range(length) if name == "k_mean" else live_old(format, length)


def _clear_young(
    config: CacheConfig, format: CacheFormat, young: Tensor, lengths: Sequence[int]
) -> None:
    """Zeros in the place of rows that do not count."""
    dead = ~live_young(format, lengths).to(young.device)
    for x in slabs(config, format, young).tensors.values():
        x.masked_fill_(dead[:, None, :, None], 0)


def state_dict(state: CacheState) -> dict[str, Tensor]:
    """See `QuantizedKVCache.state_dict`."""
    state.settle()
    lens = state.lengths.seq_lens.clone()
    result = {"format": _format_tensor(state.config), "seq_lens": lens}
    if state.seq_starts is not None:
        result["seq_starts"] = state.seq_starts.clone()
    for layer in range(state.config.num_layers):
        for name, rows in read_layer(state, layer).items():
            result[f"layers.{layer}.{name}"] = rows
    return result


def version_of(config: CacheConfig) -> int:
    """The first version that can say these formats: older packages read it then."""
    if not config.is_uniform:
        return BY_LAYER
    format = config.formats[0]
    return INT8 if format.key == format.value == "int8" else ANY_ROWS


def _format_tensor(config: CacheConfig) -> Tensor:
    """Version and numbers of the format; ``(num_layers, ..)`` if it has one per layer."""
    version = version_of(config)

    def numbers(format: CacheFormat) -> list[int]:
        key, value = format.rows
        rows = [key.bits] if version == INT8 else [key.tag, value.tag]
        age = [] if version == INT8 else [int(format.by_age)]
        return [version, *rows, int(key.rotated), format.mean_group, int(value.rotated), *age]

    of_layers = [numbers(format) for format in config.formats]
    return torch.tensor(of_layers if version == BY_LAYER else of_layers[0], dtype=torch.int64)


def check_state(tensors: Mapping[str, Tensor], config: CacheConfig) -> None:
    """Refuse a state dict that is not whole, or not of ``config``'s shapes and format.

    Tensors are asked for one at a time, each after the sizes of all have been found right.
    """

    def expect(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        require(name in tensors, f"{name}: missing")
        x = tensors[name]
        check_tensor(name, x)
        require(not x.is_meta, f"{name}: expected data, got a tensor on meta")
        require(x.dtype == dtype, f"{name}: expected {dtype}, got {x.dtype}", TypeError)
        require(
            tuple(x.shape) == shape, f"{name}: expected shape {list(shape)}, got {list(x.shape)}"
        )

    batch, layers = config.batch_size, config.num_layers
    ours = _format_tensor(config)
    expect("format", tuple(ours.shape), torch.int64)
    theirs = tensors["format"].cpu()
    fields = "bits, key_rotation, key_mean, value_rotation"
    if ours.shape[-1] > 5:
        fields = fields.replace("bits", "key, value") + ", by_age"
    require(
        torch.equal(ours, theirs),
        f"format: expected {ours.tolist()}, got {theirs.tolist()} (version, {fields})",
    )
    expect("seq_lens", (layers, batch), torch.int32)
    lengths = tensors["seq_lens"].cpu()
    shortest, longest, capacity = int(lengths.min()), int(lengths.max()), config.capacity
    require(shortest >= 0, f"seq_lens: expected no negative length, got {shortest}")
    require(
        capacity is None or longest <= capacity,
        f"seq_lens: {longest} tokens, but the cache takes {capacity}",
        CacheFullError,
    )
    wanted = {"format", "seq_lens"}
    if "seq_starts" in tensors:
        expect("seq_starts", (batch,), torch.int32)
        wanted.add("seq_starts")
    most = lengths.amax(1).tolist()
    for layer in range(layers):
        for name, (shape, dtype) in _shapes(config, layer, most[layer]).items():
            expect(f"layers.{layer}.{name}", shape, dtype)
            wanted.add(f"layers.{layer}.{name}")
    unknown = sorted(str(name) for name in tensors if name not in wanted)
    require(not unknown, f"unexpected tensors: {', '.join(unknown[:5])}")
    for layer in range(layers):
        _check_ends(tensors, layer, lengths[layer], config)


def _check_ends(
    tensors: Mapping[str, Tensor], layer: int, lengths: Tensor, config: CacheConfig
) -> None:
    """Nothing but zeros where no row counts: it would be lost."""
    most, format = int(lengths.max()), config.formats[layer]
    if int(lengths.min()) == most and not format.by_age:
        return
    for name in _shapes(config, layer, most):
        x = tensors[f"layers.{layer}.{name}"]
        if name == _YOUNG:
            cleared = x.contiguous().clone()
            _clear_young(config, format, cleared, lengths.tolist())
            lost = (x != cleared).flatten(1).any(1)
        else:
            bits = x if x.dtype == torch.uint8 else x.contiguous().view(torch.int16)
            used = (bits != 0).any(-1).any(1)  # (batch, rows)
            every = max(1, format.mean_group) if name == "k_mean" else 1
            row = torch.arange(0, used.shape[1] * every, every, device=x.device)
            counts = [_counting(format, name, n) for n in lengths.tolist()]
            begin, end = (
                torch.tensor(ends, device=x.device).unsqueeze(1)
                for ends in zip(*((of.start, of.stop) for of in counts), strict=True)
            )
            lost = (used & ((row < begin) | (row >= end))).any(1)
        if bool(lost.any()):
            sequence = int(lost.nonzero()[0])
            raise ValueError(
                f"layers.{layer}.{name}: expected zeros but for the {int(lengths[sequence])} "
                f"tokens of sequence {sequence}"
            )


@torch.inference_mode(mode=False)  # what is made here is written later on
def fill(state: CacheState, tensors: Mapping[str, Tensor], name: str = "state") -> None:
    """Write a checked state dict, of the argument ``name``, into an empty state."""
    lengths: list[list[int]] = tensors["seq_lens"].tolist()
    for layer, of_layer in enumerate(lengths):
        state.make_room(layer, of_layer, name)
    for layer, of_layer in enumerate(lengths):
        young = state.young[layer]
        for part_name in _shapes(state.config, layer, 0):
            rows = tensors[f"layers.{layer}.{part_name}"].detach()
            if part_name == _YOUNG and young is not None:
                young.copy_(rows)
                continue
            for b, length in enumerate(of_layer):
                for part, begin, end in _pieces(state, layer, part_name, b, length):
                    part.copy_(rows[b, :, begin:end])
        if young is not None:
            format, table = state.config.formats[layer], state.blocks.table
            aged(state.config, format, state.view(layer), young, table, of_layer)
    state.lengths.seq_lens.copy_(tensors["seq_lens"])
    starts = tensors.get("seq_starts")
    state.set_starts(None if starts is None else starts.to(state.config.device))
    state.lengths.set_bounds(lengths)
    state.refresh_room()


def blocks_for(config: CacheConfig, tensors: Mapping[str, Tensor]) -> int:
    """Blocks that the sequences of a state dict take if they share none."""
    size = config.block_size or 1
    return sum(-(-n // size) for n in tensors["seq_lens"].amax(0).tolist())


def restore(config: CacheConfig, tensors: Mapping[str, Tensor], *, allocate: bool) -> CacheState:
    """A state that holds a checked state dict; its capacity allocated, or left to growth."""
    if config.num_blocks is not None:  # sequences that shared blocks each have their own now
        config = replace(config, num_blocks=max(config.num_blocks, blocks_for(config, tensors)))
    state = CacheState.empty(config, allocate=allocate)
    fill(state, tensors)
    return state


# -------------------------------------------------------------------------------------- Qwen's form


def layer_past(state: CacheState, layer: int) -> LayerPast:
    """See `QuantizedKVCache.layer_past`."""
    require(
        state.config.formats[layer].is_plain,
        "layer: (q, scale, zero) exist only for a cache with CacheFormat.plain()",
    )
    state.settle()
    lengths = state.lengths.bounds(layer)
    require(len(set(lengths)) == 1, f"layer: expected sequences of one length, got {lengths}")
    rows = read_layer(state, layer)
    return _affine(rows["k_data"], rows["k_params"]), _affine(rows["v_data"], rows["v_params"])


def _affine(q: Tensor, params: Tensor) -> AffineRows:
    scale, offset = params.float().split(1, -1)
    return q, scale, -offset / scale


def from_layer_past(
    past: Sequence[LayerPast], max_seq_len: int | None, block_size: int | None
) -> CacheState:
    """See `QuantizedKVCache.from_layer_past`."""
    require(
        isinstance(past, Sequence) and not isinstance(past, str),
        f"past: expected a sequence of layers, got {type(past).__name__}",
        TypeError,
    )
    require(len(past) > 0, "past: expected at least one layer")
    for layer, pair in enumerate(past):
        if not _is_layer_past(pair):
            raise TypeError(f"past[{layer}]: expected ((qk, ks, kz), (qv, vs, vz)) of tensors")
    first_key, first_value = past[0][0][0], past[0][1][0]
    tensors: dict[str, Tensor] = {}
    for layer, pair in enumerate(past):
        for letter, (q, scale, zero), first in zip(
            "kv", pair, (first_key, first_value), strict=True
        ):
            name = f"past[{layer}]: {letter}"
            check_affine("q", q, scale, zero, None, of=f"{name}: ")
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
    state = CacheState.empty(
        CacheConfig(
            num_layers=len(past), batch_size=b, num_kv_heads=h, head_dim=k_dim,
            v_head_dim=first_value.shape[3], max_seq_len=max_seq_len, block_size=block_size,
            num_blocks=None, formats=(CacheFormat.plain(),) * len(past), device=first_key.device,
        )
    )  # fmt: skip
    fill(state, tensors, "past")
    return state


def _is_layer_past(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(x, Sequence) and len(x) == 3 for x in pair)
        and all(isinstance(x, Tensor) for triple in pair for x in triple)
    )
