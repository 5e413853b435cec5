"""Batched decoding and scoring with a local model: token ids in, token ids out. It knows no text.

Shape suffixes: B rows, T tokens, C model width, V vocabulary, N flattened positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fledge.engine.sampling import Sampler, validate
from fledge.errors import UserError
from fledge.model.kv_cache import KVCache
from fledge.model.transformer import CausalLM
from fledge.types import Completion, FinishReason, SamplingParams, pad_rows

# Called once for every token made, in order, with the prompt's number and the id: True ends that row.
ShouldStop = Callable[[int, int], bool]

# A common prefix shorter than this costs less to read again than to copy.
MIN_SHARED_PREFIX_TOKENS = 32
# Padded tokens that pass through the model at once, and scores held at once: they bound memory.
MAX_PASS_TOKENS = 16_384
MAX_LOGITS = 2**25
# Ended rows stay in the batch until they are this share of it: leaving means copying the others' cache.
COMPACT_SHARE = 0.25


class Engine:
    """Decodes and scores with a model on its own device: a `TokenGenerator` and a `Scorer`."""

    def __init__(
        self,
        model: CausalLM,
        eos_ids: Sequence[int],
        batch_size: int = 64,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """`eos_ids` end every completion; `compute_dtype` (None: the weights' own) is what matrix
        products run in, by autocast."""
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is below 1")
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.batch_size = batch_size
        self.compute_dtype = compute_dtype

    @property
    def context(self) -> int:
        """The most tokens a sequence can have, prompt and completion together."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.model.embed_tokens.weight.device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        should_stop: ShouldStop | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in the prompts' order; prompts may have any lengths.

        Row i draws from the random numbers of (`params.seed`, i). `should_stop` ends a row with the
        token just made (kept) and the reason `stop`. Raises UserError for an empty prompt, one that
        is longer than the context, an id outside the vocabulary, and a model whose scores are NaN.
        """
        validate(params)
        self._check(prompts, smallest=1)
        made: list[list[tuple[int, float]]] = [[] for _ in prompts]
        reasons: dict[int, FinishReason] = {}
        with self._computing():
            prefix = self._shared_prefix(prompts, params)
            for rows in self._batches([len(prompt) for prompt in prompts]):
                for row, event in self._decode(rows, [prompts[i] for i in rows], params, should_stop, prefix):
                    if isinstance(event, tuple):
                        made[row].append(event)
                    else:
                        reasons[row] = event
        return [
            Completion([token for token, _ in tokens], [logp for _, logp in tokens], reasons[row])
            for row, tokens in enumerate(made)
        ]

    def stream(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> Iterator[tuple[int, float] | FinishReason]:
        """(id, log-probability) as each token is made, then the finish reason; the tokens are those that
        `generate([prompt], params)` makes. Closing the iterator ends the work. Raises as `generate` does."""
        validate(params)
        self._check([prompt], smallest=1)
        for _, event in self._decode([0], [prompt], params, None, None):
            yield event

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, fp32) of every token but the first of each sequence, given those before
        it. Raises UserError for a sequence longer than the context."""
        self._check(sequences, smallest=0)
        scores: list[list[float]] = [[] for _ in sequences]
        for rows in self._batches([len(sequence) for sequence in sequences]):
            rows = [row for row in rows if len(sequences[row]) > 1]
            if rows:
                lengths = [len(sequences[row]) - 1 for row in rows]
                logps_N = self._score_batch([sequences[row] for row in rows])
                for row, logps in zip(rows, torch.split(logps_N, lengths), strict=True):
                    scores[row] = logps.tolist()
        return scores

    def _score_batch(self, sequences: list[Sequence[int]]) -> Tensor:
        """The log-probabilities of all rows, end to end (N,)."""
        ids_BT = pad_rows(sequences, 0).to(self.device)
        lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        index_T = torch.arange(ids_BT.shape[1] - 1, device=self.device)
        visible = (index_T[:, None] >= index_T[None, :])[None, None]
        with self._computing():
            hidden_BTC = self.model.hidden(ids_BT[:, :-1], index_T[None], visible)
            real_BT = index_T < lengths_B[:, None] - 1
            targets_N, logps = ids_BT[:, 1:][real_BT], []
            chunk = max(1, MAX_LOGITS // self.model.config.vocab_size)
            hidden_NC = hidden_BTC[real_BT]
            for i in range(0, len(targets_N), chunk):
                logits_NV = self.model.lm_head(hidden_NC[i : i + chunk]).float()
                logps.append(_log_probabilities(logits_NV, targets_N[i : i + chunk]))
        return torch.cat(logps)

    def _check(self, sequences: Sequence[Sequence[int]], smallest: int) -> None:
        """Raise UserError for a sequence that the model cannot read."""
        vocab_size = self.model.config.vocab_size
        for number, ids in enumerate(sequences, start=1):
            name = f"text {number} of {len(sequences)}"
            if len(ids) < smallest:
                raise UserError(f"{name} is empty; the model needs at least one token")
            if len(ids) > self.context:
                raise UserError(
                    f"{name} has {len(ids)} tokens, the model's context holds {self.context}; shorten it"
                )
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise UserError(
                    f"{name} has an id outside the model's vocabulary of {vocab_size}; "
                    "was it made by another tokenizer?"
                )

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Row numbers in batches of similar lengths, the longest first."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if batch and len(batch) >= min(self.batch_size, MAX_PASS_TOKENS // max(1, lengths[batch[0]])):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _computing(self) -> contextlib.AbstractContextManager[object]:
        if self.compute_dtype in (None, torch.float32):  # autocast only lowers
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _slots(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> int:
        """Cache slots for the longest prompt and completion."""
        return min(max(map(len, prompts)) + params.max_tokens, self.context)

    def _new_cache(self, batch: int, slots: int) -> KVCache:
        return self.model.new_cache(batch, slots, self.compute_dtype)

    @torch.inference_mode()
    def _shared_prefix(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> KVCache | None:
        """A one-row cache that has read what all prompts begin with (few-shot examples, a system
        message); None when that is not worth it. Every prompt keeps a token of its own to read."""
        if len(prompts) < 2:
            return None
        first, last = min(prompts, key=list), max(prompts, key=list)  # their prefix is everyone's
        length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        length = min(length, min(map(len, prompts)) - 1)
        if length < MIN_SHARED_PREFIX_TOKENS:
            return None
        cache = self._new_cache(1, self._slots(prompts, params))
        ids_BT = torch.tensor([list(first[:length])], device=self.device)
        self.model.extend(ids_BT, torch.tensor([length], device=self.device), cache)
        return cache

    @torch.inference_mode()
    def _decode(
        self,
        rows: list[int],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        should_stop: ShouldStop | None,
        prefix: KVCache | None,
    ) -> Iterator[tuple[int, tuple[int, float] | FinishReason]]:
        """Decode one batch: (row, (id, log-probability)) for every token, (row, reason) at a row's end."""
        stop_ids = {*self.eos_ids, *params.stop_ids}
        tokens = {row: len(prompt) for row, prompt in zip(rows, prompts, strict=True)}
        most = {row: tokens[row] + params.max_tokens for row in rows}
        place = {row: i for i, row in enumerate(rows)}  # of the rows that are not at their end
        for row in rows:
            if tokens[row] == self.context:
                del place[row]
                yield row, "context"
        if not place:
            return
        sampler = Sampler([params] * len(rows), rows, self.device)
        cache, logits_BV = self._prefill(prompts, params, prefix)
        while True:
            ids_B = sampler(logits_BV)
            ids, logps = ids_B.tolist(), _log_probabilities(logits_BV, ids_B).tolist()
            for row, i in list(place.items()):
                reason: FinishReason | None = "stop" if ids[i] in stop_ids else None
                if reason is None:
                    yield row, (ids[i], logps[i])
                    tokens[row] += 1
                    if should_stop is not None and should_stop(row, ids[i]):
                        reason = "stop"
                    elif tokens[row] >= min(most[row], self.context):
                        reason = "length" if tokens[row] == most[row] else "context"
                if reason is not None:
                    del place[row]
                    yield row, reason
            if not place:
                return
            if len(place) <= (1 - COMPACT_SHARE) * len(ids):
                kept_B = torch.tensor(list(place.values()), device=self.device)
                cache, ids_B = cache.select(kept_B), ids_B[kept_B]
                sampler.select(list(place.values()))
                place = {row: i for i, row in enumerate(place)}
            with self._computing():
                logits_BV = self.model.step(ids_B, cache).float()

    def _prefill(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, prefix: KVCache | None
    ) -> tuple[KVCache, Tensor]:
        """Read the prompts into a new cache; logits (B, V) of each row's first new token."""
        if prefix is None:
            skip, cache = 0, self._new_cache(len(prompts), self._slots(prompts, params))
        else:
            skip = int(prefix.lengths_B[0])
            cache = prefix.select(torch.zeros(len(prompts), dtype=torch.int64, device=self.device))
        rest = [prompt[skip:] for prompt in prompts]
        lengths_B = torch.tensor([len(ids) for ids in rest], device=self.device)
        with self._computing():
            return cache, self.model.prefill(pad_rows(rest, 0).to(self.device), lengths_B, cache).float()


def _log_probabilities(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """log softmax of fp32 scores at the given ids (N,); raises UserError when there is none (NaN, inf)."""
    normaliser_N = logits_NV.logsumexp(-1)
    if not bool(normaliser_N.isfinite().all()):
        raise UserError(
            "the model's scores are not numbers (NaN or infinite): its weights are damaged, "
            "or its training diverged; use an earlier checkpoint"
        )
    return logits_NV.gather(1, ids_N[:, None])[:, 0] - normaliser_N
