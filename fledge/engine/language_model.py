"""What the engine asks of a model: to read ids, and to score what may follow. A transformer does it in
`decoder.py`; here an n-gram model does.

What stands between reading and scoring ("hidden", C numbers a token) is the trunk's output of a transformer,
and the last `order - 1` ids of an n-gram model.

Shape suffixes: B rows, T tokens, N = B * T, S cache slots, C numbers of a token, M = 2, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fledge.engine.decoder import Decoder
from fledge.model.config import ModelConfig
from fledge.model.kv_cache import KVCache
from fledge.model.ngram import NOTHING, NgramConfig, NgramModel
from fledge.model.transformer import CausalLM


class LanguageModel(Protocol):
    """Reads token ids and scores the next; see `Decoder` for what each method takes and gives."""

    @property
    def config(self) -> ModelConfig | NgramConfig:
        """Sizes: `vocab_size`, `max_position_embeddings`."""
        ...

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache."""
        ...

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, visible: Tensor) -> Tensor:
        """What scores are made from (B, T, C), of tokens that see each other by `visible`."""
        ...

    def extend(self, ids_BT: Tensor, new_lengths_B: Tensor, cache: KVCache) -> Tensor:
        """The same of tokens behind what the cache holds."""
        ...

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Scores (N, V), fp32."""
        ...

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Read one token a row; scores (B, V) of the next, fp32."""
        ...


def reader_of(model: CausalLM | NgramModel, dtype: torch.dtype | None) -> LanguageModel:
    """A model as the engine reads it; `dtype` is what weights are held in, counts have none."""
    return NgramReader(model) if isinstance(model, NgramModel) else Decoder(model, dtype)


class NgramReader:
    """An n-gram model as a `LanguageModel`, on the CPU: the cache holds ids, scores are log-probabilities."""

    def __init__(self, model: NgramModel) -> None:
        self.model, self.config = model, model.config

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache; fp32 holds every id below 2^24 exactly."""
        return KVCache(self.config, batch, slots, torch.float32, torch.device("cpu"))

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, visible: Tensor) -> Tensor:
        """The last `order - 1` ids (B, T, C) that each token sees, itself among them, oldest first."""
        B, T = ids_BT.shape
        back = [torch.full((B, T), NOTHING)] * (self.config.order - 1)
        for k in range(min(T, len(back))):
            is_it = visible & (positions_BT[:, None, :] == positions_BT[:, :, None] - k)
            is_it = is_it.expand(B, T, T)
            found_BT = ids_BT.gather(1, is_it.int().argmax(-1))
            back[-1 - k] = torch.where(is_it.any(-1), found_BT, NOTHING)
        return torch.stack(back, -1) if back else torch.empty(B, T, 0, dtype=torch.int64)

    def extend(self, ids_BT: Tensor, new_lengths_B: Tensor, cache: KVCache) -> Tensor:
        """The same of new tokens behind those that the cache holds; pads' outputs mean nothing."""
        B, T = ids_BT.shape
        positions_BT = (cache.lengths_B[:, None] + torch.arange(T)).clamp(max=cache.slots)
        new_BTMD = ids_BT.float()[:, :, None, None].expand(B, T, 2, 1)
        held_BS = cache.put(0, new_BTMD, cache.places(positions_BT))[:, 0, :, 0]
        back_C = torch.arange(self.config.order - 2, -1, -1)
        places_BTC = positions_BT[:, :, None] - back_C
        ids_BTC = held_BS[:, None].expand(B, T, -1).gather(2, places_BTC.clamp(min=0)).long()
        cache.lengths_B = cache.lengths_B + new_lengths_B
        return torch.where(places_BTC >= 0, ids_BTC, NOTHING)

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Log-probabilities (N, V), fp32."""
        return torch.from_numpy(self.model.log_probabilities(hidden_NC.numpy()))

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Read one token a row; log-probabilities (B, V) of the next."""
        return self.logits(self.extend(ids_B[:, None], torch.ones_like(ids_B), cache)[:, 0])
