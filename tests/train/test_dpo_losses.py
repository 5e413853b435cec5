"""Losses of direct preference optimisation: TRL's numbers, their properties, and where they lead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fledge.data.comparisons import Comparison, Pair, in_batches
from fledge.data.preference_rows import PairBatch, judged_batches, pair_batch, strangers
from fledge.model.checkpoint import load_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.comparisons import Plan
from fledge.train.dpo import (
    Objective,
    Reference,
    Scoring,
    cached_reference,
    fingerprint_of,
    preference_batches,
    reference_of,
    scoring_of,
)
from fledge.train.dpo_losses import (
    LossName,
    PairLogps,
    hinge_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    orpo_loss,
    pair_loss,
    preferred_loss,
    robust_loss,
    row_logps,
    shared_kl,
    sigmoid_loss,
    simpo_loss,
)
from fledge.train.losses import Term, forward_of

GOLDEN = Path(__file__).parents[1] / "golden" / "dpo"
NUMBERS: dict[str, Any] = json.loads((GOLDEN / "losses.json").read_text())
NAMES: tuple[LossName, ...] = get_args(LossName)


def rows(key: str, prompt: list[int], *completions: list[int], pairs: list[Pair] | None = None) -> Comparison:
    ids = [prompt + completion for completion in completions]
    masks = [[False] * len(prompt) + [True] * len(completion) for completion in completions]
    return Comparison(key, [], [], ids, masks, pairs or [])


def objective_value(terms: dict[str, Term], counts: dict[str, int]) -> Tensor:
    """What the loop makes of a loss's terms."""
    return torch.stack([term.weight * term.sum / counts[term.per] for term in terms.values()]).sum()


# TRL's numbers.


def golden_models(turned: bool = False) -> tuple[CausalLM, CausalLM]:
    models = [load_model(GOLDEN / name) for name in ("policy", "reference")]
    return (models[1], models[0]) if turned else (models[0], models[1])


