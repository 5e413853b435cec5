"""`fledge chat`: talk with a model in the terminal, or through a pipe (one message a line)."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fledge.device import pick_device
from fledge.engine.products import WEIGHTS, WeightsName
from fledge.engine.sampling import validate
from fledge.engine.settings import banned_sequences, logit_bias, read_constraint, split_biases
from fledge.engine.text import LocalChat, TextCompletion, load_engine, terminal_safe
from fledge.errors import UserError
from fledge.files import write_text
from fledge.types import Message, SamplingParams

HELP = """\
/system TEXT  set the system prompt (alone: show it)
/reset        forget the conversation, keep the system prompt
/save FILE    write the conversation as one line of JSON that `fledge sft` reads
/help         this list
/quit         end (Ctrl-D too)
Ctrl-C stops an answer. A message that starts with / is written with two of them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Talk with a model. Answers go to stdout, everything else to stderr; /help lists the commands."""

    model: Path
    """Model directory, of a model that was fine-tuned on conversations."""
    system: str | None = None
    """System prompt."""
    temperature: float = 0.8
    """Randomness: 0 always takes the most probable token (greedy), 1 samples from the model as it is."""
    top_k: int | None = None
    """Sample among this many most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Sample among tokens at least this share as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of the conversation less probable to come again; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token that the answer has; negative invites repetition."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's score for each time that the answer has it."""
    logit_bias: tuple[str, ...] = ()
    """TOKEN=BIAS (an id, or text that is one token): added to its score; -100 bans it, 100 forces it."""
    ban: tuple[str, ...] = ()
    """Words that are never written, as the tokens they have at a line's start and behind a space."""
    min_tokens: int = 0
    """Tokens before an answer may end."""
    max_tokens: int = 512
    """Longest answer in tokens."""
    seed: int = 0
    """The same seed, messages and settings give the same answers."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not printed."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end an answer."""
    regex: str | None = None
    """Regular expression that each whole answer matches (Rust's syntax, no look-around)."""
    json_schema: str | None = None
    """JSON schema (a file, or the JSON itself) that each answer is an instance of."""
    grammar: Path | None = None
    """File with a Lark grammar (llguidance's kind) that each answer is a sentence of."""
    weights: WeightsName = "fp32"
    """What weights are rounded to for speed: fp16 is the fastest for one answer at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Read messages and commands until the end of the input."""
    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        seed=config.seed,
        stop=config.stop,
        stop_ids=config.stop_ids,
    )
    validate(params)
    biases = split_biases(config.logit_bias)
    constraint = read_constraint((), config.regex, config.json_schema, config.grammar)
    engine, tokenizer = load_engine(
        config.model, device=pick_device(config.device), compute_dtype=WEIGHTS[config.weights]
    )
    if constraint is not None and engine.grammars is not None:
        engine.grammars.start(constraint)  # one error here instead of one for each message
    banned, biases_by_id = banned_sequences(config.ban, tokenizer), logit_bias(biases, tokenizer)
    params = replace(params, banned=banned, logit_bias=biases_by_id, constraint=constraint)
    validate(params, engine.model.config.vocab_size)
    session = Session(LocalChat(engine, tokenizer), params, config.system)
    if sys.stdin.isatty():
        note("/help lists the commands.")
    for line in read_lines():
        if line.startswith("/") and not line.startswith("//"):
            if not session.command(line):
                return
        elif line:
            session.say(line.removeprefix("/") if line.startswith("//") else line)


