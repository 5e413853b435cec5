"""Continuous batching: requests join a running batch, wait where there is no room, and leave at their end.

A server drives it: `submit` and `Generation.cancel` may be called from any thread, `step` makes one token for
every running request. The memory is that of `Slots`, taken once.

Shape suffixes: B rows, T tokens, C model width, V vocabulary, N flattened positions.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fledge.engine.constraints import Constraint, Grammars
from fledge.engine.generation import Generation, Request
from fledge.engine.language_model import LanguageModel
from fledge.engine.reading import read_rows
from fledge.engine.sampling import Sampler, broken_scores, validate
from fledge.engine.slots import MIN_SHARED_PREFIX_TOKENS, Slots, common_prefix
from fledge.engine.speculative import Speculation, Speculator
from fledge.errors import UserError
from fledge.types import FinishReason, Grammar, Token


class Scheduler:
    """Runs requests on `rows` places of `slots` tokens each, first come, first served."""

    def __init__(
        self,
        decoder: LanguageModel,
        eos_ids: Sequence[int],
        rows: int,
        slots: int,
        grammars: Grammars | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.config, self.grammars = decoder.config, grammars
        self.eos_ids = tuple(token_id for token_id in eos_ids if token_id < self.config.vocab_size)
        with torch.inference_mode():
            self.slots = Slots(decoder, rows, slots)
        self.running: list[Generation] = []  # running[i] is in row i
        self.waiting: deque[Generation] = deque()
        self._arrived: deque[Generation] = deque()  # what other threads have submitted since the last step
        self._sampler: Sampler | None = None
        self._speculator = None if speculation is None else Speculator(speculation, self.slots)
        self._rejected: dict[int, Tensor] = {}  # by row: what a proposal that was not kept was drawn from
        self._lock = threading.Lock()

    def submit(self, request: Request, name: str = "the prompt") -> list[Generation]:
        """Queue a request: one `Generation` for each of its `n` completions. From any thread.

        Raises UserError, with `name` for the prompt, for one that can never be run, and for a constraint
        that cannot be compiled.
        """
        params, config = request.params, self.config
        validate(params, config.vocab_size)
        check_ids(request.prompt, name, config.max_position_embeddings, config.vocab_size)
        need = slots_needed(len(request.prompt), params.max_tokens, config.max_position_embeddings)
        if need > self.slots.slots:
            raise UserError(
                f"{name} has {len(request.prompt)} tokens, with max_tokens {params.max_tokens} up to {need}; "
                f"a request can have {self.slots.slots} here: shorten it or lower max_tokens"
            )
        end_ids = frozenset((*(() if params.ignore_eos else self.eos_ids), *params.stop_ids))
        echoed = list[Token]()
        made = [
            Generation(request, sample, end_ids, echoed, self._constraint(params.constraint, end_ids))
            for sample in range(params.n)
        ]
        for generation in made:
            if len(request.prompt) == config.max_position_embeddings and not params.echo:
                generation.end("context")
            else:
                self._arrived.append(generation)
        return made

    def _constraint(self, grammar: Grammar | None, end_ids: frozenset[int]) -> Constraint | None:
        if grammar is None:
            return None
        if self.grammars is None:
            raise UserError("this engine was made without Grammars and can hold no text to a constraint")
        return self.grammars.start(grammar, end_ids)

    @torch.inference_mode()
    def adopt(self, other: Scheduler) -> None:
        """Take over what a smaller scheduler of the same model has read and does not use now."""
        with other._lock:
            self.slots.adopt(other.slots)

    @torch.inference_mode()
    def step(self) -> bool:
        """One token more for every running request, after the waiting ones that fit have joined.
        Returns whether any request is left. From one thread at a time; others wait their turn."""
        with self._lock:
            try:
                self._settle()
                scores = self._decode() + self._join()
                if scores:
                    self._choose(torch.cat(scores) if len(scores) > 1 else scores[0])
            except BaseException as error:  # out of memory, Ctrl-C: nobody may wait for ever
                self._abandon(error)
                raise
            return bool(self.running or self.waiting or self._arrived)

    def _decode(self) -> list[Tensor]:
        """Read each row's last id and what is proposed or forced behind it; the scores of the next."""
        if not self.running:
            return []
        if self._speculator is not None:
            logits_BV, self._rejected = self._speculator.decode(self.running, self._room, self._accept)
            return [logits_BV]
        unread = [[generation.row.ids[-1], *generation.forced] for generation in self.running]
        forced = {i: ids[1:] for i, ids in enumerate(unread) if len(ids) > 1}
        longest = max(map(len, unread))
        if forced and len(unread) * longest <= 2 * sum(map(len, unread)):  # padding is cheaper than a pass
            logits_BV, tokens = read_rows(self.slots, 0, unread, forced, self._tops(forced))
            self._take_forced(tokens)
            return [logits_BV]
        for i, ids in forced.items():
            self._take_forced(read_rows(self.slots, i, [unread[i][:-1]], {i: ids}, self._tops([i]))[1])
        return [self.slots.step([ids[-1] for ids in unread])]

    def _tops(self, rows: Iterable[int]) -> dict[int, int]:
        """How many alternatives rows want."""
        return {row: self.running[row].request.params.top_logprobs for row in rows}

    def _take_forced(self, tokens: dict[int, list[Token]]) -> None:
        """Add what each row was forced to, as far as nothing ends it."""
        for i, row_tokens in tokens.items():
            generation = self.running[i]
            first = len(generation.row.ids)
            for token in row_tokens:
                is_broken = not math.isfinite(token.logp)
                if self._accept(
                    generation, broken_scores() if is_broken else token._replace(sampled_logp=0.0)
                ):
                    break
            new = generation.row.ids[first:]
            self.slots.note([i] * len(new), [*range(first, first + len(new))], new)

    def _join(self) -> list[Tensor]:
        """Give the free rows to waiting requests and read their prompts; the scores of each one's first
        token. What a prompt shares with one that joins now is read from there: it joins in a later wave."""
        joining: list[Generation] = []
        while self.waiting and len(self.running) + len(joining) < self.slots.rows:
            joining.append(self.waiting.popleft())
        scores = []
        while joining:
            wave, later = self._wave(joining)
            scores.append(self._read_prompts(wave))
            joining = later
        if scores:
            self._sampler = None
        return scores

    def _wave(self, joining: list[Generation]) -> tuple[list[Generation], list[Generation]]:
        """Those who can be read now, and those who share more with one of them than with what is there."""
        wave: list[Generation] = []
        later: list[Generation] = []
        coming: list[list[int]] = []  # the wave's prompts, sorted: the likest ones are neighbours
        echoing: set[int] = set()
        for generation in joining:
            prompt, echoed = generation.row.ids, id(generation.echoed)
            place = bisect(coming, prompt)
            near = (common_prefix(prompt, other) for other in coming[max(0, place - 1) : place + 1])
            common = max(near, default=0)
            waits = common >= MIN_SHARED_PREFIX_TOKENS and common > self.slots.shared(prompt)[0] + 1
            if waits or (generation.request.params.echo and echoed in echoing):
                later.append(generation)
                continue
            wave.append(generation)
            coming.insert(place, prompt)
            echoing.add(echoed)
        return wave, later

    def _read_prompts(self, wave: list[Generation]) -> Tensor:
        """Give them rows; the scores (B, V) of each one's first token."""
        rests: list[list[int]] = []
        wanted: dict[int, list[int]] = {}
        wave.sort(key=lambda generation: -generation.row.prompt_tokens)
        for i, generation in enumerate(wave, start=len(self.running)):
            prompt = generation.row.ids
            echo = generation.request.params.echo and not generation.echoed
            rests.append(prompt[self.slots.take(prompt, reuse=not echo) :])
            if echo:
                wanted[i] = prompt[1:]
        first = len(self.running)
        self.running += wave
        logits_BV, echoed = read_rows(self.slots, first, rests, wanted, self._tops(wanted))
        for i, tokens in echoed.items():
            self.running[i].echoed += tokens
            if not all(math.isfinite(token.logp) for token in tokens):
                self.running[i].end(broken_scores())
        return logits_BV

    def _choose(self, logits_BV: Tensor) -> None:
        """Choose each running row's next token; those at their end leave."""
        rows = [generation.row for generation in self.running]
        if self._sampler is None:
            self._sampler = Sampler(rows, self.slots.device)
        chosen = self._sampler(logits_BV, self.slots.ids_RS, self._rejected)
        self._rejected = {}
        ended = [i for i, token in enumerate(chosen) if self._accept(self.running[i], token)]
        for generation in self.running:
            if generation.row.constraint is not None and not generation.done:
                generation.forced = generation.row.forced()[: self._room(generation)]
        if self._sampler.needs_history:
            positions = [len(row.ids) - 1 for row in rows]
            self.slots.note(range(len(rows)), positions, [row.ids[-1] for row in rows])
        for i in reversed(ended):
            self._leave(i)

    def _most(self, generation: Generation) -> tuple[int, FinishReason]:
        """The most tokens that it can have, and what to call that end."""
        most = generation.request.params.max_tokens
        room = self.config.max_position_embeddings - generation.row.prompt_tokens
        return (most, "length") if most <= room else (room, "context")

    def _room(self, generation: Generation) -> int:
        """The tokens that it may still have."""
        return self._most(generation)[0] - generation.row.made

    def _accept(self, generation: Generation, token: Token | UserError) -> bool:
        """Add a token; whether that is the end."""
        row, (most, full) = generation.row, self._most(generation)
        if generation.done:  # its prompt had no scores, or what was forced was its end
            pass
        elif isinstance(token, UserError):
            generation.end(token)
        elif most == 0:  # only the prompt's log-probabilities were wanted
            generation.end(full)
        elif token.id in row.end_ids:
            generation.stop_token = token
            generation.end("stop")
        else:
            try:
                generation.push(token)
            except UserError as error:
                generation.end(error)
                return True
            if generation.should_stop(token.id):
                generation.end("stop")
            elif generation.done:
                pass
            elif row.constraint is not None and row.made >= row.params.min_tokens and row.constraint.finished:
                generation.end("stop")
            elif row.made == most:
                generation.end(full)
        return generation.done

    def _settle(self) -> None:
        """Queue what has arrived; drop what was cancelled."""
        while self._arrived:
            self.waiting.append(self._arrived.popleft())
        for i in reversed(range(len(self.running))):
            if self.running[i].cancelled:
                self.running[i].end("cancelled")
                self._leave(i)
        if any(generation.cancelled for generation in self.waiting):
            for generation in self.waiting:
                if generation.cancelled:
                    generation.end("cancelled")
            self.waiting = deque(generation for generation in self.waiting if not generation.cancelled)

    def _leave(self, i: int) -> None:
        self.slots.leave(i, keep=self.running[i].error is None)
        last = self.running.pop()
        if i < len(self.running):
            self.running[i] = last
        self._sampler = None

    def _abandon(self, error: BaseException) -> None:
        """End everything: what the cache holds is not certain any more."""
        reason = error if isinstance(error, Exception) else RuntimeError("the engine was interrupted")
        while self._arrived:  # another thread may submit meanwhile
            self.waiting.append(self._arrived.popleft())
        for generation in (*self.running, *self.waiting):
            generation.end(reason)
        self.running, self._sampler, self._rejected = [], None, {}
        if self._speculator is not None:
            self._speculator.clear()
        self.waiting.clear()
        self.slots.clear()


def slots_needed(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """Tokens that a request can come to."""
    return min(prompt_tokens + max_tokens, context)


def check_ids(ids: Sequence[int], name: str, context: int, vocab_size: int, smallest: int = 1) -> None:
    """Raise UserError for a sequence that the model cannot read."""
    if len(ids) < smallest:
        raise UserError(f"{name} is empty; the model needs at least one token")
    if len(ids) > context:
        raise UserError(f"{name} has {len(ids)} tokens, the model's context holds {context}; shorten it")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"{name} has an id outside the model's vocabulary of {vocab_size}; "
            "was it made by another tokenizer?"
        )
