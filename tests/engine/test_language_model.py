"""The engine over an n-gram model: every way of reading gives the same contexts, and so the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fledge.engine.choices import choice_logps
from fledge.engine.constraints import Grammars, choices_grammar
from fledge.engine.engine import Engine
from fledge.engine.language_model import NgramReader
from fledge.model.ngram import NOTHING, NgramConfig, NgramModel
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

TEXTS = ("the cats sat; the cats ate. hello, hello books", "the café sells books. the cats sat", "hello cats")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> NgramModel:
    documents = [np.array([tokenizer.eos_id, *tokenizer.encode(text)]) for text in TEXTS * 3]
    return NgramModel.count(documents, tokenizer.eos_id, NgramConfig(tokenizer.vocab_size, 4, 64))


def contexts(ids: list[int], order: int) -> np.ndarray:
    """The last `order - 1` ids after each of the ids."""
    padded = [NOTHING] * (order - 2) + ids
    return np.array([padded[i : i + order - 1] for i in range(len(ids))])


def test_score_is_what_the_counts_say(model: NgramModel, tokenizer: Tokenizer) -> None:
    sequences = [tokenizer.encode(text) for text in ("the cats ate books", "hello", "sells hello the")]
    for ids, logps in zip(sequences, Engine(model, [0]).score(sequences), strict=True):
        p = model.probabilities(contexts(ids, 4))
        assert logps == pytest.approx(np.log(p[range(len(ids) - 1), ids[1:]]).tolist(), abs=1e-5)


def test_reading_at_once_piece_by_piece_and_as_a_tree_is_the_same(model: NgramModel) -> None:
    reader = NgramReader(model)
    ids_BT = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    index_T = torch.arange(12)
    whole_BTC = reader.hidden(ids_BT, index_T[None], (index_T[:, None] >= index_T)[None])
    assert whole_BTC.tolist() == [contexts(ids, 4).tolist() for ids in ids_BT.tolist()]
    cache, pieces = reader.new_cache(2, 12), []
    for start, end in ((0, 1), (1, 2), (2, 9), (9, 12)):
        pieces.append(reader.extend(ids_BT[:, start:end], torch.full((2,), end - start), cache))
    assert torch.equal(torch.cat(pieces, 1), whole_BTC)
    # 7 with the children 8 and 9: neither sees the other.
    visible_TT = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    tree_TC = reader.hidden(torch.tensor([[7, 8, 9]]), torch.tensor([[0, 1, 1]]), visible_TT[None])[0]
    assert tree_TC.tolist() == [[NOTHING, NOTHING, 7], [NOTHING, 7, 8], [NOTHING, 7, 9]]


def test_rows_of_different_lengths_are_generated_as_if_alone(model: NgramModel, tokenizer: Tokenizer) -> None:
    prompts = [
        tokenizer.encode(text) for text in ("the", "the cats sat; the", "hello, hello", "books. the cats")
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    together = Engine(model, [tokenizer.eos_id], keep_cache=True).generate(prompts, greedy)
    for prompt, completion in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token_id, logp in zip(completion.ids, completion.logps, strict=True):
            p = model.probabilities(contexts(ids, 4)[-1:])[0]
            assert p[token_id] == pytest.approx(p.max())
            assert logp == pytest.approx(np.log(p[token_id]), abs=1e-5)
            ids.append(token_id)
    assert any(completion.finish_reason == "stop" for completion in together)


def test_samples_have_the_models_frequencies(model: NgramModel, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the")
    params = SamplingParams(temperature=1.0, max_tokens=1, n=2000)
    made = Engine(model, [tokenizer.eos_id], batch_size=500).generate([prompt], params)
    p = model.probabilities(contexts(prompt, 4)[-1:])[0]
    best = int(p.argmax())
    found = sum(completion.ids == [best] for completion in made) / 2000
    assert abs(found - p[best]) < 4 * (p[best] * (1 - p[best]) / 2000) ** 0.5


def test_constraints_and_probabilities_of_choices(model: NgramModel, tokenizer: Tokenizer) -> None:
    engine = Engine(model, [tokenizer.eos_id], grammars=Grammars(tokenizer, tokenizer.vocab_size))
    prompt = tokenizer.encode("the cats")
    params = SamplingParams(temperature=0.0, constraint=choices_grammar([" sat", " fly"]))
    assert tokenizer.decode(engine.generate([prompt], params)[0].ids) == " sat"
    scores = choice_logps(engine, tokenizer, [prompt], [" sat", " fly"], ())[0]
    assert scores.probabilities[0] > 0.9