def read_lines() -> Iterator[str]:
    """Lines of stdin without surrounding space, until its end; Ctrl-C empties the line being written.

    Raises UserError for a line that is not UTF-8.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history for input()
    while True:
        try:
            if interactive:
                yield input("> ").strip()
                continue
            raw = sys.stdin.buffer.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n/quit or Ctrl-D ends the chat.")
            continue
        if not raw:
            return
        try:
            yield raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"stdin: not valid UTF-8: {raw[:60]!r}; send UTF-8 text") from None


class Session:
    """A conversation and the commands on it."""

    def __init__(self, chat: LocalChat, params: SamplingParams, system: str | None) -> None:
        self.chat = chat
        self.params = params
        self.system = system
        self.turns: list[Message] = []
        self.forgotten = 0  # turns at the start that the model no longer sees
        self.asked = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, the system prompt first."""
        head = [Message(role="system", content=self.system)] if self.system else []
        return [*head, *self.turns]

    def command(self, line: str) -> bool:
        """Do what a line such as `/save FILE` says; False ends the chat."""
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/system": self.set_system,
        }
        if name == "/quit":
            return False
        if name in commands:
            commands[name](argument.strip())
        else:
            note(f"There is no command {name}; /help lists them. To send a text that starts with /, use //.")
        return True

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.forgotten = [], 0
        note("The conversation is forgotten.")

    def set_system(self, text: str) -> None:
        """Replace the system prompt from here on, or show it."""
        if text:
            self.system = text
        note(f"System prompt: {self.system or '(none)'}")

    def save(self, name: str) -> None:
        """Write the conversation to a new file."""
        if not name:
            note("/save needs a file name: /save chat.jsonl")
        elif not self.turns:
            note("There is nothing to save yet.")
        else:
            try:
                path = Path(name).expanduser()
                if path.exists():
                    note(f"{path} exists already and was left as it is; choose another name.")
                    return
                write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody has no home
                note(f"{name} could not be written: {getattr(error, 'strerror', None) or error}")
            else:
                note(f"Saved {len(self.turns)} turns to {path}")

    def say(self, text: str) -> None:
        """Answer one message: print the answer as it is made, and keep both turns."""
        self.turns.append(Message(role="user", content=text))
        try:
            seen = self.visible()
        except UserError as error:
            self.turns.pop()
            note(str(error))
            return
        # A new seed a turn: the same question asked again gets another answer.
        params = replace(self.params, seed=self.params.seed + self.asked)
        self.asked += 1
        answer, reason = print_answer(self.chat, seen, params)
        if answer:
            self.turns.append(Message(role="assistant", content=answer))
        else:
            self.turns.pop()
        if reason:
            note(reason)

    def visible(self) -> list[Message]:
        """The system prompt and the newest turns that leave room for an answer, whole exchanges only.

        Raises UserError if not even the newest message fits.
        """
        context = self.chat.engine.context
        room = min(self.params.max_tokens, context // 4)
        head = self.messages[: len(self.messages) - len(self.turns)]
        starts = [i for i, turn in enumerate(self.turns) if turn["role"] == "user" and i >= self.forgotten]
        for start in starts:
            messages = [*head, *self.turns[start:]]
            tokens = len(self.chat.prompt(messages))
            if tokens + room > context and start != starts[-1]:
                continue
            if tokens >= context:
                raise UserError(
                    f"The message was left out: with the system prompt it takes {tokens} tokens, "
                    f"and the model's context holds {context}."
                )
            if start > self.forgotten:
                note(f"The context of {context} tokens is full: the model forgets the first {start} turns.")
                self.forgotten = start
            return messages
        raise AssertionError("the newest turn is a user's")


def print_answer(chat: LocalChat, messages: list[Message], params: SamplingParams) -> tuple[str, str | None]:
    """Stream the answer to stdout. Returns its text, and why it ended if not by the model's own choice."""
    stream = chat.stream_reply(messages, params)
    safe = terminal_safe if sys.stdout.isatty() else str
    text, reason = "", None
    try:
        while True:
            piece = next(stream)
            text += piece
            print(safe(piece), end="", flush=True)
    except StopIteration as end:
        made: TextCompletion = end.value
        if made.finish_reason == "length":
            reason = f"(cut off after {params.max_tokens} tokens: --max-tokens)"
        elif made.finish_reason == "context":
            reason = "(cut off: the model's context is full)"
        elif not text:
            reason = "(the model had nothing to say)"
    except KeyboardInterrupt:
        reason = "(stopped)"
    except UserError as error:  # such as bans and a grammar that leave nothing: another message may go well
        reason = f"({error})"
    print(flush=True)
    return text, reason


def note(text: str) -> None:
    """A line to the user that is no part of an answer."""
    sys.stdout.flush()
    print(terminal_safe(text), file=sys.stderr, flush=True)
