"""Makes reward/ beside this file: losses and gradients of TRL's RewardTrainer on a tiny model.

    pip install trl==1.16.0 torch==2.13.0
    python tests/golden/make_reward.py

The test that reads them needs none of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from accelerate import Accelerator
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

OUT = Path(__file__).parent / "reward"
PAD = 0
EXAMPLES = [
    {"chosen_ids": [5, 9, 2, 8, 1], "rejected_ids": [5, 9, 2, 17, 30, 1], "margin": 0.5},
    {"chosen_ids": [7, 3, 1], "rejected_ids": [7, 3, 22, 19, 28, 4, 1], "margin": 0.0},
    {"chosen_ids": [11, 6, 6, 25, 1], "rejected_ids": [11, 6, 13, 1], "margin": -1.25},
]


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    made = transformers.Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(made.score.weight, 0.0, 0.5)
    return made.train()


def compute(made: transformers.PreTrainedModel, margin: bool, centring: float | None) -> dict[str, object]:
    """TRL's own compute_loss on a batch of its own collator."""
    trainer = SimpleNamespace(
        model=made,
        args=SimpleNamespace(center_rewards_coefficient=centring),
        accelerator=Accelerator(cpu=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    examples = EXAMPLES if margin else [{k: v for k, v in e.items() if k != "margin"} for e in EXAMPLES]
    inputs = DataCollatorForPreference(pad_token_id=PAD)(examples)
    made.zero_grad()
    loss, outputs = RewardTrainer.compute_loss(trainer, made, inputs, return_outputs=True)
    loss.backward()
    gradients = {name: float(p.grad.norm()) for name, p in made.named_parameters()}
    return {
        "margin": margin,
        "centring": centring or 0.0,
        "loss": float(loss.detach()),
        "accuracy": trainer._metrics["train"]["accuracy"][0],
        "rewards": outputs.logits.detach().squeeze(-1).tolist(),
        "gradient_norms": gradients,
    }


def main() -> None:
    made = model()
    made.save_pretrained(OUT)
    cases = [compute(made, margin, centring) for margin in (False, True) for centring in (None, 0.01, 0.3)]
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    numbers = {"versions": versions, "examples": EXAMPLES, "cases": cases}
    (OUT / "losses.json").write_text(json.dumps(numbers) + "\n")
    (OUT / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
