"""Steps of an engine that has memory and block tables of its own (random rows: only the calls
matter): two sequences read their prompts, packed, then decode.

python examples/engine_step.py
"""

import torch

import kvquant

LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCKS, BLOCK_SIZE = 4, 8, 2, 64, 64, 16
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32


def rows(total: int, heads: int) -> torch.Tensor:
    return torch.randn(total, heads, HEAD_DIM, device=device, dtype=dtype)


def index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@torch.no_grad()
def main() -> None:
    format = kvquant.CacheFormat()
    page = format.slab_bytes(HEAD_DIM, HEAD_DIM, BLOCK_SIZE)  # of a block and KV head
    buffer = torch.empty(LAYERS, BLOCKS, KV_HEADS, page, dtype=torch.uint8, device=device)
    views = [
        kvquant.CacheView.slab(layer, HEAD_DIM, block_size=BLOCK_SIZE, format=format)
        for layer in buffer
    ]
    table = index(torch.randperm(BLOCKS)[:16].tolist()).view(2, 8)
    lengths = [0, 0]
    for counts in ([50, 21], *[[1, 1]] * 20):
        # Once a step: the batch, whose lengths are without the step's own tokens.
        starts = index([0, counts[0], sum(counts)])
        seqs = kvquant.Sequences(
            table, index(lengths), cu_seqlens_q=starts, max_seqlen_q=max(counts)
        )
        for view in views:
            query, key, value = rows(sum(counts), HEADS), *(rows(sum(counts), KV_HEADS),) * 2
            out = torch.empty_like(query)
            plan = kvquant.plan(query, view, seqs, key, value)  # remembered: a look-up
            plan.run(query, view, seqs, key, value, out=out)
        lengths = [n + new for n, new in zip(lengths, counts, strict=False)]
    print(plan)
    print(f"lengths {lengths}, the last output's mean magnitude {out.abs().mean():.3f}")


if __name__ == "__main__":
    main()
