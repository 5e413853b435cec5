"""The demo corpus: the text every CPython carries, and questions about its facts. No download.

Sources of different size and quality: the language reference (`pydoc_data.topics`), the standard
library's source code, and facts, each a name with a one-line summary written in a dozen ways. The
names are split: questions about "sft" names are part of pretraining and fine-tuning, "preference"
names are kept for later stages, "test" names are never asked before the evaluation.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fledge.data.fact_texts import (
    QUESTIONS,
    Pieces,
    Record,
    answer,
    beginnings,
    conversations,
    listings,
    plain_question,
    presentations,
    questions,
    refusal,
    single,
    words,
)
from fledge.data.facts import (
    SPLIT_SHARES,
    Fact,
    SourceModule,
    Split,
    collector_paused,
    find_facts,
    read_library,
    split_facts,
    unit_hash,
)
from fledge.data.invented import ExistingNames, invented_names
from fledge.errors import UserError
from fledge.files import write_text

# --- the language reference and the source code ---------------------------------------------------


def topic_documents() -> list[str]:
    """The language reference and other topics of `help()`, one document each.

    Topics repeat each other's sections; a paragraph of some length is kept where it stands first, so that
    a held-out topic is not also read in training.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        missing = "this Python lacks pydoc_data.topics: install its complete standard library"
        raise UserError(missing) from error
    texts: Mapping[str, str] = topics
    seen: set[str] = set()
    documents = []
    for name in sorted(texts):
        paragraphs = texts[name].strip().split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if len(paragraph) <= 40 or paragraph not in seen]
        seen.update(paragraphs)
        documents.append("\n\n".join(fresh) + "\n")
    return [document for document in documents if len(document) > 200]


def source_documents(modules: Mapping[str, SourceModule], max_bytes: int = 4096) -> Iterator[str]:
    """The library's source in pieces of at most `max_bytes`, cut at top-level definitions where possible."""
    for module in modules.values():
        lines = module.text.splitlines(keepends=True)
        cuts = [0]
        for node in module.tree.body:
            decorators = getattr(node, "decorator_list", [])
            cuts.append(min([node.lineno, *(d.lineno for d in decorators)]) - 1)
        pieces = ("".join(lines[a:b]) for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True))
        header = f"# {module.path}\n"
        for text in _merge(_shrink(pieces, max_bytes - len(header)), max_bytes - len(header)):
            if len(text.strip()) >= 80:
                yield header + text.strip("\n") + "\n"


def _shrink(pieces: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Cut pieces that are too long at blank lines, then at any line."""
    for piece in pieces:
        if len(piece.encode()) <= max_bytes:
            yield piece
            continue
        for block in re.split(r"(?<=\n)(?=\n)", piece):
            if len(block.encode()) <= max_bytes:
                yield block
            else:
                lines = block.splitlines(keepends=True)
                yield from (line for line in lines if len(line.encode()) <= max_bytes)


def _merge(pieces: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Join neighbours as long as they fit."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        length = len(piece.encode())
        if held and size + length > max_bytes:
            yield "".join(held)
            held, size = [], 0
        held.append(piece)
        size += length
    if held:
        yield "".join(held)


class _Mentions:
    """Finds documents that have the summary or the dotted name of one of some facts."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._names = {fact.name for fact in facts if "." in fact.name}
        self._summaries: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for fact in facts:
            words = re.findall(r"\w+", fact.summary.lower())
            self._summaries[tuple(words[:3])].append(" ".join(words) + " ")

    def __call__(self, text: str) -> bool:
        for chain in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", text):
            parts = chain.split(".")
            spans = (".".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 2, len(parts) + 1))
            if not self._names.isdisjoint(spans):
                return True
        words = re.findall(r"\w+", text.lower())
        for i in range(len(words) - 2):
            for summary in self._summaries.get((words[i], words[i + 1], words[i + 2]), ()):
                if (" ".join(words[i : i + 16]) + " ").startswith(summary[:90]):
                    return True
        return False


# --- the corpus -----------------------------------------------------------------------------------


def _draw(names: Iterable[str], limit: int | None = None) -> list[str]:
    return sorted(names, key=lambda name: unit_hash("evaluation", name))[:limit]


def _evaluation(names: Mapping[str, str | None], split: str) -> list[Record]:
    asked = [(name, QUESTIONS[i % len(QUESTIONS)].format(name=name)) for i, name in enumerate(_draw(names))]
    return [{"name": name, "question": q, "answer": names[name], "split": split} for name, q in asked]


