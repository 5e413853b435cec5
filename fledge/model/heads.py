"""A transformer that gives one number instead of scores over the vocabulary.

Shape suffixes: B rows, T tokens, C model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fledge.model.transformer import Block, CausalLM, init_weights


class RewardModel(nn.Module):
    """The trunk of a language model with a linear output of size 1 (Ouyang et al. 2022), read at one token.

    Its parameters have the names of transformers' `*ForSequenceClassification`.
    """

    def __init__(self, language_model: CausalLM, generator: torch.Generator | None = None) -> None:
        """Takes the language model's trunk (not a copy) and drops its head. With a generator the new head is
        drawn from N(0, 1 / (C + 1)) (Stiennon et al. 2020)."""
        super().__init__()
        weight = language_model.model.embed_tokens.weight
        self.config = language_model.config
        self.model = language_model.model
        self.score = nn.Linear(self.config.hidden_size, 1, bias=False).to(weight.device, weight.dtype)
        if generator is not None:
            std = (self.config.hidden_size + 1) ** -0.5
            drawn = torch.randn(self.score.weight.shape, generator=generator) * std
            self.score.weight.data.copy_(drawn)
        del language_model.lm_head  # what is left of it is this model's trunk
        self._hidden_rows = language_model.hidden_rows

    def forward(self, input_ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Rewards (B), fp32, of right-padded rows, each read at its token `last_B`."""
        hidden_BTC = self._hidden_rows(input_ids_BT)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        with torch.autocast(hidden_BTC.device.type, enabled=False):
            rewards_B1 = hidden_BTC[rows_B, last_B].float() @ self.score.weight.float().T
        return rewards_B1[:, 0]

    def num_parameters(self) -> int:
        """Weights, the head's too."""
        return sum(p.numel() for p in self.parameters())


def add_blocks(model: CausalLM, count: int, generator: torch.Generator) -> None:
    """Put `count` blocks above a model's own and freeze everything else but the last norm.

    A new block writes nothing at first, so the model computes what it did (block expansion: Wu et al. 2024,
    "LLaMA Pro"); what it learned stays, and the new blocks read it where it is finished.
    """
    own = model.config
    layers = own.num_hidden_layers + count
    kinds = own.layer_types + own.layer_types[-1:] * count
    model.config = replace(own, num_hidden_layers=layers, layer_types=kinds)
    weight = model.model.embed_tokens.weight
    new = nn.ModuleList([Block(model.config) for _ in range(count)])
    init_weights(new, generator, own.initializer_range)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    model.model.layers.extend(new.to(weight.device, weight.dtype))
