"""Facts for the demo: public names of the standard library with a one-line summary, read from source.

Nothing is imported or executed: modules are parsed with `ast`. A fact's name is the shortest dotted
form under which people write it (`asyncio.gather`, not `asyncio.tasks.gather`), so re-exports are
followed from the packages to the definitions.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import math
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from fledge.errors import UserError

Kind = Literal["module", "class", "function", "method", "property"]
Split = Literal["sft", "preference", "test"]
SPLIT_SHARES: dict[Split, float] = {"sft": 0.62, "preference": 0.08, "test": 0.30}

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "idlelib", "lib2to3", "msilib", "encodings"}
_SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "lib-dynload", "_bundled", "pydoc_data", "__pycache__"}
# Jokes, and modules for another system or of this installation.
_SKIPPED_MODULES = {"antigravity", "this", "__hello__", "ntpath", "nturl2path"}
_SKIPPED_MODULES |= {"sitecustomize", "usercustomize"}
_NOT_WRITTEN_BY_PEOPLE = {"genericpath", "sre_compile", "sre_constants", "sre_parse"}
# A module written in C has its docstrings in its twin written in Python.
_PYTHON_TWINS = {"_io": "_pyio", "_decimal": "_pydecimal", "_datetime": "_pydatetime"}
_RENAMED = {"posixpath": "os.path"}
# turtle makes functions of these classes' methods when it is imported.
_TURTLE_CLASSES = ("TNavigator", "TPen", "RawTurtle", "TurtleScreenBase", "TurtleScreen", "_Screen")
_KIND_WEIGHTS: dict[Kind, float] = {
    "module": 8.0,
    "function": 4.0,
    "class": 3.0,
    "method": 1.0,
    "property": 1.0,
}


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but the parts: the same in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Fact:
    """A public name with what its documentation says of it in one line.

    `signature` is "(text, width=70)" for what can be called, "" otherwise; `module` is where people
    import it from; `source_line` is the line of its definition.
    """

    name: str
    kind: Kind
    signature: str
    summary: str
    module: str
    source_line: int | None = None


@dataclass
class SourceModule:
    """One parsed file of the standard library."""

    name: str
    path: str
    is_package: bool
    text: str
    tree: ast.Module = field(repr=False)

    @property
    def is_public(self) -> bool:
        """Whether people import it by this name."""
        return not _is_private(self.name) and self.name not in _NOT_WRITTEN_BY_PEOPLE

    @cached_property
    def definitions(self) -> dict[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
        """Functions and classes at the top level, also inside `if` and `try`."""
        nodes = statements(self.tree.body)
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found: dict[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = {}
        for node in nodes:
            if isinstance(node, kinds):
                found.setdefault(node.name, node)
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Local name -> (module, name there), for `from module import name`; "*1", "*2" for stars."""
        found: dict[str, tuple[str, str]] = {}
        for node in statements(self.tree.body):
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(node)
                for alias in node.names:
                    local = f"*{len(found)}" if alias.name == "*" else alias.asname or alias.name
                    found.setdefault(local, (source, alias.name))
        return found

    @cached_property
    def exported(self) -> frozenset[str] | None:
        """The names listed in `__all__`, as far as they are written literally; None without one."""
        names: set[str] = set()
        listed = False
        for node in statements(self.tree.body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                listed = True
                names |= _strings(node)
        return frozenset(names) if listed else None

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*base, *([node.module] if node.module else [])])


def _is_private(dotted: str) -> bool:
    return any(part.startswith("_") for part in dotted.split("."))


