"""A chat with a Hugging Face model, on one 8-bit cache for all turns.

python examples/transformers_chat.py Qwen/Qwen2.5-0.5B-Instruct
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # registers "kvquant"


def main(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="kvquant", dtype="auto"
    ).to(device)
    cache, messages = KVQuantCache(model), []
    before = torch.empty(0, dtype=torch.long)  # the tokens that the cache holds
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = inputs["input_ids"][0]
        # The template may write the last answer otherwise than the model did: what differs goes.
        shared = min(len(before), len(ids) - 1)
        different = (before[:shared] != ids[:shared]).nonzero()
        keep = int(different[0]) if len(different) else shared
        if keep < cache.get_seq_length():
            cache.crop(keep - cache.get_seq_length())
        output = model.generate(**inputs.to(device), **{CACHE_ARGUMENT: cache}, max_new_tokens=200)[
            0
        ].cpu()
        before = output[: cache.get_seq_length()]
        answer = tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(answer, end="\n\n", flush=True)
    print(f"cache: {cache.nbytes / 2**20:.1f} MiB for {cache.get_seq_length()} tokens")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
