"""Outputs for the prompts of a project, made in the background while people already label the first ones."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fledge.engine.remote import ChatGenerator, EndpointError
from fledge.errors import UserError
from fledge.feedback.forms import Kind, Message, check_prompt
from fledge.feedback.records import Item, Output
from fledge.feedback.simulate import Rule
from fledge.feedback.store import (
    Store,
    add_items,
    add_outputs,
    fail_item,
    get_project,
    list_items,
    waiting_items,
)
from fledge.files import read_jsonl
from fledge.types import SamplingParams

# Models that say the same again and again are asked this often for something else.
ROUNDS = 4
OUTPUTS_AT_ONCE = 32
MOST_OUTPUTS = 9
GIVEN = "given"
Row = tuple[list[Message], list[Output] | None, str | None, str]
"""Prompt, outputs if the file has some, reference answer, and where it stands."""


@dataclass(frozen=True)
class Writer:
    """A model that writes outputs, under the name that admins see."""

    name: str
    chat: ChatGenerator


class Done(Protocol):
    """Called as prompts are done: how many there are now, and how many there will be."""

    def __call__(self, done: int, total: int) -> None:
        """Tell."""
        ...


JUDGE = """\
Rate the assistant's last answer from 1 (terrible) to 7 (excellent): is it helpful, truthful and harmless? \
Reply with the number alone.

{conversation}
assistant: {output}"""


def judge_rule(chat: ChatGenerator) -> Rule:
    """A model that rates each output alone, 1 to 7, as a rule; the first such digit it says counts.

    An output that it does not rate gets the middle, so it ties with others like it.
    """

    def rate(prompt: Sequence[Message], output: str, gold: str | None) -> float:
        conversation = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        asked = JUDGE.format(conversation=conversation, output=output)
        params = SamplingParams(temperature=0.0, max_tokens=8)
        (said,) = chat.replies([[{"role": "user", "content": asked}]], params)
        found = re.search(r"(?<!\d)[1-7](?!\d)", said.text)
        return float(found[0]) if found else 4.0

    return rate


# --- prompts --------------------------------------------------------------------------------------


def read_prompts(path: Path, kinds: Sequence[Kind] = ("ranking",)) -> Iterator[Row]:
    """The rows of a file of prompts; UserError with file and line for one that is none.

    A row has `prompt` (a text, or messages) or `messages`. It may have `completions` (texts, or objects
    with `text` and perhaps `model`), then no model is asked, and `gold`, a reference answer. Where the
    last message is the assistant's, it is the answer to correct where `kinds` of tasks have corrections, or
    else the reference.
    """
    least = least_outputs(kinds)
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        if "prompt" not in row and "messages" not in row:
            raise UserError(f"{where}: a row needs 'prompt' or 'messages'")
        prompt = row["prompt"] if "prompt" in row else row["messages"]
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        messages = check_prompt(prompt[:-1] if answered else prompt, where)
        outputs = _given(row.get("completions"), where)
        if outputs is not None and not least <= len(outputs) <= MOST_OUTPUTS:
            raise UserError(
                f"{where}: {len(outputs)} completions; this project needs {least} to {MOST_OUTPUTS}"
            )
        gold = row.get("gold")
        if answered and isinstance(last, dict):
            text = last.get("content")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: the last message needs a text as its content")
            if "correction" in kinds:
                outputs = outputs or [Output(text, GIVEN)]
            else:
                gold = text if gold is None else gold
        if gold is not None and not isinstance(gold, str):
            raise UserError(f"{where}: 'gold' must be a text")
        yield messages, outputs, gold, where


def least_outputs(kinds: Sequence[Kind]) -> int:
    """How many outputs a prompt needs: two, where people compare."""
    return 2 if {"ranking", "pairwise"} & set(kinds) else 1


def _given(completions: Any, where: str) -> list[Output] | None:
    if completions is None:
        return None
    if not isinstance(completions, list) or not completions:
        raise UserError(f"{where}: 'completions' must be a list of texts")
    outputs = []
    for place, value in enumerate(completions, start=1):
        text, model = (
            (value.get("text"), value.get("model", GIVEN)) if isinstance(value, dict) else (value, GIVEN)
        )
        if not isinstance(text, str) or not isinstance(model, str):
            raise UserError(f"{where}: completion {place} must be a text, or an object with 'text'")
        outputs.append(Output(text, model))
    return outputs


def add_prompts(store: Store, project_id: int, rows: Sequence[Row]) -> int:
    """Add rows whose prompts the project does not have yet, each as often as it is in `rows`; how many were
    new."""
    known = Counter(str(item.prompt) for item in list_items(store, project_id))
    new = []
    for row in rows:
        if known[str(row[0])]:
            known[str(row[0])] -= 1
        else:
            new.append(row)
    add_items(store, project_id, new)
    return len(new)


# --- outputs --------------------------------------------------------------------------------------


def write_outputs(
    writers: Sequence[Writer], items: Sequence[Item], wanted: int, params: SamplingParams
) -> list[list[Output]]:
    """Up to `wanted` different outputs for each item, from all writers in equal shares.

    Where the shares do not come out even, writers take turns with the rest. An empty output, or one that
    another has said already, is asked for anew with another seed, a few times; so a list may end up shorter.
    Raises UserError as the writers do.
    """
    outputs: list[list[Output]] = [[] for _ in items]
    for number in range(ROUNDS if params.temperature > 0 else 1):
        shares = _shares(
            len(writers), [wanted - len(found) for found in outputs], [i.id + number for i in items]
        )
        if not shares:
            break
        for (place, n), among in shares.items():
            seed = params.seed + (items[among[0]].id * ROUNDS + number) * len(writers) + place
            asked = replace(params, n=n, seed=seed % 2**31)
            writer = writers[place]
            made = writer.chat.replies([items[i].prompt for i in among], asked)  # type: ignore[misc]
            for k, completion in enumerate(made):
                _keep(outputs[among[k // n]], Output(completion.text, writer.name), wanted)
    return outputs


def _shares(writers: int, missing: Sequence[int], turns: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """(writer, outputs each) -> items: so that items which need as many go together in one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for item, (number, turn) in enumerate(zip(missing, turns, strict=True)):
        for place in range(writers):
            extra = (place - turn) % writers < number % writers
            if share := number // writers + extra:
                groups.setdefault((place, share), []).append(item)
    return groups