def _strings(node: ast.AST) -> set[str]:
    return {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those inside its `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue  # what only a script defines
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from statements(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without the cyclic collector, which would look through all syntax trees again and again (4x slower)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_library(root: Path | None = None) -> dict[str, SourceModule]:
    """Parse the standard library (or `root`), sorted by path; name -> module. UserError if there is none."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    with collector_paused():
        modules = [module for path in paths if (module := _read_module(root, path)) is not None]
    if not modules:
        raise UserError(f"no Python source in {root}: install Python with its library's .py files")
    return {module.name: module for module in modules}


def _read_module(root: Path, path: Path) -> SourceModule | None:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    if not name or name in _SKIPPED_MODULES or name.startswith("_sysconfigdata"):
        return None
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):  # ValueError: not UTF-8, or null bytes
        return None  # a file this Python cannot read is no part of the corpus
    return SourceModule(_RENAMED.get(name, name), relative.as_posix(), is_package, text, tree)


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith(("config-", ".")):
                yield from _python_files(entry)
        elif entry.suffix == ".py":
            yield entry


# --- summaries and signatures ---------------------------------------------------------------------

_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\.k\.a)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\s\w)[.!?](?=\s|$)"
)
_STOP_LINE = re.compile(
    r"^\s*([-*+@:]|\d+\.|>>>|Args?:|Arguments|Parameters|Returns?:|Usage|Example|===|---)"
)
_CALLED = re.compile(r"(?:\w+\.)*(\w+)\s*\(")
_TITLED = re.compile(r"(?:\w+\.)*?(\w+)(?:\.py)?\s*(?:--?|:)\s+")
_ROLE = re.compile(r":\w+(?::\w+)?:`~?\.?([^`<]*?)(?:\s*<[^`>]*>)?`")
_BAD_TEXT = re.compile(
    r"->|::|>>>|\bXXX|TODO|FIXME|\$|Copyright|https?:|\\|\bself\b|[|{}<>]|\[|\bsee \b|\bPEP\b"
    r"|^(this|that) (is|method|function|class)"
    r"|^(internal|private|obsolete|deprecated|undocumented|helper|ditto|likewise|called (by|from)|callback)\b"
    r"|^(don't|do not|not|but|and|or|also|used by|test|see|note|warning|override)\b"
    r"|^overrid|^initializ(e|er) \w+\.$"
    r"|\bdeprecated\b|\bhack\b|\b(foo|bar|spam)\b|=\s|\?$",
    re.IGNORECASE,
)


def summarize(docstring: str, last_name: str) -> str | None:
    """The first sentence of a docstring, cleaned of marks; None if it is no good one-line answer.

    3 to 14 words, at most 100 characters, printable ASCII, ends with a full stop.
    """
    for paragraph in re.split(r"\n\s*\n", docstring.strip())[:2]:
        lines = paragraph.strip().splitlines()
        called = _CALLED.match(lines[0]) if lines else None
        if lines and ("->" in lines[0] or (called and called[1] == last_name)):
            lines = lines[1:]  # a signature; the summary follows it
        if not lines:
            continue
        kept = lines[:1]
        for line in lines[1:]:
            if _STOP_LINE.match(line):
                break
            kept.append(line)
        return _clean(" ".join(kept), last_name)
    return None


def _clean(text: str, last_name: str) -> str | None:
    text = re.sub(r"\s*<https?://[^>]*>", "", text)
    text = _ROLE.sub(r"\1", text).replace("`", "")
    text = re.sub(r"(?<![\w*])\*{1,2}(\w[\w ]*?)\*{1,2}(?![\w*])", r"\1", text)
    text = " ".join(text.split())
    titled = _TITLED.match(text)
    if titled and titled[1].lower() == last_name.lower():
        text = text[titled.end() :]
    end = _SENTENCE_END.search(text)
    text = text[: end.start()] + text[end.start() : end.end()] if end else text
    if not text or text[-1] in ":,;-(" or text.endswith("..."):
        return None
    text = text if text[-1] in ".!?" else text + "."
    words = text.split()
    if (
        not 3 <= len(words) <= 14
        or len(text) > 100
        or not text.isascii()
        or not text.isprintable()
        or not text[0].isalpha()
    ):
        return None
    unbalanced = any(text.count(a) != text.count(b) for a, b in ("()", "[]")) or text.count('"') % 2
    wordy = sum(word.strip(".,()'\"").isalpha() for word in words) / len(words)
    if unbalanced or wordy < 0.6 or _BAD_TEXT.search(text):
        return None
    return text[0].upper() + text[1:] if words[0].isalpha() else text


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> str:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    shown = [
        a.arg if d is None else f"{a.arg}={ast.unparse(d)}" for a, d in zip(positional, defaults, strict=True)
    ]
    shown = shown[1:] if bound else shown
    if args.vararg or args.kwonlyargs:
        shown.append(f"*{args.vararg.arg}" if args.vararg else "*")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        shown.append(arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}")
    if args.kwarg:
        shown.append(f"**{args.kwarg.arg}")
    while len(", ".join(shown)) > 60:
        shown = [*shown[: max(len(shown) - 2, 0)], "..."] if len(shown) > 1 else ["..."]
    return f"({', '.join(shown)})"


# --- public names ---------------------------------------------------------------------------------


def _origin(
    modules: dict[str, SourceModule], module: str, name: str, depth: int = 0
) -> tuple[str, str] | None:
    """Where a name of a module is defined, following `from ... import ...`."""
    source = modules.get(module) or modules.get(_PYTHON_TWINS.get(module, ""))
    if source is None or depth > 5:
        return None
    if name in source.definitions:
        return source.name, name
    if name in source.imports:
        return _origin(modules, *source.imports[name], depth + 1)
    for local, (target, _) in source.imports.items():
        if local.startswith("*") and (found := _origin(modules, target, name, depth + 1)):
            return found
    return None


def _public_names(modules: dict[str, SourceModule], module: SourceModule) -> Iterator[str]:
    """What a module offers under its own name: its definitions and what it re-exports."""
    yield from (name for name in module.definitions if not name.startswith("_"))
    for local, (target, _) in module.imports.items():
        inside = (
            _is_private(target) or target in _NOT_WRITTEN_BY_PEOPLE or target.startswith(module.name + ".")
        )
        if local.startswith("*"):
            source = modules.get(target) or modules.get(_PYTHON_TWINS.get(target, ""))
            if source is not None and inside:
                names = source.exported if source.exported is not None else source.definitions
                yield from (name for name in sorted(names) if not name.startswith("_"))
        elif not local.startswith("_") and (inside or local in (module.exported or ())):
            yield local


def _bound_methods(module: SourceModule) -> dict[tuple[str, str], str]:
    """(class, method) -> function name, for `instance = Class()` followed by `name = instance.method`."""
    instances: dict[str, str] = {}
    found: dict[tuple[str, str], str] = {}
    for node in statements(module.tree.body):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        target, value = node.targets[0].id, node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            instances[target] = value.func.id
        elif (
            isinstance(value, ast.Attribute)
            and isinstance(value.value, ast.Name)
            and value.value.id in instances
        ):
            found[instances[value.value.id], value.attr] = target
    if module.name == "turtle":
        listed = _strings(module.tree)
        for name in _TURTLE_CLASSES:
            definition = module.definitions.get(name)
            for method in definition.body if definition else []:
                if isinstance(method, ast.FunctionDef) and method.name in listed:
                    found[name, method.name] = method.name
    return {key: name for key, name in found.items() if not name.startswith("_")}


def _shortest(names: Iterable[str]) -> str:
    return min(names, key=lambda name: (name.count("."), len(name), name))


def _class_facts(
    name: str, node: ast.ClassDef, module: str, bound: dict[tuple[str, str], str]
) -> Iterator[Fact]:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    signature = _signature(init, bound=True) if init else ""
    if not _is_private(name):
        yield from _fact(name, "class", signature, node, module)
    for method in statements(node.body):
        if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) or method.name.startswith("_"):
            continue
        decorators = {ast.unparse(d).rsplit(".", 1)[-1] for d in method.decorator_list}
        if decorators & {"setter", "deleter", "overload"}:
            continue
        is_property = bool(
            decorators & {"property", "cached_property", "abstractproperty", "DynamicClassAttribute"}
        )
        shown = "" if is_property else _signature(method, bound="staticmethod" not in decorators)
        if function := bound.get((node.name, method.name)):
            yield from _fact(f"{module}.{function}", "function", shown, method, module)
        elif not _is_private(name):
            yield from _fact(
                f"{name}.{method.name}", "property" if is_property else "method", shown, method, module
            )


