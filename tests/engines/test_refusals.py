"""What is not served is refused at start-up, with a sentence that says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

import kvquant
from kvquant.integrations.vllm import backend, cache_dtype
from kvquant.integrations.vllm.formats import block_size_of
from kvquant.integrations.vllm.support import refusals

from .conftest import LONG
from .offline import Job, run
from .test_models import TOKENS, numbers, save

SERVED: dict[str, Any] = {
    "device": torch.device("cpu"), "head_size": 128, "dtype": torch.bfloat16,
    "kv_cache_dtype": cache_dtype(),
}  # fmt: skip


def of(**changes: Any) -> list[str]:
    return refusals(kvquant.CacheFormat(), **{**SERVED, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_cache_dtype": "auto"}, "needs --kv-cache-dtype"),
        ({"kv_cache_dtype": "fp8"}, "got fp8"),
        ({"head_size": 100}, "multiple of 16 up to 256"),
        ({"head_size": 512}, "is 512"),
        ({"v_head_size": 24}, "head_size of values is 24"),
        ({"dtype": torch.float64}, "float64: pass --dtype bfloat16"),
        ({"block_size": 48}, "--block-size 256"),
        ({"use_mla": True, "head_size": 576}, "caches a latent vector"),
        ({"attn_type": "encoder_only"}, "serves decoders"),
        ({"use_batch_invariant": True}, "VLLM_BATCH_INVARIANT"),
        ({"use_dcp": True}, "--decode-context-parallel-size"),
        ({"use_non_causal": True}, "causal"),
        ({"device": torch.device("meta")}, "no kernels"),
    ],
)
def test_each_has_one_sentence(changes: dict[str, Any], says: str) -> None:
    (sentence,) = of(**changes)
    assert says in sentence


def test_what_is_served_has_none() -> None:
    for size in (16, 64, 80, 96, 128, 192, 256):
        assert not of(head_size=size)
    for dtype in (torch.float16, torch.float32):
        assert not of(dtype=dtype)
    assert not of(block_size=512, has_sink=True, has_sliding_window=True, use_mla=False)


def test_the_engine_is_told_the_same() -> None:
    asked: dict[str, Any] = {
        **{name: x for name, x in SERVED.items() if name != "device"}, "block_size": None,
        "use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "attn_type": AttentionType.DECODER,
        "has_sliding_window": True, "device_capability": None,
    }  # fmt: skip
    assert backend.KVQUANT.validate_configuration(**asked) == []
    (reason,) = backend.KVQUANT.validate_configuration(**{**asked, "kv_cache_dtype": "auto"})
    assert reason == of(kv_cache_dtype="auto")[0]


def test_block_sizes() -> None:
    assert [block_size_of(n) for n in (64, 128, 192, 256, 384, 512)] == [64, 128, 64, 256, 128, 256]
    with pytest.raises(ValueError, match="got 80"):
        block_size_of(80)
    wrong = FullAttentionSpec(block_size=80, num_kv_heads=2, head_size=64, dtype=torch.int8)
    with pytest.raises(ValueError, match="--block-size 256"):
        backend.KVQUANT.customize_spec(wrong)


def started(model: str, **engine: Any) -> str:
    with pytest.raises(RuntimeError) as failed:
        run(Job(model, numbers(5), "KVQUANT", {**TOKENS, **engine}, max_tokens=2))
    return str(failed.value)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not LONG, reason="make test-vllm")
def test_the_engine_ends_with_the_sentence(scratch: Path) -> None:
    sizes = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = save("Llama", scratch / "refused", head_dim=32, **sizes)
    assert "--block-size 256" in started(model, block_size=48)
    assert "needs --kv-cache-dtype" in started(model, kv_cache_dtype="auto")
    odd = save("Llama", scratch / "odd", head_dim=40, **sizes)
    assert "multiple of 16 up to 256" in started(odd)
    latent = save(
        "DeepseekV2", scratch, **sizes, n_routed_experts=4, first_k_dense_replace=1,
        kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    assert "caches a latent vector" in started(latent)


def test_a_process_that_is_started_afresh_finds_the_backend(tmp_path: Path) -> None:
    """vLLM's configuration is unpickled before plugins are loaded."""
    write = (
        "import pickle, sys; from kvquant.integrations.vllm import register; register();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "pickle.dump(E['KVQUANT_PLAIN'], open(sys.argv[1], 'wb'))"
    )
    read = (
        "import pickle, sys; x = pickle.load(open(sys.argv[1], 'rb')); print(x.get_class().format)"
    )
    file = str(tmp_path / "backend.pkl")
    subprocess.run([sys.executable, "-c", write, file], check=True)
    found = subprocess.run(
        [sys.executable, "-c", read, file], check=True, capture_output=True, text=True
    )
    assert "key_rotation=False" in found.stdout
