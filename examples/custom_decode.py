"""A decode loop of one's own on the 8-bit cache (random weights: only the calls matter).

python examples/custom_decode.py
"""

import torch
import torch.nn.functional as F

import kvquant

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 4, 8, 2, 64, 512, 1000
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype) / shape[-1] ** 0.5


torch.manual_seed(0)
embedding = weight(VOCAB, HIDDEN)
layers = [
    {
        "q": weight(HEADS * HEAD_DIM, HIDDEN),
        "k": weight(KV_HEADS * HEAD_DIM, HIDDEN),
        "v": weight(KV_HEADS * HEAD_DIM, HIDDEN),
        "o": weight(HIDDEN, HEADS * HEAD_DIM),
    }
    for _ in range(LAYERS)
]


def forward(ids: torch.Tensor, cache: kvquant.QuantizedKVCache) -> torch.Tensor:
    x = F.embedding(ids, embedding)
    for i, w in enumerate(layers):
        h = F.rms_norm(x, (HIDDEN,))
        q, k, v = (F.linear(h, w[n]).unflatten(-1, (-1, HEAD_DIM)) for n in "qkv")
        x = x + F.linear(cache.attend(i, q, k, v).flatten(-2), w["o"])  # append and attend
    return F.rms_norm(x[:, -1], (HIDDEN,)) @ embedding.T


@torch.no_grad()
def main() -> None:
    ids = torch.randint(VOCAB, (2, 100), device=device)
    cache = kvquant.QuantizedKVCache(
        LAYERS, 2, KV_HEADS, HEAD_DIM, max_seq_len=256, dtype=dtype, device=device
    )
    for _ in range(20):
        logits = forward(ids if cache.max_length == 0 else ids[:, -1:], cache)
        new = torch.multinomial(logits.float().softmax(-1), 1)
        ids = torch.cat([ids, new], dim=1)
    print(cache)
    print(kvquant.explain(cache))
    print("tokens:", ids[0, 100:].tolist())


if __name__ == "__main__":
    main()
