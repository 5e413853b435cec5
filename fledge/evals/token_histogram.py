"""The histogram over the vocabulary, token by token: what a model expects at every place of a text.

The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020) asks each layer the same: the
model's final norm and head, applied to the residual stream as that layer leaves it.

Shape suffixes: T tokens, N some of them, C model width, V vocabulary.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fledge.engine.engine import MAX_LOGITS, Engine
from fledge.engine.sampling import broken_scores, top_logprobs
from fledge.engine.scheduler import check_ids
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer

# Most fonts have these, few the pictures of U+240A and U+2409.
ARROWS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
# Letters and marks without a picture: fillers, joiners, variation selectors.
BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | set(map(chr, range(0xFE00, 0xFE10)))
BLANK |= set(map(chr, range(0xE0100, 0xE01F0)))


@dataclass(frozen=True)
class Expectation:
    """What is expected in one place. `logp` (nats) and `rank` (1: the most probable) are those of the token
    that came, None where nothing came; `top` has the most probable ids with their `logp`, best first."""

    entropy_bits: float
    top: tuple[tuple[int, float], ...]
    logp: float | None
    rank: int | None


@torch.inference_mode()
def expectations(engine: Engine, ids: Sequence[int], top: int) -> list[Expectation]:
    """What the model expects after each of the ids; what came is the id that follows, nothing after the last.

    Raises UserError for a text that the model cannot read, and for scores that are not numbers.
    """
    check_ids(ids, "the text", engine.context, engine.model.config.vocab_size)
    decoder = engine.decoder()
    index_T = torch.arange(len(ids), device=engine.device)
    ids_1T = torch.tensor([ids], device=engine.device)
    hidden_TC = decoder.hidden(ids_1T, index_T[None], (index_T[:, None] >= index_T)[None])[0]
    scores = (decoder.logits(part_NC) for part_NC in _parts(hidden_TC, decoder.config.vocab_size))
    return _judged(scores, ids, top)


@torch.inference_mode()
def logit_lens(model: CausalLM, ids: Sequence[int], top: int) -> list[list[Expectation]]:
    """`expectations` of each layer: number 0 is the embedding, number i what stands after block i; the last
    is the model's own. Raises as `expectations` does."""
    device = model.model.embed_tokens.weight.device
    check_ids(ids, "the text", model.config.max_position_embeddings, model.config.vocab_size)
    ids_1T = torch.tensor([ids], device=device)
    streams: list[Tensor] = [model.model.embed_tokens(ids_1T)[0]]

    def keep(block: nn.Module, inputs: Any, output_1TC: Tensor) -> None:
        streams.append(output_1TC[0])

    hooks = [block.register_forward_hook(keep) for block in model.model.layers]
    try:
        model.hidden_rows(ids_1T)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for stream_TC in streams:
        parts = _parts(model.model.norm(stream_TC), model.config.vocab_size)
        layers.append(_judged((model.lm_head(part_NC).float() for part_NC in parts), ids, top))
    return layers


def _parts(hidden_TC: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Pieces whose scores fit in memory."""
    return torch.split(hidden_TC, max(1, MAX_LOGITS // vocab_size))


def _judged(scores: Iterator[Tensor], ids: Sequence[int], top: int) -> list[Expectation]:
    found: list[Expectation] = []
    for logits_NV in scores:
        normaliser_N = logits_NV.logsumexp(-1)
        if not bool(normaliser_N.isfinite().all()):
            raise broken_scores()
        N = len(logits_NV)
        logps_NV = logits_NV - normaliser_N[:, None]
        entropies = (torch.special.entr(logps_NV.exp()).sum(-1) / math.log(2)).tolist()
        came = list(ids[len(found) + 1 : len(found) + 1 + N])
        actual_N1 = torch.tensor([*came, *[0] * (N - len(came))], device=logits_NV.device)[:, None]
        own_N1 = logits_NV.gather(1, actual_N1)
        ranks = (1 + (logits_NV > own_N1).sum(-1)).tolist()
        logps = logps_NV.gather(1, actual_N1)[:, 0].tolist()
        tops = top_logprobs(logits_NV, normaliser_N, [top] * N)
        for i in range(N):
            has = i < len(came)
            found.append(
                Expectation(entropies[i], tops[i], logps[i] if has else None, ranks[i] if has else None)
            )
    return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as it can be shown anywhere: control characters as pictures, bytes that are no whole characters
    and other invisible characters by their numbers; spaces stay."""
    raw = tokenizer.token_bytes(token_id)
    if not raw:
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        return visible(names.get(token_id, f"<id {token_id}>"))
    try:
        return visible(raw.decode())
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" if byte > 0x7E else visible(chr(byte)) for byte in raw)


def visible(text: str) -> str:
    """Text in which every control character is a picture (arrows for line break and tab, U+2400 and on for
    the others) and every other character that cannot be seen, or that turns others around, is its number."""
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char in ARROWS:
        return ARROWS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\N{SYMBOL FOR DELETE}"
    # Cc: C1 controls; Cf: joiners, direction marks, tags; Co, Cn, Cs: nobody knows how they look; Z: spaces.
    category = unicodedata.category(char)
    if category in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp") or (category == "Zs" and char != " "):
        return f"<U+{ord(char):04X}>"
    if char in BLANK:
        return f"<U+{ord(char):04X}>"
    return char


def described(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[Expectation], read: int
) -> dict[str, Any]:
    """All of it as JSON: `tokens`, each with what was expected in its place (nothing in the first's), and
    `next`, what is expected behind the last. The first `read` ids were given, the others made."""
    first: dict[str, Any] = {"logp": None, "rank": None, "entropy_bits": None, "top": []}
    places = [first, *({"logp": e.logp, "rank": e.rank, **_spread(tokenizer, e)} for e in found[:-1])]
    tokens = [
        {
            "position": i,
            "id": token_id,
            "text": token_text(tokenizer, token_id),
            "special": token_id in tokenizer.special_ids,
            "made": i >= read,
            **place,
        }
        for i, (token_id, place) in enumerate(zip(ids, places, strict=True))
    ]
    return {"tokens": tokens, "next": _spread(tokenizer, found[-1])}


def described_lens(tokenizer: Tokenizer, layers: Sequence[Sequence[Expectation]]) -> list[dict[str, Any]]:
    """The logit lens as JSON: for each layer what it expects after every token."""
    return [
        {
            "layer": number,
            "after": [{"logp": e.logp, "rank": e.rank, **_spread(tokenizer, e)} for e in layer],
        }
        for number, layer in enumerate(layers)
    ]


def _spread(tokenizer: Tokenizer, expectation: Expectation) -> dict[str, Any]:
    top = [{"id": i, "text": token_text(tokenizer, i), "logp": logp} for i, logp in expectation.top]
    return {"entropy_bits": expectation.entropy_bits, "top": top}
