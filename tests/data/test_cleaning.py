"""Cleaning from sources to a mixture: accounts that balance, order, repeatability, and nothing half done."""

from __future__ import annotations

import json
import random
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.data.cleaning import Cleaning, prepare
from fledge.data.quality import RULES
from fledge.data.sources import BadLines, Source, read_documents
from fledge.errors import UserError

pytest.importorskip("rensa")

PLAIN = Cleaning(rules=("none",), exact_duplicates=False, near_duplicates=False)


def prose(seed: int, words: int = 80) -> str:
    """Text of one seed that shares no run of words with that of another."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(words)) + "."


def write(path: Path, texts: list[str], **extra: Any) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(path.stem, str(path), extra.pop("weight", None), **extra)


def read(out: Path, name: str) -> list[str]:
    with (out / f"{name}.jsonl.zst").open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file).read()
    return [json.loads(line)["text"] for line in raw.decode().split("\n") if line]


def removed(summary: dict[str, Any], source: str) -> dict[str, int]:
    return {step: counts["documents"] for step, counts in summary["sources"][source]["removed"].items()}


def test_what_is_left_can_be_read_and_trained_on(tmp_path: Path) -> None:
    wiki = write(tmp_path / "wiki.jsonl", [prose(0), "Äpfel\n" + prose(1)], weight=2.0)
    code = write(tmp_path / "code.jsonl", [prose(2)], weight=1.0, max_epochs=4.0)
    summary = prepare([wiki, code], Cleaning(), tmp_path / "out")
    mixture = tomllib.loads((tmp_path / "out/mixture.toml").read_text())
    assert mixture == {
        "sources": {
            "wiki": {"path": "wiki.jsonl.zst", "weight": 2.0},
            "code": {"path": "code.jsonl.zst", "weight": 1.0, "max_epochs": 4.0},
        }
    }
    cleaned = Source("wiki", str(tmp_path / "out/wiki.jsonl.zst"), None)
    assert list(read_documents(cleaned)) == [prose(0), "Äpfel\n" + prose(1)]
    names = {"wiki.jsonl.zst", "code.jsonl.zst", "mixture.toml", "summary.json", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out/summary.json").read_text()) == json.loads(json.dumps(summary))


pieces = st.sampled_from(
    [
        *(prose(seed) for seed in range(4)),
        prose(0).replace(" ", "\n"),
        prose(1) + " jane@example.org",
        prose(2) + " more",
        "- a\n- b\n- c",
        "Menu\n" + prose(3, 9),
        "Menu",
        "two words...\n" * 3,
        "Four lorem ipsum words",
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    st.lists(pieces, min_size=1, max_size=12),
    st.lists(pieces, max_size=6),
    st.sampled_from([(), ("default",), ("all",), ("terminal-punctuation", "bullets")]),
    st.booleans(),
)
def test_accounts_balance(
    tmp_path: Path, first: list[str], second: list[str], rules: tuple[str, ...], duplicates: bool
) -> None:
    """What comes in goes out, is left out by one step, is cut, or gives way to a placeholder."""
    extra = prose(99)
    sources = [
        write(tmp_path / "a.jsonl", [*first, extra]),
        write(tmp_path / "b.jsonl", [*second, prose(98)]),
    ]
    cleaning = Cleaning(
        rules=rules,
        rules_by_source={"b": ("none",)},
        mask=("email",),
        exact_duplicates=duplicates,
        near_duplicates=duplicates,
    )
    summary = prepare(sources, cleaning, tmp_path / "out", overwrite=True)
    for source, texts in zip(sources, ([*first, extra], [*second, prose(98)]), strict=True):
        account = summary["sources"][source.name]
        steps = account["removed"].values()
        assert account["documents_in"] == len(texts)
        assert account["documents_in"] == account["documents_out"] + sum(step["documents"] for step in steps)
        assert account["bytes_in"] == sum(len(text.encode()) for text in texts)
        assert account["bytes_in"] == (
            account["bytes_out"] + account["masked_bytes"] + sum(step["bytes"] for step in steps)
        )
        kept = read(tmp_path / "out", source.name) if account["documents_out"] else []
        assert account["bytes_out"] == sum(len(text.encode()) for text in kept)
        assert all(1 <= len(step["examples"]) <= 5 for step in steps)
        if duplicates:
            assert len({" ".join(text.split()) for text in kept}) == len(kept)
    assert not any("@" in text for name in "ab" for text in _kept(summary, tmp_path / "out", name))


def _kept(summary: dict[str, Any], out: Path, name: str) -> list[str]:
    return read(out, name) if summary["sources"][name]["documents_out"] else []


def test_the_first_source_keeps_a_duplicate(tmp_path: Path) -> None:
    near = prose(0).replace(prose(0).split()[40], "changed")
    first = write(tmp_path / "first.jsonl", [prose(0), prose(1)])
    second = write(tmp_path / "second.jsonl", [near, prose(1).replace(" ", "  "), prose(2)])
    for sources, kept in (([first, second], [2, 1]), ([second, first], [3, 0])):
        out = tmp_path / "-".join(source.name for source in sources)
        summary = prepare(sources, Cleaning(), out)
        assert [summary["sources"][source.name]["documents_out"] for source in sources] == kept
        last = summary["sources"][sources[1].name]["removed"]
        assert last["exact-duplicate"]["originals"] == {sources[0].name: 1}
        example = last["near-duplicate"]["examples"][0]
        assert example["original_source"] == sources[0].name
        assert {example["text"], example["original"]} == {prose(0), near}
    assert summary["emptied"] == ["first"]
    assert not (out / "first.jsonl.zst").exists()
    assert "first" not in tomllib.loads((out / "mixture.toml").read_text())["sources"]


def test_what_was_left_out_is_no_original(tmp_path: Path) -> None:
    """A document with an evaluation's text must not take its clean twin with it."""
    question = prose(50, 13)
    contaminated, clean = prose(0, 200) + " " + question, prose(0, 200)
    (tmp_path / "evaluation.txt").write_text(question)
    source = write(tmp_path / "a.jsonl", [contaminated, clean, clean])
    cleaning = Cleaning(evaluations=(str(tmp_path / "evaluation.txt"),))
    summary = prepare([source], cleaning, tmp_path / "out")
    assert removed(summary, "a") == {"evaluation": 1, "exact-duplicate": 1}
    assert read(tmp_path / "out", "a") == [clean]


