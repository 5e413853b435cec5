"""How probable each of some texts is as the whole answer: a classifier without training.

A text has many tokenisations, and a model gives each of them some probability. Summed over all of them
(Cao & Rimell 2021, "You should evaluate your language model on marginal likelihood over tokenisations"), the
probability of a text is exact; where they are too many, that of the tokenizer's own ids stands for it.

The tokenisations of all choices behind a prompt are a tree, and so are prompts that begin alike: each tree is
read in one pass, in which a token sees the tokens on its own branch. What is common is read once.

Shape suffixes: T tokens of a tree, N pairs of a token and an id, C model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fledge.engine.engine import Engine
from fledge.engine.reading import MAX_LOGITS
from fledge.engine.sampling import broken_scores
from fledge.engine.scheduler import check_ids
from fledge.engine.slots import common_prefix
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer

Method = Literal["exact", "canonical"]
# A node of a tree, and the id that follows it.
Step = tuple[int, int]

# Tokens of all tokenisations together, above which only the tokenizer's own count.
MAX_TOKENISATION_TOKENS = 512
# Tokens of a tree: a pass costs memory with the square of it.
MAX_TREE_TOKENS = 2048


@dataclass(frozen=True)
class ChoiceScores:
    """Of each choice: the log-probability (nats) that the model writes it, and its share among the choices.
    `method`: over every tokenisation (`exact`) or by the tokenizer's own ids (`canonical`)."""

    logps: list[float]
    probabilities: list[float]
    method: Method


def choice_logps(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[str],
    stop_ids: Collection[int] = (),
    end: bool = True,
    max_tokens: int = MAX_TOKENISATION_TOKENS,
) -> list[ChoiceScores]:
    """How probable each choice is behind each prompt (ids), followed by an end: one of the engine's
    `eos_ids` or of `stop_ids`. Without `end`, whatever follows counts, which favours a choice that begins
    another. `max_tokens` bounds the tokens of the tree of all tokenisations.

    Raises UserError for choices or prompts that are empty or do not fit the context, and for NaN scores.
    """
    config = engine.model.config
    if not choices or "" in choices:
        raise UserError("choices: none, or an empty one; give texts with at least one character")
    paths, method = _paths(tokenizer, choices, config.vocab_size, max_tokens)
    end_ids = sorted({i for i in (*engine.eos_ids, *stop_ids) if i < config.vocab_size}) if end else []
    if end and not end_ids:
        raise UserError("the model has no end-of-text id; ask for the choices without an end")
    room = engine.context - max(len(path) for found in paths for path in found)
    for number, prompt in enumerate(prompts, start=1):
        check_ids(prompt, f"prompt {number} of {len(prompts)}, before the choices,", room, config.vocab_size)
    made: dict[int, ChoiceScores] = {}
    branches = len({path[:k] for found in paths for path in found for k in range(1, len(path) + 1)})
    for group in _groups(prompts, branches):
        tree = _Tree()
        steps: dict[int, list[list[list[Step]]]] = {}
        for number in group:
            last = tree.add(-1, prompts[number])
            steps[number] = [[tree.steps(last, path, end_ids) for path in found] for found in paths]
        logps = tree.logps(engine)
        for number, of_choices in steps.items():
            scores = [_log_sum([_along(path, logps, end_ids) for path in of_one]) for of_one in of_choices]
            made[number] = ChoiceScores(scores, _shares(scores), method)
    return [made[number] for number in range(len(prompts))]


def _along(steps: list[Step], logps: dict[Step, float], end_ids: Sequence[int]) -> float:
    """The log-probability of a path and its end, whose steps come last."""
    inner = steps[: len(steps) - len(end_ids)]
    total = math.fsum(logps[step] for step in inner)
    return total + (_log_sum([logps[step] for step in steps[len(inner) :]]) if end_ids else 0.0)


def _paths(
    tokenizer: Tokenizer, choices: Sequence[str], vocab_size: int, max_tokens: int
) -> tuple[list[list[tuple[int, ...]]], Method]:
    """The tokenisations of each choice: all of them, or, where they are too many, the tokenizer's own."""
    canonical = [tuple(tokenizer.encode_piece(choice, "text")) for choice in choices]
    # What the tokenizer's ids write, should it change a text (as by normalisation).
    targets = [b"".join(map(tokenizer.token_bytes, ids)) for ids in canonical]
    ids_of = defaultdict[bytes, list[int]](list)
    for token_id in range(min(vocab_size, tokenizer.vocab_size)):
        piece = tokenizer.token_bytes(token_id)
        if piece and any(piece in target for target in targets):
            ids_of[piece].append(token_id)
    if sum(_count(target, ids_of) for target in targets) > max_tokens:
        return [[ids] for ids in canonical], "canonical"
    return [list(_tokenisations(target, ids_of)) for target in targets], "exact"


