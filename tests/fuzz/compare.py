"""What was before beside what is after, and the compiled kernels beside the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kvquant

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LOOSE = 5e-2  # where stored codes may differ by a step


_PARTS = {
    "k_data": ("k.codes", torch.uint8),
    "k_params": ("k.params", torch.float16),
    "k_mean": ("mean", torch.float16),
    "v_data": ("v.codes", torch.uint8),
    "v_params": ("v.params", torch.float16),
}


def parts(view: kvquant.CacheView) -> dict[str, Tensor]:
    """A view's tensors as what their bytes are, by the names that they have in a state dict."""
    tensors = view.tensors
    return {name: tensors[at].view(dtype) for name, (at, dtype) in _PARTS.items() if at in tensors}


def rebuilt(view: kvquant.CacheView, named: dict[str, Tensor]) -> kvquant.CacheView:
    """The same view of other tensors, by the names of `parts`."""
    return view.replaced({_PARTS[name][0]: x.view(torch.uint8) for name, x in named.items()})


def own_fields(x: Any) -> list[tuple[str, Any]]:
    """What an object of the library's was made of."""
    return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x) if f.init]


def tensors_in(x: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an argument leads to."""
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, kvquant.CacheView):
        for part, tensor in parts(x).items():
            yield f"{name}.{part}", tensor
    elif isinstance(x, (kvquant.RowsView, kvquant.Sequences)):
        for part, value in own_fields(x):
            yield from tensors_in(value, f"{name}.{part}")
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from tensors_in(value, f"{name}[{i}]")


def memory_of(x: Tensor) -> Tensor:
    """All bytes of the buffer that ``x`` lies in, as a view."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


class Memory:
    """The bytes of all buffers under some arguments at one time, what lies between included.

    They are kept and compared on the CPU.
    """

    def __init__(self, arguments: Any) -> None:
        self._named: dict[int, tuple[str, Tensor, Tensor]] = {}
        for name, x in tensors_in(arguments):
            if x.device.type == "meta" or x.layout is not torch.strided:
                continue
            address = x.untyped_storage().data_ptr()
            if address not in self._named:
                memory = memory_of(x.detach())
                self._named[address] = name, memory, memory.to("cpu", copy=True)

    def changed(self, but: Sequence[Tensor] = ()) -> str | None:
        """The name of a tensor whose buffer is not as it was, outside of ``but``."""
        for address, (name, memory, before) in self._named.items():
            now = memory.cpu()
            if torch.equal(now, before):
                continue
            now = now.clone() if now is memory else now
            for x in but:
                if x.untyped_storage().data_ptr() == address:
                    size = [
                        n if step else min(n, 1)
                        for n, step in zip(x.shape, x.stride(), strict=True)
                    ]
                    place = x.storage_offset(), size, x.stride()  # expanded: each element once
                    view, old = (
                        torch.empty(0, dtype=x.dtype).set_(buffer.untyped_storage(), *place)
                        for buffer in (now, before)
                    )
                    view.copy_(old)
            if not torch.equal(now, before):
                return name
        return None


def bits(x: Tensor) -> Tensor:
    """Bytes of the elements, in their order."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def equal(a: Tensor, b: Tensor) -> bool:
    """The same numbers, NaN equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(bits(a), bits(b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def difference(got: Any, wanted: Any, tolerance: float | None = None) -> str | None:
    """How a result differs from the reference's by more than rounding, or None."""
    if isinstance(wanted, Tensor):
        return _tensor_difference(got, wanted, tolerance)
    if isinstance(wanted, (tuple, list)):
        if type(got) is not type(wanted) or len(got) != len(wanted):
            return f"{type(got).__name__} instead of {type(wanted).__name__}"
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if why := difference(a, b, tolerance):
                return f"[{i}]: {why}"
        return None
    return None if got == wanted else f"{got!r} instead of {wanted!r}"


def _tensor_difference(got: Any, wanted: Tensor, tolerance: float | None) -> str | None:
    if not isinstance(got, Tensor):
        return f"a {type(got).__name__} instead of a tensor"
    if got.shape != wanted.shape or got.dtype != wanted.dtype or got.device != wanted.device:
        return (
            f"{got.dtype} {list(got.shape)} on {got.device} instead of {wanted.dtype} "
            f"{list(wanted.shape)} on {wanted.device}"
        )
    if not wanted.is_floating_point():
        return None if torch.equal(got, wanted) else "other integers"
    if equal(got, wanted):
        return None
    finite = wanted.isfinite()
    patterns = (
        got.nan_to_num(posinf=1, neginf=-1, nan=0),
        wanted.nan_to_num(posinf=1, neginf=-1, nan=0),
    )
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), wanted.isnan()):
        return "other elements are NaN or infinite"
    if not torch.equal(patterns[0][~finite], patterns[1][~finite]):
        return "infinities of another sign"
    a, b = got[finite].double(), wanted[finite].double()
    limit = _TOLERANCE[wanted.dtype] if tolerance is None else tolerance
    limit = max(limit, _TOLERANCE[wanted.dtype])
    error = (a - b).norm().item()
    size = b.norm().item() + 1e-3 * b.numel() ** 0.5
    return None if error <= limit * size else f"off by {error / size:.0e}"


def attention_difference(
    cu: Tensor | None,
    got: Any,
    wanted: Any,
    tolerance: float | None,
    *,
    rounds_queries: bool,
    held: tuple[Tensor | None, Tensor | None] = (None, None),
) -> str | None:
    """`difference` of outputs, with rows of no sequence looked at first: they say nothing.

    ``rounds_queries``: the CUDA kernels take queries as integers, so an lse is as exact as they;
    where a value makes an output NaN, its lse is NaN there, too.
    ``held``: what the caller's own output and lse held: rows of no sequence still do.
    """
    if rounds_queries and isinstance(wanted, tuple) and isinstance(wanted[0], Tensor):
        wanted = _without_hidden(got, wanted)
        tolerance = max(tolerance or 0.0, _TOLERANCE.get(wanted[0].dtype, 0.0)) or None
    if cu is None or wanted is None or type(got) is not type(wanted):
        return difference(got, wanted, tolerance)
    first, last = int(cu[0]), int(cu[-1])
    pairs = [(got, wanted)] if isinstance(got, Tensor) else list(zip(got, wanted, strict=True))
    for i, (ours, theirs) in enumerate(pairs):
        old = held[i]
        nothing = torch.full_like(theirs, 0.0 if i == 0 else -torch.inf) if old is None else old
        for x in (ours, theirs):
            if not (equal(x[:first], nothing[:first]) and equal(x[last:], nothing[last:])):
                return "rows outside of cu_seqlens_q are not as they were"
        if why := difference(ours[first:last], theirs[first:last], tolerance):
            return why
    return None


def _without_hidden(got: Any, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is wanted of an output and its lse, with NaN in the lse where both outputs are NaN."""
    if len(wanted) != 2 or type(got) is not tuple or got[1].shape != got[0].shape[:-1]:
        return wanted
    hidden = got[0].isnan().any(-1) & wanted[0].isnan().any(-1) & got[1].isnan()
    return wanted[0], torch.where(hidden, got[1], wanted[1])


def stored_difference(
    got: kvquant.CacheView, wanted: kvquant.CacheView, before: kvquant.CacheView
) -> str | None:
    """How a layer that was written differs from the reference's, or None.

    Without a mean every bit is the same; with one, a mean may be rounded otherwise and then a code
    is the next one. What the reference left alone is to be left alone.
    """
    for name, x in parts(got).items():
        ours, theirs, old = x, parts(wanted)[name], parts(before)[name]
        if equal(ours, theirs):
            continue
        if got.mean is None or name.startswith("v_"):
            return f"{name}: other bits"
        row = bits_of_rows(theirs).ne(bits_of_rows(old)).any(-1)
        if bits_of_rows(ours).ne(bits_of_rows(old)).any(-1)[~row].any():
            return f"{name}: a row was written that the reference left alone"
    if got.mean is None:
        return None
    means = [x.mean.view(torch.float16).float() for x in (got, wanted) if x.mean is not None]
    if not torch.equal(means[0].isnan(), means[1].isnan()):
        return "k_mean: NaN elsewhere"
    largest = means[1].nan_to_num(nan=0).abs().amax().item() if means[1].numel() else 0.0
    rows = [_dequantized(x) for x in (got, wanted)]
    large = rows[1].nan_to_num(nan=0).abs().amax().item() if rows[1].numel() else 0.0
    near = 2**-9 * means[1].abs() + 1e-4 + 1e-6 * large  # sums in another order
    if (means[0] - means[1]).abs().nan_to_num(nan=0).gt(near).any():
        return "k_mean: another mean"
    if not torch.equal(rows[0].isnan(), rows[1].isnan()):
        return "k_params: NaN elsewhere"
    step = wanted.k.params.view(torch.float16)[..., :1].float()
    off = (rows[0] - rows[1]).abs() > 1.1 * step + 2**-9 * largest + 1e-4 + 1e-6 * large
    return "k_data: off by more than a step" if off.any() else None


def bits_of_rows(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _dequantized(view: kvquant.CacheView) -> Tensor:
    return view.k.format.decode(view.k.codes, view.k.params)
