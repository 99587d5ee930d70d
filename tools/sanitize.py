"""Every kernel on small inputs, for compute-sanitizer: no other kernels run but copies.

Inputs are made on the CPU; results are compared with those of the torch reference there.
`make sanitize` runs it under each tool; `--device cpu` checks the program itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import typer
from torch import Tensor

import kvquant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
Move = Callable[[Any], Any]
Case = tuple[str, float, Callable[[Move], list[Tensor]]]  # name, tolerance, and what runs it


def both(case: Case, device: str) -> None:
    """Run a case on the device and on the CPU's reference; compare."""
    what, tolerance, run = case
    torch.manual_seed(0)
    ours = run(lambda x: x.to(device) if isinstance(x, Tensor) else x)
    torch.manual_seed(0)
    with kvquant.use_backend("reference"):
        reference = run(lambda x: x)
    for mine, expected in zip(ours, reference, strict=True):
        a, b = mine.cpu().double(), expected.double()
        error = (a - b).norm() / b.norm().clamp_min(1e-9)
        if not error <= tolerance:
            raise SystemExit(
                f"{what}: relative error {error:.2e}, expected {tolerance:.0e} at most"
            )
    print(what, flush=True)


def cache_case(
    move: Move,
    dims: tuple[int, int],
    heads: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    block: int,
    format: kvquant.CacheFormat,
    options: dict[str, Any],
    spare: int = 0,
    longest: int = 300,
) -> list[Tensor]:
    """Append a ragged prompt, take a decode step, then attend and gather.

    ``spare``: blocks of a sequence that stay empty. ``longest``: tokens of the longer prompt.
    """
    lens, kv_heads = (longest, 17), heads[1]
    blocks = -(-(max(lens) + tokens) // block) + spare
    table = move(torch.randperm(2 * blocks, dtype=torch.int32).view(2, blocks))
    view = kvquant.CacheView.allocate(
        2 * blocks, kv_heads, block, *dims, format=format, device=table.device
    )
    for tensor in view.tensors.values():  # tiles of 16 tokens are read whole, used in part
        tensor.zero_()
    seq_lens = move(torch.zeros(2, dtype=torch.int32))
    edges = move(torch.tensor([0, lens[0], sum(lens)], dtype=torch.int32))
    where = {"block_table": table, "seq_lens": seq_lens}
    key, value = (move(torch.randn(sum(lens), kv_heads, dim).to(dtype)) for dim in dims)
    kvquant.append_(key, value, view, **where, cu_seqlens=edges, max_seqlen=lens[0], advance=True)
    query = move(torch.randn(2, tokens, heads[0], dims[0]).to(dtype))
    key, value = (move(torch.randn(2, tokens, kv_heads, dim).to(dtype)) for dim in dims)
    stepped = take_step(query, key, value, view, table, seq_lens)
    out, lse = kvquant.attention(
        query, view, **where, **{k: move(v) for k, v in options.items()}, return_lse=True
    )
    return [stepped, out, lse, *kvquant.gather(view, **where, dtype=dtype)]


def take_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: kvquant.CacheView,
    table: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Append and attend: in one launch, where the backend can."""
    seqs = kvquant.Sequences(table, seq_lens, advance=True)
    out = kvquant.plan(query, view, seqs, key, value).run(query, view, seqs, key, value)
    assert isinstance(out, Tensor)
    return out


def cache_cases() -> Iterator[Case]:
    """Instances by head_dim, rows and dtype; layouts and features in turn."""
    formats = itertools.cycle(
        [
            kvquant.CacheFormat(),
            kvquant.CacheFormat(key_mean=16, value_rotation=True),
            kvquant.CacheFormat.plain(),
        ]
    )
    blocks = itertools.cycle([16, 512, 64])
    options = itertools.cycle(
        [
            {},
            {"sliding_window": 100, "softcap": 20.0},
            {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "causal": False},
            {"alibi_slopes": torch.tensor([0.1, 0.02, 0.3, 0.05])},
        ]
    )
    cases = [
        (dims, (4, 2), tokens, dtype, next(blocks), next(formats), next(options))
        for dims, tokens, dtype in itertools.product(
            [(64, 64), (128, 128), (192, 80), (16, 256)], [1, 4, 20], DTYPES
        )
    ]
    many = [  # more blocks than a device holds at once
        ((128, 128), (512, 256), 1, dtype, block, kvquant.CacheFormat(), extra)
        for dtype, block, extra in (
            (torch.float16, 16, {}), (torch.bfloat16, 512, {"softcap": 20.0})
        )
    ]  # fmt: skip
    wide = [  # room for more splits than are merged at once
        ((128, 128), (4, 2), tokens, torch.float16, 512, kvquant.CacheFormat(), {}, 8)
        for tokens in (1, 4)
    ]
    k8v4 = kvquant.CacheFormat(value="int4")
    k4v4 = kvquant.CacheFormat(key="int4", value="int4")
    rows = [  # many query rows, 64 or 32 a block: tiles of tokens as a whole, and in pieces
        ((dim, dim), (4, 2), tokens, dtype, block, format, extra)
        for tokens in (40, 12)
        for dim, dtype, block, format, extra in (
            (128, torch.float16, 512, kvquant.CacheFormat(), {}),
            (128, torch.bfloat16, 32, kvquant.CacheFormat(), {}),
            (64, torch.bfloat16, 64, kvquant.CacheFormat(),
             {"sliding_window": 100, "softcap": 20.0}),
            (128, torch.bfloat16, 32, k4v4, {}), (64, torch.float16, 512, k8v4, {}),
        )
    ]  # fmt: skip
    trees = [  # splits' blocks that take in others' and are taken in
        ((128, 128), (4, 2), tokens, torch.float16, 512, kvquant.CacheFormat(), {}, 0, 1500)
        for tokens in (40, 12)
    ]
    for arguments in cases + many + wide + rows + trees:
        dims, heads, tokens, dtype, block, format, *_ = arguments
        splits = ", a tree" if arguments in trees else ""
        kind = "" if format.value == "int8" else f" {format.key} {format.value}"
        name = f"attention {dims} {heads} heads {tokens} tokens {dtype} {block}{kind}{splits}"
        yield name, TOLERANCE[dtype], partial(_run, cache_case, arguments)


def age_case(
    move: Move, dims: tuple[int, int], dtype: torch.dtype, block: int, format: kvquant.CacheFormat
) -> list[Tensor]:
    """Two sequences by age: a prompt, a chunk, and steps that open and close groups."""
    heads, kv_heads, room = 4, 2, 512
    blocks = room // block
    table = move(torch.randperm(2 * blocks, dtype=torch.int32).view(2, blocks))
    view = kvquant.CacheView.allocate(
        2 * blocks, kv_heads, block, *dims, format=format, device=table.device
    )
    for tensor in view.tensors.values():  # tiles of 16 tokens are read whole, used in part
        tensor.zero_()
    young = move(torch.zeros(2, kv_heads, format.young_bytes(*dims), dtype=torch.uint8))
    lens, outs = move(torch.tensor([0, 60], dtype=torch.int32)), []
    seqs = kvquant.Sequences(table, lens, advance=True, young=young)
    for tokens in (70, 1, 40, 20, 1, 4, 1):  # to 137 and 197, by groups of 64
        query = move(torch.randn(2, tokens, heads, dims[0]).to(dtype))
        pair = [move(torch.randn(2, tokens, kv_heads, dim).to(dtype)) for dim in dims]
        out = kvquant.plan(query, view, seqs, *pair).run(query, view, seqs, *pair)
        assert isinstance(out, Tensor)
        outs.append(out)
    return outs


def age_cases() -> Iterator[Case]:
    """Pairs by age, in instances by head_dim, rows and dtype."""
    pairs = [{"value": "int4"}, {"key": "int4", "value": "int4"}]
    shapes = [((64, 64), torch.float16, 16), ((128, 128), torch.bfloat16, 512),
              ((192, 80), torch.float16, 64), ((128, 128), torch.float32, 32)]  # fmt: skip
    for pair, (dims, dtype, block) in itertools.product(pairs, shapes):
        format = kvquant.CacheFormat(**pair, by_age=True, key_mean=64)
        name = f"by age {dims} {dtype} {block} {pair}"
        # A mean that is summed in another order moves a 4-bit code now and then.
        arguments = dims, dtype, block, format
        yield name, max(2e-2, TOLERANCE[dtype]), partial(_run, age_case, arguments)


def plain_case(move: Move, dim: int, dtype: torch.dtype, granularity: str) -> list[Tensor]:
    """Quantize, dequantize and both matmuls."""
    group = 32 if granularity == "channel" else None
    x = move(torch.randn(2, 3, 70, dim).to(dtype))
    q, scale, zero = kvquant.quantize_cache_v(x, granularity=granularity, group_size=group)
    scores = kvquant.qk_matmul(
        move(torch.randn(2, 6, 4, dim).to(dtype)), q, scale, zero, group_size=group
    )
    probs = move(torch.rand(2, 6, 4, 70).to(dtype))
    return [
        q, scale, zero, scores,
        kvquant.dequantize_cache_torch(q, scale, zero, dtype, group_size=group),
        kvquant.pv_matmul(probs, q, scale, zero, group_size=group),
    ]  # fmt: skip


def piece_case(
    move: Move, dims: tuple[int, int], dtype: torch.dtype, block: int, backwards: bool
) -> list[Tensor]:
    """What attention by dense kernels needs besides them: a piece of the history, a merge."""
    blocks, heads = -(-320 // block), 3
    spans = (37, 150), (200, 40)  # two pieces: their first token, and how many
    table = move(torch.randperm(2 * blocks, dtype=torch.int32).view(2, blocks))
    view = kvquant.CacheView.allocate(2 * blocks, heads, block, *dims, device=table.device)
    lens = move(torch.zeros(2, dtype=torch.int32))
    where = {"block_table": table, "seq_lens": lens}
    key, value = (move(torch.randn(2, 300, heads, dim).to(dtype)) for dim in dims)
    kvquant.append_(key, value, view, **where, advance=True)
    outs = [move(torch.randn(2, 50, 4, dims[1]).to(dtype)) for _ in range(3)]
    sums = [move(torch.randn(2, 50, 4)) for _ in range(3)]
    sinks = move(torch.randn(4))
    if not table.is_cuda:
        stored = kvquant.gather(view, **where, dtype=dtype)
        rows = [x[:, at : at + count] for at, count in spans for x in stored]
        rows = [(x.flip(1) if backwards else x).transpose(1, 2) for x in rows]
        outs[0], sums[0] = (x.flip(1) if backwards else x for x in (outs[0], sums[0]))
        weights = torch.stack([*sums, sinks.expand_as(sums[0])]).softmax(0)[:3]
        out = (weights[..., None] * torch.stack(outs).float()).sum(0)
        return [*rows, out.to(dtype), torch.stack([*sums, sinks.expand_as(sums[0])]).logsumexp(0)]
    from kvquant.backends.cuda import CUDA
    from kvquant.backends.steps import History, Read, Result

    rows = [
        torch.empty(2, heads, count, dim, dtype=dtype, device=table.device)
        for _, count in spans
        for dim in dims
    ]
    reads = [
        Read(at, (at, at + count), backwards, *rows[2 * i : 2 * i + 2])
        for i, (at, count) in enumerate(spans)
    ]
    CUDA.steps.read(view, History(table), reads)
    pairs = enumerate(zip(outs, sums, strict=True))
    results = [Result(*pair, backwards and i == 0) for i, pair in pairs]
    folded = torch.empty(outs[0].shape, dtype=torch.float32, device=table.device)
    folded_lse, out, lse = torch.empty_like(sums[0]), torch.empty_like(outs[0]), sums[0].clone()
    CUDA.steps.merge(results[:2], None, folded, folded_lse)
    CUDA.steps.merge([Result(folded, folded_lse), results[2]], sinks, out, lse)
    return [*rows, out, lse]


def _run(case: Callable[..., list[Tensor]], arguments: tuple[Any, ...], move: Move) -> list[Tensor]:
    return case(move, *arguments)


def cases() -> Iterator[Case]:
    """All of them."""
    for plain in itertools.product((128, 40), DTYPES, ("token", "head", "channel")):
        name = "plain {} {} {}".format(*plain)
        yield name, TOLERANCE[plain[1]], partial(_run, plain_case, plain)
    yield from cache_cases()
    yield from age_cases()
    for dims, dtype, (block, backwards) in itertools.product(
        [(64, 64), (128, 128), (256, 256), (80, 80)], DTYPES[:2], [(16, False), (320, True)]
    ):
        name = f"pieces {dims} {dtype} {block}"
        yield name, TOLERANCE[dtype], partial(_run, piece_case, (dims, dtype, block, backwards))


def main(device: str = "cuda", part: int = 0, parts: int = 1) -> None:
    """Run all cases, or one part of them; exit with an error at the first that differs."""
    for case in itertools.islice(cases(), part, None, parts):
        both(case, device)
    print("all cases agree")


if __name__ == "__main__":
    typer.run(main)