def golden_pairs(reference: CausalLM | None) -> PairBatch:
    prompts = [
        rows(str(i), pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"], pairs=[Pair(0, 1)])
        for i, pair in enumerate(NUMBERS["pairs"])
    ]
    if reference is None:
        return pair_batch(prompts, None)
    logps = scoring_of(reference, torch.float32).logps(prompts)
    return pair_batch(prompts, {prompt.key: found for prompt, found in zip(prompts, logps, strict=True)})


def check_gradients(model: CausalLM, loss: Tensor, case: dict[str, Any]) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(case["gradient_norms"], rel=1e-4, abs=1e-6)


def cases(*names: str) -> list[Any]:
    return [
        pytest.param(c, id=f"{c['loss']}-{i}") for i, c in enumerate(NUMBERS["cases"]) if c["loss"] in names
    ]


@pytest.mark.parametrize("case", cases("sigmoid", "hinge", "ipo", "robust"))
def test_losses_with_a_reference_are_trls(case: dict[str, Any]) -> None:
    """Value, every gradient and the figures that are logged, as DPOTrainer._compute_loss gave them."""
    policy, reference = golden_models()
    batch = golden_pairs(reference)
    loss = pair_loss(case["loss"], case["beta"], case["label_smoothing"])
    terms = preferred_loss(forward_of(policy), batch, loss, case["beta"])
    value = objective_value(terms, batch.denominators())
    assert value.item() == pytest.approx(case["value"], rel=1e-5)
    check_gradients(policy, value, case)
    theirs = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    theirs |= {"logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}
    for ours, name in theirs.items() if "metrics" in case else ():
        assert float(terms[ours].sum) / batch.prompts == pytest.approx(case["metrics"][name], rel=1e-4)


@pytest.mark.parametrize("case", cases("simpo", "orpo"))
def test_losses_without_a_reference_are_trls(case: dict[str, Any]) -> None:
    """Each pair's value and every gradient, as cpo_loss and odds_ratio_loss gave them."""
    policy, _ = golden_models()
    batch = golden_pairs(None)
    logps_B = row_logps(forward_of(policy), batch.input_ids, batch.loss_mask)
    tokens_B, zeros = batch.loss_mask[:, 1:].sum(1), torch.zeros(len(batch.better))
    logps = PairLogps(
        logps_B[batch.better],
        logps_B[batch.worse],
        zeros,
        zeros,
        tokens_B[batch.better],
        tokens_B[batch.worse],
    )
    if case["loss"] == "simpo":
        loss_P = simpo_loss(logps, case["beta"], case["gamma"])
    else:
        loss_P = case["beta"] * odds_ratio_loss(logps)
        mean_nll = -logps.chosen / logps.chosen_tokens
        assert torch.equal(orpo_loss(logps, case["beta"]), mean_nll + loss_P)
    assert loss_P.tolist() == pytest.approx(case["values"], rel=1e-5)
    check_gradients(policy, loss_P.mean(), case)


@pytest.mark.parametrize("case", cases("kto"))
def test_kto_is_trls(case: dict[str, Any]) -> None:
    """Value, KL and every gradient, as KTOTrainer._compute_loss gave them; once its KL is below 0."""
    policy, reference = golden_models(case.get("turned", False))
    judged = NUMBERS["judged"]
    prompts = [rows(str(i), row["prompt_ids"], row["completion_ids"]) for i, row in enumerate(judged)]
    others = [rows(str(i), row["prompt_ids"], row["KL_completion_ids"]) for i, row in enumerate(judged)]
    labels = {str(i): [row["label"]] for i, row in enumerate(judged)}
    scoring = scoring_of(reference, torch.float32)
    keyed = [dict(zip(labels, scoring.logps(part), strict=True)) for part in (prompts, others)]
    strange = {prompt.key: prompt for prompt in others}
    weights = (case["weight_good"], case["weight_bad"])
    objective = Objective("kto", case["beta"], 0.0, 0.0, *weights, labels, strange)
    now = scoring_of(policy, torch.float32)
    (batch,) = preference_batches(now, objective, Reference(*keyed), [prompts], 10_000)
    terms = objective.loss(forward_of(policy), batch)
    value = objective_value(terms, batch.denominators())
    assert value.item() == pytest.approx(case["value"], rel=1e-5)
    check_gradients(policy, value, case)
    theirs = {"kl": "kl", "margin": "rewards/margins"}
    theirs |= {"logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}
    for ours, name in theirs.items():
        assert float(terms[ours].sum) / 4 == pytest.approx(case["metrics"][name], rel=1e-4), ours


# Properties.


def logps(chosen: float, rejected: float, ref_chosen: float = -5.0, ref_rejected: float = -7.0) -> PairLogps:
    values = (chosen, rejected, ref_chosen, ref_rejected, 2.0, 4.0)
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values))


def test_policy_and_reference_alike() -> None:
    """Sigmoid, smoothed or not, and robust begin with ln 2; hinge 1; ipo 1 / (2 beta)^2; kto 1 / 2."""
    same = logps(-5.0, -7.0)
    for smoothing in (0.0, 0.3):
        assert sigmoid_loss(same, 0.1, smoothing).item() == pytest.approx(math.log(2), abs=1e-12)
        assert robust_loss(same, 0.1, smoothing).item() == pytest.approx(math.log(2), abs=1e-12)
    assert hinge_loss(same, 0.1).item() == 1.0
    assert ipo_loss(same, 0.1).item() == pytest.approx(25.0)
    assert kto_loss(torch.zeros(2), torch.tensor([True, False]), 0.0, 0.1).tolist() == [0.5, 0.5]


def test_by_hand() -> None:
    """Delta = (-4 + 5) - (-9 + 7) = 3; with beta 1/2: 1.5. Means: chosen -2, rejected -9/4."""
    moved = logps(-4.0, -9.0)
    assert sigmoid_loss(moved, 0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    smoothed = 0.8 * math.log1p(math.exp(-1.5)) + 0.2 * math.log1p(math.exp(1.5))
    assert sigmoid_loss(moved, 0.5, 0.2).item() == pytest.approx(smoothed)
    assert hinge_loss(moved, 0.25).item() == pytest.approx(0.25)
    assert hinge_loss(moved, 0.5).item() == 0.0
    assert ipo_loss(moved, 0.5).item() == pytest.approx((1 / 2 + 2 / 4 - 1) ** 2)
    assert simpo_loss(moved, 2.0, 0.5).item() == pytest.approx(math.log1p(math.exp(-(2 * 0.25 - 0.5))))
    odds = [p / (1 - p) for p in (math.exp(-2), math.exp(-9 / 4))]
    assert odds_ratio_loss(moved).item() == pytest.approx(math.log1p(odds[1] / odds[0]))


@given(st.floats(-20, 20), st.floats(0.01, 0.45))
def test_robust_is_unbiased(delta: float, share: float) -> None:
    """Its mean over labels of which a share is turned is the loss of the true label."""
    true, turned = (logps(-5.0 + d, -7.0) for d in (delta, -delta))
    noisy = (1 - share) * robust_loss(true, 0.3, share) + share * robust_loss(turned, 0.3, share)
    assert noisy.item() == pytest.approx(sigmoid_loss(true, 0.3).item(), rel=1e-6, abs=1e-6)


def test_smoothing_wants_a_finite_margin() -> None:
    """The smoothed loss is least where sigmoid(beta Delta) = 1 - eps."""
    best = math.log(0.8 / 0.2) / 0.5
    at = [sigmoid_loss(logps(-5.0 + best + d, -7.0), 0.5, 0.2).item() for d in (-0.1, 0.0, 0.1)]
    assert at[1] < min(at[0], at[2])


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-4, -0.6931, -0.6932, -40.0, -1e4])
def test_the_odds_of_a_certain_completion_are_finite(mean: float) -> None:
    chosen = torch.tensor([2 * mean], requires_grad=True)
    other, zero, tokens = torch.tensor([-3.0]), torch.zeros(1), torch.tensor([2])
    loss = orpo_loss(PairLogps(chosen, other, zero, zero, tokens, tokens), 0.1)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite().all() and chosen.grad is not None and chosen.grad.isfinite().all()


