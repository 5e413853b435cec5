"""Names that look like the standard library's and do not exist: what a model should say it does not know.

An invented name is a real name in which words were exchanged for those of another real name of the
same kind and style, so that modules, lengths, number of parts and spelling are distributed like the
real ones. How far that succeeds is measured: see `fledge.evals.facts.NgramNameClassifier`.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from fledge.data.facts import Fact, SourceModule, statements, unit_hash

_CAMEL_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[a-z]+")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


class ExistingNames:
    """Answers whether a dotted name exists in the standard library, public or private.

    It errs on the side of "exists": any identifier that stands in the module's own file counts.
    """

    def __init__(self, modules: Mapping[str, SourceModule]) -> None:
        self._modules = modules
        self._identifiers: dict[str, frozenset[str]] = {}
        self._bases: dict[str, set[str]] = defaultdict(set)
        self._members: dict[str, set[str]] = defaultdict(set)
        self._pairs: set[tuple[str, str]] = set()
        for name, module in modules.items():
            for chain in set(_DOTTED.findall(module.text)) | {name}:
                self._pairs.update(pairwise(chain.split(".")))
            self._add_classes(module.tree.body)

    def _add_classes(self, body: Sequence[ast.stmt]) -> None:
        for node in statements(body):
            if isinstance(node, ast.ClassDef):
                self._bases[node.name] |= {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
                for inner in statements(node.body):
                    if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        self._members[node.name].add(inner.name)
                    elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
                        targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                        self._members[node.name] |= {t.id for t in targets if isinstance(t, ast.Name)}
                self._add_classes(node.body)

    def __call__(self, name: str) -> bool:
        """Whether the dotted name exists, or differs from one that does only in case, "_" or plural."""
        prefix, _, last = name.rpartition(".")
        if not prefix:
            return name in self._modules or name in sys.stdlib_module_names
        owner = prefix.rsplit(".", 1)[-1]
        if (owner, last) in self._pairs or last in self._class_members(owner):
            return True
        homes = [prefix]
        while "." in homes[-1]:
            homes.append(homes[-1].rpartition(".")[0])
        return any(_spelling(last) in self._spellings_in(home) for home in homes)

    def _spellings_in(self, name: str) -> frozenset[str]:
        if name not in self._identifiers:
            module = self._modules.get(name)
            found = set(re.findall(r"[A-Za-z_]\w*", module.text)) if module else set()
            for local, (target, _) in module.imports.items() if module else ():
                if local.startswith("*") and target in self._modules:
                    found.update(self._modules[target].definitions)
            self._identifiers[name] = frozenset(map(_spelling, found))
        return self._identifiers[name]

    def _class_members(self, name: str) -> set[str]:
        found: set[str] = set()
        seen: set[str] = set()
        queue = [name]
        while queue:
            current = queue.pop()
            if current not in seen:
                seen.add(current)
                found |= self._members.get(current, set())
                queue.extend(self._bases.get(current, ()))
        known = (getattr(builtins, base, object) for base in seen | {"object"})
        return found.union(("register", "mro"), *(dir(base) for base in known))


def _spelling(name: str) -> str:
    """A name without case, underscores and plural: two names that agree in it are told apart by nobody."""
    return ".".join(part.replace("_", "").lower().rstrip("s") for part in name.split("."))


def _split_words(last: str, vocabulary: frozenset[str]) -> tuple[str, list[str]]:
    """The style of a last name part and its words: "add_argument" -> ("_", ["add", "argument"])."""
    if "_" in last:
        return "_", last.split("_")
    if last.lower() != last:
        words = _CAMEL_WORD.findall(last)
        style = "Pascal" if last[0].isupper() else "camel"
        return (style, words) if "".join(words) == last else (style, [last])
    return "lower", _segment(last, vocabulary)


def _segment(word: str, vocabulary: frozenset[str]) -> list[str]:
    """Cut "linecache" into ["line", "cache"]; the fewest known words, one if it cannot be cut."""
    best: dict[int, list[str]] = {0: []}
    for end in range(1, len(word) + 1):
        for start in range(end - 2):
            piece = word[start:end]
            if start in best and piece in vocabulary and (end - start < len(word)):
                candidate = [*best[start], piece]
                if end not in best or len(candidate) < len(best[end]):
                    best[end] = candidate
    return best.get(len(word), [word])


def _vocabulary(facts: Sequence[Fact]) -> frozenset[str]:
    counts: Counter[str] = Counter()
    for fact in facts:
        for part in fact.name.split("."):
            words = part.split("_") if "_" in part else _CAMEL_WORD.findall(part)
            if len(words) > 1:
                counts.update({word.lower() for word in words})
            elif fact.name.count("."):
                counts[part.lower()] += 1
    return frozenset(word for word, count in counts.items() if count >= 2 and len(word) >= 3)


def _join(style: str, words: Sequence[str]) -> str:
    if style == "camel":
        return words[0].lower() + "".join(word[0].upper() + word[1:] for word in words[1:])
    return ("_" if style == "_" else "").join(words)


def _cross(own: Sequence[str], donor: Sequence[str], cut: int, own_first: bool) -> list[str]:
    return [*own[:cut], *donor[cut:]] if own_first else [*donor[:cut], *own[cut:]]


class _Recombiner:
    """Makes candidates from one set of real names: a real name with words of another in it."""

    def __init__(self, facts: Sequence[Fact], vocabulary: frozenset[str], seed: int) -> None:
        self._seed = seed
        self._words = {fact.name: _split_words(fact.name.rsplit(".", 1)[-1], vocabulary) for fact in facts}
        self._donors: dict[tuple[str, str, int], list[list[str]]] = defaultdict(list)
        self._singles: list[list[str]] = []
        for fact in facts:
            style, words = self._words[fact.name]
            self._donors[_kind(fact), style, len(words)].append(words)
            if style == "lower" and len(words) == 1 and 3 <= len(words[0]) <= 9 and "." in fact.name:
                self._singles.append(words)

    def candidates(self, fact: Fact, turn: int) -> list[str]:
        """Up to four candidates, the one closest in length to the real name first."""
        prefix, _, last = fact.name.rpartition(".")
        style, words = self._words[fact.name]
        donors = self._donors[_kind(fact), style, len(words)]
        if len(words) == 1 and style == "lower" and not prefix and self._singles:
            donors = self._singles  # every one-word module exists already: take a word from elsewhere
        options: list[str] = []
        for option in range(4):
            key = (self._seed, fact.name, turn, option)
            donor = donors[int(unit_hash(*key) * len(donors))]
            cut = 1 + int(unit_hash(*key, "cut") * (len(words) - 1))
            mixed = _cross(words, donor, cut, own_first=len(words) > 1 and unit_hash(*key, "order") < 0.5)
            made = _join(style, mixed)
            if made != last and len({word.lower() for word in mixed}) == len(mixed):
                options.append(made)
        options.sort(key=lambda made: (abs(len(made) - len(last)), made))
        return [f"{prefix}.{made}" if prefix else made for made in options]


def _kind(fact: Fact) -> str:
    return "method" if fact.kind == "property" else fact.kind


def _look_alike_keys(name: str) -> set[str]:
    """Names that share a key differ in one or two letters, or have the same last part of several words."""
    spelling = _spelling(name)
    last = name.rsplit(".", 1)[-1]
    keys = {spelling} | {spelling[:i] + spelling[i + 1 :] for i in range(len(spelling))}
    if "_" in last or last.lower() != last or len(last) > 9:
        keys.add("." + spelling.rsplit(".", 1)[-1])
    return keys


def invented_names(
    facts: Sequence[Fact], exists: ExistingNames, n: int, seed: int = 0, apart_from: Sequence[str] = ()
) -> list[str]:
    """`n` names that do not exist, each made from one of `facts` with words of another one.

    Every real name serves equally often, so that the distributions agree. None looks like one of
    `apart_from`. Fewer than `n` when there are too few real names to recombine. Training and test
    names should be made from training and test facts: otherwise the words of the test names would
    be met in training as words of names that do not exist.
    """
    forbidden = {key for name in apart_from for key in _look_alike_keys(name)}
    recombiner = _Recombiner(facts, _vocabulary(facts), seed)
    order = sorted(facts, key=lambda fact: unit_hash(seed, "template", fact.name))
    chosen: list[str] = []
    taken: set[str] = set()
    for turn in range(8 if not facts else 4 + 4 * (n // len(facts) + 1)):
        for fact in order[: None if turn else n]:
            if len(chosen) >= n:
                return chosen
            for name in recombiner.candidates(fact, turn):
                if _spelling(name) in taken or exists(name) or forbidden & _look_alike_keys(name):
                    continue
                taken.add(_spelling(name))
                chosen.append(name)
                break
    return chosen
