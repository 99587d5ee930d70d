"""Each of the doctor's rows, provoked."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant import cli, doctor

BUILT = {
    "version": "0.1.0", "cuda": True, "devices": 1, "cuda_error": None,
    "cuda_archs": "80-real;90-virtual", "cuda_runtime": 13000, "cuda_driver": 13000,
}  # fmt: skip
INFO: dict[str, Any] = {
    "versions": {"kvquant": "0.1.0", "torch": "2.9.0", "python": "3.12"},
    "extension": BUILT,
    "cuda": {"torch": "13.0", "devices": [{"name": "A100", "compute_capability": "8.0"}]},
}
ALONE = {"extension": {**BUILT, "devices": 0, "cuda_driver": 0}, "cuda.devices": []}
CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {  # changes, row, state, what, advice
    "well": ({}, "extension", "ok", "nothing is compiled at run time", ""),
    "extension-missing": (
        {"extension": {"error": "ImportError: no module"}},
        "extension", "stops", "the compiled kernels are not there", "install a wheel",
    ),
    "extension-stale": (
        {"extension": {"error": "ImportError: it is of version 0.0.9, but this package of 0.1.0"}},
        "extension", "stops", "a stale build of kvquant._C", "build it again",
    ),
    "extension-other-fields": (
        {"extension": {"error": "ImportError: its Options has (), but this package's (1)"}},
        "extension", "stops", "a stale build of kvquant._C", "build it again",
    ),
    "no-gpu": (ALONE, "GPU", "note", "kvquant runs on the CPU", "nvidia-smi"),
    "no-driver": (ALONE, "driver", "note", "no NVIDIA driver", ""),
    "old-driver": (
        {"extension": {**BUILT, "cuda_driver": 12040}},
        "driver", "stops", "it is for CUDA 12.4, but this build of kvquant needs 13.0",
        "update the NVIDIA driver",
    ),
    "driver": ({}, "driver", "ok", "for CUDA 13.0", ""),
    "cpu-build": (
        {"extension": {**BUILT, "cuda": False, "cuda_archs": "", "devices": 0}},
        "CUDA build", "stops", "no CUDA kernels", "KVQUANT_CUDA=ON",
    ),
    "cpu-build-without-gpu": (
        {"extension": {"cuda": False}, "cuda.devices": []},
        "CUDA build", "note", "no CUDA kernels", "",
    ),
    "architecture": (
        {"cuda.devices": [{"name": "T4", "compute_capability": "7.5"}]},
        "architecture", "stops", "T4 has compute capability 7.5, but this build is for 80-real",
        "KVQUANT_CUDA_ARCHS=75-real",
    ),
    "torch-cpu": (
        {"cuda.torch": None, "cuda.devices": []},
        "torch", "stops", "there is a GPU, but torch 2.9.0 is a CPU build", "a CUDA build of torch",
    ),
    "torch-blind": (
        {"cuda.devices": []}, "torch", "stops", "does not see it", "CUDA_VISIBLE_DEVICES",
    ),
}  # fmt: skip


def info_with(changes: dict[str, Any]) -> dict[str, Any]:
    info = copy.deepcopy(INFO)
    for name, value in changes.items():
        *path, last = name.split(".")
        of = info
        for part in path:
            of = of[part]
        of[last] = value
    return info


@pytest.fixture(autouse=True)
def explained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `explain` says by device, as on a machine where all is well."""
    from kvquant.doctor import checks

    by_device = {
        name: kvquant.Explanation("attention", name, f"compiled {name} kernels")
        for name in ("cpu", "cuda")
    }
    monkeypatch.setattr(checks, "explain", lambda device: by_device[device])
    return by_device


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.logging.getLogger("kvquant"), "setLevel", lambda level: None)


@pytest.mark.parametrize("case", CASES)
def test_a_row(case: str) -> None:
    changes, check, state, what, advice = CASES[case]
    rows = {row.check: row for row in doctor.examine(info_with(changes), transformers="5.24.0")}
    assert rows[check].state == state
    assert what in rows[check].what
    assert advice in rows[check].advice
    assert all(row.advice for row in rows.values() if row.state in ("slow", "stops"))


def test_all_is_well() -> None:
    rows = doctor.examine(INFO, transformers="5.24.0")
    assert {row.state for row in rows} == {"ok"}


@pytest.mark.parametrize(
    ("reason", "state", "advice"),
    [
        ("forced by use_backend or KVQUANT_BACKEND", "slow", "unset KVQUANT_BACKEND"),
        ("the extension is not there", "stops", "see the other rows"),
    ],
)
def test_a_slow_backend_is_seen(
    reason: str, state: str, advice: str, explained: dict[str, Any]
) -> None:
    explained["cpu"] = kvquant.Explanation("attention", "reference", reason)
    rows = {row.check: row for row in doctor.examine(INFO, transformers="5.24.0")}
    row = rows["attention on the CPU"]
    assert (row.state, reason in row.what, advice in row.advice) == (state, True, True)
    assert rows["attention on the GPU"].state == "ok"