def test_kto_pushes_good_up_and_bad_down_beyond_the_kl() -> None:
    ratio = torch.tensor([0.5, 0.5], requires_grad=True)
    loss = kto_loss(ratio, torch.tensor([True, False]), 0.2, 1.0, 3.0, 0.5)
    sigmoid = 1 / (1 + math.exp(-0.3))
    assert loss.tolist() == pytest.approx([3.0 * (1 - sigmoid), 0.5 * sigmoid])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert ratio.grad is not None and ratio.grad[0] < 0 < ratio.grad[1]
    assert shared_kl([1.0, -3.0]) == 0.0
    assert shared_kl([1.0, 2.0]) == 1.5


# Batches.


def tiny(seed: int, vocab: int = 12) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig("qwen3", vocab, 16, 24, 1, 2, 2, 8, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5)
    return model


def some_prompts() -> list[Comparison]:
    """Rankings and pairs of different lengths."""
    return [
        rows("a", [1, 2, 3], [4, 0], [5, 6, 7, 0], [8, 0], pairs=[Pair(0, 1), Pair(0, 2), Pair(2, 1)]),
        rows("b", [9], [10, 11, 0], [3, 0], pairs=[Pair(1, 0)]),
        rows("c", [2, 2], [7, 7, 7, 7, 0], [6, 0], pairs=[Pair(0, 1), Pair(0, 1)]),
        rows("d", [5, 6, 7, 8], [1, 0], [9, 9, 0], pairs=[Pair(0, 1)]),
    ]


def step_of(
    name: LossName, micro_tokens: int, policy: CausalLM
) -> tuple[dict[str, float], list[Tensor], int]:
    """The figures and gradients of one step over all prompts, and in how many micro-batches."""
    prompts = some_prompts()
    labels = {p.key: [i % 2 == 0 for i in range(len(p.ids))] for p in prompts}
    objective = Objective(name, 0.3, 0.1, 0.5, 1.5, 0.5, labels, strangers(prompts, 0, 32))
    plan = Plan(4, micro_tokens, 1.0, 0)
    reference = reference_of(scoring_of(tiny(1), torch.float32), objective, plan, prompts, [])
    (parts,) = plan.steps(prompts)
    scoring = scoring_of(policy, torch.float32)
    batches = preference_batches(scoring, objective, reference, parts, micro_tokens)
    counts: dict[str, int] = {}
    for batch in batches:
        for per, count in batch.denominators().items():
            counts[per] = counts.get(per, 0) + count
    policy.zero_grad()
    sums: dict[str, float] = {}
    for batch in batches:
        terms = objective.loss(forward_of(policy), batch)
        objective_value(terms, counts).backward()  # type: ignore[no-untyped-call]
        for term_name, term in terms.items():
            sums[term_name] = sums.get(term_name, 0.0) + float(term.sum.detach()) / counts[term.per]
    return sums, [p.grad.clone() for p in policy.parameters() if p.grad is not None], len(batches)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_equal_the_big_batch(name: LossName) -> None:
    policy = tiny(0)
    big, gradients, count = step_of(name, 10_000, policy)
    assert count == 1
    small, small_gradients, count = step_of(name, 20, policy)
    assert count == 4
    assert small == pytest.approx(big, rel=1e-5, abs=1e-6)
    assert big["loss"] != 0 and any(g.abs().max() > 1e-3 for g in gradients)
    for one, other in zip(gradients, small_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_is_the_reference_itself(dtype: torch.dtype) -> None:
    """In every micro-batch the log-probabilities are the same numbers, with or without a gradient."""
    prompts = some_prompts()
    objective, plan = Objective("sigmoid", 0.1), Plan(2, 20, 3.0, 0)
    scoring = scoring_of(tiny(0), dtype)
    reference = reference_of(scoring, objective, plan, prompts, [])
    assert set(reference.rows) == {"a", "b", "c", "d"}
    for parts in list(plan.steps(prompts))[:2]:
        for batch in preference_batches(scoring, objective, reference, parts, 20):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                terms = objective.loss(scoring.forward, batch)
            assert float(terms["kl"].sum) == float(terms["margin"].sum) == 0.0
            loss = float(terms["loss"].sum.detach()) / batch.denominators()["prompts"]
            assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("epochs", "expected"), [(0.5, 1), (1.0, 2), (3.0, 2)])
