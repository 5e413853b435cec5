"""Text over token ids: streaming decoding, stop strings, completions of prompts and of chats."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.model.checkpoint import eos_ids_of, load_model
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Completion, FinishReason, Message, SamplingParams, TokenGenerator

# The control characters of Unicode (C0, DEL, C1) but for tab and newline.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _CONTROLS[ord("\t")], _CONTROLS[ord("\n")]


@dataclass(frozen=True)
class TextCompletion:
    """A completion as text, without the stop string, and the ids and log-probabilities that made it.

    When a stop string cut the text, the last id may hold the text's end and the stop string's start.
    """

    text: str
    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason


class TextStream:
    """Turns ids into text, one by one, so that all pieces joined are the final text.

    The bytes of an unfinished character are held until they are valid UTF-8; bytes that never will be
    become U+FFFD. Text that may be the start of a stop string is held until that is decided; the text
    ends before the stop string that is complete first (of several complete at once, the longest).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""  # what was handed out so far
        self.stopped = False  # whether a stop string was found: nothing more will come
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._decoded_characters: list[int] = []  # after each id

    def push(self, token_id: int) -> str:
        """Add an id; returns the text that is now certain, "" often."""
        if self.stopped:
            return ""
        decoded = self._decoder.decode(self._bytes(token_id))
        before = self._decoded_characters[-1] if self._decoded_characters else 0
        self._decoded_characters.append(before + len(decoded))
        return self._take(decoded)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_ids:  # control tokens have no text, markup (<tool_call>) has
            return self._tokenizer.decode([token_id], skip_special=True).encode()
        return self._tokenizer.token_bytes(token_id)

    def finish(self) -> str:
        """The rest of the text: nothing more will be pushed."""
        rest = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    @property
    def num_ids(self) -> int:
        """How many of the ids the text needs: all, unless a stop string cut it."""
        if not self.stopped:
            return len(self._decoded_characters)
        return bisect_left(self._decoded_characters, len(self.text)) + 1 if self.text else 0

    def _take(self, decoded: str) -> str:
        self._held += decoded
        ends = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if ends:
            end, minus_length = min(ends)
            piece, self._held, self.stopped = self._held[: end + minus_length], "", True
        else:
            kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - kept
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper start of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def complete(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams
) -> list[TextCompletion]:
    """Continue plain texts, batched. An empty prompt starts a new document.

    Raises UserError as `Engine.generate` does.
    """
    return complete_ids(engine, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], params)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a plain text to continue; the document separator for an empty one."""
    return tokenizer.encode(prompt) or [tokenizer.eos_id]


def complete_ids(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[TextCompletion]:
    """`complete` for prompts that are already ids."""
    texts = [TextStream(tokenizer, params.stop) for _ in prompts]

    def should_stop(row: int, token_id: int) -> bool:
        texts[row].push(token_id)
        return texts[row].stopped

    completions = engine.generate(prompts, params, should_stop)
    for text in texts:
        text.finish()
    return [_joined(text, completion) for text, completion in zip(texts, completions, strict=True)]


def stream_ids(
    engine: TokenGenerator, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams
) -> Generator[str, None, TextCompletion]:
    """Yields the pieces of one completion's text as they become certain; its value is the completion."""
    text, ids, logps = TextStream(tokenizer, params.stop), [], []
    reason: FinishReason = "stop"
    for event in engine.stream(prompt, params):
        if not isinstance(event, tuple):
            reason = event
            break
        ids.append(event[0])
        logps.append(event[1])
        if piece := text.push(event[0]):
            yield piece
        if text.stopped:
            break
    if rest := text.finish():
        yield rest
    return _joined(text, Completion(ids, logps, reason))


def _joined(text: TextStream, completion: Completion) -> TextCompletion:
    kept = text.num_ids
    reason: FinishReason = "stop" if text.stopped else completion.finish_reason
    return TextCompletion(text.text, completion.ids[:kept], completion.logps[:kept], reason)


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

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model reads before it answers."""
        return encode_chat(self.tokenizer, messages, add_generation_prompt=True).ids

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
) -> tuple[Engine, Tokenizer]:
    """The model and tokenizer of a model directory, ready to generate.

    Raises UserError for a directory that is no model, or whose tokenizer has ids the model lacks.
    """
    model = load_model(directory, dtype)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; the files are of different models"
        )
    eos_ids = eos_ids_of(directory) or [tokenizer.eos_id]
    return Engine(model.to(device or torch.device("cpu")), eos_ids, batch_size), tokenizer


def terminal_safe(text: str) -> str:
    """Text without control characters (escape sequences, carriage return, bell); \\n and \\t stay.

    A model's output must not move the cursor, rename the window or paste into a terminal.
    """
    return text.translate(_CONTROLS)
