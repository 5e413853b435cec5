"""The models that are served: loaded, named, each with its worker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.engine.beam import Beams, beam_search
from fledge.engine.engine import Engine
from fledge.engine.language_model import LanguageModel
from fledge.engine.search import Hypothesis
from fledge.engine.text import load_engine, text_stream
from fledge.errors import UserError
from fledge.files import read_json
from fledge.rewards.reward_model import Judge, load_judge
from fledge.serve.plan import Room
from fledge.serve.turns import Turns
from fledge.serve.worker import Worker
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

# Requests that a long context leaves room for at once, where the memory allows no more.
FEWEST_ROWS = 4


@dataclass(frozen=True)
class Served:
    """A model under its name: one that writes (`engine`), or one that judges (`judge`)."""

    name: str
    directory: Path
    tokenizer: Tokenizer
    worker: Worker
    room: Room
    created: int
    engine: Engine | None = None
    judge: Judge | None = None

    def beam_search(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], beams: Beams,
        wanted: Callable[[], bool],
    ) -> list[list[Hypothesis]]:  # fmt: skip
        """In the models' thread: the best texts of each prompt, while other requests go on. Raises UserError
        when nobody wants it any more."""
        assert self.engine is not None

        def turn() -> None:
            if not wanted():
                raise UserError("nobody waits for this search any more")
            self.worker.turn()

        engine = copy.copy(self.engine)
        engine._decoder = _Interleaved(self.engine.decoder(), turn)
        return [
            beam_search(engine, [prompt], settings, beams)[0]
            for prompt, settings in zip(prompts, params, strict=True)
        ]


class _Interleaved:
    """A `LanguageModel` that lets others have their turn before each of its steps."""

    def __init__(self, inner: LanguageModel, turn: Callable[[], None]) -> None:
        self._inner, self._turn, self.config = inner, turn, inner.config
        self.new_cache, self.hidden = inner.new_cache, inner.hidden
        self.extend, self.logits = inner.extend, inner.logits

    def step(self, ids_B: Tensor, cache: Any) -> Tensor:
        """See `LanguageModel`."""
        self._turn()
        return self._inner.step(ids_B, cache)


def named_directories(texts: Sequence[str]) -> dict[str, Path]:
    """Names and directories out of `NAME=DIR` or `DIR`. A directory's name is its own, or of one called model
    (as every run has it) its parent's. Raises UserError for a name that is there twice."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).is_dir():
            path = Path(text)
            whole = path.resolve()
            name = whole.parent.name if whole.name == "model" else whole.name
        else:
            path = Path(rest)
        if not name or (equals and not rest and not path.is_dir()):
            raise UserError(f"--model {text}: write NAME=DIR")
        if name in found:
            raise UserError(f"--model {text}: two models are called {name!r}; write NAME=DIR")
        if not path.is_dir():
            raise UserError(f"--model {text}: {path} is no directory")
        found[name] = path
    if not found:
        raise UserError("--model is needed: --model DIR, or several as --model NAME=DIR NAME=DIR")
    return found


def load_served(
    name: str,
    directory: Path,
    *,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    rows: int,
    context: int | None,
    answer_tokens: int | None,
    turns: Turns,
) -> Served:
    """A model of a directory, ready to work on `rows` requests at once (fewer where memory lacks) of up to
    `context` tokens (None: as many as the model reads and memory allows), in the thread of `turns`. Raises
    UserError."""
    created = int((directory / "config.json").stat().st_mtime) if (directory / "config.json").exists() else 0
    if is_reward_model(directory):
        judge = load_judge(directory, device)
        worker = Worker(name, None, lambda params: _no_text(), turns)
        room = Room(judge.max_tokens, 0)
        return Served(name, directory, judge.tokenizer, worker, room, created, judge=judge)
    engine, tokenizer = load_engine(directory, device=device, batch_size=rows, compute_dtype=compute_dtype)
    if context is not None and context > engine.context:
        raise UserError(f"--context {context}: {name} reads {engine.context} tokens")
    slots = context or engine.most_slots(min(FEWEST_ROWS, rows))
    scheduler = engine.new_scheduler(rows, slots)
    worker = Worker(name, scheduler, lambda params: text_stream(engine, tokenizer, params), turns)
    room = Room(slots, answer_tokens)
    return Served(name, directory, tokenizer, worker, room, created, engine=engine)


def is_reward_model(directory: Path) -> bool:
    """Whether a model directory holds one that judges."""
    path = directory / "config.json"
    names = read_json(path).get("architectures") if path.exists() else None
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


def _no_text() -> Any:
    raise UserError("this model judges, it writes nothing")
