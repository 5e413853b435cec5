"""Losses of direct preference optimisation: pure functions of log-probabilities.

All log-probabilities are nats, summed over a completion's tokens; pi is the policy, pi_0 the frozen
reference.
Shape suffixes: B rows (completions), T tokens, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.data.preference_rows import JudgedBatch, PairBatch
from fledge.train.losses import Forward, Term

LossName = Literal["sigmoid", "ipo", "hinge", "robust", "kto", "orpo", "simpo"]
WITHOUT_REFERENCE: frozenset[LossName] = frozenset({"orpo", "simpo"})


@dataclass(frozen=True)
class PairLogps:
    """Pairs of completions, all tensors (P)."""

    chosen: Tensor
    """log pi of the better completion."""
    rejected: Tensor
    ref_chosen: Tensor
    """log pi_0 of the better completion; zeros where a loss has no reference."""
    ref_rejected: Tensor
    chosen_tokens: Tensor
    """Tokens that the sums are over."""
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log (pi / pi_0) of the better completion; beta times it is its implicit reward."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log (pi / pi_0) of the worse completion."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """Delta: how much further the policy prefers the better one than the reference does."""
        return self.chosen_ratio - self.rejected_ratio


PairLoss = Callable[[PairLogps], Tensor]


def sigmoid_loss(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(beta Delta) - eps log sigmoid(-beta Delta) (Rafailov et al. 2023; eps, the share
    of turned labels to allow for: Mitchell 2023, "conservative DPO"). ln 2 where policy and reference agree.
    """
    logits_P = beta * logps.delta
    loss_P = -F.logsigmoid(logits_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-logits_P)
    return loss_P


def robust_loss(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - eps) log sigmoid(beta Delta) + eps log sigmoid(-beta Delta)) / (1 - 2 eps): if a share eps of
    the labels is turned, its expectation is the sigmoid loss of the true ones (Chowdhury et al. 2024)."""
    logits_P = beta * logps.delta
    right_P, turned_P = -F.logsigmoid(logits_P), -F.logsigmoid(-logits_P)
    return ((1 - label_smoothing) * right_P - label_smoothing * turned_P) / (1 - 2 * label_smoothing)


def hinge_loss(logps: PairLogps, beta: float) -> Tensor:
    """max(0, 1 - beta Delta) (Zhao et al. 2023, SLiC-HF, with the reference inside: Liu et al. 2023, RSO)."""
    return torch.relu(1 - beta * logps.delta)


def ipo_loss(logps: PairLogps, beta: float) -> Tensor:
    """(Delta_mean - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17; beta is their tau), Delta_mean from means over
    tokens, so that the distance to reach does not depend on a completion's length."""
    chosen_P = logps.chosen_ratio / logps.chosen_tokens
    rejected_P = logps.rejected_ratio / logps.rejected_tokens
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def simpo_loss(logps: PairLogps, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (m_chosen - m_rejected) - gamma), m = mean of log pi over the tokens (Meng et al.
    2024). No reference."""
    chosen_P, rejected_P = _means(logps)
    return -F.logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def odds_ratio_loss(logps: PairLogps) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(mean of log pi over
    the tokens) (Hong et al. 2024, eq. 7)."""
    chosen_P, rejected_P = _means(logps)
    return -F.logsigmoid((chosen_P - _log1mexp(chosen_P)) - (rejected_P - _log1mexp(rejected_P)))


def orpo_loss(logps: PairLogps, beta: float) -> Tensor:
    """-m_chosen + beta * `odds_ratio_loss`, m_chosen = mean of log pi over its tokens (Hong et al. 2024,
    eq. 6; beta is their lambda). No reference."""
    return -logps.chosen / logps.chosen_tokens + beta * odds_ratio_loss(logps)


def kto_loss(
    ratio_B: Tensor, good_B: Tensor, kl: float, beta: float, weight_good: float = 1.0, weight_bad: float = 1.0
) -> Tensor:
    """w (1 - sigmoid(+-beta (log (pi / pi_0) - kl))), + and `weight_good` for good completions, - and
    `weight_bad` for bad ones (Ethayarajh et al. 2024, eq. 7 and 8).

    `kl` estimates KL(pi || pi_0) of the whole step (see `shared_kl`); it has no gradient.
    """
    gain_B = torch.where(good_B, ratio_B - kl, kl - ratio_B)
    weight_B = torch.where(good_B, weight_good, weight_bad)
    return weight_B * torch.sigmoid(-beta * gain_B)


def shared_kl(ratios: list[float]) -> float:
    """max(0, mean of log (pi / pi_0)) over prompts with completions of others (Ethayarajh et al. 2024)."""
    return max(0.0, math.fsum(ratios) / len(ratios))