def _next(target: bytes, start: int, ids_of: dict[bytes, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """(end, ids) of the tokens that can stand at a place of a text."""
    for end in range(start + 1, len(target) + 1):
        if target[start:end] in ids_of:
            yield end, ids_of[target[start:end]]


def _count(target: bytes, ids_of: dict[bytes, list[int]]) -> int:
    """Tokens in the tree of a text's tokenisations: at each place, the ways to come there, if the text's
    end can be reached from it."""
    reaches = [False] * len(target) + [True]
    for start in reversed(range(len(target))):
        reaches[start] = any(reaches[end] for end, _ in _next(target, start, ids_of))
    ways = [1] + [0] * len(target)
    for start in range(len(target)):
        for end, ids in _next(target, start, ids_of):
            ways[end] += ways[start] * len(ids) * reaches[end]
    return sum(ways[1:])


def _tokenisations(
    target: bytes, ids_of: dict[bytes, list[int]], start: int = 0
) -> Iterator[tuple[int, ...]]:
    """Every sequence of ids whose bytes are the text from `start` on."""
    if start == len(target):
        yield ()
    for end, ids in _next(target, start, ids_of):
        for rest in _tokenisations(target, ids_of, end):
            yield from ((token_id, *rest) for token_id in ids)


def _groups(prompts: Sequence[Sequence[int]], branches: int) -> Iterator[list[int]]:
    """The numbers of prompts that are read together; those that begin alike are neighbours."""
    group: list[int] = []
    size, before = 0, list[int]()
    for number in sorted(range(len(prompts)), key=lambda number: list(prompts[number])):
        prompt = list(prompts[number])
        new = len(prompt) - common_prefix(before, prompt) + branches
        if group and size + new > MAX_TREE_TOKENS:
            yield group
            group, size, new = [], 0, len(prompt) + branches
        group.append(number)
        size, before = size + new, prompt
    if group:
        yield group


class _Tree:
    """Sequences that share what they begin with; a node is a token, known by its number."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._nodes: dict[tuple[int, int], int] = {}
        self._wanted: dict[Step, None] = {}

    def add(self, node: int, ids: Sequence[int]) -> int:
        """Put ids behind a node (-1: the start of all); the last one's node."""
        for token_id in ids:
            node = self._child(node, token_id)
        return node

    def steps(self, node: int, path: Sequence[int], end_ids: Sequence[int]) -> list[Step]:
        """Put a path behind a node: its steps, then those to the ends."""
        steps = []
        for token_id in path:
            steps.append((node, token_id))
            node = self._child(node, token_id)
        steps += [(node, token_id) for token_id in end_ids]
        self._wanted.update(dict.fromkeys(steps))
        return steps

    def _child(self, parent: int, token_id: int) -> int:
        node = self._nodes.setdefault((parent, token_id), len(self._ids))
        if node == len(self._ids):
            self._ids.append(token_id)
            self._parents.append(parent)
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
        return node

    @torch.inference_mode()
    def logps(self, engine: Engine) -> dict[Step, float]:
        """The log-probability (fp32) of every step. Raises UserError for scores that are NaN."""
        T, device, decoder = len(self._ids), engine.device, engine.decoder()
        visible_TT = torch.eye(T, dtype=torch.bool).numpy()
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                visible_TT[node] |= visible_TT[parent]
        ids_1T, positions_1T = torch.tensor([[self._ids], [self._depths]], device=device)
        visible_1TT = torch.from_numpy(visible_TT).to(device)[None]
        steps = sorted(self._wanted)
        nodes = sorted({node for node, _ in steps})
        found: list[float] = []
        chunk = max(1, MAX_LOGITS // engine.model.config.vocab_size)
        hidden_TC = decoder.hidden(ids_1T, positions_1T, visible_1TT)[0]
        for i in range(0, len(nodes), chunk):
            row_of = {node: row for row, node in enumerate(nodes[i : i + chunk])}
            logps_NV = decoder.logits(hidden_TC[list(row_of)]).log_softmax(-1)
            if not bool(logps_NV.isfinite().all()):
                raise broken_scores()
            pairs = [(row_of[node], token_id) for node, token_id in steps if node in row_of]
            rows_N, ids_N = torch.tensor(pairs, device=device).T
            found += logps_NV[rows_N, ids_N].tolist()
        return dict(zip(steps, found, strict=True))


def _log_sum(logps: Sequence[float]) -> float:
    """The logarithm of a sum of probabilities."""
    best = max(logps)
    return best + math.log(math.fsum(math.exp(logp - best) for logp in logps))


def _shares(logps: Sequence[float]) -> list[float]:
    """Probabilities that sum to 1."""
    total = _log_sum(logps)
    return [math.exp(logp - total) for logp in logps]
