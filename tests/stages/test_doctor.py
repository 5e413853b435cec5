"""`fledge doctor` tells what is there, and its choice is the one that the stages make."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.cli import main
from fledge.device import can_compile, pick_compute_dtype, pick_device
from fledge.stages import doctor


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    device = pick_device()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert found["cores"] == os.cpu_count()
    assert found["memory_total_bytes"] > found["memory_available_bytes"] > 2**20
    assert found["fp32_gflops"] > 0
    assert found["bf16_gflops"] > 0
    assert found["use"] == {
        "device": str(device),
        "compute_dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[pick_compute_dtype(device)],
        "compile": can_compile()[0],
        "threads": torch.get_num_threads(),
    }


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("Python", "PyTorch", "AMX", "AVX512-BF16", "GPU", "Memory", "C++ compiler", "will use"):
        assert name in printed


def test_what_a_machine_lacks_is_said() -> None:
    found = {
        "python": "3.11.0", "torch": "2.9.0", "system": "Linux", "cpu": "abacus", "cores": 1, "threads": 1,
        "amx": False, "avx512_bf16": False, "gpu": [], "memory_total_bytes": None,
        "memory_available_bytes": None, "compiler": "no C++ compiler: g++ is not installed",
        "fp32_gflops": 0.1, "bf16_gflops": 0.1,
    }  # fmt: skip
    rows = dict(doctor.machine_rows(found))
    assert rows["GPU"] == "none"
    assert rows["Memory"] == "unknown"
    assert "g++ is not installed" in rows["C++ compiler"]
    use = {"device": "cpu", "compute_dtype": "fp32", "compile": False, "threads": 1}
    assert "eager" in " ".join(value for _, value in doctor.use_rows(use))


def test_rate_counts_two_operations_a_product_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes a second for one 256 x 256 product does 2 * 256^3 operations in it."""
    monkeypatch.setattr(doctor, "_elapsed", lambda a, repeats: float(repeats))
    rate = doctor.product_gflops(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(0.033554432)


# A model directory.


def judged(capsys: pytest.CaptureFixture[str], directory: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["doctor", str(directory), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def changed_config(directory: Path, out: Path, **changes: Any) -> Path:
    """A copy with other values in config.json; None takes a key out."""
    shutil.copytree(directory, out)
    config = {**json.loads((out / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(kept))
    return out


def words(found: dict[str, Any]) -> dict[str, str]:
    return {name: one["reads"] for name, one in found["readers"].items()}


def test_a_model_of_ours(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judged(capsys, chat_run / "model")
    assert found["what"] == "a language model of the family qwen3"
    assert words(found) == {"fledge": "yes", "transformers": "yes", "vLLM": "yes", "llama.cpp": "perhaps"}
    assert "--dtype bfloat16" in " ".join(found["readers"]["vLLM"]["notes"])
    assert "hash" in " ".join(found["readers"]["llama.cpp"]["unsure"])
    assert main(["doctor", str(chat_run / "model")]) == 0
    assert "llama.cpp" in capsys.readouterr().out


@pytest.mark.peers
def test_what_the_others_say_is_true_of_transformers(chat_run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_run / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "expected", "why"),
    [
        ({"model_type": "gemma3"}, {"fledge": "no", "transformers": "perhaps"}, "gemma3"),
        ({"architectures": None}, {"transformers": "yes", "vLLM": "no", "llama.cpp": "no"}, "architectures"),
        ({"architectures": ["LlamaForCausalLM"]}, {"transformers": "yes", "vLLM": "no"}, "Qwen3ForCausalLM"),
        ({"hidden_size": 96}, {"fledge": "no", "transformers": "no", "vLLM": "no"}, "shape"),
        ({"num_hidden_layers": 2}, {"fledge": "no", "transformers": "no", "llama.cpp": "no"}, "no tensor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"llama.cpp": "no"}, "dynamic"),
    ],
)  # fmt: skip
def test_why_not(
    changes: dict[str, Any],
    expected: dict[str, str],
    why: str,
    chat_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = judged(capsys, changed_config(chat_run / "model", tmp_path / "model", **changes))
    assert {name: words(found)[name] for name in expected} == expected
    assert why in json.dumps(found["readers"])


def test_a_tokenizer_with_more_ids_than_rows(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(capsys, changed_config(chat_run / "model", tmp_path / "model", vocab_size=8))
    assert set(words(found).values()) == {"no"}
    assert "the tokenizer has" in json.dumps(found)


def test_a_base_model_cannot_chat_with_others(
    base_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(base_run / "model", tmp_path / "model")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    found = judged(capsys, directory)
    assert "cannot chat" in " ".join(found["readers"]["vLLM"]["notes"])
    (directory / "tokenizer.json").unlink()
    assert set(words(judged(capsys, directory)).values()) == {"no"}


def test_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "models/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = judged(capsys, tmp_path)
    assert set(words(found).values()) == {"yes"}
    assert "--max-lora-rank 8" in json.dumps(found["readers"]["vLLM"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    assert words(judged(capsys, tmp_path))["vLLM"] == "no"


def test_an_ngram_model_is_ours_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ngram"}))
    assert words(judged(capsys, tmp_path)) == {
        "fledge": "yes", "transformers": "no", "vLLM": "no", "llama.cpp": "no",
    }  # fmt: skip


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        assert main(["doctor", str(directory)]) == 2
        assert str(directory) in capsys.readouterr().err