def _fact(
    name: str,
    kind: Kind,
    signature: str,
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    module: str,
) -> Iterator[Fact]:
    docstring = ast.get_docstring(node)
    summary = summarize(docstring, name.rsplit(".", 1)[-1]) if docstring else None
    if summary and name.count(".") <= 3 and len(name) <= 60 and not name.endswith(".test"):
        yield Fact(name, kind, signature, summary, module, node.lineno)


def _all_facts(modules: dict[str, SourceModule]) -> Iterator[Fact]:
    known_as: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module in modules.values():
        if not module.is_public:
            continue
        docstring = ast.get_docstring(module.tree)
        if docstring and (summary := summarize(docstring, module.name.rsplit(".", 1)[-1])):
            yield Fact(module.name, "module", "", summary, module.name, 1)
        for name in _public_names(modules, module):
            if origin := _origin(modules, module.name, name):
                known_as[origin].add(f"{module.name}.{name}")
    for module in modules.values():
        bound = _bound_methods(module) if module.is_public else {}
        for name, node in module.definitions.items():
            public = _shortest(known_as[module.name, name]) if known_as[module.name, name] else None
            if public is None and not any(cls == name for cls, _ in bound):
                continue
            home = public.rsplit(".", 1)[0] if public else module.name
            if isinstance(node, ast.ClassDef):
                yield from _class_facts(public or f"{module.name}.{name}", node, home, bound)
            elif public and not any("overload" in ast.unparse(d) for d in node.decorator_list):
                yield from _fact(public, "function", _signature(node, bound=False), node, home)


