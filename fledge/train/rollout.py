"""Roll-outs: what a policy makes of prompts, and the same as tensors that training reads.

Shape suffixes: B rows (roll-outs), T tokens, N tokens of all rows, C model width, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fledge.device import autocast
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.model.lora import LoRALinear
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.train import losses
from fledge.train.parallel import ALONE, Ranks
from fledge.train.ppo_losses import k1, k3
from fledge.train.prompts import EncodedPrompt
from fledge.types import Completion, Rollout, SamplingParams, Token, pad_rows

# Nats a token between sampler and training beyond which nothing is learned; rounding in bf16 gives 0.003.
MOST_GAP = 0.2


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(kw_only=True)
class EmptyCompletions:
    """How many completions had no text."""

    empty: int = 0
    empty_first: list[str] = field(default_factory=list)
    """Where the prompts of the first of them stand."""

    def note_empty(self, rollouts: Sequence[Rollout]) -> None:
        """Count the completions in which nothing is said."""
        places = [rollout.where for rollout in rollouts if not rollout.completion.strip()]
        self.empty += len(places)
        self.empty_first = [*self.empty_first, *places][:20]


def play(
    policy: CausalLM,
    eos_ids: Sequence[int],
    rows: int,
    compute_dtype: torch.dtype,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    ranks: Ranks = ALONE,
) -> list[Rollout]:
    """`roll_out` of a policy as it is now, at most `rows` completions at once."""
    dtype = None if compute_dtype == torch.float32 else compute_dtype
    return roll_out(Engine(merged_view(policy), eos_ids, rows, dtype), tokenizer, prompts, params, ranks)


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    ranks: Ranks = ALONE,
) -> list[Rollout]:
    """`params.n` roll-outs for each prompt, in the prompts' order. The ids are those that were sampled, never
    those of their text. A stop id of the engine or of `params` ends one and belongs to it. Each rank makes
    those of its part of the prompts, with the random numbers that they have among all, and gets all."""
    if ranks.count == 1:
        made = engine.generate([prompt.ids for prompt in prompts], params)
    else:

        def part(mine: Sequence[EncodedPrompt], first: int) -> list[list[Any]]:
            return [_told(one) for one in engine.generate([p.ids for p in mine], params, first=first)]

        made = [_heard(said) for said in ranks.spread(part, prompts)]
    asked = [prompt for prompt in prompts for _ in range(params.n)]
    return [_rollout(tokenizer, prompt, one) for prompt, one in zip(asked, made, strict=True)]


def _told(made: Completion) -> list[Any]:
    """What other ranks need of a completion, as JSON values."""
    end = made.stop_token
    stop = None if end is None else [end.id, end.sampled_logp]
    return [made.ids, made.sampled_logps, stop, made.finish_reason]


def _heard(said: list[Any]) -> Completion:
    """The inverse of `_told`."""
    ids, logps, stop, reason = said
    end = None if stop is None else Token(stop[0], stop[1], stop[1])
    return Completion(ids, logps, reason, sampled_logps=logps, stop_token=end)


def _rollout(tokenizer: Tokenizer, prompt: EncodedPrompt, made: Completion) -> Rollout:
    ids, logps = list(made.ids), list(made.sampled_logps)
    if made.stop_token is not None:
        ids, logps = [*ids, made.stop_token.id], [*logps, made.stop_token.sampled_logp]
    before = len(prompt.ids)
    return Rollout(
        input_ids=[*prompt.ids, *ids],
        loss_mask=[False] * before + [True] * len(ids),
        logps=[0.0] * before + logps,
        row=prompt.prompt.row,
        messages=list(prompt.prompt.messages),
        completion=tokenizer.decode(made.ids),
        ended=made.finish_reason == "stop",
        where=prompt.prompt.where,
    )


# As tensors.


@dataclass
class Padded:
    """Roll-outs as right-padded rows; place t of a mask is the token t + 1 of its row, predicted at t."""

    input_ids: Tensor
    """(B, T + 1)."""
    mask: Tensor
    """(B, T): True where the policy made the token."""
    lengths: Tensor
    """(B): tokens of each row, padding left out."""

    def rows(self, chosen: Sequence[int]) -> Padded:
        """Some rows, only as long as the longest of them."""
        lengths = self.lengths[list(chosen)]
        longest = int(lengths.max())
        rows = list(chosen)
        return Padded(self.input_ids[rows, :longest], self.mask[rows, : longest - 1], lengths)

    def to(self, device: torch.device) -> Padded:
        """The same on a device."""
        return Padded(*(tensor.to(device) for tensor in vars(self).values()))


def padded(rollouts: Sequence[Rollout]) -> Padded:
    """Roll-outs as tensors. Padding is id 0 under a mask of False: nothing reads it."""
    mask_BT = pad_rows([list(map(int, rollout.loss_mask)) for rollout in rollouts], 0)[:, 1:].bool()
    lengths_B = torch.tensor([len(rollout.input_ids) for rollout in rollouts])
    return Padded(pad_rows([rollout.input_ids for rollout in rollouts], 0), mask_BT, lengths_B)


def same_rows(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The numbers of roll-outs that are the same, token for token, by the first of them: what a model says of
    one it says of all, so that it need be read once."""
    found: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[int]] = {}
    for number, rollout in enumerate(rollouts):
        found.setdefault((tuple(rollout.input_ids), tuple(rollout.loss_mask)), []).append(number)
    return list(found.values())


