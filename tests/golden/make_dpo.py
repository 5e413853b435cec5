"""Makes dpo/ beside this file: losses and gradients of TRL's DPO, KTO, CPO and ORPO trainers on tiny models.

    pip install trl==1.16.0 torch==2.13.0
    python tests/golden/make_dpo.py

The test that reads them needs none of it.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from accelerate import Accelerator
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.utils import add_fused_lm_head

warnings.filterwarnings("ignore")
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

OUT = Path(__file__).parent / "dpo"
PAD = 0
PAIRS = [
    {"prompt_ids": [5, 9, 2], "chosen_ids": [8, 1], "rejected_ids": [17, 30, 1]},
    {"prompt_ids": [7], "chosen_ids": [3, 1], "rejected_ids": [3, 22, 19, 28, 4, 1]},
    {"prompt_ids": [11, 6, 6, 25], "chosen_ids": [13, 14, 29, 1], "rejected_ids": [1]},
    {"prompt_ids": [20, 7], "chosen_ids": [27, 5, 23, 1], "rejected_ids": [18, 1]},
    {"prompt_ids": [11, 6, 6, 25], "chosen_ids": [1], "rejected_ids": [13, 14, 29, 1]},
]
JUDGED = [
    {"prompt_ids": [5, 9, 2], "completion_ids": [8, 1], "KL_completion_ids": [3, 22, 19, 1], "label": True},
    {"prompt_ids": [7], "completion_ids": [3, 22, 19, 1], "KL_completion_ids": [8, 1], "label": False},
    {"prompt_ids": [11, 6], "completion_ids": [1], "KL_completion_ids": [12, 26, 1], "label": False},
    {"prompt_ids": [4, 4], "completion_ids": [12, 26, 1], "KL_completion_ids": [1], "label": True},
]
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def model(seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config).train()


def gradient_norms(made: transformers.PreTrainedModel, loss: torch.Tensor) -> dict[str, float]:
    made.zero_grad()
    loss.backward()
    return {name: float(p.grad.norm()) for name, p in made.named_parameters()}


def metrics(trainer: Any) -> dict[str, float]:
    found = trainer._metrics["train"].items()
    return {name: values[-1] for name, values in found if name.startswith(("rewards/", "logps/", "kl"))}


def trainer_of(policy: Any, reference: Any, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=Accelerator(cpu=True),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo(policy: Any, reference: Any, loss: str, beta: float, label_smoothing: float) -> dict[str, Any]:
    trainer = trainer_of(
        policy,
        reference,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    value = DPOTrainer._compute_loss(trainer, policy, DataCollatorForPreference(PAD)(PAIRS), False)
    case = {"loss": loss, "beta": beta, "label_smoothing": label_smoothing, "value": float(value.detach())}
    return {**case, "metrics": metrics(trainer), "gradient_norms": gradient_norms(policy, value)}


def kto(policy: Any, reference: Any, beta: float, good: float, bad: float) -> dict[str, Any]:
    trainer = trainer_of(
        policy,
        reference,
        beta=beta,
        desirable_weight=good,
        undesirable_weight=bad,
        loss_type="kto",
        calculate_KL=True,
    )
    trainer._compute_kl_logps = lambda made, batch: KTOTrainer._compute_kl_logps(trainer, made, batch)
    value = KTOTrainer._compute_loss(trainer, policy, DataCollatorForUnpairedPreference(PAD)(JUDGED), False)
    case = {
        "loss": "kto",
        "beta": beta,
        "weight_good": good,
        "weight_bad": bad,
        "value": float(value.detach()),
    }
    return {**case, "metrics": metrics(trainer), "gradient_norms": gradient_norms(policy, value)}


def means(policy: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-probabilities of chosen and rejected, by TRL's own get_batch_logps."""
    batch = DataCollatorForPreference(PAD)(PAIRS)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)


def simpo(policy: Any, beta: float, gamma: float) -> dict[str, Any]:
    trainer = trainer_of(
        policy, None, beta=beta, simpo_gamma=gamma, label_smoothing=0.0, alpha=0.0, loss_type="simpo"
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *means(policy))
    case = {"loss": "simpo", "beta": beta, "gamma": gamma, "values": losses.detach().tolist()}
    return {**case, "gradient_norms": gradient_norms(policy, losses.mean())}


def orpo(policy: Any, beta: float) -> dict[str, Any]:
    """The part with the odds ratio; TRL's other part is a mean over all tokens of prompts and answers."""
    trainer = trainer_of(policy, None, beta=beta)
    losses = -ORPOTrainer.odds_ratio_loss(trainer, *means(policy))[0]
    case = {"loss": "orpo", "beta": beta, "values": losses.detach().tolist()}
    return {**case, "gradient_norms": gradient_norms(policy, losses.mean())}


def smoothed(policy: Any, reference: Any, beta: float, label_smoothing: float) -> dict[str, Any]:
    """CPOTrainer's sigmoid of log-ratios: TRL's DPO itself has no smoothing."""
    sums = []
    for made in (policy, reference):
        batch = DataCollatorForPreference(PAD)(PAIRS)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logits = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        sums.append(CPOTrainer.get_batch_logps(logits, labels).chunk(2))
    ratios = [sums[0][i] - sums[1][i].detach() for i in (0, 1)]
    trainer = trainer_of(
        policy, None, beta=beta, label_smoothing=label_smoothing, alpha=0.0, loss_type="sigmoid"
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *ratios)
    case = {"loss": "sigmoid", "beta": beta, "label_smoothing": label_smoothing}
    value = losses.mean()
    return {**case, "value": float(value.detach()), "gradient_norms": gradient_norms(policy, value)}


def main() -> None:
    policy, reference = model(0), model(1).requires_grad_(False)
    for name, made in (("policy", policy), ("reference", reference)):
        made.save_pretrained(OUT / name)
        (OUT / name / "model.safetensors").chmod(0o644)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        add_fused_lm_head(made, outputs=FIELDS)
    cases = [
        dpo(policy, reference, loss, beta, 0.0) for loss in ("sigmoid", "hinge", "ipo") for beta in (0.1, 0.5)
    ]
    cases += [dpo(policy, reference, "robust", beta, 0.2) for beta in (0.1, 0.5)]
    cases += [smoothed(policy, reference, beta, 0.2) for beta in (0.1, 0.5)]
    cases += [kto(policy, reference, 0.1, 1.0, 1.0), kto(policy, reference, 0.3, 1.5, 0.5)]
    cases += [kto(reference.requires_grad_(), policy.requires_grad_(False), 0.1, 1.0, 1.0)]
    cases[-1]["turned"] = True
    policy.requires_grad_()
    cases += [simpo(policy, 2.0, 1.0), simpo(policy, 0.5, 0.25), orpo(policy, 0.1), orpo(policy, 1.0)]
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    numbers = {"versions": versions, "pairs": PAIRS, "judged": JUDGED, "cases": cases}
    (OUT / "losses.json").write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
