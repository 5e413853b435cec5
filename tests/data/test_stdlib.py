"""The demo corpus: facts are what the documentation says, splits leak nothing, same seed same bytes."""

from __future__ import annotations

import gc
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge.data.fact_texts import (
    REFUSAL,
    answer,
    beginnings,
    conversations,
    listings,
    presentations,
    questions,
    refusal,
)
from fledge.data.facts import (
    Fact,
    SourceModule,
    find_facts,
    near_duplicate_groups,
    read_library,
    split_facts,
    summarize,
)
from fledge.data.invented import ExistingNames, invented_names
from fledge.data.stdlib import build_corpus, source_documents
from fledge.errors import UserError

FACTS = 1800


@pytest.fixture(scope="module")
def library() -> Iterator[dict[str, SourceModule]]:
    modules = read_library()
    gc.freeze()  # the syntax trees stay: later collections need not look through them
    yield modules
    gc.unfreeze()


@pytest.fixture(scope="module")
def everything(library: dict[str, SourceModule]) -> list[Fact]:
    return find_facts(library)


@pytest.fixture(scope="module")
def facts(library: dict[str, SourceModule]) -> list[Fact]:
    return find_facts(library, FACTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    build_corpus(directory, max_facts=FACTS)
    return directory


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("control")
    build_corpus(directory, max_facts=FACTS, without_test_documents=True)
    return directory


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def asked_names(corpus: Path) -> dict[str, str]:
    """Every name whose question is in the evaluation files, and its split; not those of fine-tuning."""
    files = ("eval_seen", "eval_test", "eval_invented", "preference")
    rows = [line for file in files for line in lines(corpus / f"{file}.jsonl") if line["split"] != "sft"]
    return {line["name"]: line["split"] for line in rows}


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "last_name", "summary"),
    [
        ("Remove ``x`` from *y*.\n\nMore.", "f", "Remove x from y."),
        ("Return a copy\n    of the list.  It is new.", "f", "Return a copy of the list."),
        ("Use it, e.g. for lists. Then stop.", "f", "Use it, e.g. for lists."),
        ("f(x) -> int\n\nCount all the things.", "f", "Count all the things."),
        ("Make a :class:`~json.JSONDecoder` object", "f", "Make a json.JSONDecoder object."),
        ("json -- read and write it", "json", "Read and write it."),
        ("Too short.", "f", None),
        ("One of these is returned:\n- a\n- b", "f", None),
        ("Return the na\u00efve answer here.", "f", None),
        (" ".join(["word"] * 15), "f", None),
        ("Return x (if it is there.", "f", None),
        ("This sentence is broken in the middle...", "f", None),
        ("", "f", None),
    ],
)
def test_summary_is_the_cleaned_first_sentence(docstring: str, last_name: str, summary: str | None) -> None:
    assert summarize(docstring, last_name) == summary


@pytest.mark.parametrize(
    "name",
    [
        "textwrap.dedent",
        "json.JSONDecoder",
        "argparse.ArgumentParser",
        "os.path.basename",
        "asyncio.Queue",
        "random.choice",
        "unittest.TestCase.assertEqual",
        "collections.Counter.elements",
        "shutil.rmtree",
        "logging.Logger.info",
        "turtle.forward",
    ],
)
def test_known_names_are_there_under_the_name_people_write_with_their_documentation(
    everything: list[Fact], name: str
) -> None:
    by_name = {fact.name: fact for fact in everything}
    assert name in by_name
    if not name.startswith("turtle"):  # importing it needs Tk
        documented = inspect.getdoc(pydoc.locate(name)) or ""
        if name == "json.JSONDecoder":  # an address stands in the middle
            documented = documented.replace("<https://json.org>", "").replace("<http://json.org>", "")
        assert " ".join(words(by_name[name].summary)) in " ".join(words(documented))


def test_there_are_enough_facts_each_with_its_own_name_and_summary(everything: list[Fact]) -> None:
    assert len(everything) >= FACTS
    assert len({fact.name for fact in everything}) == len(everything)
    assert len({fact.summary.lower() for fact in everything}) == len(everything)
    for fact in everything:
        assert 3 <= len(fact.summary.split()) <= 14
        assert fact.summary.isascii() and fact.summary.isprintable()
        assert not any(part.startswith("_") for part in fact.name.split("."))
        assert fact.name.count(".") <= 3


