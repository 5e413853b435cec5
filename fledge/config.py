"""A stage's settings: a frozen dataclass, and the same as TOML and as command-line flags."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import tomllib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from fledge.errors import UserError


class Dataclass(Protocol):
    """What every stage's `Config` is."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


C = TypeVar("C", bound=Dataclass)


def parse(config_class: type[C], verb: str, argv: Sequence[str]) -> C | None:
    """Build the stage's settings from `argv`, where `--config FILE.toml` gives values that flags override.

    None when help was asked for, and printed. Raises UserError on a wrong flag, value, file or key.
    """
    # Imported here: reading and writing TOML must not cost the start-up of a command-line library.
    from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, UnusedCliTokensError
    from cyclopts.argument import ArgumentCollection

    flags, file = _take_config_flag(_join_hyphens(argv))
    hints = get_type_hints(config_class)

    def fill_from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        values = {} if file is None else read_toml(config_class, file)
        for argument in arguments:
            name = argument.field_info.name
            for token in argument.tokens:
                # cyclopts would round it.
                if "." in token.value and describe(hints[name]) == "whole number":
                    raise UserError(f"{argument.name} must be a whole number, not {token.value!r}")
            if name in values and not argument.tokens:
                argument.append(Token(source=str(file), implicit_value=values[name]))

    app = App(
        name=f"fledge {verb}",
        help=config_class.__doc__ or "",
        help_epilogue="--config FILE.toml takes settings from a file; flags override it.",
        version_flags=[],
        # At least one value after a flag that takes several; a default cannot be emptied by a flag.
        default_parameter=Parameter(consume_multiple=(1, None), negative_iterable=()),
        config=fill_from_file,
        result_action="return_value",
    )
    app["--help"].group = app.group_parameters
    app.default(config_class)
    try:
        config: C | None = app(flags, exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        stray = " ".join(error.unused_tokens or flags)
        raise UserError(f"unexpected {stray!r}: settings are flags, see fledge {verb} --help") from error
    except CycloptsError as error:
        message = " ".join(str(error).split())
        flag = error.argument.name if isinstance(error, MissingArgumentError) and error.argument else ""
        if flag in flags and flags.index(flag) + 1 < len(flags):
            message += f" A value that starts with '--' is written {flag}=VALUE."
        raise UserError(f"{message} See fledge {verb} --help") from error
    return config


def to_toml(config: Dataclass) -> str:
    """Write settings as TOML: paths as strings, tuples as arrays; a setting that is None is left out."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return tomli_w.dumps({name: _plain(value) for name, value in values.items() if value is not None})


def from_toml(config_class: type[C], path: Path) -> C:
    """Read settings from a TOML file; what it leaves out has its default.

    Raises UserError, naming file, line and key, on an unknown key, a wrong type or a missing setting.
    """
    values = read_toml(config_class, path)
    for field in dataclasses.fields(config_class):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in values and not optional:
            raise UserError(f"{path}: {field.name!r} is missing; add {field.name} = ...")
    return config_class(**values)


def read_toml(config_class: type[Dataclass], path: Path) -> dict[str, Any]:
    """Read the settings that a TOML file has, by name, each in its field's type. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; a settings file is TOML") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings file: {error.strerror}") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    hints = get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {}
    for key, value in table.items():
        place = f"{path}:{_line_of(key, text)}"
        if key not in names:
            raise UserError(f"{place}: unknown setting {key!r}; the nearest is {nearest(key, names)!r}")
        try:
            values[key] = _typed(value, hints[key])
        except TypeError as error:
            raise UserError(f"{place}: {key!r} must be: {describe(hints[key])}; not {value!r}") from error
    return values


def check_at_least(config: Dataclass, least: int, *names: str) -> None:
    """Raise UserError, naming the flag, for the first of these settings that is set and below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_positive(config: Dataclass, *names: str) -> None:
    """Raise UserError, naming the flag, for the first of these settings that is set and no number above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above 0")


def check_share(config: Dataclass, name: str) -> None:
    """Raise UserError, naming the flag, if a share is below 0, or is the whole."""
    if not 0 <= getattr(config, name) < 1:
        value = getattr(config, name)
        raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of `names` that is most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def describe(hint: Any) -> str:
    """Say in words what a field of this type takes: `true or false`, `whole number`, `list of paths`..."""
    if _is_union(hint):
        return " or ".join(describe(arg) for arg in get_args(hint) if arg is not types.NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"list of {describe(get_args(hint)[0])}s"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return words[hint]


def field_texts(config_class: type[Dataclass]) -> dict[str, str]:
    """Return the text under each field, on one line, by the field's name; "" where there is none."""
    texts = {field.name: "" for field in dataclasses.fields(config_class)}
    (class_body,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(class_body, ast.ClassDef)
    for field, below in itertools.pairwise(class_body.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts


def _join_hyphens(argv: Sequence[str]) -> list[str]:
    """Join a value that starts with one hyphen, as "-" or "- item", to its flag with "=".

    Every flag but -h has two hyphens, so it must be a value; cyclopts would look for such a flag.
    """
    joined: list[str] = []
    flag = ""
    for arg in argv:
        if arg.startswith("--"):
            flag = arg.partition("=")[0]
        elif arg.startswith("-") and arg != "-h" and flag:
            if joined[-1] == flag:
                joined.pop()
            arg = f"{flag}={arg}"
        joined.append(arg)
    return joined


def _take_config_flag(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` or `--config=FILE` off the flags."""
    flags: list[str] = []
    file: Path | None = None
    rest = iter(argv)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name != "--config":
            flags.append(flag)
        elif file is not None:
            raise UserError("--config is given twice; one file holds all settings")
        elif not (value := value if equals else next(rest, "")):
            raise UserError("--config needs a file: --config FILE.toml")
        else:
            file = Path(value)
    return flags, file


def _typed(value: Any, hint: Any) -> Any:
    """Return a value out of TOML in the type of its field. Raises TypeError where it does not fit."""
    if _is_union(hint):
        for arg in get_args(hint):
            try:
                return _typed(value, arg)
            except TypeError:
                continue
    elif get_origin(hint) is Literal:
        # The type too: True == 1 in Python.
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_typed(item, get_args(hint)[0]) for item in value)
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        if type(value) in (int, float):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError(f"{value!r} is not {hint}")


def _plain(value: Any) -> Any:
    """Return a field's value as TOML has it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _line_of(key: str, text: str) -> int:
    """Return the line of a top-level key or table, counted from 1."""
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines, start=1) if pattern.match(line)), 1)
