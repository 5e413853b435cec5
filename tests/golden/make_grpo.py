"""Makes grpo/ beside this file: what TRL's GRPOTrainer and RLOOTrainer compute of fixed completions.

    pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    python tests/golden/make_grpo.py

The trainers score and learn themselves; only what was sampled is given to them, and an older policy that is
said to have sampled it, so that ratios are clipped. The models are those of dpo/. The test that reads the
file needs none of it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

warnings.filterwarnings("ignore")
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

GOLDEN = Path(__file__).parent
PAD, EOS, SAMPLES, MOST = 0, 1, 3, 7
PROMPTS = [[5, 9, 2], [7], [11, 6, 6, 25]]
COMPLETIONS = [
    [[8, 1], [3, 22, 19, 1], [30, 12, 4, 4, 9, 1]],
    [[13, 14, 29, 4, 17, 28, 2], [1], [27, 5, 23, 1]],
    [[18, 1], [6, 6, 1], [21, 10, 15, 1]],
]
REWARDS = [[1.0, 0.0, 0.25], [-0.5, 2.0, 0.5], [0.75, 0.75, 0.75]]
ROWS = [
    (p, c, r)
    for p, cs, rs in zip(PROMPTS, COMPLETIONS, REWARDS, strict=True)
    for c, r in zip(cs, rs, strict=True)
]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"t{i}": i for i in range(32)}
    made = Tokenizer(models.WordLevel(words, unk_token="t2"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0", eos_token="t1")


def near(model: Any, scale: float) -> Any:
    """The same model with a little noise: what it was some updates ago."""
    torch.manual_seed(9)
    old = type(model)(model.config).requires_grad_(False)
    old.load_state_dict(model.state_dict())
    for parameter in old.parameters():
        parameter += scale * torch.randn_like(parameter)
    return old


def load(name: str) -> Any:
    return transformers.Qwen3ForCausalLM.from_pretrained(GOLDEN / "dpo" / name, attn_implementation="eager")


def trainer_of(kind: Any, config: Any, **settings: Any) -> Any:
    count = len(ROWS)
    args = config(
        output_dir="/tmp/unused", report_to="none", use_cpu=True, bf16=False, num_generations=SAMPLES,
        max_completion_length=MOST, per_device_train_batch_size=count, gradient_checkpointing=False,
        temperature=1.0, **settings,
    )  # fmt: skip
    rewards = [reward for _, _, reward in ROWS]
    made = kind(
        model=load("policy"),
        reward_funcs=lambda prompts, completions, **_: rewards,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(count)]),
        processing_class=tokenizer(),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def logps_of(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """By TRL's own function."""
    trl.trainer.utils.add_fused_lm_head(
        model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    )
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            model, ids, mask, inputs["completion_ids"].shape[1]
        )[0]


def case(kind: Any, config: Any, **settings: Any) -> dict[str, Any]:
    trainer = trainer_of(kind, config, **settings)
    reference, old = load("reference").requires_grad_(False), near(load("policy"), 0.03)
    prompts, completions = [p for p, _, _ in ROWS], [c for _, c, _ in ROWS]
    rloo = kind is RLOOTrainer
    made = (prompts, completions, ["x"] * len(ROWS))
    rest = (None, ["x"] * len(ROWS), None, {}, None, None)
    trainer._generate = lambda *_: made if rloo else (prompts, completions, *rest)
    trainer.ref_model = reference
    logps_of(trainer, reference, shape := padded(prompts, completions))
    inputs = trainer._generate_and_score_completions([{"prompt": f"t{i}"} for i in range(len(ROWS))])
    old_logps = logps_of(trainer, old, shape)
    mask = shape["completion_mask"]
    inputs["old_logps" if rloo else "old_per_token_logps"] = (old_logps * mask).sum(1) if rloo else old_logps
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    out = {
        "settings": {"trainer": kind.__name__, **settings},
        "advantages": inputs["advantages"].tolist(),
        "loss": float(loss.detach()),
        "old_logps": old_logps.tolist(),
        "ref_logps": logps_of(trainer, reference, shape).tolist(),
        "logps": logps_of(trainer, trainer.model, shape).tolist(),
        "clip_fraction": metrics["clip_ratio/region_mean"],
        "entropy": metrics["entropy"],
        "without_signal": metrics["frac_reward_zero_std"],
        "gradient_norms": {n: float(p.grad.norm()) for n, p in trainer.model.named_parameters()},
    }
    return {**out, **({"kl": metrics["kl"]} if "kl" in metrics and not rloo else {})}


def padded(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, torch.Tensor]:
    widths = max(map(len, prompts)), max(map(len, completions))
    left = [[PAD] * (widths[0] - len(p)) + p for p in prompts]
    right = [c + [PAD] * (widths[1] - len(c)) for c in completions]
    return {
        "prompt_ids": torch.tensor(left),
        "prompt_mask": torch.tensor([[0] * (widths[0] - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor(right),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (widths[1] - len(c)) for c in completions]),
    }


def main() -> None:
    cases = []
    for loss_type, scale in (("grpo", "group"), ("bnpo", "group"), ("dapo", "group"), ("dr_grpo", "none")):
        common = {"loss_type": loss_type, "scale_rewards": scale}
        cases.append(case(GRPOTrainer, GRPOConfig, beta=0.0, epsilon=0.2, **common))
        cases.append(case(GRPOTrainer, GRPOConfig, beta=0.1, epsilon=0.05, epsilon_high=0.28, **common))
    cases.append(case(RLOOTrainer, RLOOConfig, beta=0.0, epsilon=0.2))
    cases.append(case(RLOOTrainer, RLOOConfig, beta=0.0, epsilon=0.05, epsilon_high=0.4))
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    numbers = {"versions": versions, "prompts": PROMPTS, "completions": COMPLETIONS, "rewards": REWARDS}
    (GOLDEN / "grpo").mkdir(exist_ok=True)
    (GOLDEN / "grpo" / "losses.json").write_text(
        json.dumps({**numbers, "most_tokens": MOST, "cases": cases}) + "\n"
    )


if __name__ == "__main__":
    main()