def _keep(found: list[Output], output: Output, wanted: int) -> None:
    text = output.text.strip()
    if text and len(found) < wanted and all(text != other.text.strip() for other in found):
        found.append(output)


class Preparation:
    """Makes the outputs of a project's waiting items, one batch after the other, in a thread of its own.

    What is done is in the store: a server that was stopped goes on where it was.
    """

    def __init__(
        self, store: Store, project_id: int, writers: Sequence[Writer], params: SamplingParams,
        report: Done = lambda done, total: None, prefill: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.project_id, self.writers, self.params = store, project_id, list(writers), params
        self.report, self.prefill = report, prefill
        self.error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="preparation", daemon=True)

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Ask it to end behind the batch in hand, and wait for that a while."""
        self._stop.set()
        self.wait(timeout_seconds)

    def wait(self, timeout_seconds: float) -> None:
        """Until all is done, or for that long."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def status(self) -> dict[str, Any]:
        """Whether it runs, and why it ended too early, if it did."""
        return {"running": self._thread.is_alive(), "error": self.error}

    def _work(self) -> None:
        try:
            self.run()
        except UserError as error:
            self.error = str(error)
            print(f"outputs are no longer made: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            traceback.print_exc()

    def run(self) -> None:
        """Work through what waits, in the caller's thread. Raises UserError when no writer can go on; a
        prompt that alone is at fault is recorded as failed."""
        settings = get_project(self.store, self.project_id).settings
        least = least_outputs(settings.kinds)
        at_once = max(1, OUTPUTS_AT_ONCE // settings.outputs_per_prompt)
        items = waiting_items(self.store, self.project_id)
        if self.prefill is not None:
            self.prefill()
        for start in range(0, len(items), at_once):
            if self._stop.is_set():
                return
            for item, made in self._batch(items[start : start + at_once], settings.outputs_per_prompt):
                if isinstance(made, str):
                    fail_item(self.store, item.id, made)
                elif len(made) < least:
                    fail_item(self.store, item.id, f"the models gave only {len(made)} different outputs")
                else:
                    add_outputs(self.store, item.id, made)
            if self.prefill is not None:
                self.prefill()
            self.report(min(start + at_once, len(items)), len(items))

    def _batch(self, items: Sequence[Item], wanted: int) -> Iterator[tuple[Item, list[Output] | str]]:
        try:
            yield from zip(items, write_outputs(self.writers, items, wanted, self.params), strict=True)
        except EndpointError:
            raise
        except UserError as error:
            if len(items) == 1:
                yield items[0], str(error)
                return
            for item in items:  # one of them is at fault: the others shall not suffer
                yield from self._batch([item], wanted)
