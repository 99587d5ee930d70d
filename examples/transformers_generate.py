"""generate() of a Hugging Face model on the 8-bit cache.

python examples/transformers_generate.py Qwen/Qwen2.5-0.5B-Instruct "Why is the sky blue?"
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache  # registers "kvquant"


def main(name: str, *prompts: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="kvquant", dtype="auto"
    ).to(device)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    cache = KVQuantCache(model)
    output = model.generate(**inputs.to(device), **{CACHE_ARGUMENT: cache}, max_new_tokens=100)
    new = output[:, inputs["input_ids"].shape[1] :]
    for text in tokenizer.batch_decode(new, skip_special_tokens=True):
        print(text, end="\n\n")
    print(f"cache: {cache.nbytes / 2**20:.1f} MiB for {cache.get_seq_length()} tokens a sequence")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
