"""The types that pass between parts: conversations, batches, completions, and the model interfaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "context", "cancelled"]


class Message(TypedDict):
    """One turn in OpenAI's form; `arguments` of a tool call are a JSON string here."""

    role: Literal["system", "user", "assistant", "tool"]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Conversation(TypedDict):
    """One line of an SFT file."""

    messages: list[Message]
    tools: NotRequired[list[dict[str, Any]]]


@dataclass
class Batch:
    """A micro-batch of packed rows. B rows of T + 1 tokens: position t is predicted from those before it.

    `loss_mask` is True where the token is a target; `segment_ids` number the documents or
    conversations of a row that do not see each other (None: the whole row is one), -1 is padding.
    """

    input_ids: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return Batch(self.input_ids.to(device), self.loss_mask.to(device), segments)

    def num_tokens(self) -> int:
        """How many tokens are read, whether learned from or not; padding is none."""
        if self.segment_ids is None:
            return self.input_ids[:, :-1].numel()
        return int((self.segment_ids[:, :-1] >= 0).sum())

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        return {"tokens": int(self.loss_mask[:, 1:].sum()), "sequences": self.input_ids.shape[0]}


class Token(NamedTuple):
    """One token that was chosen, or read: log-probabilities in nats.

    `logp` is the model's own (log-softmax of its raw scores, fp32), `sampled_logp` that of the
    distribution the token was taken from (after penalties, bans, constraint, temperature, top-k, ...; at
    temperature 0 after penalties, bans and constraint). `top` has the most probable ids with their `logp`,
    best first.
    """

    id: int
    logp: float
    sampled_logp: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a `TokenGenerator` made: ids without the stop token, the raw log-probability of each id
    under the model, and why it ended (`stop`: a stop id or string; `length`: `max_tokens`;
    `context`: no room left in the model's context; `cancelled`: nobody wanted more).

    The other lists are as long as `ids` and hold the parts of `Token`. `stop_token` is the stop id that
    ended it, if one did. `echoed`: the prompt's tokens from the second on, where `echo` asked for them.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: FinishReason
    sampled_logps: list[float] = field(default_factory=list)
    top_logps: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    stop_token: Token | None = None
    echoed: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Grammar:
    """What a completion must be: one of a JSON list of texts (`choices`), all of a regular expression, JSON
    by a schema (its JSON text), or a sentence of a Lark grammar."""

    kind: Literal["choices", "regex", "json_schema", "lark"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Temperature 0 is greedy.

    `repetition_penalty` (1: none) looks at prompt and completion, `presence_penalty` and
    `frequency_penalty` (0: none) at the completion. `logit_bias` adds to the scores of ids; -100 bans an
    id, 100 leaves only such ids to choose from. `banned` are id sequences that are never made.
    `min_tokens` come before any end; with `ignore_eos` only `stop_ids` and `stop` are ends, the model's own
    ids are not. `n` completions a prompt; `top_logprobs` alternatives a token; `echo` gives the
    log-probabilities of the prompt too. `constraint`: what the completion must be.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = field(default=())
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    n: int = 1
    top_logprobs: int = 0
    echo: bool = False
    constraint: Grammar | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Rollout:
    """What a policy made of a prompt, for a reward function to judge and for training to learn from.

    `input_ids` are the exact ids that were read and made, over all turns; `loss_mask` is True for those that
    the policy made, the token that ends its turn among them; `logps` are their log-probabilities (nats) when
    they were sampled, 0 for all others; the three are of one length.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    logps: list[float]
    row: dict[str, Any]
    """The line of data that the prompt came from, with the right answer or whatever else a verifier needs."""
    messages: list[Message]
    """The prompt: all turns before the policy's."""
    completion: str
    """What the policy made, as text, without the token that ends it."""
    ended: bool
    """Whether it ended its turn; False: it was cut off at the length limit."""
    where: str = ""
    """File and line of the prompt."""


# One reward for each roll-out: a verifier, a reward model or a judge.
RewardFunction = Callable[[list[Rollout]], list[float]]


class TokenGenerator(Protocol):
    """Token ids in; ids, log-probabilities and finish reasons out."""

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """`params.n` completions a prompt, in the prompts' order."""
        ...

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token | FinishReason]:
        """Each token as it is made, then the finish reason; closing the iterator cancels the rest."""
        ...


class Scorer(Protocol):
    """Log-probability of every token of given sequences, the first left out."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Nats: one list a sequence, one shorter than it."""
        ...


class ModelFiles(Protocol):
    """Anything that writes its part of a model directory (a tokenizer does)."""

    def save(self, directory: Path) -> None:
        """Write the files into an existing directory."""
        ...


def pad_rows(rows: Sequence[Sequence[int]], value: int, length: int | None = None) -> Tensor:
    """Right-pad integer rows to one int64 tensor (B, T)."""
    length = max(map(len, rows)) if length is None else length
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
