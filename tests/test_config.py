"""Settings as dataclass, TOML and flags: the three say the same, and a mistake is named."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from fledge.cli import VERBS, command
from fledge.config import describe, field_texts, from_toml, nearest, parse, to_toml
from fledge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fly."""

    data: tuple[str, ...]
    """Files to read,
    one or more."""
    out: Path = Path("runs/fly")
    """Where to."""
    learning_rate: float | None = None
    """How fast."""
    steps: int = 10
    """How long."""
    wing: Literal["left", "right"] = "left"
    """Which one."""
    overwrite: bool = False
    """Replace."""
    stop: tuple[str, ...] = ()


def fly(*argv: str) -> Config:
    config = parse(Config, "fly", argv)
    assert config is not None
    return config


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fly.toml"
    path.write_text(text, encoding="utf-8")
    return path


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type may have; no None, which TOML lacks."""
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if NoneType in get_args(hint):
        return st.one_of([values_of(arg) for arg in get_args(hint) if arg is not NoneType])
    if hint is Path:
        return st.text().map(Path)
    if hint is float:
        return st.floats(allow_nan=False)
    return st.from_type(hint)


@pytest.mark.parametrize("verb", VERBS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_stage_survives_toml_and_flags(verb: str, tmp_path: Path, data: st.DataObject) -> None:
    config_class, _ = command(verb)
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    chosen = {*required, *data.draw(st.sets(st.sampled_from([field.name for field in fields])))}
    values = {name: data.draw(values_of(hints[name]), label=name) for name in sorted(chosen)}
    try:
        config = config_class(**values)
    except UserError:
        reject()
    path = toml(tmp_path, to_toml(config))
    assert from_toml(config_class, path) == config
    assert parse(config_class, verb, ["--config", str(path)]) == config


@pytest.mark.parametrize("verb", VERBS)
def test_what_toml_leaves_out_is_the_default(verb: str) -> None:
    """TOML has no None: a setting that may be None must have it as its default."""
    config_class, _ = command(verb)
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if NoneType in get_args(hints[field.name]):
            assert field.default is None, field.name


@pytest.mark.parametrize("verb", VERBS)
def test_no_setting_takes_the_name_of_a_flag_of_every_verb(verb: str) -> None:
    config_class, _ = command(verb)
    names = {field.name for field in dataclasses.fields(config_class)}
    assert not names & {"config", "debug", "help", "version"}


def test_toml_reads_as_people_write_it() -> None:
    text = to_toml(Config(data=("a.txt", "b.txt"), out=Path("runs/x"), steps=3))
    assert 'out = "runs/x"' in text
    assert "steps = 3" in text
    assert "overwrite = false" in text
    assert "learning_rate" not in text


def test_flags_take_several_values_at_once_or_repeated() -> None:
    assert fly("--data", "a", "b", "--data", "c", "--steps", "2").data == ("a", "b", "c")
    assert fly("--data=a", "--data=b").data == ("a", "b")


def test_flags() -> None:
    config = fly("--data", "a", "--learning-rate", "3e-4", "--out", "x", "--wing", "right", "--overwrite")
    assert config == Config(
        data=("a",), learning_rate=3e-4, out=Path("x"), wing="right", overwrite=True, steps=10
    )


def test_a_value_may_start_with_a_hyphen() -> None:
    config = fly("--data", "-", "--stop", "- a", "b", "-x", "c", "--steps", "-1", "--learning-rate=-2")
    assert config == Config(data=("-",), stop=("- a", "b", "-x", "c"), steps=-1, learning_rate=-2)
    assert fly("--data", "a", "-", "--overwrite").data == ("a", "-")


def test_a_value_with_two_hyphens_needs_an_equals_sign() -> None:
    assert fly("--data=--x", "--stop=--").stop == ("--",)
    with pytest.raises(UserError, match="--out=VALUE"):
        fly("--data", "a", "--out", "--x")


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'data = ["a", "b"]\nsteps = 5\noverwrite = true\nlearning_rate = 1\n')
    config = fly("--config", str(path), "--data", "c", "--steps=6", "--no-overwrite")
    assert config == Config(data=("c",), steps=6, overwrite=False, learning_rate=1.0)
    assert isinstance(config.learning_rate, float)
    assert fly(f"--config={path}") == Config(data=("a", "b"), steps=5, overwrite=True, learning_rate=1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data"),
        (["--data"], "--data"),
        (["a.txt"], "--data"),
        (["--data", "a", "--", "b"], "'b'"),
        (["-x", "--data", "a"], "-x"),
        (["--data", "a", "--overwrite", "-x"], "--overwrite"),
        (["--data", "a", "--learningrate", "1"], "--learning-rate"),
        (["--data", "a", "--steps", "many"], "--steps"),
        (["--data", "a", "--steps", "1.5"], "--steps"),
        (["--data", "a", "--steps", "1", "--steps", "2"], "--steps"),
        (["--data", "a", "--steps"], "--steps"),
        (["--data", "a", "--wing", "middle"], "right"),
        (["--data", "a", "--empty-stop"], "--empty-stop"),
        (["--data", "a", "--version"], "--version"),
        (["--config"], "--config FILE.toml"),
        (["--config", "a.toml", "--config", "b.toml"], "twice"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_a_wrong_command_is_one_line_that_names_the_flag(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        fly(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data = ["a"]\n\nlearning_rat = 1\n', "fly.toml:3: unknown setting 'learning_rat'.*'learning_rate'"),
        ('data = ["a"]\n[wings]\nx = 1\n', "fly.toml:2: unknown setting 'wings'.*'wing'"),
        ('steps = "many"\n', "fly.toml:1: 'steps' must be: whole number; not 'many'"),
        ("steps = 1.5\n", "fly.toml:1: 'steps'"),
        ("steps = true\n", "fly.toml:1: 'steps'"),
        ("learning_rate = true\n", "fly.toml:1: 'learning_rate' must be: number"),
        ("overwrite = 1\n", "fly.toml:1: 'overwrite' must be: true or false"),
        ('data = "a"\n', "fly.toml:1: 'data' must be: list of texts; not 'a'"),
        ('data = ["a", 1]\n', "fly.toml:1: 'data'"),
        ('wing = "middle"\n', "fly.toml:1: 'wing' must be: left or right"),
        ("out = 1\n", "fly.toml:1: 'out' must be: path"),
        ("steps = 1\n", "fly.toml: 'data' is missing"),
        ("steps = \n", "fly.toml: not valid TOML.*line 1"),
    ],
)
def test_a_wrong_file_is_named_with_its_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_toml(Config, toml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_an_error_under_its_flag_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fly\.toml:1: unknown setting 'step'.*'steps'"):
        fly("--data", "a", "--config", str(toml(tmp_path, "step = 1\n")))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        from_toml(Config, tmp_path / "none.toml")
    with pytest.raises(UserError, match="Is a directory"):
        from_toml(Config, tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b'data = ["\xe9"]\n')
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8"):
        from_toml(Config, path)


def test_help_is_printed_and_gives_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(Config, "fly", ["--help"]) is None
    printed = capsys.readouterr().out
    assert "Usage: fledge fly --data" in printed
    assert "Files to read" in printed
    assert "--config FILE.toml" in printed
    for absent in ("--empty", "--version", "DATA"):
        assert absent not in printed


def test_texts_under_the_fields() -> None:
    texts = field_texts(Config)
    assert texts["data"] == "Files to read, one or more."
    assert texts["stop"] == ""
    assert list(texts) == [field.name for field in dataclasses.fields(Config)]


def test_types_in_words() -> None:
    hints = get_type_hints(Config)
    assert {name: describe(hint) for name, hint in hints.items()} == {
        "data": "list of texts",
        "out": "path",
        "learning_rate": "number",
        "steps": "whole number",
        "wing": "left or right",
        "overwrite": "true or false",
        "stop": "list of texts",
    }


def test_the_nearest_name_is_named_however_far() -> None:
    assert nearest("pretrian", VERBS) == "pretrain"
    assert nearest("???", VERBS) in VERBS