def test_the_reference_reads_what_the_first_epoch_reads(epochs: float, expected: int) -> None:
    """Policy and reference get the same tensors, so that bf16 rounds alike; also the strangers of kto."""
    prompts = some_prompts()
    labels = {prompt.key: [True] * len(prompt.ids) for prompt in prompts}
    objective = Objective("kto", 0.1, labels=labels, strangers=strangers(prompts, 0, 32))
    plan, forward = Plan(2, 30, epochs, 0), forward_of(tiny(0))
    read: list[list[list[int]]] = []

    def recorded(input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
        read.append(input_ids.tolist())
        return forward(input_ids, segment_ids)

    scoring = Scoring(recorded, torch.device("cpu"), torch.float32)
    reference = reference_of(scoring, objective, plan, prompts, [])
    before, read[:] = sorted(read), []
    steps = list(plan.steps(prompts))[:expected]
    for parts in steps:
        for batch in preference_batches(scoring, objective, reference, parts, 30):
            objective.loss(recorded, batch)
    assert len(steps) == expected
    assert sorted(read) == before


def test_a_cached_reference_is_that_of_its_fingerprint(tmp_path: Path) -> None:
    """Prompts that training never meets have none, there and back; another fingerprint computes again."""
    path, prompts = tmp_path / "reference.json", some_prompts()
    first = Reference({"a": [-0.1, -2.0, -1 / 3], "c": [-3.5, -1e-7]}, {"c": [-4.0, -5.0]})
    second = Reference({"d": [0.0, -1.0]}, {})

    def never() -> Reference:
        raise AssertionError("it is in the file")

    assert cached_reference(path, "one", prompts, lambda: first) == first
    assert cached_reference(path, "one", prompts, never) == first
    assert cached_reference(path, "two", prompts, lambda: second) == second
    assert cached_reference(path, "two", prompts, never) == second


def test_the_fingerprint_is_of_data_and_settings() -> None:
    prompts = some_prompts()
    kto = Objective("kto", 0.1, strangers=strangers(prompts, 0, 32))
    found = {
        fingerprint_of(prompts, Objective("sigmoid", 0.1), "model"),
        fingerprint_of(prompts, Objective("sigmoid", 0.1), "other model"),
        fingerprint_of(prompts[::-1], Objective("sigmoid", 0.1), "model"),
        fingerprint_of(prompts, kto, "model"),
    }
    assert len(found) == 4
    again = fingerprint_of(some_prompts(), Objective("ipo", 0.2), "model")
    assert again in found, "the reference does not depend on the loss of pairs"


def test_prompts_count_alike_however_many_pairs_they_have() -> None:
    prompts = some_prompts()
    whole = pair_batch(prompts, None)
    alone = [pair_batch([prompt], None) for prompt in prompts]
    forward, loss = forward_of(tiny(0)), pair_loss("simpo", 2.0, gamma=1.0)

    def total(batch: PairBatch) -> float:
        return float(preferred_loss(forward, batch, loss, 2.0)["loss"].sum.detach())

    assert total(whole) == pytest.approx(sum(map(total, alone)), rel=1e-5)
    assert whole.num_tokens() == sum(prompt.num_tokens for prompt in prompts)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=8), st.integers(0, 5))
