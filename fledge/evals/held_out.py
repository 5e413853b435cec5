"""A training's evaluation: what the model makes of documents that were held out, and of some prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fledge.data.mixture import MixtureSource
from fledge.engine.engine import Engine
from fledge.evals.bits import bits_per_byte
from fledge.run import Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

# A text and the ids that stand for it.
Prompts = Sequence[tuple[str, list[int]]]


def held_out_evaluation(
    run: Run,
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Prompts,
    sources: Sequence[MixtureSource],
    window_tokens: int,
) -> Callable[[int], dict[str, float]]:
    """Bits per byte on what each source holds out, and their mean; what the prompts become is logged."""
    validation = {source.name: source.validation(tokenizer) for source in sources}
    separator, special = tokenizer.eos_id, tokenizer.special_ids

    def evaluate(step: int) -> dict[str, float]:
        figures = {
            name: bits_per_byte(engine, ids, text_bytes, separator, special, window_tokens)
            for name, (ids, text_bytes) in validation.items()
        }
        for prompt, ids in prompts:
            made = engine.generate([ids], SamplingParams(temperature=0.0, max_tokens=48))[0]
            run.log("samples", {"step": step, "prompt": prompt, "text": tokenizer.decode(made.ids)})
        mean = sum(figures[source.name] * source.share for source in sources)
        return {"validation": mean, **{f"validation/{name}": value for name, value in figures.items()}}

    return evaluate