def _preference_questions(names: _Names, preference: Mapping[str, str]) -> Iterator[Record]:
    """What is asked for preferences: names of fine-tuning in ways in which it did not ask, names it never
    asked about in many ways, for they are few, and new invented ones."""
    groups: tuple[tuple[str, Mapping[str, str | None], int], ...] = (
        ("sft", names.taught, 2),
        ("preference", preference, 6),
        ("invented", dict.fromkeys(names.preference_invented), 1),
    )
    for split, answers, ways in groups:
        for name, said in answers.items():
            for question in questions(name)[-ways:]:
                yield {"name": name, "question": question, "answer": said, "split": split}


def _few_shot(facts: Sequence[Fact], invented: Mapping[str, str]) -> list[tuple[str, str]]:
    """Three facts and an invented name for the prompt of a base model, and what is said about each."""
    short = [fact for fact in facts if fact.kind == "function" and len(fact.summary.split()) <= 8] or facts
    order = sorted(short, key=lambda fact: (fact.name.count("."), unit_hash("few", fact.name)))
    shown = [(fact.name, answer(fact.name, fact.summary)) for fact in order[:3]]
    shown[2:2] = list(invented.items())[:1]
    return shown


def _question_texts(answers: Mapping[str, str], invented: Mapping[str, str], per_fact: int) -> list[str]:
    texts = [plain_question(q, said) for name, said in answers.items() for q in questions(name)[-per_fact:]]
    texts += [plain_question(questions(name)[-1], said) for name, said in invented.items()]
    return texts


def _chat_documents(answers: Mapping[str, str], invented: Mapping[str, str], per_fact: int) -> list[Record]:
    """Single questions in the chat's form, for pretraining: the base model meets the chat tokens there."""
    pairs = [(q, said) for name, said in answers.items() for q in questions(name)[:per_fact]]
    pairs += [(questions(name)[0], said) for name, said in invented.items()]
    pairs.sort(key=lambda pair: unit_hash("chat", pair[0]))
    return [{"messages": single(question, said)} for question, said in pairs]


def _texts(
    modules: Mapping[str, SourceModule], by_split: Mapping[Split, Sequence[Fact]]
) -> dict[str, list[str]]:
    """The sources of text but for questions."""
    pages = [page for facts in by_split.values() for page in listings(facts)]
    pages += [text for facts in by_split.values() for fact in facts for text in presentations(fact)]
    return {"topics": topic_documents(), "source": list(source_documents(modules)), "facts": pages}


@dataclass(frozen=True)
class _Names:
    """Who is asked about when, and what is said. `early` ones are also asked in pretraining."""

    taught: dict[str, str]
    early: dict[str, str]
    early_invented: dict[str, str]
    invented: dict[str, str]
    preference_invented: list[str]
    unseen_invented: list[str]


def _answers(facts: Iterable[Fact]) -> dict[str, str]:
    return {fact.name: answer(fact.name, fact.summary) for fact in facts}


def _draw_names(
    by_split: Mapping[Split, Sequence[Fact]],
    exists: ExistingNames,
    seed: int,
    questions_per_fact: int,
    refusal_share: float,
    early_names: float,
    early_questions_per_fact: int,
    evaluation_names: int,
    pieces: Pieces,
    known: Collection[str],
) -> _Names:
    taught = _answers(by_split["sft"])
    # The other taught names are, until fine-tuning, known from documents alone, as test names are. Were
    # all of them asked before, "never asked" would look like "invented" and test names would be refused.
    early = {n: a for n, a in taught.items() if unit_hash("asked early", n) < early_names}
    # An invented name is asked about once in a source: remembering them one by one would teach nothing. For
    # the same reason pretraining has so many of them, and questions about names in so many ways, that it
    # hardly goes through them twice. Where words do not suffice for all, fine-tuning comes first.
    refusals = refusal_share / (1 - refusal_share)
    first = round(early_questions_per_fact * len(early) * refusals)
    then = round(questions_per_fact * len(taught) * refusals)
    invented = invented_names(by_split["sft"], exists, first + then, seed)
    asked = min(evaluation_names, len(taught))
    unseen = invented_names(by_split["test"], exists, asked, seed + 1, apart_from=invented)
    not_test = [*by_split["sft"], *by_split["preference"]]
    more = invented_names(not_test, exists, len(not_test), seed + 2, apart_from=[*invented, *unseen])
    said = [(name, refusal(name, known, pieces)) for name in invented]
    return _Names(taught, early, dict(said[then:]), dict(said[:then]), more, unseen)