@pytest.mark.parametrize(
    ("version", "state", "what"),
    [
        (None, "note", "not installed"),
        ("5.4.0", "stops", "5.4.0 is too old: KVQuantCache needs 5.5"),
        ("5.5.0", "ok", "5.5.0"),
        ("5.24.0.dev0", "ok", "5.24.0"),
    ],
)
def test_the_library(version: str | None, state: str, what: str) -> None:
    row = doctor.examine(INFO, transformers=version)[-1]
    assert row.check == "transformers"
    assert row.state == state
    assert what in row.what


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("90-real", "9.0", True),
        ("90-real", "8.9", False),
        ("80-real", "8.6", True),
        ("86-real", "8.0", False),
        ("80-real", "9.0", False),
        ("80-virtual", "9.0", True),
        ("80", "12.0", True),
        ("90a-real", "9.0", True),
        ("90a-real", "10.0", False),
        ("75-real;120-real", "12.0", True),
        ("nonsense", "9.0", False),
    ],
)
def test_architectures(archs: str, capability: str, serves: bool) -> None:
    assert doctor.serves_arch(archs, capability) == serves


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    file = tmp_path / "doctor.json"
    for info, status in ((INFO, 0), (info_with(CASES["old-driver"][0]), 1)):
        monkeypatch.setattr(cli, "collect", lambda info=info: info)
        with pytest.raises(SystemExit) as end:
            cli.main(["doctor", "--json", str(file)])
        assert end.value.code == status
        states = [row["state"] for row in json.loads(file.read_text())]
        assert ("stops" in states) == bool(status)
    printed = capsys.readouterr().out
    assert "nothing stops it" in printed
    assert "stops  driver" in printed
    assert "-> update the NVIDIA driver" in printed


def test_the_command_needs_torch_alone(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'transformers'): sys.modules[name] = None\n"
        f"from kvquant.cli import main; main(['doctor', '--json', {str(file)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    assert "extension" in done.stdout
    assert json.loads(file.read_text())


# ---------------------------------------------------------------------------------------- models


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", minversion="5.5")


def config_of(transformers: Any, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    for name, value in more.items():
        setattr(config, name, value)
    return config


def rows_of(config: Any, **options: Any) -> dict[str, doctor.Finding]:
    return {row.check: row for row in doctor.examine_model(config, **options)}


def test_models(transformers: Any) -> None:
    assert rows_of(config_of(transformers))["model"].state == "ok"
    mamba = rows_of(transformers.MambaConfig(num_hidden_layers=1, hidden_size=32))["model"]
    assert mamba.state == "stops"
    assert "layer 0 is" in mamba.what  # "mamba", "linear_attention"
    bloom = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=2)
    row = rows_of(bloom)["model"]
    assert row.state == "slow"
    assert "computes attention by itself" in row.what


@pytest.mark.parametrize(
    ("switches", "state", "what"),
    [
        ({}, "note", "none in the config"),
        ({"use_cache_kernel": True}, "stops", "without use_cache_quantization"),
        ({"use_cache_quantization": True}, "ok", "is set"),
        (
            {"use_cache_quantization": True, "use_cache_kernel": False},
            "slow",
            "the torch reference runs",
        ),
    ],
)
def test_switches(switches: dict[str, bool], state: str, what: str, transformers: Any) -> None:
    row = rows_of(config_of(transformers, **switches))["switches"]
    assert row.state == state
    assert what in row.what


def test_memory(transformers: Any) -> None:
    small = rows_of(config_of(transformers), batch=4, length=1000, device_memory=10**5)["memory"]
    assert small.state == "stops"
    assert "more than" in small.what
    assert "kvquant fit" in small.advice
    large = rows_of(config_of(transformers), batch=4, length=1000, device_memory=10**9)["memory"]
    assert large.state == "ok"


def test_calls(transformers: Any) -> None:
    from kvquant.integrations.transformers import KVQuantCache, enable

    def model(attention: str) -> Any:
        return transformers.AutoModelForCausalLM.from_config(
            config_of(transformers), attn_implementation=attention
        )

    ours, other = model("kvquant"), model("sdpa")
    for found, state, what in (
        (doctor.examine_call(ours, KVQuantCache(ours)), "ok", "8-bit cache"),
        (doctor.examine_call(other, KVQuantCache(other)), "slow", "the attention is 'sdpa'"),
        (doctor.examine_call(ours), "stops", "no KVQuantCache is passed"),
        (
            doctor.examine_call(ours, transformers.DynamicCache(config=ours.config)),
            "stops",
            "no KVQuantCache is passed",
        ),
        (doctor.examine_call(other), "note", "neither"),
        (doctor.examine_call(enable(model("sdpa"))), "ok", "8-bit cache"),
    ):
        assert found.state == state
        assert what in found.what
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        doctor.examine_call(torch.nn.Linear(1, 1))


def test_the_command_on_a_model(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("typer")
    monkeypatch.setattr(cli, "collect", lambda: INFO)
    config_of(transformers, use_cache_kernel=True).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", str(tmp_path), "--batch", "2", "--length", "100"])
    assert end.value.code == 1
    with pytest.raises(SystemExit, match="kvquant doctor: model: expected a folder"):
        cli.main(["doctor", "no-such-model"])


def test_a_bar_is_shown_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="5.5")
    pytest.importorskip("typer")
    terminal = pytest.importorskip("kvquant.terminal")
    bars: list[tuple[str, int]] = []
    progress = terminal.progress

    def watched(what: str, total: int) -> Any:
        bars.append((what, total))
        return progress(what, total)

    monkeypatch.setattr(terminal, "progress", watched)
    with pytest.raises(SystemExit):
        cli.main(["doctor", "smollm2-135m"])
    assert bars == [("the model, without weights", 1)]
