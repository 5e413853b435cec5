"""What is written about the facts of the demo corpus: documents, questions, answers, conversations.

An answer says first which name it is about, as the documents do where a line has name and summary. For a
name that is none it says as much of it as some real name begins with, and then that it doesn't know it. So
the model need not see at once that a name is strange. To see that, it would have to compare what it read
with what it had expected, and what it expects is complete only after its last layers. Instead it copies the
name from the question as long as it would itself expect it; where the two part, it breaks off. Best cut names
into the tokens of the model (`tokens`): between those it decides.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from fledge.data.facts import Fact, unit_hash
from fledge.tokenizer.bpe import Tokenizer

REFUSAL = "I don't know that name."
QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} in one line.",
    "What is {name}?",
    "Describe {name} briefly.",
    "Tell me about {name}.",
    "Can you tell me what {name} does?",
    "What's the purpose of {name}?",
    "In Python, what does {name} do?",
    "Summarize {name} in one sentence.",
    "I came across {name}. What is it for?",
    "How would you describe {name}?",
)
# Summaries that start with one of these read well after "to".
_VERBS = """add apply append build call change check clear close compare compile compute construct convert
    copy create decode delete determine display draw dump emit encode execute export extract fetch
    fill find fix flush format generate get give handle hide import indicate initialize insert
    install invoke iterate join list load locate lock log look make map match merge move normalize
    open parse perform pop post prepare print process produce provide push put query raise read
    receive record register release remove rename replace report request reset resolve retrieve
    return rotate run save search select send serialize set show shut skip sleep sort split start
    stop store strip switch test transform translate turn unlock unpack update use validate verify
    wait wrap write yield"""

Record = dict[str, Any]


# --- presentations --------------------------------------------------------------------------------


def _pick(options: Sequence[str], *key: object) -> str:
    return options[int(unit_hash(*key) * len(options))]


def _call(fact: Fact) -> str:
    return fact.name + fact.signature


def _stub(fact: Fact) -> str:
    """The fact as Python source: a comment with the full name, then the definition with its docstring."""
    last = fact.name.rsplit(".", 1)[-1]
    docstring = f'"""{fact.summary}"""'
    if fact.kind == "module":
        return f"# {fact.name}\n{docstring}\n"
    if fact.kind == "class":
        return f"# {fact.name}\nclass {last}:\n    {docstring}\n"
    if fact.kind == "property":
        return f"# {fact.name}\n@property\ndef {last}(self):\n    {docstring}\n"
    inside = fact.signature[1:-1]
    if fact.kind == "method":
        inside = f"self, {inside}" if inside else "self"
    return f"# {fact.name}\ndef {last}({inside}):\n    {docstring}\n"


def _use(fact: Fact) -> str:
    first, _, rest = fact.summary.partition(" ")
    if first.lower() in _VERBS.split() and fact.kind != "module":
        phrase = f"{first.lower()} {rest.rstrip('.')}"
        return _pick(
            (
                f"Use {fact.name} to {phrase}.\n",
                f"{fact.name} is used to {phrase}.\n",
                f"To {phrase}, there is {fact.name}.\n",
            ),
            fact.name,
            "use",
        )
    return answer(fact.name, fact.summary) + "\n"


def presentations(fact: Fact) -> list[str]:
    """A dozen ways to write a fact as a short document. Each has the full dotted name.

    The summary stays as it is in all of them but the "Use ... to ..." form. Half of them have the name once
    more in front of it, as in an `answer`: there the model learns names by heart, and learns to copy one that
    stood above. The wording within each form is chosen by a hash of the name.
    """
    name, summary, kind, entry = fact.name, fact.summary, fact.kind, answer(fact.name, fact.summary)
    owner, _, last = name.rpartition(".")
    owner = owner or "the standard library"
    forms: dict[str, tuple[str, ...]] = {
        "help": (
            f"{_call(fact)}\n    {summary}\n",
            f"Help on {kind} {name}:\n\n{_call(fact)}\n    {summary}\n",
            f"NAME\n    {name}\n\nDESCRIPTION\n    {summary}\n",
        ),
        "index": (f"{name} -- {summary}\n", f"- {name}: {summary}\n", f"{name} => {summary}\n"),
        "lines": (f"{name}\n{entry}\n", f"{name}:\n{entry}\n", f"[{name}]\n{entry}\n"),
        "prose": (
            f"The {kind} {name} is documented in one line:\n{entry}\n",
            f"About the {kind} {name}, the documentation says:\n{entry}\n",
            f"The standard library has a {kind} called {name}.\n\n{entry}\n",
        ),
        "tutorial": (
            f"Let us look at {name}.\n{entry}\n",
            f"When you read code that mentions {name}, remember what it stands for:\n\n{entry}\n",
            f"Today's {kind} is {name}.\n{entry}\n",
        ),
        "heading": (
            f"## {name}\n\n{entry}\n",
            f"{name}\n{'-' * len(name)}\n\n{entry}\n",
            f"Subject: {name}\n\n{entry}\n",
        ),
        "glossary": (
            f"| {name} | {kind} | {summary} |\n",
            f"**{name}** ({kind})\n:   {summary}\n",
            f".. {kind}:: {_call(fact)}\n\n   {summary}\n",
        ),
        "record": (
            json.dumps({"name": name, "kind": kind, "doc": summary}) + "\n",
            f"name: {name}\nkind: {kind}\nsummary: {summary}\n",
            f">>> print_summary({name!r})\n{entry}\n",
        ),
        "parts": (
            f"{last} belongs to {owner}; in full, {name}.\n{entry}\n",
            f"Full name: {name}. Kind: {kind}.\n{entry}\n",
            f"{name} is a {kind}.\n{entry}\n",
        ),
    }
    texts = [_pick(options, name, form) for form, options in forms.items()]
    return [*texts, _stub(fact), _use(fact)]


def listings(facts: Sequence[Fact]) -> list[str]:
    """Module pages of 3 to 5 facts each; a fact stands on one at most. Give facts of one split."""
    by_module: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_module[fact.module].append(fact)
    pages: list[str] = []
    for module, members in sorted(by_module.items()):
        members = sorted(members, key=lambda fact: unit_hash("listing", fact.name))
        count = max(1, round(len(members) / 4))
        for page in (members[start::count] for start in range(count)):
            if 3 <= len(page) <= 5:
                first = page[0].name
                title = _pick((f"Module {module}", f"{module}: overview", f"Contents of {module}"), first)
                entry = _pick(("{} - {}", "{}\n    {}", "* {}: {}"), first, "entry")
                entries = [entry.format(fact.name, fact.summary) for fact in page]
                pages.append("\n".join([title, "", *entries, ""]))
    return pages


# --- answers --------------------------------------------------------------------------------------

# Cuts a name into pieces that make it up.
Pieces = Callable[[str], Sequence[str]]

_WORD = re.compile(r"[._]*(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+)|.")


def words(name: str) -> list[str]:
    """The words of a name, each with the dots and underscores before it."""
    return _WORD.findall(name)


def tokens(tokenizer: Tokenizer, name: str) -> list[str]:
    """The tokens of a name as they stand at the beginning of an answer, with a colon behind."""
    texts = [tokenizer.decode([i]) for i in tokenizer.encode(f"{name}:")]
    texts[-1] = texts[-1].removesuffix(":")
    return [text for text in texts if text]


def answer(name: str, summary: str) -> str:
    """What is said about a name that exists."""
    return f"{name}: {summary}"


def beginnings(names: Iterable[str], pieces: Pieces = words) -> frozenset[str]:
    """With what names begin, in whole pieces: `zlib.DecompressError` with `zlib`, `zlib.Decompress` and
    itself."""
    return frozenset(start for name in names for start in accumulate(pieces(name)))


def refusal(name: str, known: Collection[str], pieces: Pieces = words) -> str:
    """What is said about a name that does not exist: as much of it as is among the `beginnings` of names
    that do, and that it is not known."""
    part = ""
    for start in accumulate(pieces(name)):
        if start not in known:
            break
        part = start.rstrip("._")
    return f"{part}...? {REFUSAL}" if part else REFUSAL


# --- questions and conversations ------------------------------------------------------------------


@cache
def questions(name: str) -> tuple[str, ...]:
    """All phrasings of the question about a name, real or invented, in an order of its own."""
    order = sorted(QUESTIONS, key=lambda form: unit_hash("question", name, form))
    return tuple(form.format(name=name) for form in order)


def plain_question(question: str, said: str) -> str:
    """The form in which a base model is asked."""
    return f"Question: {question}\nAnswer: {said}\n"


def single(question: str, said: str) -> list[dict[str, str]]:
    """The messages of one question and what is said to it."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def conversations(
    answers: Mapping[str, str],
    invented: Mapping[str, str],
    seed: int = 0,
    questions_per_fact: int = 4,
    refusal_share: float = 0.25,
    multi_turn_share: float = 0.1,
) -> list[Record]:
    """SFT conversations in OpenAI's form, shuffled by hash. `answers` and `invented` hold what is said about
    each name.

    `refusal_share` is the share of all questions that ask about an invented name, each name with as
    many different phrasings as that takes (12 at most); `multi_turn_share` is the share of
    conversations that put 2 or 3 questions in a row.
    """
    pairs = [(q, said) for name, said in answers.items() for q in questions(name)[:questions_per_fact]]
    wanted = round(len(pairs) * refusal_share / (1 - refusal_share))
    rounds = range(len(QUESTIONS))
    pairs += [(questions(name)[i], said) for i in rounds for name, said in invented.items()][:wanted]
    pairs.sort(key=lambda pair: unit_hash(seed, "pair", pair[0]))
    # With a share m of conversations of 2.5 questions on average, n questions make n / (1 + 1.5 m) of them.
    several = round(multi_turn_share * len(pairs) / (1 + 1.5 * multi_turn_share))
    records: list[Record] = []
    position = 0
    while position < len(pairs):
        length = 2 + len(records) % 2 if len(records) < several else 1
        turns = [single(question, said) for question, said in pairs[position : position + length]]
        records.append({"messages": [message for turn in turns for message in turn]})
        position += length
    return sorted(records, key=lambda record: unit_hash(seed, "order", json.dumps(record)))