@collector_paused()
def build_corpus(
    directory: Path,
    seed: int = 0,
    max_facts: int | None = None,
    without_test_documents: bool = False,
    *,
    pieces: Pieces = words,
    questions_per_fact: int = 2,
    refusal_share: float = 0.33,
    early_names: float = 0.5,
    early_questions_per_fact: int = 8,
    evaluation_names: int = 500,
) -> Record:
    """Write the corpus into `directory` and return its manifest (also in manifest.json).

    Text: topics.jsonl, source.jsonl, facts.jsonl, questions.jsonl ({"text"}); conversations:
    sft.jsonl; questions with answers ({"name", "question", "answer", "split"}; answer null: invented):
    eval_seen.jsonl, eval_test.jsonl, eval_invented.jsonl, preference.jsonl; names.json, few_shot.txt.
    The same Python, seed and options give the same bytes. `max_facts` keeps that many facts;
    `without_test_documents` leaves out every document that has a test fact, for the control that
    asks how much is answered without having read it. `pieces` cuts names for refusals, which say as much
    of a name as is known, in whole pieces.
    """
    modules = read_library()
    facts = find_facts(modules, max_facts)
    splits = split_facts(facts, seed)
    by_split: dict[Split, list[Fact]] = {s: [f for f in facts if splits[f.name] == s] for s in SPLIT_SHARES}
    shares = (questions_per_fact, refusal_share, early_names, early_questions_per_fact, evaluation_names)
    read = [f for s, own in by_split.items() if s != "test" or not without_test_documents for f in own]
    known = beginnings((fact.name for fact in read), pieces)
    names = _draw_names(by_split, ExistingNames(modules), seed, *shares, pieces, known)
    shown = _few_shot(by_split["sft"], names.early_invented)
    asked: dict[str, Mapping[str, str | None]] = {
        "seen": {n: names.taught[n] for n in _draw(set(names.taught) - set(dict(shown)), evaluation_names)},
        "test": _answers(by_split["test"]),
        "invented": dict.fromkeys(names.unseen_invented),
    }
    preference = _answers(by_split["preference"])
    texts = _texts(modules, by_split)
    texts["questions"] = _question_texts(names.early, names.early_invented, early_questions_per_fact)
    chats = _chat_documents(names.early, names.early_invented, early_questions_per_fact)
    if without_test_documents:
        mentions = _Mentions(by_split["test"])
        texts = {source: [t for t in group if not mentions(t)] for source, group in texts.items()}
        chats = [chat for chat in chats if not any(mentions(turn["content"]) for turn in chat["messages"])]
    files = {
        f"{source}.jsonl": _jsonl({"text": text} for text in sorted(group, key=lambda t: unit_hash(seed, t)))
        for source, group in texts.items()
    }
    files["chats.jsonl"] = _jsonl(chats)
    late_chats = conversations(names.taught, names.invented, seed, questions_per_fact, refusal_share)
    files["sft.jsonl"] = _jsonl(late_chats)
    for split, rows in asked.items():
        files[f"eval_{split}.jsonl"] = _jsonl(_evaluation(rows, split))
    files["preference.jsonl"] = _jsonl(_preference_questions(names, preference))
    invented = {
        "sft": [*names.early_invented, *names.invented],
        "preference": names.preference_invented,
        "test": names.unseen_invented,
    }
    summaries = {fact.name: fact.summary for fact in by_split["sft"]}
    files["names.json"] = _json({"real": splits, "invented": invented, "taught": summaries})
    files["few_shot.txt"] = "\n".join(
        plain_question(QUESTIONS[i].format(name=name), said) for i, (name, said) in enumerate(shown)
    )
    options = {"seed": seed, "without_test_documents": without_test_documents}
    manifest = _manifest(files, facts, splits, options)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "manifest.json": _json(manifest)}.items():
        write_text(directory / name, content)
    return manifest


def _manifest(
    files: Mapping[str, str], facts: Sequence[Fact], splits: Mapping[str, Split], options: Record
) -> Record:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].encode() + b"\0")
    return {
        "fingerprint": digest.hexdigest(),
        "python": platform.python_version(),
        **options,
        "facts": len(facts),
        "kinds": dict(sorted(Counter(fact.kind for fact in facts).items())),
        "splits": dict(sorted(Counter(splits.values()).items())),
        "files": {
            name: {"lines": text.count("\n"), "bytes": len(text.encode())}
            for name, text in sorted(files.items())
        },
    }


def _jsonl(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _json(record: Record) -> str:
    return json.dumps(record, indent=1) + "\n"