def sampled_logps(rollouts: Sequence[Rollout]) -> Tensor:
    """What the sampler said of each token (B, T), in the places of `Padded.mask`."""
    length = max(len(rollout.logps) for rollout in rollouts)
    rows = [rollout.logps[1:] + [0.0] * (length - len(rollout.logps)) for rollout in rollouts]
    return torch.tensor(rows)


def minibatches(rows: int, count: int, seed: Sequence[int]) -> list[list[int]]:
    """Row numbers in a random order, in `count` parts of as equal a size as can be."""
    order = np.random.default_rng(seed).permutation(rows).tolist()
    ends = [rows * i // count for i in range(count + 1)]
    return [order[first:end] for first, end in itertools.pairwise(ends) if end > first]


def micro_batches(rows: Sequence[int], lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length in parts of at most `most_tokens`, padding included; one row at least."""
    part: list[int] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if part and (len(part) + 1) * lengths[row] > most_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


# The policy's own forward pass over roll-outs.


def token_scores(
    head: nn.Linear, hidden_BTC: Tensor, targets_BT: Tensor, mask_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of what could have been (B, T; nats, fp32; 0 outside the
    mask), at the temperature the tokens were sampled at. The entropy has no gradient.

    Scores over the vocabulary are made for the mask's tokens alone, and where they would be many, in chunks
    that the backward pass makes again.
    """
    hidden_NC, targets_N = hidden_BTC[mask_BT], targets_BT[mask_BT]
    N, V = len(targets_N), head.out_features
    size = N if N * V <= losses.WHOLE_SCORES else max(1, losses.CHUNK_SCORES // V)
    parts = []
    for i in range(0, N, max(1, size)):
        chunk = (head, hidden_NC[i : i + size], targets_N[i : i + size], temperature)
        if size < N and torch.is_grad_enabled():
            parts.append(checkpoint(_scores, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_scores(*chunk))
    logps_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
    zeros_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    return zeros_BT.masked_scatter(mask_BT, logps_N), zeros_BT.masked_scatter(mask_BT, entropy_N)


def _scores(
    head: nn.Linear, hidden_NC: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logps_NV = (head(hidden_NC).float() / temperature).log_softmax(-1)
    known_NV = logps_NV.detach()
    return logps_NV.gather(1, targets_N[:, None])[:, 0], -(known_NV.exp() * known_NV).sum(-1)


def policy_scores(model: CausalLM, batch: Padded, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_scores` of a model for a batch of roll-outs."""
    hidden_BTC = model.hidden_rows(batch.input_ids[:, :-1])
    return token_scores(model.lm_head, hidden_BTC, batch.input_ids[:, 1:], batch.mask, temperature)


def reference_scores(policy: CausalLM, frozen: CausalLM | None, batch: Padded, temperature: float) -> Tensor:
    """Log-probabilities (B, T) of pi_0: a frozen model, or the policy without its adapter."""
    if frozen is not None:
        return policy_scores(frozen, batch, temperature)[0]
    with adapters_off(policy):
        return policy_scores(policy, batch, temperature)[0]


@torch.no_grad()
def read_in_parts(
    rows: Padded,
    parts: Sequence[Sequence[int]],
    device: torch.device,
    compute_dtype: torch.dtype,
    read: Callable[[Padded], Sequence[Tensor]],
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """What `read` says of each row, all (B, T), in micro-batches `parts`: read again in the same ones, before
    anything is learned, models say exactly the same. Rows of no part get 0. Each rank reads its own parts."""
    found: list[Tensor] = []
    for i, counts in ranks.turns(len(parts)):
        with autocast(device, compute_dtype):
            said = read(rows.rows(parts[i]).to(device))
        found = found or [torch.zeros(rows.mask.shape) for _ in said]
        for whole_BT, part_bt in zip(found, said, strict=True):
            if counts:
                whole_BT[list(parts[i]), : part_bt.shape[1]] = part_bt.float().cpu()
    ranks.add(found)
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A block in which adapters add nothing: the model is what it was before it got them."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    scales = [module.scale for module in adapted]
    for module in adapted:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale


@torch.no_grad()
def merged_view(model: CausalLM) -> CausalLM:
    """The model without adapters that computes the same now; it shares every weight that has none, so it is
    for reading only, until the model is trained further. A model without adapters is returned itself."""
    if not any(isinstance(module, LoRALinear) for module in model.modules()):
        return model
    view = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(view.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
    return view


@dataclass(frozen=True)
class Gap:
    """How far the sampler's log-probabilities are from those of training, over all tokens (nats)."""

    mean: float
    largest: float


def sampler_gap(rollouts: Sequence[Rollout], logps_BT: Tensor, mask_BT: Tensor) -> Gap:
    """The absolute difference: 0 but for rounding, unless something is wrong. The two read in other orders
    and batches, and the sampler may hold its weights in another type."""
    gaps_N = (sampled_logps(rollouts) - logps_BT).abs()[mask_BT]
    gap = Gap(float(gaps_N.mean()), float(gaps_N.max()))
    return gap if math.isfinite(gap.mean) else Gap(math.inf, math.inf)


# Figures for the log.


def gap_figures(rollouts: Sequence[Rollout], logps_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """The `sampler_gap`; raises UserError if it is too large to learn from what was sampled."""
    gap = sampler_gap(rollouts, logps_BT, mask_BT)
    if gap.mean > MOST_GAP:
        raise UserError(
            f"the sampler's log-probabilities are {gap.mean:.2f} nats a token from those of training: what "
            "was sampled is not what would be learned about; try --compute fp32"
        )
    return {"sampler_gap": gap.mean, "sampler_gap_largest": gap.largest}


def kl_figures(logps_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """KL to the reference in nats a completion, by the estimators k1 and k3."""
    kl_B, kl_k3_B = (torch.where(mask_BT, estimate(logps_BT, ref_BT), 0.0).sum(1) for estimate in (k1, k3))
    return {"kl": float(kl_B.mean()), "kl_k3": float(kl_k3_B.mean())}


def length_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean length of the completions; shares of those that ended, and that say nothing."""
    count = len(rollouts)
    return {
        "completion_tokens": sum(sum(rollout.loss_mask) for rollout in rollouts) / count,
        "ended": sum(rollout.ended for rollout in rollouts) / count,
        "empty": sum(not rollout.completion.strip() for rollout in rollouts) / count,
    }