def test_strangers_are_all_completions_at_other_prompts(sizes: list[int], seed: int) -> None:
    prompts = [rows(str(i), [i] * 3, *([100 + 10 * i + j] for j in range(n))) for i, n in enumerate(sizes)]
    found = strangers(prompts, seed, 32)
    assert [len(found[prompt.key].ids) for prompt in prompts] == sizes
    pairs = [(row[0], row[-1]) for prompt in prompts for row in found[prompt.key].ids]
    assert sorted(last for _, last in pairs) == sorted(row[-1] for prompt in prompts for row in prompt.ids)
    if 2 * max(sizes) <= sum(sizes):
        assert all((last - 100) // 10 != first for first, last in pairs)
    assert all(mask == [False] * 3 + [True] for prompt in found.values() for mask in prompt.masks)


def test_strangers_are_cut_at_the_context() -> None:
    found = strangers([rows("a", [1] * 5, [2]), rows("b", [3], [4] * 6)], 0, 7)
    assert found["a"].ids == [[1] * 5 + [4] * 2]
    assert found["a"].masks == [[False] * 5 + [True] * 2]
    assert found["b"].ids == [[3, 2]]


def test_judged_batches_know_the_whole_step() -> None:
    parts = list(in_batches([rows("a", [1], [2], [3]), rows("b", [1] * 9, [4])], 10))
    batches = judged_batches(parts, {"a": [True, False], "b": [False]}, {"a": [-1, -2], "b": [-3]}, 0.5)
    assert [(batch.step_good, batch.step_bad, batch.kl) for batch in batches] == [(1, 2, 0.5)] * 2
    assert [batch.denominators()["completions"] for batch in batches] == [2, 1]


# Where it leads.

STRENGTHS = ((1, 2, 3, 4, 6), (5, 1, 1, 2, 1))
"""exp(reward) of the five answers to two prompts: whole numbers, so that data can be exact."""
BETA = 0.5


def exact_preferences(strengths: tuple[int, ...]) -> list[Pair]:
    """What Bradley and Terry's labelers say in expectation: of w_i + w_j comparisons, i wins w_i over j."""
    answers = range(len(strengths))
    return [Pair(i, j) for i in answers for j in answers if i != j for _ in range(strengths[i])]


def answers_of(model: CausalLM, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt]))[0, -1].double(), -1)


def test_the_sigmoid_loss_leads_to_the_optimum_in_closed_form() -> None:
    """A bandit: two prompts, every token of the vocabulary an answer of one token, rewards r known.

    Of all policies the one with the largest E_pi[r] - beta KL(pi || pi_0) is pi* = pi_0 exp(r / beta) / Z:
    the objective is beta ln Z - beta KL(pi || pi*), for
        r - beta ln(pi / pi_0) = beta (ln(pi_0 exp(r / beta)) - ln pi) = beta (ln Z + ln(pi* / pi)).
    DPO reaches the same without knowing r: labelers after Bradley and Terry prefer i to j with probability
    p_ij = sigmoid(r_i - r_j). In expectation the loss of the pair {i, j} is
        -p_ij ln sigmoid(beta Delta_ij) - p_ji ln sigmoid(-beta Delta_ij),
    a cross-entropy of two coins, least where sigmoid(beta Delta_ij) = p_ij, so beta Delta_ij = r_i - r_j,
    however often the pair is asked about. All pairs can have that at once, and then ln(pi / pi_0) - r / beta
    is the same for all answers: pi = pi_0 exp(r / beta) / Z, since both sum to 1.
    Here exp(r) are whole numbers w, so the expectation is a finite data set, and with beta = 1/2 the optimum
    is pi_0 w^2 / Z.
    """
    model = tiny(3, vocab=5)
    prompts = [
        rows(str(i), [i], *([answer] for answer in range(5)), pairs=exact_preferences(strengths))
        for i, strengths in enumerate(STRENGTHS)
    ]
    before = [answers_of(model, [i]) for i in range(2)]
    objective, plan = Objective("sigmoid", BETA), Plan(2, 10_000, 1.0, 0)
    reference = reference_of(scoring_of(model, torch.float32), objective, plan, prompts, [])
    batch = pair_batch(prompts, reference.rows)
    forward, steps = forward_of(model), 400
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        terms = objective.loss(forward, batch)
        objective_value(terms, batch.denominators()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
    for i, strengths in enumerate(STRENGTHS):
        best = before[i] * torch.tensor(strengths).double().square()
        best /= best.sum()
        assert (best / before[i] - 1).abs().max() > 0.5, "there is something to learn"
        assert answers_of(model, [i]).tolist() == pytest.approx(best.tolist(), rel=0.02)
