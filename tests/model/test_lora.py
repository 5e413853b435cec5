"""LoRA: what an adapter computes, its files, and that PEFT computes the same with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fledge.errors import UserError
from fledge.model.checkpoint import load_model, save_model
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    TARGETS,
    LoRA,
    add_lora,
    load_adapter,
    lora_of,
    merge_lora,
    read_adapter,
    save_adapter,
    trained_parameters,
)
from fledge.model.transformer import CausalLM

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


class NoTokenizer:
    def save(self, directory: Path) -> None:
        pass


def language_model(family: str = "qwen3") -> CausalLM:
    model = CausalLM(ModelConfig(family, 50, 16, 24, 2, 4, 2, 4, 32, tie_word_embeddings=family != "llama"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def disturb(model: torch.nn.Module) -> None:
    """Give what is trained other values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(lora: LoRA, family: str = "qwen3") -> CausalLM:
    model = language_model(family)
    add_lora(model, lora, torch.Generator().manual_seed(0))
    disturb(model)
    return model


def test_an_untrained_adapter_changes_nothing() -> None:
    model, plain = language_model(), language_model()
    add_lora(model, LoRA(4, 8.0), torch.Generator().manual_seed(0))
    assert torch.equal(model(IDS), plain(IDS))


def test_it_is_the_product_that_the_paper_says() -> None:
    """h = W x + (alpha / r) B A x, here for one layer; its gradient reaches A and B and not W."""
    model = adapted(LoRA(2, 6.0, ("q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    expected = x @ layer.weight.T + 3.0 * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected)
    model(IDS).sum().backward()
    assert {name.split(".", 4)[-1] for name, p in model.named_parameters() if p.grad is not None} == {
        "q_proj.lora_A.weight", "q_proj.lora_B.weight",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_merged_it_computes_the_same(family: str, tmp_path: Path) -> None:
    model = adapted(LoRA(3, 6.0), family)
    before = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), before, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == language_model(family).state_dict().keys()
    save_model(tmp_path, model, NoTokenizer(), {}, [1])
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))


def test_a_saved_adapter_loads_again(tmp_path: Path) -> None:
    lora = LoRA(3, 5.0, ("v_proj", "down_proj"))
    model = adapted(lora)
    save_adapter(tmp_path, model, lora, Path("base"), NoTokenizer(), {})
    assert len(read_adapter(tmp_path)) == 2 * 2 * 2
    again = language_model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))


def test_a_reward_models_head_belongs_to_the_adapter(tmp_path: Path) -> None:
    def reward_model(seed: int) -> RewardModel:
        return RewardModel(language_model(), torch.Generator().manual_seed(seed))

    lora = LoRA(2, 4.0)
    model = reward_model(0)
    add_lora(model, lora, torch.Generator().manual_seed(0))
    disturb(model)
    save_adapter(tmp_path, model, lora, Path("base"), NoTokenizer(), {})
    again = reward_model(5)
    load_adapter(again, tmp_path)
    last = torch.tensor([8, 4])
    assert torch.equal(again(IDS, last), model(IDS, last))
    merge_lora(again)
    torch.testing.assert_close(again(IDS, last), model(IDS, last), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern = {'q_proj': 3} is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = ['embed_tokens'] is not supported"),
        ({"r": 0}, "r = 0 is not a number above 0"),
        ({"lora_alpha": None}, "lora_alpha = None is not a number above 0"),
        ({"r": 5}, "lora_A.weight has shape (2, 16), the model calls for (5, 16)"),
    ],
)
def test_another_kind_of_adapter_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    lora = LoRA(2, 4.0, ("q_proj",))
    save_adapter(tmp_path, adapted(lora), lora, Path("base"), NoTokenizer(), {})
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        load_adapter(language_model(), tmp_path)
    assert message in str(error.value)


def test_an_adapter_outside_the_blocks_is_refused(tmp_path: Path) -> None:
    lora = LoRA(2, 4.0)
    save_adapter(tmp_path, adapted(lora), lora, Path("base"), NoTokenizer(), {})
    tensors = {f"{PREFIX}lm_head.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="adapts lm_head; only layers inside the blocks"):
        load_adapter(language_model(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora = LoRA(2, 4.0)
    save_adapter(tmp_path, adapted(lora), lora, Path("base"), NoTokenizer(), {})
    small = CausalLM(ModelConfig("qwen3", 50, 16, 24, 1, 4, 2, 4, 32))
    with pytest.raises(UserError, match="stands beside a layer that the model does not have"):
        load_adapter(small, tmp_path)
    with pytest.raises(UserError, match="an adapter; `fledge merge` makes a model of it"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no adapter: it has no adapter_config"):
        load_adapter(small, tmp_path / "nothing")


def test_flags() -> None:
    assert lora_of(None, None, TARGETS) is None
    assert lora_of(4, None, TARGETS) == LoRA(4, 8.0)
    with pytest.raises(UserError, match="go with --lora-rank"):
        lora_of(None, 3.0, TARGETS)
    with pytest.raises(UserError, match="--lora-rank 0: must be at least 1"):
        lora_of(0, None, TARGETS)
    with pytest.raises(UserError, match="--lora-targets wq: choose from q_proj"):
        lora_of(2, None, ("wq",))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
class TestPeft:
    """With transformers' model of the same weights."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        directory = tmp_path / "base"
        directory.mkdir()
        save_model(directory, language_model(), NoTokenizer(), {}, [1], pad_id=0)
        return directory

    def test_it_loads_our_adapter(self, base: Path, tmp_path: Path) -> None:
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        lora = LoRA(3, 7.0, ("q_proj", "up_proj", "o_proj"))
        model = adapted(lora)
        (tmp_path / "adapter").mkdir()
        save_adapter(tmp_path / "adapter", model, lora, base, NoTokenizer(), {})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)

    def test_it_loads_our_reward_models_adapter(self, base: Path, tmp_path: Path) -> None:
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        lora, generator = LoRA(2, 4.0), torch.Generator().manual_seed(0)
        model = RewardModel(language_model(), generator)
        add_lora(model, lora, generator)
        disturb(model)
        (tmp_path / "adapter").mkdir()
        save_adapter(tmp_path / "adapter", model, lora, base, NoTokenizer(), {})
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        ids: Tensor = IDS.clamp(min=1)
        with torch.no_grad():
            logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
            torch.testing.assert_close(model(ids, torch.tensor([8, 8])), logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("rslora", [False, True])
    def test_its_adapter_loads_here(self, base: Path, tmp_path: Path, rslora: bool) -> None:
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["k_proj", "gate_proj"],
            use_rslora=rslora,
            task_type="CAUSAL_LM",
        )
        theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
        model = load_model(base)
        load_adapter(model, tmp_path / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
        assert (tmp_path / "adapter" / ADAPTER_WEIGHTS).exists()

    def test_its_reward_models_adapter_loads_here(self, base: Path, tmp_path: Path) -> None:
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        theirs = peft.get_peft_model(theirs, config)
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
        model = RewardModel(load_model(base))
        load_adapter(model, tmp_path / "adapter")
        ids: Tensor = IDS.clamp(min=1)
        with torch.no_grad():
            logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
            torch.testing.assert_close(model(ids, torch.tensor([8, 8])), logits, atol=1e-4, rtol=1e-4)
