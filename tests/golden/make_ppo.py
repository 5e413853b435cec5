"""Makes ppo/ beside this file: what TRL's PPOTrainer computes of fixed roll-outs of tiny models.

    pip install trl==1.8.0 torch==2.13.0 transformers==5.23.0
    python tests/golden/make_ppo.py

TRL's own `train` runs up to the backward pass of its first minibatch; what stands in its variables is written
down. The roll-outs, and the policy and value function that made them, are given, so that ratios and values
differ from the old ones by enough to be clipped. The test that reads the files needs none of it.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from accelerate import Accelerator

warnings.filterwarnings("ignore")
from trl.experimental.ppo import PPOConfig, ppo_trainer  # noqa: E402

OUT = Path(__file__).parent / "ppo"
PAD, EOS = 0, 1
PROMPTS = [[5, 9, 2], [7], [11, 6, 6, 25], [20, 7]]
# The first two and the last end early, the third not at all; after the end anything may stand.
RESPONSES = [[8, 1, 0, 0, 0, 0], [3, 22, 19, 1, 30, 12], [13, 14, 29, 4, 17, 28], [1, 0, 0, 0, 0, 0]]
SCORES = [0.7, -1.3, 2.1, 0.4]


class Done(Exception):
    """All that is wanted is known."""


def settings(seed: int) -> transformers.Qwen3Config:
    torch.manual_seed(seed)
    return transformers.Qwen3Config(
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
        num_labels=1,
        tie_word_embeddings=True,
    )


def policy_model(seed: int) -> Any:
    return transformers.Qwen3ForCausalLM(settings(seed)).train()


def value_model(seed: int) -> Any:
    made = transformers.Qwen3ForSequenceClassification(settings(seed)).train()
    torch.nn.init.normal_(made.score.weight, std=0.3)
    return made


def near(model: Any, scale: float) -> Any:
    """The same model with a little noise: what it was some updates ago."""
    torch.manual_seed(9)
    old = type(model)(model.config).requires_grad_(False)
    old.load_state_dict(model.state_dict())
    for parameter in old.parameters():
        parameter += scale * torch.randn_like(parameter)
    return old


def rolled_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, padded to the left, and prompts with responses."""
    width = max(map(len, PROMPTS))
    queries = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    return queries, torch.cat([queries, torch.tensor(RESPONSES)], 1)


def run(policy: Any, value: Any, reference: Any, args: PPOConfig) -> dict[str, Any]:
    """The variables of `PPOTrainer.train` after the backward pass of its first minibatch."""
    queries, whole = rolled_out()
    old_policy, old_value = near(policy, 0.03), near(value, 0.03)
    context = queries.shape[1]
    old_logits = ppo_trainer.forward(old_policy, whole, PAD).logits[:, context - 1 : -1]
    scores = torch.tensor(SCORES)
    get_reward = ppo_trainer.get_reward

    def given_reward(model: Any, *rest: Any) -> Any:
        return get_reward(old_value, *rest) if model is value else (None, scores.clone(), None)

    @contextmanager
    def unwrapped(model: Any, *_: Any, **__: Any) -> Any:
        yield model

    found: dict[str, Any] = {}

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        found.update(sys._getframe(1).f_locals, loss=loss)
        raise Done

    ppo_trainer.batch_generation = lambda *_: (whole, old_logits.detach())
    ppo_trainer.get_reward = given_reward
    ppo_trainer.unwrap_model_for_generation = unwrapped
    ppo_trainer.np.random.permutation = lambda count: torch.arange(count).numpy()
    accelerator = Accelerator(cpu=True)
    accelerator.backward = backward
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=ppo_trainer.PolicyAndValueWrapper(policy, value),
        ref_model=reference,
        reward_model=SimpleNamespace(),
        optimizer=None,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        dataloader=[{"input_ids": queries}],
        stop_token_id=EOS,
        train_dataset_len=len(PROMPTS),
        state=SimpleNamespace(),
        control=None,
        callback_handler=SimpleNamespace(on_train_begin=lambda *_: None),
        is_deepspeed_enabled=False,
    )
    with suppress(Done):
        ppo_trainer.PPOTrainer.train(trainer)
    ppo_trainer.get_reward = get_reward
    return found


def case(policy: Any, value: Any, reference: Any, **changes: float) -> dict[str, Any]:
    args = PPOConfig(output_dir="/tmp/unused", temperature=1.0, report_to="none", use_cpu=True, **changes)
    count = len(PROMPTS)
    args.local_batch_size = args.local_mini_batch_size = args.batch_size = count
    args.per_device_train_batch_size = args.local_rollout_forward_batch_size = count
    args.num_total_batches, args.total_episodes = 1, count
    for made in (policy, value):
        made.zero_grad()
    found = run(policy, value, reference, args)
    names = ("logprobs", "ref_logprobs", "scores", "values", "rewards", "advantages", "returns", "loss")
    names = (*names, "new_logprobs", "vpred", "pg_loss", "vf_loss", "padding_mask", "padding_mask_p1", "kl")
    out = {name: found[name].detach().tolist() for name in names}
    out["ratio"] = found["ratio"].detach().tolist()
    out["clipped"] = float((found["pg_losses2"] > found["pg_losses"]).float().mean())
    out["value_clipped"] = float((found["vf_losses2"] > found["vf_losses1"]).float().mean())
    settings = ("kl_coef", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "missing_eos_penalty")
    out["settings"] = {name: getattr(args, name) for name in settings}
    for made, name in ((policy, "policy"), (value, "value")):
        norms = {key: float(p.grad.norm()) for key, p in made.named_parameters() if p.grad is not None}
        out[f"{name}_gradient_norms"] = norms
    return out


def functions() -> dict[str, Any]:
    """masked_mean, masked_whiten and truncate_response on numbers of their own."""
    torch.manual_seed(3)
    values = torch.randn(4, 7) * 3 + 1
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6, [0, 1, 1, 0, 1, 0, 0]]).bool()
    responses = torch.tensor([[5, 9, 2, 1, 7, 7], [6, 8, 10, 12, 14, 16], [1, 1, 3, 3, 3, 3]])
    return {
        "values": values.tolist(),
        "mask": mask.tolist(),
        "mean": float(ppo_trainer.masked_mean(values, mask)),
        "whitened": ppo_trainer.masked_whiten(values, mask).tolist(),
        "stop_id": EOS,
        "responses": responses.tolist(),
        "truncated": ppo_trainer.truncate_response(EOS, PAD, responses).tolist(),
    }


def main() -> None:
    policy, value, reference = policy_model(0), value_model(1), near(policy_model(0), 0.1)
    for name, made in (("policy", policy), ("value", value)):
        made.save_pretrained(OUT / name)
        (OUT / name / "model.safetensors").chmod(0o644)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
    cases = [
        case(policy, value, reference),
        case(policy, value, reference, kl_coef=0.3, gamma=0.97, lam=0.8, vf_coef=0.5, cliprange=0.05),
        case(policy, value, reference, cliprange=0.4, cliprange_value=0.01, missing_eos_penalty=1.0),
    ]
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    numbers = {"versions": versions, "prompts": PROMPTS, "responses": RESPONSES, "scores": SCORES}
    numbers |= {"eos_id": EOS, "functions": functions(), "cases": cases}
    (OUT / "losses.json").write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
