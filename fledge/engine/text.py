"""Text over token ids: completions of prompts and of chats, whole or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fledge.engine.constraints import Grammars
from fledge.engine.engine import Engine
from fledge.engine.stops import TextStream
from fledge.errors import UserError
from fledge.model.checkpoint import eos_ids_of, load_model
from fledge.model.ngram import NgramModel, is_ngram, load_ngram
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Completion, FinishReason, Message, SamplingParams, Token, TokenGenerator

# The control characters of Unicode (C0, DEL, C1) but for tab and newline.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _CONTROLS[ord("\t")], _CONTROLS[ord("\n")]


@dataclass(frozen=True)
class TextCompletion:
    """A completion as text, without the stop string, and the ids and log-probabilities that made it
    (see `Completion`); all are cut at the same token. An endpoint gives no ids: `tokens` is how many it
    counts then, None if it says nothing of it.

    When a stop string cut the text, the last id may hold the text's end and the stop string's start.
    """

    text: str
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason
    sampled_logps: list[float] = field(default_factory=list)
    top_logps: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    echoed: list[Token] = field(default_factory=list)
    tokens: int | None = None


def complete(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams
) -> list[TextCompletion]:
    """Continue plain texts, batched. An empty prompt starts a new document.

    Raises UserError as `Engine.generate` does.
    """
    return complete_ids(engine, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], params)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a plain text to continue; the document separator for an empty one."""
    return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)] or [tokenizer.eos_id]


def complete_ids(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[TextCompletion]:
    """`complete` for prompts that are already ids: `params.n` completions for each."""
    texts = [text_stream(engine, tokenizer, params) for _ in range(len(prompts) * params.n)]

    def should_stop(place: int, token_id: int) -> bool:
        texts[place].push(token_id)
        return texts[place].stopped

    completions = engine.generate(prompts, params, should_stop)
    return [joined(text, completion) for text, completion in zip(texts, completions, strict=True)]


def text_stream(engine: TokenGenerator, tokenizer: Tokenizer, params: SamplingParams) -> TextStream:
    """Where a request's ids become text, with its stop strings; under a constraint one ends the text only
    where that is complete."""
    is_whole = None
    if params.constraint is not None and isinstance(engine, Engine) and engine.grammars is not None:
        is_whole = partial(engine.grammars.accepts, params.constraint)
    return TextStream(tokenizer, params.stop, params.min_tokens, is_whole)


def stream_ids(
    engine: TokenGenerator, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams
) -> Generator[str, None, TextCompletion]:
    """Yields the pieces of one completion's text as they become certain; its value is the completion.
    Closing it cancels the rest."""
    text = text_stream(engine, tokenizer, params)
    tokens: list[Token] = []
    reason: FinishReason = "stop"
    events = engine.stream(prompt, params)
    for event in events:
        if not isinstance(event, Token):
            reason = event
            break
        tokens.append(event)
        if piece := text.push(event.id):
            yield piece
        if text.stopped:
            break
    if rest := text.finish():
        yield rest
    ids, logps, sampled, tops = map(list, zip(*tokens, strict=True)) if tokens else ([], [], [], [])
    return joined(text, Completion(ids, logps, reason, sampled, tops))


def joined(text: TextStream, completion: Completion) -> TextCompletion:
    """A completion whose ids were all pushed into `text`; what a stop string cut off is left out."""
    text.finish()
    kept = text.num_ids
    return TextCompletion(
        text.text,
        completion.ids[:kept],
        completion.logps[:kept],
        "stop" if text.stopped else completion.finish_reason,
        completion.sampled_logps[:kept],
        completion.top_logps[:kept],
        completion.echoed,
        kept,
    )


class LocalChat:
    """Answers conversations (OpenAI's `messages`) with a local model: a `ChatGenerator`."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Raises UserError for a tokenizer without a chat template or end-of-turn token."""
        if tokenizer.chat_template is None or tokenizer.end_of_turn_id is None:
            raise UserError(
                "the model's tokenizer has no chat template: continue plain text with `fledge generate`, "
                "or make a chat model of it with `fledge sft`"
            )
        self.engine = engine
        self.tokenizer = tokenizer
        self._end_of_turn_id = tokenizer.end_of_turn_id

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """The ids that the model reads before it answers."""
        return encode_chat(self.tokenizer, messages, tools, add_generation_prompt=True).ids

    def reply(self, messages: Sequence[Message], params: SamplingParams) -> TextCompletion:
        """The assistant's next turn."""
        return self.replies([messages], params)[0]

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> list[TextCompletion]:
        """The assistant's next turn in each of many conversations, batched."""
        prompts = [self.prompt(messages) for messages in conversations]
        return complete_ids(self.engine, self.tokenizer, prompts, self.until_end_of_turn(params))

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The assistant's next turn, piece by piece."""
        return self.stream_reply(messages, params)

    def stream_reply(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[str, None, TextCompletion]:
        """`stream`, with the whole turn as the generator's value."""
        prompt = self.prompt(messages)
        return stream_ids(self.engine, self.tokenizer, prompt, self.until_end_of_turn(params))

    def until_end_of_turn(self, params: SamplingParams) -> SamplingParams:
        """Settings that also stop at the end of the assistant's turn."""
        return replace(params, stop_ids=(*params.stop_ids, self._end_of_turn_id))


def load_engine(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    batch_size: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Engine, Tokenizer]:
    """The model and tokenizer of a model directory, ready to generate; `compute_dtype` as of `Engine`.

    An n-gram model is read on the CPU, whatever the device. Raises UserError for a directory that is no
    model, or whose tokenizer has ids the model lacks, and for weights rounded where there are only counts.
    """
    model = _load_counts(directory, compute_dtype) if is_ngram(directory) else load_model(directory, dtype)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; the files are of different models"
        )
    eos_ids = eos_ids_of(directory) or [tokenizer.eos_id]
    if not isinstance(model, NgramModel):
        model = model.to(device or torch.device("cpu"))
    grammars = Grammars(tokenizer, model.config.vocab_size)
    return Engine(model, eos_ids, batch_size, compute_dtype, keep_cache=True, grammars=grammars), tokenizer


def _load_counts(directory: Path, compute_dtype: torch.dtype | None) -> NgramModel:
    if compute_dtype not in (None, torch.float32):
        raise UserError(
            f"{directory}: --weights and --quantize have no meaning for an n-gram model: it has counts; "
            "leave them out"
        )
    return load_ngram(directory)


def terminal_safe(text: str) -> str:
    """Text without control characters (escape sequences, carriage return, bell); \\n and \\t stay.

    A model's output must not move the cursor, rename the window or paste into a terminal.
    """
    return text.translate(_CONTROLS)
