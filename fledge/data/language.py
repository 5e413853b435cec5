"""Which language a text is in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fledge.data.readers import need
from fledge.errors import UserError

_SLICE_CHARACTERS = 1000
_SLICES = 4


class LanguageFilter:
    """Lets texts in some languages pass, whose codes may be in capitals.

    Raises UserError for an unknown language or without `py3langid`.
    """

    def __init__(self, languages: Sequence[str], min_probability: float) -> None:
        self._languages = frozenset(language.lower() for language in languages)
        self._min_probability = min_probability
        self._identifier = _identifier()
        for language in languages:
            if language.lower() not in self._identifier.labels:
                raise UserError(
                    f"--languages {language}: no such code of a language; two-letter codes (ISO 639-1) are "
                    "wanted, as in en"
                )

    def reason(self, text: str) -> str | None:
        """Why a text is left out; None if it is likely enough in one of the languages.

        Of a long text four slices of 1,000 characters are looked at, spread over all of it.
        """
        scores = dict(self._identifier.rank(sample(text)))
        if sum(scores[language] for language in self._languages) >= self._min_probability:
            return None
        language = max(scores, key=lambda name: scores[name])
        wanted = ", ".join(sorted(self._languages))
        share = sum(scores[name] for name in self._languages)
        likely = f"most likely {language}, {scores[language]:.2f}"
        return f"probability of {wanted} {share:.2f} < {self._min_probability:g} ({likely})"


@functools.cache
def _identifier() -> Any:
    package = need("py3langid.langid", "data")
    return package.LanguageIdentifier.from_model_file(package.MODEL_FILE, norm_probs=True)


def sample(text: str) -> str:
    """A text, or four slices spread evenly over a long one."""
    if len(text) <= _SLICES * _SLICE_CHARACTERS:
        return text
    step = (len(text) - _SLICE_CHARACTERS) // (_SLICES - 1)
    return "\n".join(text[i * step : i * step + _SLICE_CHARACTERS] for i in range(_SLICES))