def find_facts(modules: dict[str, SourceModule], limit: int | None = None) -> list[Fact]:
    """One fact for a name and one for a summary (the shortest name keeps it), sorted by name.

    With `limit`, that many are drawn by hash; modules, functions and classes are likelier than methods.
    """
    by_summary: dict[str, Fact] = {}
    names: set[str] = set()
    for fact in sorted(_all_facts(modules), key=lambda f: (f.name.count("."), len(f.name), f.name)):
        key = " ".join(re.findall(r"\w+", fact.summary.lower()))
        if fact.name not in names and key not in by_summary:
            names.add(fact.name)
            by_summary[key] = fact
    facts = list(by_summary.values())
    if limit is not None and limit < len(facts):
        facts.sort(key=lambda f: -math.log(1.0 - unit_hash("limit", f.name)) / _KIND_WEIGHTS[f.kind])
        facts = facts[:limit]
    return sorted(facts, key=lambda f: f.name)


# --- near-duplicates and splits -------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def near_duplicate_groups(facts: Sequence[Fact], threshold: float = 0.6) -> list[list[Fact]]:
    """Groups of facts whose summaries say nearly the same, largest groups too: connected components.

    Two facts are linked when the Jaccard similarity of their summaries' word sets is at least
    `threshold`, or when their last name parts are equal and their summaries share most words.
    """
    words = [_words(fact.summary) for fact in facts]
    frequency = Counter(word for bag in words for word in bag)
    parent = list(range(len(facts)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    # Two sets with Jaccard >= t share one of the first |x| - ceil(t |x|) + 1 words in any fixed order
    # (prefix filtering); the rarest words first makes the candidate lists short.
    index: dict[str, list[int]] = defaultdict(list)
    last_parts: dict[str, list[int]] = defaultdict(list)
    for i, bag in enumerate(words):
        prefix = sorted(bag, key=lambda word: (frequency[word], word))
        prefix = prefix[: len(bag) - math.ceil(threshold * len(bag)) + 1]
        same_last = last_parts[facts[i].name.rsplit(".", 1)[-1].lower()]
        for j in {j for word in prefix for j in index[word]}:
            if len(bag & words[j]) >= threshold * len(bag | words[j]):
                parent[find(i)] = find(j)
        for j in same_last:
            if 2 * len(bag & words[j]) > min(len(bag), len(words[j])):
                parent[find(i)] = find(j)
        same_last.append(i)
        for word in prefix:
            index[word].append(i)
    groups: dict[int, list[Fact]] = defaultdict(list)
    for i, fact in enumerate(facts):
        groups[find(i)].append(fact)
    return list(groups.values())


def split_facts(facts: Sequence[Fact], seed: int = 0) -> dict[str, Split]:
    """Name -> split; whole near-duplicate groups together, shares as in SPLIT_SHARES."""
    groups = near_duplicate_groups(facts)
    groups.sort(key=lambda group: (len(group) < 10, unit_hash(seed, "split", min(f.name for f in group))))
    sizes: dict[Split, int] = dict.fromkeys(SPLIT_SHARES, 0)
    splits: dict[str, Split] = {}
    for group in groups:  # each group goes where most is missing; the few very large ones come first
        chosen = min(SPLIT_SHARES, key=lambda split: (sizes[split] + len(group)) / SPLIT_SHARES[split])
        sizes[chosen] += len(group)
        splits.update((fact.name, chosen) for fact in group)
    return splits
