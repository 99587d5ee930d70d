"""Questions about a long document, which a Hugging Face model reads once.

python examples/transformers_prefix.py Qwen/Qwen2.5-0.5B-Instruct book.txt "Who is Alice?"
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # registers "kvquant"

CHUNK = 2048  # tokens of the document at a time


@torch.no_grad()
def main(name: str, document: str, *questions: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="kvquant", dtype="auto"
    ).to(device)
    prefix = tokenizer(Path(document).read_text(), return_tensors="pt")["input_ids"].to(device)
    cache = KVQuantCache(model, block_size=64)
    for chunk in prefix.split(CHUNK, dim=1):
        model(input_ids=chunk, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    print(f"read {cache.get_seq_length()} tokens: {cache.nbytes / 2**20:.1f} MiB", end="\n\n")
    for question in questions:
        asked = tokenizer(f"\nQ: {question}\nA:", return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([prefix, asked["input_ids"].to(device)], dim=1)
        fork = cache.fork()  # shares the document's blocks
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, **{CACHE_ARGUMENT: fork}
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"Q: {question}\nA:{answer}", end="\n\n")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
