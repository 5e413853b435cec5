"""Reading ids whose own log-probabilities are wanted: prompts that are scored, tokens that were forced.

Shape suffixes: B rows, T tokens, C model width, V vocabulary, N flattened positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fledge.engine.language_model import LanguageModel
from fledge.engine.sampling import top_logprobs
from fledge.engine.slots import Slots
from fledge.types import Token

# Padded tokens that pass through the model at once, and scores held at once: they bound memory.
MAX_PASS_TOKENS = 16_384
MAX_LOGITS = 2**25


def read_rows(
    slots: Slots,
    first: int,
    rests: list[list[int]],
    wanted: Mapping[int, list[int]],
    tops: Mapping[int, int],
) -> tuple[Tensor, dict[int, list[Token]]]:
    """Read ids into the rows from `first` on, as many rows a pass as memory allows.

    Returns the scores (B, V) after each row's last id and, for the rows of `wanted`, what the model thinks
    of those ids: number i is one that may follow after number i of the row. `tops`: alternatives for each.
    """
    scores: list[Tensor] = []
    tokens: dict[int, list[Token]] = {row: [] for row in wanted}
    while rests:
        count = longest = 0
        for rest in rests:
            longest = max(longest, len(rest))
            if count and (count + 1) * longest > MAX_PASS_TOKENS:
                break
            count += 1
        last_BC: list[Tensor] = [torch.empty(0)] * count
        for start, hidden_BTC in slots.read(first, rests[:count]):
            end = start + hidden_BTC.shape[1]
            for i, rest in enumerate(rests[:count]):
                row = first + i
                if start < len(rest) <= end:
                    last_BC[i] = hidden_BTC[i, len(rest) - 1 - start]
                if ids := wanted.get(row, [])[start:end]:
                    tokens[row] += read_tokens(slots.decoder, hidden_BTC[i, : len(ids)], ids, tops[row])
        scores.append(slots.decoder.logits(torch.stack(last_BC)))
        first, rests = first + count, rests[count:]
    return torch.cat(scores), tokens


def read_tokens(decoder: LanguageModel, hidden_NC: Tensor, ids: list[int], top: int) -> list[Token]:
    """The model's log-probability of each id, given the trunk's output before it."""
    tokens: list[Token] = []
    chunk = max(1, MAX_LOGITS // decoder.config.vocab_size)
    for i in range(0, len(ids), chunk):
        some = ids[i : i + chunk]
        logits_NV = decoder.logits(hidden_NC[i : i + chunk])
        normaliser_N = logits_NV.logsumexp(-1)
        ids_N1 = torch.tensor(some, device=hidden_NC.device)[:, None]
        logps = (logits_NV.gather(1, ids_N1)[:, 0] - normaliser_N).tolist()
        tokens += map(Token, some, logps, logps, top_logprobs(logits_NV, normaliser_N, [top] * len(some)))
    return tokens
