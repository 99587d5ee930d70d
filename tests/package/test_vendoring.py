"""A copy of the package under another name, beside the installed one, in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvquant
from kvquant.backends import native

CODE = """
import logging
import torch
import kvquant
import mylib._vendor.kvquant as copied

assert copied.__file__ != kvquant.__file__
assert copied.QuantizedKVCache is not kvquant.QuantizedKVCache
key, value = torch.randn(2, 1, 9, 2, 64)
query = torch.randn(1, 1, 8, 64)
outs = []
for package in (kvquant, copied, kvquant):
    cache = package.QuantizedKVCache(1, 1, 2, 64, max_seq_len=64, dtype=torch.float32)
    cache.append(0, key, value)
    for _ in range(2):
        out = cache.attend(0, query, key[:, :1], value[:, :1])
    where = dict(block_table=cache.block_table, seq_lens=cache.seq_lens)

    def attend(query):
        return package.attention(query, cache.layer(0)[0], **where)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(query)
    assert torch.equal(compiled, attend(query))
    outs += [out, compiled]
    assert package.explain().backend == kvquant.explain().backend
    torch._dynamo.reset()
assert all(torch.equal(a, b) for a, b in zip(outs[:2] * 2, outs[2:]))
assert hasattr(torch.ops.mylib__vendor_kvquant, "attend_")

try:
    import transformers
except ImportError:
    print("without transformers")
else:
    from kvquant.integrations.transformers import CACHE_ARGUMENT, KVQuantCache
    from mylib._vendor.kvquant.integrations.transformers import KVQuantCache as CopiedCache

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )
    logits = []
    for name, cache in (("kvquant", KVQuantCache), ("mylib__vendor_kvquant", CopiedCache)):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        with torch.no_grad():
            ids = torch.arange(9)[None]
            logits.append(model(ids, use_cache=True, **{CACHE_ARGUMENT: cache(model)}).logits)
    assert torch.equal(*logits)
    print("with transformers")
"""


@pytest.mark.skipif(native.module is None, reason="the extension is not there")
def test_two_copies_in_one_process(tmp_path: Path) -> None:
    vendored = tmp_path / "mylib" / "_vendor" / "kvquant"
    shutil.copytree(Path(kvquant.__file__).parent, vendored)
    shutil.copy(native.module.__file__, vendored)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("with")
