"""Model directories: what is saved loads again, and what is damaged is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge.errors import UserError
from fledge.files import new_directory
from fledge.model.checkpoint import INDEX, eos_ids_of, load_model, read_weights, save_model, weights_of
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM


class NoTokenizer:
    """Takes a tokenizer's place in `save_model`."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def random_model(tied: bool = False) -> CausalLM:
    model = CausalLM(ModelConfig("qwen3", 50, 16, 24, 2, 4, 2, 4, 32, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_model(path, random_model(), NoTokenizer(), {"stage": "sft", "tokens": 7}, [3, 4])
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = random_model(tied)
    save_model(tmp_path, model, NoTokenizer(), {"stage": "pretrain"}, [3])
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids), model(ids))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_everything_is_written(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "lineage.json"),
        *("model.safetensors", "tokenizer.json"),
    }
    assert json.loads((directory / "lineage.json").read_text()) == {"stage": "sft", "tokens": 7}
    assert "| stage | sft |" in (directory / "README.md").read_text()


def test_weights_load_in_another_type(directory: Path) -> None:
    model = load_model(directory, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_shards_load(directory: Path) -> None:
    expected = load_model(directory)(torch.tensor([[1, 2, 3]]))
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_model(directory)(torch.tensor([[1, 2, 3]])), expected)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load_model(directory)


@pytest.mark.parametrize("limit", [10**9, 6000, 1])
def test_large_models_are_written_in_shards(limit: int, tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path, model, NoTokenizer(), {}, [3], max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    files = len(shards)
    assert files == {10**9: 1, 1: len(weights_of(model))}.get(limit, files)
    assert (files > 1) == (limit < 10**9) == (tmp_path / INDEX).exists()
    if files > 1:
        names = [f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)]
        assert [path.name for path in shards] == names
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"].keys() == weights_of(model).keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights_of(model).values())
        for path in shards:
            held = load_file(path)
            assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
            assert {index["weight_map"][name] for name in held} == {path.name}
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(tmp_path)(ids), model(ids))
    assert read_weights(tmp_path).keys() == weights_of(model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path, random_model(tied=True).to(dtype), NoTokenizer(), {}, [3])
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in load_model(tmp_path, None).parameters()} == {dtype}
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


MEASURE = """
import sys, torch
from pathlib import Path
from fledge.model.checkpoint import load_model

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

before = status("RssAnon")
model = load_model(Path(sys.argv[1]), {"None": None, "float32": torch.float32}[sys.argv[2]])
own = status("RssAnon") - before
for parameter in model.parameters():  # read every page
    parameter.detach().view(torch.uint8).flatten()[::4096].sum()
print(own, status("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_large_model_is_in_memory_once(tmp_path: Path) -> None:
    """1.2 GB in bf16: kept as it is, it is the file's own pages; converted, it has the new type's size."""
    config = ModelConfig("llama", 32_000, 2048, 5632, 10, 32, 8, 64, 2048, tie_word_embeddings=False)
    with torch.device("meta"):
        model = CausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    save_model(tmp_path, model, NoTokenizer(), {}, [3], max_shard_bytes=500_000_000)
    size = sum(t.nbytes for t in weights_of(model).values())
    del model
    assert size > 1.1e9
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for dtype, factor in (("None", 1), ("float32", 2)):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        own, peak = map(int, done.stdout.split())
        assert own < 200e6 if factor == 1 else own < 2 * size + 200e6
        assert peak < factor * size + 900e6  # Python and PyTorch, and one tensor on its way


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: rewrite(d, lambda w: w.pop(NAME)), rf"no tensor {NAME}"),
        (
            lambda d: rewrite(d, lambda w: w.update({NAME: torch.zeros(3, 4)})),
            rf"tensor {NAME} has shape \(3, 4\), config.json calls for \(24, 16\)",
        ),
        (lambda d: rewrite(d, lambda w: w.update({"model.bias": torch.zeros(1)})), r"hold model\.bias"),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (lambda d: cut(d / "model.safetensors"), r"model\.safetensors: not a readable safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
        (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
        (lambda d: (d / INDEX).write_text("[]"), "not a valid shard index"),
        (lambda d: (d / INDEX).write_bytes(b"\xff"), "not a valid shard index"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "not a valid shard index"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../b"}}'), "a shard outside the directory"),
        (
            lambda d: rewrite(d, lambda w: w.update({NAME: torch.zeros(24, 16, dtype=torch.int8)})),
            rf"tensor {NAME} is of type I8; quantised weights are not supported",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            r"pytorch_model\.bin is not read: it could run code",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], message: str, directory: Path) -> None:
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        load_model(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        load_model(tmp_path / "nothing")


def test_eos_ids(directory: Path) -> None:
    assert eos_ids_of(directory) == [3, 4]
    (directory / "generation_config.json").write_text('{"do_sample": false}')
    assert eos_ids_of(directory) == [3]  # config.json's
    (directory / "config.json").write_text("{}")
    assert eos_ids_of(directory) == []
    for content in (b"{", b"[]", b"\xff", b'{"eos_token_id": "x"}'):
        (directory / "generation_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            eos_ids_of(directory)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    with new_directory(path) as new:
        (new / "a").write_text("old")
    with pytest.raises(UserError, match="exists already"), new_directory(path):
        pass
    with new_directory(path, overwrite=True) as new:
        (new / "b").write_text("new")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with new_directory(path) as new:
        (new / "a").write_text("old")
    with pytest.raises(OSError, match="full"), new_directory(path, overwrite=True) as new:
        (new / "a").write_text("half")
        raise OSError("disk full")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existed", [True, False])
def test_a_crash_leaves_no_half_model(existed: bool, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if existed:
        with new_directory(path) as new:
            (new / "a").write_text("old")
    program = (
        "import os, sys; from pathlib import Path; from fledge.files import new_directory\n"
        "with new_directory(Path(sys.argv[1]), overwrite=True) as new:\n"
        "    (new / 'a').write_text('half')\n"
        "    os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=False)
    assert done.returncode == 9
    assert path.exists() == existed
    if existed:
        assert (path / "a").read_text() == "old"
    with new_directory(path, overwrite=True) as new:  # what the crash left does not hinder the next try
        (new / "a").write_text("new")
    assert (path / "a").read_text() == "new"