def test_a_question_is_no_near_duplicate_of_another(tmp_path: Path) -> None:
    ask = "What is the name of the capital city of the U.S. state of {}?".format
    texts = [ask("Ohio"), ask("Utah"), ask("ohio")]
    summary = prepare([write(tmp_path / "a.jsonl", texts)], Cleaning(), tmp_path / "out")
    assert removed(summary, "a") == {"near-duplicate": 1}


def test_the_original_of_a_near_duplicate_is_named_among_long_and_short_texts(tmp_path: Path) -> None:
    short, long = ["One two three", "Four five six"], [prose(0), prose(1)]
    near = {text: text + "!" for text in short} | {text: "More " + text for text in long}
    source = write(tmp_path / "a.jsonl", [short[0], long[0], short[1], long[1], *near.values()])
    summary = prepare([source], Cleaning(), tmp_path / "out")
    examples = summary["sources"]["a"]["removed"]["near-duplicate"]["examples"]
    assert {example["original"]: example["text"] for example in examples} == near


def test_every_step_can_be_switched_off(tmp_path: Path) -> None:
    texts = ["- a\n- b", prose(0), prose(0), prose(0) + " x", "me@example.org 81.2.69.142"]
    source = write(tmp_path / "a.jsonl", texts)
    prepare([source], PLAIN, tmp_path / "out")
    assert read(tmp_path / "out", "a") == texts


def test_rules_of_a_source(tmp_path: Path) -> None:
    """Those of the call come first, then the source's own, then the general ones."""
    texts = ["Short {", prose(0)]
    general = write(tmp_path / "a.jsonl", texts)
    own = write(tmp_path / "b.jsonl", texts, rules=("curly-brace",))
    given = write(tmp_path / "c.jsonl", texts, rules=("curly-brace",))
    cleaning = Cleaning(rules=("min-words",), rules_by_source={"c": ("none",)}, exact_duplicates=False)
    cleaning = Cleaning(**{**vars(cleaning), "near_duplicates": False})
    summary = prepare([general, own, given], cleaning, tmp_path / "out")
    assert [removed(summary, name) for name in "abc"] == [{"min-words": 1}, {"curly-brace": 1}, {}]