def pair_loss(name: LossName, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0) -> PairLoss:
    """The loss of that name for pairs: log-probabilities -> (P)."""
    losses: dict[str, PairLoss] = {
        "sigmoid": partial(sigmoid_loss, beta=beta, label_smoothing=label_smoothing),
        "robust": partial(robust_loss, beta=beta, label_smoothing=label_smoothing),
        "hinge": partial(hinge_loss, beta=beta),
        "ipo": partial(ipo_loss, beta=beta),
        "orpo": partial(orpo_loss, beta=beta),
        "simpo": partial(simpo_loss, beta=beta, gamma=gamma),
    }
    return losses[name]


def _means(logps: PairLogps) -> tuple[Tensor, Tensor]:
    return logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens


def _log1mexp(x_P: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact at both ends (Maechler 2012). A completion that is certain (x = 0) has
    finite odds: those of the last x that fp32 tells from 0."""
    x_P = x_P.clamp(max=-torch.finfo(x_P.dtype).eps)
    return torch.where(x_P > -math.log(2), torch.log(-torch.expm1(x_P)), torch.log1p(-torch.exp(x_P)))


# As named sums, for the loop.


def row_logps(forward: Forward, input_ids_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """log pi (B) of what the mask covers, summed over tokens, in fp32. Padding is to the right, where nothing
    sees it."""
    nll_BT = forward(input_ids_BT, None)
    return -(nll_BT * loss_mask_BT[:, 1:]).sum(1)


def preferred_loss(forward: Forward, batch: PairBatch, loss: PairLoss, beta: float) -> dict[str, Term]:
    """A loss of pairs: the mean over prompts of its mean over a prompt's pairs.

    Reported beside it: implicit rewards (beta log (pi / pi_0), or beta times the mean of log pi over tokens
    where there is no reference), and `kl`, the mean of log (pi_0 / pi): an estimate of KL(pi_0 || pi) in nats
    a completion, if the completions were drawn from pi_0.
    """
    logps_B = row_logps(forward, batch.input_ids, batch.loss_mask)
    tokens_B = batch.loss_mask[:, 1:].sum(1)
    ref_B = torch.zeros_like(logps_B) if batch.ref_logps is None else batch.ref_logps
    better, worse, weight_P = batch.better, batch.worse, batch.weight
    logps = PairLogps(
        logps_B[better], logps_B[worse], ref_B[better], ref_B[worse], tokens_B[better], tokens_B[worse]
    )
    figures: dict[str, Tensor] = {"logp_chosen": logps.chosen, "logp_rejected": logps.rejected}
    chosen_P, rejected_P = logps.chosen_ratio, logps.rejected_ratio
    if batch.ref_logps is None:
        chosen_P, rejected_P = _means(logps)
    else:
        figures["kl"] = -(chosen_P + rejected_P) / 2
    figures["margin"] = beta * (chosen_P - rejected_P)
    figures["accuracy"] = (chosen_P > rejected_P).float()
    terms = {"loss": Term((weight_P * loss(logps)).sum(), per="prompts")}
    for name, value_P in figures.items():
        terms[name] = Term((weight_P * value_P.detach()).sum(), per="prompts", weight=0.0)
    return terms


def judged_loss(
    forward: Forward, batch: JudgedBatch, beta: float, weight_good: float, weight_bad: float
) -> dict[str, Term]:
    """`kto_loss`, its mean over completions. `accuracy` is the share of good ones whose implicit reward is
    above beta kl, and of bad ones whose is below; `margin` the mean reward of the step's good ones minus that
    of its bad ones; `logp_chosen` and `logp_rejected` are means over either, where the step has any."""
    logps_B = row_logps(forward, batch.input_ids, batch.loss_mask)
    good_B, ratio_B = batch.good, logps_B - batch.ref_logps
    loss_B = kto_loss(ratio_B, good_B, batch.kl, beta, weight_good, weight_bad)
    terms = {"loss": Term(loss_B.sum(), per="completions")}
    figures_B = {"accuracy": torch.where(good_B, ratio_B > batch.kl, ratio_B < batch.kl).float()}
    figures_B["kl"] = torch.full_like(ratio_B, batch.kl)
    total = batch.step_good + batch.step_bad
    sides = (("logp_chosen", good_B, batch.step_good), ("logp_rejected", ~good_B, batch.step_bad))
    for name, on_B, count in sides:
        if count:
            figures_B[name] = on_B * logps_B * (total / count)
    if batch.step_good and batch.step_bad:
        sign_B = torch.where(good_B, total / batch.step_good, -total / batch.step_bad)
        figures_B["margin"] = beta * sign_B * ratio_B
    for name, value_B in figures_B.items():
        terms[name] = Term(value_B.detach().sum(), per="completions", weight=0.0)
    return terms
