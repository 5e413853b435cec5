"""Continuous batching: requests join a running batch, wait where there is no room, and leave at their end.

A server drives it: `submit` and `Generation.cancel` may be called from any thread, `step` makes one token for
every running request. The memory is that of `Slots`, taken once.

Shape suffixes: B rows, T tokens, C model width, V vocabulary, N flattened positions.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.engine.generation import Generation, Request
from fledge.engine.sampling import Sampler, broken_scores, top_logprobs, validate
from fledge.engine.slots import MIN_SHARED_PREFIX_TOKENS, Slots, common_prefix
from fledge.errors import UserError
from fledge.model.transformer import CausalLM
from fledge.types import FinishReason, Token

# Padded tokens that pass through the model at once, and scores of prompts held at once: they bound memory.
MAX_PASS_TOKENS = 16_384
MAX_LOGITS = 2**25


class Scheduler:
    """Runs requests on `rows` places of `slots` tokens each, first come, first served."""

    def __init__(
        self,
        model: CausalLM,
        eos_ids: Sequence[int],
        rows: int,
        slots: int,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.compute_dtype = model, compute_dtype
        self.eos_ids = tuple(token_id for token_id in eos_ids if token_id < model.config.vocab_size)
        with torch.inference_mode():
            self.slots = Slots(model, rows, slots, compute_dtype)
        self.running: list[Generation] = []  # running[i] is in row i
        self.waiting: deque[Generation] = deque()
        self._arrived: deque[Generation] = deque()  # what other threads have submitted since the last step
        self._sampler: Sampler | None = None
        self._lock = threading.Lock()

    def submit(self, request: Request, name: str = "the prompt") -> list[Generation]:
        """Queue a request: one `Generation` for each of its `n` completions. From any thread.

        Raises UserError, with `name` for the prompt, for one that can never be run.
        """
        params, config = request.params, self.model.config
        validate(params, config.vocab_size)
        check_ids(request.prompt, name, config.max_position_embeddings, config.vocab_size)
        need = slots_needed(len(request.prompt), params.max_tokens, config.max_position_embeddings)
        if need > self.slots.slots:
            raise UserError(
                f"{name} has {len(request.prompt)} tokens, with max_tokens {params.max_tokens} up to {need}; "
                f"a request can have {self.slots.slots} here: shorten it or lower max_tokens"
            )
        end_ids, echoed = frozenset((*self.eos_ids, *params.stop_ids)), list[Token]()
        made = [Generation(request, sample, end_ids, echoed) for sample in range(params.n)]
        for generation in made:
            if len(request.prompt) == config.max_position_embeddings and not params.echo:
                generation.end("context")
            else:
                self._arrived.append(generation)
        return made

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
                with computing(self.compute_dtype, self.slots.device):
                    scores = self._decode() + self._join()
                if scores:
                    self._choose(torch.cat(scores) if len(scores) > 1 else scores[0])
            except BaseException as error:  # out of memory, Ctrl-C: nobody may wait for ever
                self._abandon(error)
                raise
            return bool(self.running or self.waiting or self._arrived)

    def _decode(self) -> list[Tensor]:
        if not self.running:
            return []
        return [self.slots.step([generation.row.ids[-1] for generation in self.running]).float()]

    def _join(self) -> list[Tensor]:
        """Give the free rows to waiting requests and read their prompts; the scores of each one's first
        token. What a prompt shares with one that joins now is read from there: it joins in a later wave."""
        joining: list[Generation] = []
        while self.waiting and len(self.running) + len(joining) < self.slots.rows:
            joining.append(self.waiting.popleft())
        scores = []
        while joining:
            wave, later = self._wave(joining)
            scores += self._read_prompts(wave)
            joining = later
        if scores:
            self._sampler = None
        return scores

    def _wave(self, joining: list[Generation]) -> tuple[list[Generation], list[Generation]]:
        """Those who can be read now, and those who share more with one of them than with what is there."""
        wave: list[Generation] = []
        later: list[Generation] = []
        for generation in joining:
            prompt = generation.row.ids
            coming = max((common_prefix(prompt, other.row.ids) for other in wave), default=0)
            sibling = generation.request.params.echo and any(g.echoed is generation.echoed for g in wave)
            waits = coming >= MIN_SHARED_PREFIX_TOKENS and coming > self.slots.shared(prompt)[0] + 1
            (later if sibling or waits else wave).append(generation)
        return wave, later

    def _read_prompts(self, wave: list[Generation]) -> list[Tensor]:
        rests: list[list[int]] = []
        wave.sort(key=lambda generation: -generation.row.prompt_tokens)
        echoing = [generation.request.params.echo and not generation.echoed for generation in wave]
        for generation, echo in zip(wave, echoing, strict=True):
            prompt = generation.row.ids
            rests.append(prompt[self.slots.take(prompt, reuse=not echo) :])
        first, scores = len(self.running), []
        self.running += wave
        while rests:
            count = longest = 0
            for rest in rests:
                longest = max(longest, len(rest))
                if count and (count + 1) * longest > MAX_PASS_TOKENS:
                    break
                count += 1
            echoes = {i: self.running[first + i] for i in range(count) if echoing[i]}
            scores.append(self._read(first, rests[:count], echoes))
            first, rests, echoing = first + count, rests[count:], echoing[count:]
        return scores

    def _read(self, first: int, rests: list[list[int]], echoes: dict[int, Generation]) -> Tensor:
        """Scores (B, V) after the last token of each rest; log-probabilities of the prompts in `echoes`."""
        last_BC: list[Tensor] = [torch.empty(0)] * len(rests)
        for start, hidden_BTC in self.slots.read(first, rests):
            for i, rest in enumerate(rests):
                if start < len(rest) <= start + hidden_BTC.shape[1]:
                    last_BC[i] = hidden_BTC[i, len(rest) - 1 - start]
            for i, generation in echoes.items():
                targets = rests[i][start + 1 : start + 1 + hidden_BTC.shape[1]]
                generation.echoed += self._prompt_tokens(
                    hidden_BTC[i, : len(targets)], targets, generation.request.params.top_logprobs
                )
        for generation in echoes.values():
            if not all(math.isfinite(token.logp) for token in generation.echoed):
                generation.end(broken_scores())
        logits_BV: Tensor = self.model.lm_head(torch.stack(last_BC)).float()
        return logits_BV

    def _prompt_tokens(self, hidden_NC: Tensor, targets: list[int], top: int) -> list[Token]:
        """What the model thinks of tokens that were read."""
        tokens: list[Token] = []
        chunk = max(1, MAX_LOGITS // self.model.config.vocab_size)
        for i in range(0, len(targets), chunk):
            ids = targets[i : i + chunk]
            logits_NV = self.model.lm_head(hidden_NC[i : i + chunk]).float()
            normaliser_N = logits_NV.logsumexp(-1)
            ids_N1 = torch.tensor(ids, device=self.slots.device)[:, None]
            logps = (logits_NV.gather(1, ids_N1)[:, 0] - normaliser_N).tolist()
            tops = top_logprobs(logits_NV, normaliser_N, [top] * len(ids))
            tokens += map(Token, ids, logps, logps, tops)
        return tokens

    def _choose(self, logits_BV: Tensor) -> None:
        """Choose each running row's next token; those at their end leave."""
        rows = [generation.row for generation in self.running]
        if self._sampler is None:
            self._sampler = Sampler(rows, self.slots.device)
        chosen = self._sampler(logits_BV, self.slots.ids_RS)
        ended = [i for i, token in enumerate(chosen) if self._accept(self.running[i], token)]
        if self._sampler.needs_history:
            self.slots.note([row.ids[-1] for row in rows], [len(row.ids) - 1 for row in rows])
        for i in reversed(ended):
            self._leave(i)

    def _accept(self, generation: Generation, token: Token | UserError) -> bool:
        """Add a chosen token; whether that is the end."""
        params, row, context = (
            generation.request.params,
            generation.row,
            self.model.config.max_position_embeddings,
        )
        most = min(params.max_tokens, context - row.prompt_tokens)
        full: FinishReason = "length" if most == params.max_tokens else "context"
        if generation.done:  # its prompt had no scores
            pass
        elif isinstance(token, UserError):
            generation.end(token)
        elif most == 0:  # only the prompt's log-probabilities were wanted
            generation.end(full)
        elif token.id in row.end_ids:
            generation.stop_token = token
            generation.end("stop")
        else:
            generation.push(token)
            if generation.should_stop(token.id):
                generation.end("stop")
            elif row.made == most and not generation.done:
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
        self.waiting.extend(self._arrived)
        self._arrived.clear()
        for generation in (*self.running, *self.waiting):
            generation.end(reason)
        self.running, self._sampler = [], None
        self.waiting.clear()
        self.slots.clear()


def slots_needed(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """Tokens that a request can come to."""
    return min(prompt_tokens + max_tokens, context)


def computing(
    compute_dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """What the model runs under: autocast to the compute type, which only lowers."""
    if compute_dtype in (None, torch.float32):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)


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