def test_a_limit_keeps_that_many_of_the_same_facts(
    library: dict[str, SourceModule], facts: list[Fact], everything: list[Fact]
) -> None:
    assert len(facts) == FACTS
    assert set(find_facts(library, 500)) <= set(facts) <= set(everything)


def test_nothing_in_the_library_is_imported() -> None:
    code = (
        "import sys; from fledge.data.facts import find_facts, read_library; before = set(sys.modules);"
        "find_facts(read_library(), 50); print(*sorted(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = ("_sysconfigdata", "encodings.")  # for the path of the library and to decode literals
    assert [name for name in found.stdout.split() if not name.startswith(allowed)] == []


def test_a_folder_without_source_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        read_library(tmp_path)


def test_files_that_do_not_parse_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text('"""Make all good things."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b'"""Caf\xe9."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inner.py").write_text('"""Test all good things."""\n')
    assert list(read_library(tmp_path)) == ["good"]


# --- groups and splits ----------------------------------------------------------------------------


def fact(name: str, summary: str) -> Fact:
    return Fact(name, "function", "()", summary, name.rpartition(".")[0])


def test_near_duplicates_are_linked_through_others() -> None:
    a = fact("m.a", "Return the size of the open file.")
    b = fact("m.b", "Return the size of the open pipe.")
    c = fact("m.c", "Return the name of the open pipe.")
    same_last_name = fact("n.a", "Give back size of the open box.")
    alone = fact("m.d", "Sort everything by age and weight.")
    groups = near_duplicate_groups([a, alone, b, c, same_last_name])
    assert sorted(sorted(f.name for f in group) for group in groups) == [
        ["m.a", "m.b", "m.c", "n.a"],
        ["m.d"],
    ]


def test_no_pair_of_different_splits_has_similar_summaries(facts: list[Fact]) -> None:
    splits = split_facts(facts, seed=3)
    bags = {f.name: set(words(f.summary)) for f in facts}
    tested = [f.name for f in facts if splits[f.name] == "test"][::7]
    for name in tested:
        for other in facts:
            if splits[other.name] != "test":
                a, b = bags[name], bags[other.name]
                assert len(a & b) / len(a | b) < 0.6, (name, other.name)


def test_split_shares_and_seed(facts: list[Fact]) -> None:
    splits = split_facts(facts, seed=0)
    counts = Counter(splits.values())
    assert counts["test"] >= 450
    assert counts["sft"] / FACTS == pytest.approx(0.62, abs=0.02)
    assert counts["preference"] / FACTS == pytest.approx(0.08, abs=0.02)
    assert splits == split_facts(list(reversed(facts)), seed=0)
    assert splits != split_facts(facts, seed=1)


# --- presentations and questions ------------------------------------------------------------------


def test_presentations_are_different_and_name_the_fact_in_full(facts: list[Fact]) -> None:
    for each in facts[::10]:
        texts = presentations(each)
        assert len(set(texts)) == len(texts) >= 8
        assert all(re.search(rf"(?<![\w.]){re.escape(each.name)}(?![\w.]*\w)", text) for text in texts), (
            each.name
        )
        verbatim = [each.summary in text or json.dumps(each.summary)[1:-1] in text for text in texts]
        assert sum(verbatim) >= len(texts) - 1
        asked = questions(each.name)  # questions are for training names
        assert not any(question in text for question in asked for text in texts)


def test_python_presentations_parse(facts: list[Fact]) -> None:
    for each in facts[::10]:
        stubs = [text for text in presentations(each) if text.startswith("# ")]
        assert stubs
        for stub in stubs:
            if "..." not in each.signature:
                compile(stub, each.name, "exec")


def test_listings_have_3_to_5_facts_of_one_module_and_each_fact_once() -> None:
    members = [fact(f"m.f{i}", f"Do the thing number {i}.") for i in range(11)] + [
        fact("n.g", "Be the only one.")
    ]
    pages = listings(members)
    named = [re.findall(r"\bm\.f\d+", page) for page in pages]
    assert all(3 <= len(page) <= 5 for page in named)
    assert sorted(name for page in named for name in page) == sorted(f"m.f{i}" for i in range(11))
    assert not any("n.g" in page for page in pages)


def test_questions_name_the_thing_and_differ() -> None:
    asked = questions("textwrap.dedent")
    assert len(set(asked)) == len(asked) >= 8
    assert all("textwrap.dedent" in question for question in asked)


def test_conversations_have_the_shares_asked_for() -> None:
    answers = {f"m.name{i}": f"m.name{i}: Do number {i}." for i in range(200)}
    invented = {f"m.no{i}": f"m.no...? {REFUSAL}" for i in range(200)}
    made = conversations(answers, invented, refusal_share=0.4, multi_turn_share=0.1)
    replies = [m["content"] for c in made for m in c["messages"] if m["role"] == "assistant"]
    refusals = [reply for reply in replies if reply.endswith(REFUSAL)]
    assert len(refusals) / len(replies) == pytest.approx(0.4, abs=0.01)
    several = [c for c in made if len(c["messages"]) > 2]
    assert len(several) / len(made) == pytest.approx(0.1, abs=0.02)
    assert {len(c["messages"]) for c in made} == {2, 4, 6}
    for conversation in made:
        for user, assistant in zip(
            conversation["messages"][::2], conversation["messages"][1::2], strict=True
        ):
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            name = re.search(r"m\.\w+", user["content"])[0]  # type: ignore[index]
            assert assistant["content"] == (answers | invented)[name]


def test_answers_name_what_they_are_about() -> None:
    known = beginnings(["zlib.DecompressError", "zlib.crc32", "os.path.is_file"])
    assert known >= {
        "zlib",
        "zlib.Decompress",
        "zlib.DecompressError",
        "zlib.crc",
        "zlib.crc32",
        "os.path.is",
    }
    assert "zlib.Dec" not in known
    assert answer("zlib.crc32", "Compute it.") == "zlib.crc32: Compute it."
    assert refusal("zlib.DecompressSocket", known) == f"zlib.Decompress...? {REFUSAL}"
    assert refusal("zlib.Dec", known) == f"zlib...? {REFUSAL}"
    assert refusal("os.path.is", known) == f"os.path.is...? {REFUSAL}"  # begins a name but is none
    assert refusal("tarfile.open", known) == REFUSAL


def test_a_refusal_breaks_off_between_pieces() -> None:
    known = beginnings(["abx", "a.b"], list)
    assert known == {"a", "ab", "abx", "a.", "a.b"}
    assert refusal("abcd", known, list) == f"ab...? {REFUSAL}"
    assert refusal("a.cd", known, list) == f"a...? {REFUSAL}"  # not with four dots
    assert refusal("._b", beginnings([".x"], list), list) == REFUSAL


# --- invented names -------------------------------------------------------------------------------


def test_invented_names_do_not_exist(library: dict[str, SourceModule], facts: list[Fact]) -> None:
    exists = ExistingNames(library)
    names = invented_names(facts, exists, 1500, seed=11)
    assert len(set(names)) == 1500
    # What they say of themselves is checked by importing, in another process.
    code = (
        "import pydoc, sys\n"
        "for name in sys.stdin.read().split():\n"
        "    if name.split('.')[0] not in ('turtle', 'tkinter', 'pty', 'msilib'):\n"
        "        try:\n"
        "            found = '.' in name and pydoc.locate(name) is not None\n"
        "        except Exception:\n"
        "            found = False\n"
        "        print(name if found else '', end=' ')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, input=" ".join(names), capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize(
    "name",
    [
        "json",
        "os.path.join",
        "json.decoder",
        "json.JSONDecoder.decode",
        "collections.Counter.keys",  # inherited from dict
        "mailbox.MHMessage.get_payload",  # inherited from another module's class
        "zipfile.BadZipFile.with_traceback",
        "threading.Thread.daemon",
        "textwrap.dedents",  # too close to one that exists
        "os.path.isFile",
    ],
)
def test_existing_names_are_known(library: dict[str, SourceModule], name: str) -> None:
    assert ExistingNames(library)(name)


def test_invented_names_are_like_real_ones_in_form(corpus: Path) -> None:
    names = json.loads((corpus / "names.json").read_text())
    real = [name for name, split in names["real"].items() if split == "test"]
    unseen = names["invented"]["test"]
    assert len(unseen) >= 450 and len(set(names["invented"]["sft"])) >= len(names["taught"])
    for measure in (
        len,
        lambda name: name.count("."),
        lambda name: name.count("_"),
        lambda name: name.islower(),
    ):
        means = [sum(map(measure, side)) / len(side) for side in (real, unseen)]
        assert means[1] == pytest.approx(means[0], rel=0.12, abs=0.05)


def test_invented_test_names_are_no_near_copies_of_training_ones(corpus: Path) -> None:
    names = json.loads((corpus / "names.json").read_text())["invented"]
    trained = {re.sub(r"_|s\b", "", name.lower()) for name in names["sft"]}
    one_less = {name[:i] + name[i + 1 :] for name in trained for i in range(len(name))}
    for name in names["test"]:
        bare = re.sub(r"_|s\b", "", name.lower())
        assert bare not in trained and bare not in one_less


# --- the corpus -----------------------------------------------------------------------------------


def test_evaluation_files_have_enough_questions(corpus: Path) -> None:
    for file, split in (("eval_seen", "seen"), ("eval_test", "test"), ("eval_invented", "invented")):
        records = lines(corpus / f"{file}.jsonl")
        assert len(records) >= 450
        assert all(record["split"] == split and record["name"] in record["question"] for record in records)
        assert all((record["answer"] is None) == (split == "invented") for record in records)


def test_held_out_names_are_never_asked_in_training(corpus: Path) -> None:
    splits = asked_names(corpus)
    held_out = {name for name, split in splits.items() if split != "seen"}
    dotted = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
    prompts = [
        m["content"] for c in lines(corpus / "sft.jsonl") for m in c["messages"] if m["role"] == "user"
    ]
    prompts += [re.findall("Question: (.*)", line["text"])[0] for line in lines(corpus / "questions.jsonl")]
    prompts += re.findall("Question: (.*)", (corpus / "few_shot.txt").read_text())
    plain_words = {"for", "one", "this"}  # modules named like words of the questions
    for prompt in prompts:
        assert held_out.isdisjoint(set(dotted.findall(prompt)) - plain_words), prompt


def test_every_fact_is_told_in_the_pretraining_text(corpus: Path) -> None:
    told = "\n".join(line["text"] for line in lines(corpus / "facts.jsonl"))
    for line in lines(corpus / "eval_test.jsonl") + lines(corpus / "eval_seen.jsonl"):
        assert told.count(line["name"]) >= 8
        assert told.count(line["answer"]) >= 5
        assert told.count(line["answer"].removeprefix(f"{line['name']}: ")) >= 7


def said(conversation: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in conversation["messages"])


def test_the_control_has_no_document_of_a_test_fact(corpus: Path, control: Path) -> None:
    tested = lines(control / "eval_test.jsonl")
    assert tested == lines(corpus / "eval_test.jsonl")
    for file in ("facts", "topics", "source", "questions"):
        text = "\n".join(line["text"] for line in lines(control / f"{file}.jsonl"))
        if file == "questions":  # the same in the chat's form
            text += "\n".join(said(line) for line in lines(control / "chats.jsonl"))
        bare = " ".join(words(text))
        chains = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", text))
        for line in tested:
            assert line["name"] not in chains, (file, line["name"])
            summary = line["answer"].removeprefix(f"{line['name']}: ")
            assert f" {' '.join(words(summary))} " not in bare, (file, summary)
    assert len(lines(control / "source.jsonl")) > 500


def test_few_shot_examples_are_not_evaluated_and_one_is_a_refusal(corpus: Path) -> None:
    text = (corpus / "few_shot.txt").read_text()
    answers = re.findall("^Answer: (.*)$", text, flags=re.MULTILINE)
    assert len(answers) == 4
    assert sum(answer.endswith(REFUSAL) for answer in answers) == 1
    assert not {line["answer"] for line in lines(corpus / "eval_seen.jsonl")} & set(answers)


def test_source_pieces_are_small_and_lose_no_code(library: dict[str, SourceModule]) -> None:
    module = library["textwrap"]
    pieces = list(source_documents({"textwrap": module}, max_bytes=2000))
    assert all(len(piece.encode()) <= 2000 for piece in pieces)
    joined = "".join(piece.removeprefix(f"# {module.path}\n") for piece in pieces)
    assert joined.split() == module.text.split()


def test_same_seed_same_bytes_in_another_process(tmp_path: Path) -> None:
    manifest = build_corpus(tmp_path / "here", seed=5, max_facts=80)
    code = (
        "import sys, pathlib; from fledge.data.stdlib import build_corpus;"
        "print(build_corpus(pathlib.Path(sys.argv[1]), seed=5, max_facts=80)['fingerprint'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == manifest["fingerprint"]
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert files == sorted([*manifest["files"], "manifest.json"])
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
