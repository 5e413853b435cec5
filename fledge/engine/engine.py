"""Batched decoding and scoring with a local model: token ids in, token ids out. It knows no text.

Shape suffixes: B rows, T tokens, C model width, V vocabulary, N flattened positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fledge.engine.constraints import Grammars
from fledge.engine.decoder import cache_dtype
from fledge.engine.generation import Request
from fledge.engine.language_model import LanguageModel, reader_of
from fledge.engine.sampling import broken_scores, validate
from fledge.engine.scheduler import Scheduler, check_ids, slots_needed
from fledge.engine.speculative import Speculation
from fledge.errors import UserError
from fledge.model.ngram import NgramModel
from fledge.model.transformer import CausalLM
from fledge.types import Completion, FinishReason, SamplingParams, Token, pad_rows

# Called once for every token made, with the completion's number and the id: True ends that completion.
ShouldStop = Callable[[int, int], bool]

# Padded tokens that pass through the model at once to be scored, and scores held at once: they bound memory.
MAX_PASS_TOKENS = 16_384
MAX_LOGITS = 2**25
# What keys and values may take: this on a CPU, this share of the free memory on an accelerator.
CPU_CACHE_BYTES = 4 * 2**30
DEVICE_CACHE_SHARE = 0.5
# A cache that is kept has a multiple of this many slots, so that it need not grow at every turn of a chat.
KEPT_SLOTS = 512


class Engine:
    """Decodes and scores with a model on its own device: a `TokenGenerator` and a `Scorer`."""

    def __init__(
        self,
        model: CausalLM | NgramModel,
        eos_ids: Sequence[int],
        batch_size: int = 64,
        compute_dtype: torch.dtype | None = None,
        keep_cache: bool = False,
        cache_bytes: int | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`eos_ids` end every completion; `compute_dtype` (None: the weights' own) is what weights are held
        in for matrix products (see `product`). `keep_cache`: weights are laid out once, and what was read
        stays readable for the next call, as the turns of a chat; only for a model that is not trained
        meanwhile: without it each call lays the weights out anew. `cache_bytes` bounds the cache.
        `grammars` compiles constraints; without it a request cannot have one.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is below 1")
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.batch_size = batch_size
        self.compute_dtype = compute_dtype
        self.keep_cache = keep_cache
        self.cache_bytes = cache_bytes
        self.grammars = grammars
        self.speculation: Speculation | None = None  # set it before the first call
        self._kept: Scheduler | None = None
        self._decoder: LanguageModel | None = None

    @property
    def context(self) -> int:
        """The most tokens a sequence can have, prompt and completion together."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight().device

    def _weight(self) -> Tensor:
        """One of the weights, for their device and type; counts are on the CPU."""
        model = self.model
        return torch.empty(0) if isinstance(model, NgramModel) else model.model.embed_tokens.weight

    def decoder(self) -> LanguageModel:
        """The model as it is now, laid out for reading; with `keep_cache` the one that was made first."""
        if self._decoder is not None:
            return self._decoder
        decoder = reader_of(self.model, self.compute_dtype)
        if self.keep_cache:
            self._decoder = decoder
        return decoder

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        should_stop: ShouldStop | None = None,
        first: int = 0,
    ) -> list[Completion]:
        """`params.n` completions a prompt, in the prompts' order; prompts may have any lengths.

        Completion j of prompt i draws from the random numbers of (`params.seed`, `first` + i, j): a part of
        the prompts, from number `first` on, gets what it would get among all. `should_stop`, given
        a completion's place in the result, ends it with the token just made (kept) and the reason `stop`.
        Raises UserError for an empty prompt, one that is longer than the context, an id outside the
        vocabulary, settings without a meaning, and (once all others have ended) scores that are NaN.
        """
        validate(params, self.model.config.vocab_size)
        for number, prompt in enumerate(prompts, start=1):
            self._check(prompt, f"text {number} of {len(prompts)}", smallest=1)
        if not prompts:
            return []
        scheduler = self.scheduler_for(map(len, prompts), params)
        made = []
        for i, prompt in enumerate(prompts):
            stop = None if should_stop is None else _numbered(should_stop, i * params.n)
            made += scheduler.submit(Request(prompt, params, first + i, stop))
        try:
            for generation in made:
                while not generation.done:
                    scheduler.step()
        finally:
            for generation in made:
                generation.cancel()
        return [generation.completion() for generation in made]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token | FinishReason]:
        """Each token as it is made, then the finish reason; the tokens are those of the first completion of
        `generate([prompt], params)`. Closing the iterator ends the work. Raises as `generate` does."""
        validate(params, self.model.config.vocab_size)
        self._check(prompt, "text 1 of 1", smallest=1)
        scheduler = self.scheduler_for([len(prompt)], params)
        yield from scheduler.submit(Request(prompt, replace(params, n=1)))[0].events(scheduler.step)

    def scheduler_for(
        self, prompt_tokens: Iterator[int] | Sequence[int], params: SamplingParams
    ) -> Scheduler:
        """A scheduler with room for prompts of these lengths; the kept one where it is large enough."""
        lengths = list(prompt_tokens)
        slots = slots_needed(max(lengths), params.max_tokens, self.context)
        rows = min(len(lengths) * params.n, self.batch_size)
        if not self.keep_cache:
            return self.new_scheduler(rows, slots)
        kept = self._kept
        if kept is None or kept.slots.slots < slots or kept.slots.rows < rows:
            rounded = min(-(-slots // KEPT_SLOTS) * KEPT_SLOTS, self.context)
            self._kept = self.new_scheduler(rows, max(rounded, slots))
            if kept is not None:
                self._kept.adopt(kept)
        assert self._kept is not None
        return self._kept

    def new_scheduler(self, rows: int, slots: int) -> Scheduler:
        """A scheduler for up to `rows` requests at a time, of up to `slots` tokens each; fewer rows where the
        cache would be too large. Raises UserError if not even one fits."""
        most_bytes, row_bytes = self._most_cache_bytes(), self._token_bytes() * (slots + 1)
        if row_bytes > most_bytes:
            raise UserError(
                f"a request of {slots:,} tokens needs {row_bytes / 2**30:.1f} GiB of cache, and there are "
                f"{most_bytes / 2**30:.1f} GiB for it; lower max_tokens or shorten the prompt"
            )
        rows = min(rows, most_bytes // row_bytes)
        return Scheduler(self.decoder(), self.eos_ids, rows, slots, self.grammars, self.speculation)

    def most_slots(self, rows: int = 1) -> int:
        """The tokens of the longest requests, so many at once, that fit the cache's bounds and context."""
        return max(1, min(self.context, self._most_cache_bytes() // (rows * self._token_bytes()) - 1))

    def _token_bytes(self) -> int:
        """Keys and values of one token."""
        config = self.model.config
        dtype = cache_dtype(self.device, self.compute_dtype or self._weight().dtype)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def _most_cache_bytes(self) -> int:
        if self.cache_bytes is not None:
            return self.cache_bytes
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * DEVICE_CACHE_SHARE)
        return CPU_CACHE_BYTES

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, fp32) of every token but the first of each sequence, given those before
        it. The last token is not read: a sequence may be one longer than the context. Raises UserError for a
        longer one."""
        context, vocab_size = self.context + 1, self.model.config.vocab_size
        for number, ids in enumerate(sequences, start=1):
            check_ids(ids, f"text {number} of {len(sequences)}", context, vocab_size, smallest=0)
        scores: list[list[float]] = [[] for _ in sequences]
        decoder = None
        for rows in self._batches([len(sequence) for sequence in sequences]):
            rows = [row for row in rows if len(sequences[row]) > 1]
            if rows:
                decoder = decoder or self.decoder()
                lengths = [len(sequences[row]) - 1 for row in rows]
                logps_N = self._score_batch(decoder, [sequences[row] for row in rows])
                for row, logps in zip(rows, torch.split(logps_N, lengths), strict=True):
                    scores[row] = logps.tolist()
        return scores

    def _score_batch(self, decoder: LanguageModel, sequences: list[Sequence[int]]) -> Tensor:
        """The log-probabilities of all rows, end to end (N,)."""
        ids_BT = pad_rows(sequences, 0).to(self.device)
        lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        index_T = torch.arange(ids_BT.shape[1] - 1, device=self.device)
        visible_1TT = (index_T[:, None] >= index_T[None, :])[None]
        hidden_BTC = decoder.hidden(ids_BT[:, :-1], index_T[None], visible_1TT)
        real_BT = index_T < lengths_B[:, None] - 1
        targets_N, logps = ids_BT[:, 1:][real_BT], []
        chunk = max(1, MAX_LOGITS // decoder.config.vocab_size)
        hidden_NC = hidden_BTC[real_BT]
        for i in range(0, len(targets_N), chunk):
            logits_NV = decoder.logits(hidden_NC[i : i + chunk])
            logps.append(_log_probabilities(logits_NV, targets_N[i : i + chunk]))
        return torch.cat(logps)

    def _check(self, ids: Sequence[int], name: str, smallest: int) -> None:
        check_ids(ids, name, self.context, self.model.config.vocab_size, smallest)

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


def _numbered(should_stop: ShouldStop, first: int) -> ShouldStop:
    """The same function for the completions from `first` on."""
    return lambda sample, token_id: should_stop(first + sample, token_id)


def _log_probabilities(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """log softmax of fp32 scores at the given ids (N,); raises UserError when there is none (NaN, inf)."""
    normaliser_N = logits_NV.logsumexp(-1)
    if not bool(normaliser_N.isfinite().all()):
        raise broken_scores()
    return logits_NV.gather(1, ids_N[:, None])[:, 0] - normaliser_N
