"""`fledge merge`: an adapter and its base become one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fledge import cli
from fledge.model.checkpoint import eos_ids_of, load_model
from fledge.model.lora import LoRA, add_lora, save_adapter
from fledge.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.usefixtures("quick")


class NoTokenizer:
    def save(self, directory: Path) -> None:
        pass


IDS = torch.tensor([[5, 40, 61, 7]])


@pytest.fixture
def adapter(chat_run: Path, tmp_path: Path) -> Path:
    """An adapter without a tokenizer, as PEFT writes it, that changes what the model computes."""
    model, lora = load_model(chat_run / "model"), LoRA(2, 4.0)
    add_lora(model, lora, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_adapter(directory, model, lora, chat_run / "model", NoTokenizer(), {})
    (directory / "lineage.json").unlink()
    return directory


def test_the_merged_model_is_whole(adapter: Path, chat_run: Path, tmp_path: Path) -> None:
    base = chat_run / "model"
    assert cli.main(["merge", "--model", str(adapter), "--out", str(tmp_path / "out")]) == 0
    merged, plain = load_model(tmp_path / "out"), load_model(base)
    assert not torch.allclose(merged(IDS), plain(IDS), atol=0.1)
    assert torch.equal(merged.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert Tokenizer.load(tmp_path / "out").fingerprint() == Tokenizer.load(base).fingerprint()
    assert eos_ids_of(tmp_path / "out") == eos_ids_of(base)
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["adapter"], lineage["base"]) == ("merge", str(adapter), str(base))


def test_a_base_that_has_moved_can_be_named(
    adapter: Path, chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    flags = ["merge", "--model", str(adapter), "--out", str(tmp_path / "out")]
    assert cli.main(flags) == 2
    assert "gone: no such directory; give the model that the adapter belongs to" in capsys.readouterr().err
    assert cli.main([*flags, "--base", str(chat_run / "model")]) == 0
    assert cli.main([*flags, "--base", str(chat_run / "model")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*flags, "--base", str(chat_run / "model"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "{tmp}/nothing"], "{tmp}/nothing: no adapter: it has no adapter_config.json"),
        (["--model", "{chat}"], "{chat}: no adapter: it has no adapter_config.json"),
        (["--base", "{tmp}/other"], "{tmp}/other/config.json: no such file"),
        (["--out", "{tmp}/other", "--overwrite"], "{tmp}/other: holds no model, so --overwrite leaves it"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    message: str,
    adapter: Path,
    chat_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    for name, value in (("{tmp}", str(tmp_path)), ("{chat}", str(chat_run / "model"))):
        more, message = [text.replace(name, value) for text in more], message.replace(name, value)
    flags = {"--model": str(adapter), "--out": str(tmp_path / "out"), more[0]: more[1]}
    assert cli.main(["merge", *(word for pair in flags.items() for word in pair), *more[2:]]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fledge merge: error: {message}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "other").is_dir()
    shutil.rmtree(tmp_path / "other")
