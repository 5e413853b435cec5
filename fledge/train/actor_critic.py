"""The policy and the value function of reinforcement learning, and the reference that does not change.

Shape suffixes: B rows (roll-outs), T tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.model.checkpoint import load_reward_model, read_file
from fledge.model.heads import RewardModel
from fledge.model.lora import LoRA, add_lora, trained_parameters
from fledge.model.transformer import CausalLM
from fledge.rewards.reward_model import offset_of
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.rollout import Padded, reference_scores, token_scores
from fledge.train.start import load_start, require_chat

VALUE_WEIGHTS = "value.safetensors"


class Read(NamedTuple):
    """What the models say of roll-outs, all (B, T): log-probabilities and entropies of the tokens (nats), and
    the values before them."""

    logps: Tensor
    entropy: Tensor
    values: Tensor


class Critic(nn.Module):
    """A value function that begins as a reward model, with a trunk of its own."""

    def __init__(self, reward: RewardModel, offset: float) -> None:
        """Takes the reward model's trunk and head (not a copy); `offset` is added to what it says."""
        super().__init__()
        with torch.device("meta"):
            self.trunk = CausalLM(reward.config)
        del self.trunk.lm_head
        self.trunk.model, self.score, self.offset = reward.model, reward.score, offset

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Values (B, T), fp32."""
        return _linear(self.trunk.hidden_rows(input_ids_BT), self.score) + self.offset


class ActorCritic(nn.Module):
    """The policy and the value function, as one thing to train. Without a critic the value function is a
    linear output on the policy's trunk, which begins as 0."""

    def __init__(self, policy: CausalLM, critic: Critic | None, temperature: float) -> None:
        super().__init__()
        weight = policy.model.embed_tokens.weight
        self.policy, self.temperature = policy, temperature
        self.critic: Critic | nn.Linear = critic or nn.Linear(policy.config.hidden_size, 1).to(weight.device)
        if isinstance(self.critic, nn.Linear):
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)

    def forward(self, batch: Padded) -> Read:
        """One pass over roll-outs."""
        ids_BT, targets_BT = batch.input_ids[:, :-1], batch.input_ids[:, 1:]
        hidden_BTC = self.policy.hidden_rows(ids_BT)
        scores = token_scores(self.policy.lm_head, hidden_BTC, targets_BT, batch.mask, self.temperature)
        own = isinstance(self.critic, nn.Linear)
        values_BT = _linear(hidden_BTC, self.critic) if own else self.critic(ids_BT)
        return Read(*scores, values_BT)


def _linear(hidden_BTC: Tensor, layer: nn.Module) -> Tensor:
    """A linear output of size 1 (B, T), in fp32."""
    with torch.autocast(hidden_BTC.device.type, enabled=False):
        out_BT1: Tensor = layer(hidden_BTC.float())
    return out_BT1[..., 0]


Reference = Callable[[Padded], Tensor]


def reference_of(actor: ActorCritic, frozen: CausalLM | None) -> Reference:
    """The log-probabilities (B, T) of pi_0: a frozen model, or the policy without its adapter."""

    return lambda batch: reference_scores(actor.policy, frozen, batch, actor.temperature)


def critic_of(
    directory: Path, device: torch.device, lora: LoRA | None, generator: torch.Generator, checkpointed: bool
) -> Critic:
    """A critic out of a reward model's directory, with an adapter if the policy has one."""
    reward = load_reward_model(directory).to(device)
    if lora is not None:
        add_lora(reward, lora, generator)
    critic = Critic(reward, offset_of(directory))
    critic.trunk.checkpoint_activations = checkpointed
    return critic


def load_policy(
    directory: Path, tokenizer: Tokenizer, plain: bool, device: torch.device, checkpointed: bool
) -> CausalLM:
    """The model to begin with. Raises UserError if it cannot chat and is not to continue plain text, or if
    the tokenizer is another model's."""
    if not plain:
        require_chat(directory, tokenizer, ", or pass --plain to continue prompts as plain text")
    return load_start(directory, tokenizer, device, checkpointed)


def save_critic(directory: Path, actor: ActorCritic) -> None:
    """Write what is trained of the value function beside the policy's files."""
    tensors = {name: p.detach().contiguous() for name, p in trained_parameters(actor.critic).items()}
    save_file(tensors, directory / VALUE_WEIGHTS)


def read_trained(directory: Path, read_policy: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """By `ActorCritic`'s names, what `read_policy` finds in a checkpoint and what `save_critic` wrote."""
    policy = {f"policy.{name}": tensor for name, tensor in read_policy(directory).items()}
    critic = read_file(directory / VALUE_WEIGHTS)
    return {**policy, **{f"critic.{name}": tensor for name, tensor in critic.items()}}
