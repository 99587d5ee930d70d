"""What the tests share: the builder of a cache of ragged sequences, and its bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import kvquant
import oracle
from matrix import FORMATS

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"fp16": FP16, "bf16": BF16, "fp32": FP32}
LAYOUTS = {"contiguous": None, "paged16": 16, "paged32": 32, "paged64": 64, "paged256": 256}
RAGGED = (257, 0, 1, 15, 16, 17, 255, 256, 530)

PLAIN, DEFAULT, ROTATED = (FORMATS[name] for name in ("plain", "default", "rotated"))


def index(values: Sequence[int] | Tensor, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def starts_of(lengths: Sequence[int]) -> list[int]:
    """``cu_seqlens`` of packed rows."""
    return [0, *torch.tensor(list(lengths)).cumsum(0).tolist()]


def random_rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Keys as models have them: a few channels with a large bias."""
    x = torch.randn(*shape)
    x[..., 1] += 6
    x[..., shape[-1] // 2] -= 4
    return x.to(dtype).to(device)


NAMES = {
    "k_data": ("k.codes", torch.uint8),
    "k_params": ("k.params", torch.float16),
    "k_mean": ("mean", torch.float16),
    "v_data": ("v.codes", torch.uint8),
    "v_params": ("v.params", torch.float16),
}


def parts(view: kvquant.CacheView) -> dict[str, Tensor]:
    """A view's tensors as what their bytes are, by the names that they have in a state dict."""
    tensors = view.tensors
    return {name: tensors[at].view(dtype) for name, (at, dtype) in NAMES.items() if at in tensors}


def rebuilt(view: kvquant.CacheView, named: dict[str, Tensor]) -> kvquant.CacheView:
    """The same view of other tensors, by the names of `parts`."""
    of = {**parts(view), **named}
    return view.replaced(
        {NAMES[name][0]: None if x is None else x.view(torch.uint8) for name, x in of.items()}
    )


def poison(view: kvquant.CacheView) -> kvquant.CacheView:
    """Random codes and NaN params and means, so that reading what was never written shows."""
    for name, tensor in parts(view).items():
        if name.endswith("data"):
            tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))
        else:
            tensor.fill_(torch.nan)
    return view


def snapshot(view: kvquant.CacheView) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parts(view).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    if a.is_floating_point():
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def assert_unchanged(view: kvquant.CacheView, before: dict[str, Tensor]) -> None:
    for name, tensor in parts(view).items():
        assert same_bits(tensor, before[name]), f"{name} was written"


@dataclass
class Cache:
    """A poisoned view with room for ``room`` tokens a sequence, and what was appended."""

    view: kvquant.CacheView
    table: Tensor
    lens: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    starts: Tensor | None = None

    @property
    def device(self) -> str:
        return str(self.table.device)

    @property
    def lengths(self) -> list[int]:
        return self.lens.tolist()

    def append(self, keys: list[Tensor], values: list[Tensor], **options: Any) -> None:
        """Packed rows of every sequence behind what is there."""
        counts = [len(k) for k in keys]
        kvquant.append_(
            torch.cat(keys),
            torch.cat(values),
            self.view,
            block_table=self.table,
            seq_lens=self.lens,
            cu_seqlens=index(starts_of(counts), self.device),
            seq_starts=self.starts,
            **options,
        )
        if not options.get("advance"):
            self.lens = self.lens + index(counts, self.device)
        old = self.keys or [k[:0] for k in keys], self.values or [v[:0] for v in values]
        self.keys = [torch.cat(pair) for pair in zip(old[0], keys, strict=True)]
        self.values = [torch.cat(pair) for pair in zip(old[1], values, strict=True)]

    def decode(self, sequence: int) -> tuple[Tensor, Tensor]:
        return oracle.decode(self.view, self.table, sequence, self.lengths[sequence])

    def rows(self, sequence: int) -> dict[str, Tensor]:
        """What is stored of a sequence, by token, whatever the layout."""
        length = self.lengths[sequence]
        block, row = oracle.places(self.view, self.table, sequence, length)
        named = {n: t[block, :, row] for n, t in parts(self.view).items() if n != "k_mean"}
        if self.view.mean is not None:
            named["k_mean"] = oracle.means(self.view, self.table, sequence, length)
        return named


def empty_cache(
    room: Sequence[int],
    *,
    kv_heads: int = 2,
    k_dim: int = 64,
    v_dim: int | None = None,
    block: int | None = None,
    fmt: kvquant.CacheFormat = DEFAULT,
    device: str = "cpu",
    starts: Sequence[int] | None = None,
) -> Cache:
    """Shuffled blocks, a few to spare; unused table entries hold -1 or a huge id."""
    most = max(room, default=0)
    size = block or max(16, -(-most // 16) * 16)
    width = max(1, -(-most // size))
    needs = [-(-n // size) for n in room] if block else [1] * len(room)
    blocks = torch.randperm(sum(needs) + 3).tolist()
    table = torch.tensor([-1, 2**30]).repeat(len(room) * width)[: len(room) * width]
    table = table.reshape(len(room), width)
    for row, need in zip(table, needs, strict=True):
        row[:need] = torch.tensor([blocks.pop() for _ in range(need)])
    view = kvquant.CacheView.allocate(
        sum(needs) + 3, kv_heads, size, k_dim, v_dim, format=fmt, device=device
    )
    return Cache(
        poison(view),
        index(table, device),
        index([0] * len(room), device),
        starts=None if starts is None else index(starts, device),
    )


def filled_cache(
    lens: Sequence[int],
    *,
    room: Sequence[int] | None = None,
    dtype: torch.dtype = BF16,
    **options: Any,
) -> Cache:
    """`empty_cache` with random keys and values of these lengths appended in one call."""
    cache = empty_cache(room or lens, **options)
    heads, k_dim = cache.view.num_kv_heads, cache.view.k.head_dim
    v_dim = cache.view.v.head_dim
    keys = [random_rows(n, heads, k_dim, dtype=dtype, device=cache.device) for n in lens]
    values = [torch.randn(n, heads, v_dim).to(dtype).to(cache.device) for n in lens]
    cache.append(keys, values)
    return cache


def relocated(cache: Cache, order: Sequence[int]) -> Cache:
    """The same view with its sequences in another order (or a selection of them)."""
    at = torch.tensor(list(order), dtype=torch.long, device=cache.table.device)
    starts = None if cache.starts is None else cache.starts[at]
    return replace(cache, table=cache.table[at], lens=cache.lens[at], starts=starts)


def foreign(view: kvquant.CacheView) -> kvquant.CacheView:
    """The same content in one buffer where a (block, head) slab holds K, V, params and mean."""
    dims, fmt = (view.k.head_dim, view.v.head_dim), view.format
    width = fmt.slab_bytes(*dims, view.block_size) + 32
    buffer = torch.full(
        (view.num_blocks, view.num_kv_heads, width), 255, dtype=torch.uint8, device=view.device
    )
    copy = kvquant.CacheView.slab(
        buffer[..., 16:], dims[0], v_head_dim=dims[1], block_size=view.block_size, format=fmt
    )
    for name, tensor in view.tensors.items():
        copy.tensors[name].copy_(tensor)
    return copy


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, an operation that waits for the CUDA device is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