def test_a_run_can_be_repeated_byte_by_byte(tmp_path: Path) -> None:
    texts = [prose(seed % 7) + " x" * (seed % 3) for seed in range(40)] + ["- a\n- b"] * 20
    source = write(tmp_path / "a.jsonl", texts)
    for out in ("one", "two"):
        prepare([source], Cleaning(seed=3), tmp_path / out)
    for name in ("a.jsonl.zst", "mixture.toml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    summaries = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("one", "two")]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}


def test_bad_lines_are_an_error_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": prose(0)}) + "\n{\n")
    source = Source("a", str(path), None)
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        prepare([source], Cleaning(), tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    summary = prepare([source], Cleaning(), tmp_path / "out", BadLines(skip=True))
    assert summary["sources"]["a"]["skipped_lines"] == 1
    assert "1 line could not be read and was skipped" in (tmp_path / "out/report.html").read_text()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [prose(0)])
    prepare([source], Cleaning(), tmp_path / "out")
    with pytest.raises(UserError, match="out: exists already"):
        prepare([source], Cleaning(), tmp_path / "out")
    again = write(tmp_path / "a.jsonl", [prose(1)])
    prepare([again], Cleaning(), tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out", "a") == [prose(1)]


def test_a_crash_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", [prose(0)])
    prepare([source], Cleaning(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], Cleaning(), tmp_path / "out", overwrite=True, progress=stop)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("cleaning", "message"),
    [
        (Cleaning(rules=("gofer",)), "--rules gofer: .* the nearest is 'gopher'"),
        (Cleaning(rules_by_source={"b": ()}), "rules for 'b': there is no such source; the nearest is 'a'"),
        (Cleaning(jaccard=0.0), "--jaccard 0.0: must be above 0"),
        (Cleaning(shingle_words=0), "--shingle-words 0"),
        (Cleaning(mask=("mail",)), "--mask mail"),
        (Cleaning(languages=("xx",)), "--languages xx"),
        (Cleaning(min_language_probability=2.0), "--min-language-probability 2.0"),
        (Cleaning(evaluations=("missing.jsonl",)), "missing.jsonl"),
    ],
)
def test_settings_that_cannot_be(cleaning: Cleaning, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [prose(0)])
    with pytest.raises(UserError, match=message):
        prepare([source], cleaning, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\nb", "x" * 300])
def test_names_that_are_no_file_names(name: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", [prose(0)]).path)
    with pytest.raises(UserError, match="its name becomes a file's name"):
        prepare([Source(name, str(path), None)], Cleaning(), tmp_path / "out")


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [prose(0)]).path
    with pytest.raises(UserError, match="sources 'Wiki' and 'wiki'"):
        prepare([Source("Wiki", path, None), Source("wiki", path, None)], Cleaning(), tmp_path / "out")


def test_conversations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(UserError, match=r"'chats': .* holds conversations"):
        prepare([Source("chats", str(path), None)], Cleaning(), tmp_path / "out")


def test_if_nothing_is_left_the_rule_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["- a", "- b", "- a"])
    with pytest.raises(
        UserError, match="nothing is left of 3 documents; bullets left out 3; --rules no-bullets"
    ):
        prepare([source], Cleaning(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The report.


class Page(HTMLParser):
    """Which elements are open, and what a page links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_shows_what_went_and_is_whole(tmp_path: Path) -> None:
    near = prose(0).replace(prose(0).split()[40], "changed")
    texts = [prose(0), near, prose(1), prose(1), "- <script>alert('x')</script>\x00\n- b", "- b"]
    texts += [prose(2) + " jane@example.org"]
    cleaning = Cleaning(mask=("email",), languages=(), rules=("default", "terminal-punctuation"))
    prepare([write(tmp_path / "a & b.jsonl", texts)], cleaning, tmp_path / "out")
    html = (tmp_path / "out/report.html").read_text()
    page = Page(html)
    assert not page.open
    assert page.links == ["data:,"]  # nothing is fetched
    text = " ".join(" ".join(page.text).split())
    assert "<script>" not in html and "\x00" not in html
    for shown in ("a & b", "exact duplicates", "changed", "similarity 0.", "<email>", "no line is left"):
        assert shown in text
    for name in ("terminal-punctuation", "bullets"):
        assert RULES[name].text in text


def test_a_report_of_nothing_removed(tmp_path: Path) -> None:
    prepare([write(tmp_path / "a.jsonl", [prose(0)])], PLAIN, tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert "100.0% of the text was kept" in " ".join(page.text)
    assert "No step was switched on." in " ".join(" ".join(page.text).split())
