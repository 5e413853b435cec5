"""Beam and exact search as a command has them: settings that go together, texts, and a line about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fledge.engine.beam import Beams, beam_search
from fledge.engine.engine import Engine
from fledge.engine.exact import Budget, exact_search
from fledge.engine.search import logp_of
from fledge.engine.text import TextCompletion, joined, text_stream
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Completion, SamplingParams

Strategy = Literal["sample", "exact"]
EarlyStoppingName = Literal["true", "false", "never"]
# Beam search, exact search, or (None) a token at a time.
Search = Beams | Budget | None


def search_of(
    strategy: Strategy,
    beams: int | None,
    length_penalty: float | None,
    early_stopping: EarlyStoppingName | None,
    stochastic: bool,
    max_expansions: int | None,
    max_seconds: float | None,
) -> Search:
    """The search that flags ask for; None is a flag that was not given. Raises UserError for those that do
    not go together."""
    of_beams = {
        "--length-penalty": length_penalty is not None,
        "--early-stopping": early_stopping is not None,
        "--stochastic": stochastic,
    }
    of_exact = {"--max-expansions": max_expansions is not None, "--max-seconds": max_seconds is not None}
    if strategy == "exact":
        if length_penalty:
            raise UserError(
                "--length-penalty does not go with --strategy exact: divided by the length, a "
                "log-probability may rise as a text grows, and a prefix's bounds nothing; use --beams for it"
            )
        if beams is not None or any(of_beams.values()):
            raise UserError("--strategy exact goes without --beams and their settings: it starts from a beam")
        return Budget(Budget.expansions if max_expansions is None else max_expansions, max_seconds)
    if given := [flag for flag, is_given in of_exact.items() if is_given]:
        raise UserError(f"{given[0]} goes with --strategy exact")
    if beams is None:
        if given := [flag for flag, is_given in of_beams.items() if is_given]:
            raise UserError(f"{given[0]} goes with --beams K")
        return None
    stopping = {"true": True, "false": False, "never": "never", None: False}[early_stopping]
    assert isinstance(stopping, bool) or stopping == "never"
    return Beams(beams, 1.0 if length_penalty is None else length_penalty, stopping, stochastic)


def search_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    search: Beams | Budget,
) -> list[list[tuple[TextCompletion, str]]]:
    """What is found for each prompt, best first, and what is known of it. Raises UserError as the searches
    do."""
    params = replace(params, echo=False)
    if isinstance(search, Budget):
        results = [exact_search(engine, prompt, params, search) for prompt in prompts]
        return [
            [(_text(engine, tokenizer, r.completion, params), _certificate(r.logp, r.gap, r.expansions))]
            for r in results
        ]
    return [
        [
            (_text(engine, tokenizer, h.completion, params), _score(h.completion, h.score, search))
            for h in hypotheses
        ]
        for hypotheses in beam_search(engine, prompts, params, search)
    ]


def _text(
    engine: Engine, tokenizer: Tokenizer, completion: Completion, params: SamplingParams
) -> TextCompletion:
    text = text_stream(engine, tokenizer, params)
    for token_id in completion.ids:
        text.push(token_id)
    return joined(text, completion)


def _score(completion: Completion, score: float, beams: Beams) -> str:
    known = f"log-probability {logp_of(completion):.3f}"
    return known if beams.stochastic else f"{known}, score {score:.3f}"


def _certificate(logp: float, gap: float, expansions: int) -> str:
    known = f"log-probability {logp:.3f}, {expansions:,} expansions"
    if gap == 0:
        return f"{known}: certified, no whole text is more probable"
    return f"{known}: not certified, another text may be up to {gap:.3f} nats more probable"
