"""A conversation in a terminal: its turns, its commands, answers printed as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fledge.engine.remote import RemoteChat
from fledge.engine.text import LocalChat, TextCompletion, terminal_safe
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


class Session:
    """A conversation and the commands on it."""

    def __init__(self, chat: LocalChat | RemoteChat, params: SamplingParams, system: str | None) -> None:
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

        Raises UserError if not even the newest message fits. Of an endpoint's model the context is unknown.
        """
        if isinstance(self.chat, RemoteChat):
            return self.messages
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


def print_answer(
    chat: LocalChat | RemoteChat, messages: list[Message], params: SamplingParams
) -> tuple[str, str | None]:
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
