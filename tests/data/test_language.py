"""The language filter on sentences whose language is known."""

from __future__ import annotations

import pytest

from fledge.data.language import LanguageFilter, sample
from fledge.errors import UserError

pytest.importorskip("py3langid")

ENGLISH = "The bees gather around their queen in the winter, and those inside shiver to keep everyone warm."
GERMAN = "Im Winter sammeln sich die Bienen um ihre Königin, und die inneren zittern, damit es warm bleibt."
FRENCH = "En hiver, les abeilles se rassemblent autour de leur reine, et celles du centre tremblent de froid."


def test_languages_pass_or_not() -> None:
    english = LanguageFilter(["en"], 0.5)
    assert english.reason(ENGLISH) is None
    reason = english.reason(GERMAN)
    assert reason is not None and reason.startswith("probability of en 0.") and "most likely de" in reason
    both = LanguageFilter(["de", "en"], 0.5)
    assert both.reason(ENGLISH) is None and both.reason(GERMAN) is None
    assert both.reason(FRENCH) is not None


def test_the_probability_is_that_of_all_languages_asked_for() -> None:
    assert LanguageFilter(["en"], 0.0).reason(GERMAN) is None
    assert LanguageFilter(["en"], 1.1).reason(ENGLISH) is not None


def test_a_long_text_is_looked_at_all_over() -> None:
    text = ENGLISH * 20 + GERMAN * 400
    assert len(sample(text)) == 4003 and sample(text).endswith(text[-1000:])
    assert sample(ENGLISH) == ENGLISH
    assert LanguageFilter(["en"], 0.5).reason(text) is not None


def test_an_unknown_language_is_named() -> None:
    for name in ("eng", "english", "XX"):
        with pytest.raises(UserError) as error:
            LanguageFilter(["de", name], 0.5)
        assert str(error.value) == (
            f"--languages {name}: no such code of a language; two-letter codes (ISO 639-1) are "
            "wanted, as in en"
        )


def test_codes_may_be_in_capitals() -> None:
    capitals = LanguageFilter(["EN", "De"], 0.5)
    assert capitals.reason(ENGLISH) is None and capitals.reason(GERMAN) is None
    assert capitals.reason(FRENCH) == LanguageFilter(["de", "en"], 0.5).reason(FRENCH)
