"""Roll-outs: the ids that were sampled are those that are learned from, and every token has its own place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fledge.data.prompts import Prompt
from fledge.engine.engine import Engine
from fledge.model.config import ModelConfig
from fledge.model.lora import LoRA, LoRALinear, add_lora, merge_lora
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, Tokenizer, train_bpe
from fledge.train import losses
from fledge.train.prompts import EncodedPrompt
from fledge.train.rollout import (
    adapters_off,
    merged_view,
    micro_batches,
    minibatches,
    padded,
    policy_scores,
    roll_out,
    sampler_gap,
    seed_of,
    token_scores,
)
from fledge.types import Message, Rollout, SamplingParams


def tiny(seed: int, vocab: int = 12, tied: bool = True) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig("qwen3", vocab, 16, 24, 2, 2, 2, 8, 64, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([], SMALLEST_VOCAB_SIZE)


def asked(text: str, ids: list[int], **row: Any) -> EncodedPrompt:
    turn: Message = {"role": "user", "content": text}
    return EncodedPrompt(Prompt([turn], None, {"prompt": text, **row}, f"file:{text}"), ids)


def some_rollouts(model: CausalLM, tokenizer: Tokenizer, temperature: float = 1.0) -> list[Rollout]:
    """Of different lengths, some of them cut off."""
    engine = Engine(model, [0, 1])
    prompts = [asked("a", [5, 6, 7]), asked("b", [8]), asked("c", [3, 3, 3, 3, 4])]
    return roll_out(engine, tokenizer, prompts, SamplingParams(temperature, max_tokens=6, n=4, seed=1))


# Roll-outs.


def test_every_call_has_a_seed_of_its_own() -> None:
    assert len({seed_of(0, 2, number) for number in range(100)} | {seed_of(2, 0)}) == 101


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampled_ids_are_kept(temperature: float, tokenizer: Tokenizer) -> None:
    """Prompt, then exactly what the engine made, the token that ends it included; nothing is decoded and
    encoded again."""
    model = tiny(0)
    made = some_rollouts(model, tokenizer, temperature)
    params = SamplingParams(temperature, max_tokens=6, n=4, seed=1)
    completions = Engine(model, [0, 1]).generate([[5, 6, 7], [8], [3, 3, 3, 3, 4]], params)
    assert len(made) == 12 and 0 < sum(one.ended for one in made) < 12
    for one, completion in zip(made, completions, strict=True):
        end = [] if completion.stop_token is None else [completion.stop_token]
        ids = completion.ids + [token.id for token in end]
        assert one.input_ids[-len(ids) :] == ids
        assert one.loss_mask == [False] * (len(one.input_ids) - len(ids)) + [True] * len(ids)
        logps = completion.sampled_logps + [token.sampled_logp for token in end]
        assert one.logps[-len(ids) :] == logps and not any(one.logps[: -len(ids)])
        assert one.completion == tokenizer.decode(completion.ids)
        assert one.ended == (one.input_ids[-1] in (0, 1)) == bool(end)
    assert [one.where for one in made] == ["file:a"] * 4 + ["file:b"] * 4 + ["file:c"] * 4
    assert made[0].row == {"prompt": "a"} and made[0].messages == [{"role": "user", "content": "a"}]


def test_tokens_keep_their_places_in_tensors(tokenizer: Tokenizer) -> None:
    made = some_rollouts(tiny(0), tokenizer)
    whole = padded(made)
    for rows in ([0], [7, 2], list(range(12))):
        part = whole.rows(rows)
        assert part.input_ids.shape[1] == max(len(made[row].input_ids) for row in rows)
        assert part.mask.shape[1] == part.input_ids.shape[1] - 1
        for place, row in enumerate(rows):
            ids = part.input_ids[place, 1:][part.mask[place]].tolist()
            expected = zip(made[row].input_ids, made[row].loss_mask, strict=True)
            assert ids == [token for token, on in expected if on]
            assert part.lengths[place] == len(made[row].input_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampler_and_training_agree(temperature: float, tokenizer: Tokenizer) -> None:
    """Decoded token by token or read at once, the log-probabilities are the same but for rounding."""
    model = tiny(0)
    made = some_rollouts(model, tokenizer, temperature)
    rows = padded(made)
    with torch.no_grad():
        logps, _ = policy_scores(model, rows, temperature)
        wrong, _ = policy_scores(model, rows, temperature + 1)
    gap = sampler_gap(made, logps, rows.mask)
    assert gap.mean <= gap.largest < 1e-5
    assert sampler_gap(made, wrong, rows.mask).mean > 0.1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_minibatches_are_a_partition(rows: int, count: int, seed: int) -> None:
    parts = minibatches(rows, count, [seed, 1])
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert len(parts) == min(rows, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 80))
def test_micro_batches_are_bounded(lengths: list[int], most: int) -> None:
    parts = list(micro_batches(range(len(lengths)), lengths, most))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= most


# Scores.


def test_scores_by_their_definition(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """log softmax at the temperature and its entropy, for the mask's tokens; in chunks the same, gradients
    too."""
    model, temperature = tiny(0), 0.7
    rows = padded(some_rollouts(model, tokenizer))
    whole = (model(rows.input_ids[:, :-1]).double() / temperature).log_softmax(-1)
    expected = whole.gather(2, rows.input_ids[:, 1:, None])[..., 0]
    entropy = -(whole.exp() * whole).sum(-1)
    found: list[list[Tensor]] = []
    for limit in (losses.WHOLE_SCORES, 1):
        monkeypatch.setattr(losses, "WHOLE_SCORES", limit)
        monkeypatch.setattr(losses, "CHUNK_SCORES", 5 * 12)
        model.zero_grad()
        logps, entropies = policy_scores(model, rows, temperature)
        torch.testing.assert_close(logps, torch.where(rows.mask, expected, 0.0).float())
        torch.testing.assert_close(entropies, torch.where(rows.mask, entropy, 0.0).float())
        assert not entropies.requires_grad
        logps.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scores_are_made_for_completions_alone() -> None:
    """Of a long prompt and a short completion the head reads only the completion."""
    model, read = tiny(0), []
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 7:], mask[1, 5] = True, True
    ids = torch.randint(12, (2, 9))
    hidden = model.hidden_rows(ids)
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[0]))
    token_scores(model.lm_head, hidden, ids, mask, 1.0)
    assert read == [3]


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_can_be_left_out_or_taken_in(tied: bool, tokenizer: Tokenizer) -> None:
    """Off, the model is bit for bit what it was; merged, it is what it has become, and the weights that have
    no adapter are shared."""
    model, before = tiny(0, tied=tied), tiny(0, tied=tied)
    assert merged_view(model) is model
    add_lora(model, LoRA(2, 4.0, ("q_proj", "down_proj")), torch.Generator().manual_seed(0))
    rows = padded(some_rollouts(before, tokenizer))
    with torch.no_grad():
        original = policy_scores(before, rows, 1.0)[0]
        assert torch.equal(policy_scores(model, rows, 1.0)[0], original), "a new adapter adds nothing"
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.weight.normal_(0.0, 0.5)
        adapted = policy_scores(model, rows, 1.0)[0]
        assert (adapted - original).abs().max() > 0.01
        with adapters_off(model):
            assert torch.equal(policy_scores(model, rows, 1.0)[0], original)
        assert torch.equal(policy_scores(model, rows, 1.0)[0], adapted)
        view = merged_view(model)
        torch.testing.assert_close(policy_scores(view, rows, 1.0)[0], adapted, rtol=1e-4, atol=1e-5)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    new = [name for name, parameter in view.named_parameters() if parameter.data_ptr() not in own]
    assert sorted({name.split(".")[-2] for name in new}) == ["down_proj", "q_proj"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained), "the view changes nothing in the model"
    merge_lora(model)
    with torch.no_grad():
        assert torch.equal(policy_scores(model, rows, 1.0)[0], policy_scores(view, rows, 1.0)[0])
