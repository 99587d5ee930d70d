"""The three switches, in each combination, by argument and by config."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant import backends

transformers = pytest.importorskip("transformers", minversion="5.5")

from kvquant.compat.qwen import Switches, apply_switches, from_pretrained  # noqa: E402
from kvquant.compat.qwen import switches as module  # noqa: E402
from kvquant.integrations.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    KVQuantCache,
)
from tiny import CONFIGS, generate, ids_of, make  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]
CHOICES = (None, False, True)


def cache_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    out = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = out.get(CACHE_ARGUMENT) if CACHE_ARGUMENT in out else out.past_key_values
    return out.sequences, cache


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that attention calls are planned for."""
    seen: list[str] = []
    prepare = backends._prepare

    def watched(problem: Any) -> Any:
        found = prepare(problem)
        seen.append(found.details.get("appends", found.backend))
        return found

    monkeypatch.setattr(backends, "_prepare", watched)
    backends._prepared.clear()
    return seen


@pytest.mark.parametrize(
    ("quantization", "kernel", "flash"),
    list(itertools.product(CHOICES, CHOICES, (*CHOICES, "auto"))),
)
@pytest.mark.parametrize("how", ["arguments", "config"])
def test_each_combination(
    quantization: Any, kernel: Any, flash: Any, how: str, tmp_path: Path, served: list[str]
) -> None:
    given = {
        "use_cache_quantization": quantization,
        "use_cache_kernel": kernel,
        "use_flash_attn": flash,
    }
    model, lines = make("llama", "cpu", "sdpa"), []
    if how == "config":
        for name, value in given.items():
            if value is not None:
                setattr(model.config, name, value)
        given = {}
    apply_switches(model, **given, log=lines.append)
    from kvquant.plan import _plans

    _plans.clear()
    _, cache = cache_of(model, ids_of(2, 9, "cpu"))
    assert isinstance(cache, KVQuantCache) == bool(quantization)
    assert len(lines) == 1
    assert "\n" not in lines[0]
    if not quantization:
        assert lines[0].startswith("kvquant: 16-bit KV cache, attention 'sdpa'")
        assert "use_cache_quantization is off" in lines[0]
        assert ("use_cache_kernel belongs to it" in lines[0]) == (kernel is not False)
        assert not served
    else:
        assert lines[0].startswith("kvquant: 8-bit KV cache")
        expected = "reference" if kernel is False else backends.choose(torch.device("cpu"))[0].name
        assert set(served) == {expected}
        assert ("SLOW" in lines[0]) == (expected == "reference")
        assert ("use_flash_attn changes nothing" in lines[0]) == (flash is True)
    assert model.config.use_cache_quantization is bool(quantization)
    assert model.config.use_cache_kernel is (kernel is not False)
    assert model.config.use_flash_attn is (flash is True)


def test_the_cache_is_the_one_made_by_hand() -> None:
    ids = ids_of(2, 20, "cpu")
    model = make("llama", "cpu")
    expected = generate(model, KVQuantCache(model), ids, 5)
    switched = apply_switches(make("llama", "cpu", "sdpa"), use_cache_quantization=True)
    assert torch.equal(cache_of(switched, ids)[0], expected)
    apply_switches(switched, use_cache_quantization=True, use_cache_kernel=False)
    assert torch.equal(cache_of(switched, ids)[0], expected)  # near enough, here


def test_a_saved_model_keeps_its_switches(tmp_path: Path, capsys: Any) -> None:
    model = apply_switches(make("llama", "cpu", "sdpa"), use_cache_quantization=True)
    model.save_pretrained(tmp_path)
    assert "8-bit KV cache" in capsys.readouterr().err
    loaded = from_pretrained(tmp_path)
    assert "8-bit KV cache" in capsys.readouterr().err
    assert isinstance(cache_of(loaded, ids_of(1, 5, "cpu"))[1], KVQuantCache)
    off = from_pretrained(tmp_path, use_cache_quantization=False)
    assert "16-bit KV cache" in capsys.readouterr().err
    assert not isinstance(cache_of(off, ids_of(1, 5, "cpu"))[1], KVQuantCache)


def test_switching_back_undoes_everything() -> None:
    model = make("llama", "cpu", "sdpa")
    ids = ids_of(1, 9, "cpu")
    before = cache_of(model, ids)[0]
    apply_switches(model, use_cache_quantization=True, use_cache_kernel=False)
    assert model._forward_pre_hooks
    apply_switches(model, use_cache_quantization=False)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(cache_of(model, ids)[0], before)


def test_the_reference_is_left_when_a_forward_fails() -> None:
    model = apply_switches(
        make("llama", "cpu", "sdpa"), use_cache_quantization=True, use_cache_kernel=False
    )
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 3), 10_000))
    assert backends.forced() == "auto"


def test_flash_attention_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    asked: list[str] = []
    model = make("llama", "cpu", "eager")
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    apply_switches(model, use_flash_attn=True)
    assert asked == ["flash_attention_2"]


def test_no_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kvquant.Explanation("attention", "reference", "the extension is not there")
    monkeypatch.setattr(module, "explain", lambda **options: found)
    line = Switches(use_cache_quantization=True).line(torch.device("cpu"), 128, "sdpa")
    assert "SLOW: the extension is not there" in line
    assert "kvquant doctor" in line


@pytest.mark.parametrize("name", ["use_cache_quantization", "use_cache_kernel", "use_flash_attn"])
def test_other_types_are_refused_before_loading(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected True, False or None, got 'yes'"):
        from_pretrained("no-such-model", **{name: "yes"})


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        apply_switches(torch.nn.Linear(2, 2), use_cache_quantization=True)
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=2)
    bloom = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="computes attention by itself"):
        apply_switches(bloom, use_cache_quantization=True)


def test_every_family_of_the_tests_is_switched() -> None:
    for name in CONFIGS:
        model = apply_switches(make(name, "cpu", "eager"), use_cache_quantization=True)
        assert isinstance(cache_of(model, ids_of(1, 5, "cpu"))[1], KVQuantCache)
