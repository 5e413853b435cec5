"""The command line: `fledge VERB [--flags]` runs `fledge/stages/VERB.py`, imported only when called.

A verb may have a second word (`data inspect`); such a stage has several settings classes and functions.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import fledge
from fledge.errors import UserError

VERBS: dict[str, str] = {
    "demo": "all of it on text that every Python installation carries",
    "data inspect": "show what a mixture of sources holds and what a run would read of it",
    "data prepare": "clean sources: duplicates, bad quality, personal data, evaluation texts",
    "tokenizer": "learn a byte-level BPE tokenizer from text",
    "pretrain": "train a base model on text",
    "sft": "fine-tune a model on conversations",
    "reward": "train a reward model on preferences, and examine it",
    "dpo": "train a model on preferences directly",
    "ppo": "train a model by reinforcement learning from a reward",
    "grpo": "train a model on a task that a program can check",
    "score": "give conversations the rewards of a reward model",
    "task addition": "write reversed addition: problems, worked examples, tests",
    "task countdown": "write Countdown: problems, worked searches, tests",
    "task tictactoe": "write tic-tac-toe: boards, a weak player's games, tests",
    "task check": "verify completions of a task",
    "task play": "follow every line of tic-tac-toe that a model plays",
    "label": "collect what people write, rate and rank, in a browser",
    "label export": "write labels as data to train on",
    "label import": "read labels that others made",
    "generate": "continue a text",
    "chat": "talk with a model",
    "serve": "models behind an OpenAI-compatible address, and a chat page",
    "inspect": "show what a model expects, token by token",
    "evaluate": "measure a model on texts, questions and tasks",
    "merge": "take an adapter into the weights of its model",
    "plan": "say on paper what training would take on many GPUs",
    "doctor": "show what this machine offers, or which programs can read a model",
}

# Verbs that several processes may run together, started by torchrun.
ON_RANKS = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")

# What the shell reports for a process that the signal ended.
INTERRUPTED = 130
BROKEN_PIPE = 141


def usage() -> str:
    """Return the overview that `fledge --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return f"""\
Usage: fledge VERB [--flags]

Raise a language model from raw text to an aligned assistant.

{verbs}

fledge VERB --help lists a verb's flags; --config FILE.toml takes them from a file.
--debug shows where an error came from. --version prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr and code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"fledge {fledge.__version__}")
        return 0
    verb, flags = _split_verb(argv)
    name = f"fledge {verb}" if verb in VERBS else "fledge"
    try:
        _run(verb, flags)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def entry() -> NoReturn:
    """Run the process's command and exit: the `fledge` script."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    if _ranks() > 1:  # the threads of torch.distributed now and then abort a process that ends slowly
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def command(verb: str) -> tuple[Any, Callable[[Any], None]]:
    """The settings class of a verb, and the function that runs it."""
    module, _, action = verb.partition(" ")
    stage = importlib.import_module(f"fledge.stages.{module}")
    if action:
        config_class, run = stage.ACTIONS[action]
        return config_class, run
    return stage.Config, stage.main


def _split_verb(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The verb and its flags; what follows a two-word verb without a flag is `--data`, `doctor` `--model`."""
    two = " ".join(argv[:2])
    if argv[0] == "doctor" and len(argv) > 1 and not argv[1].startswith("-"):
        return "doctor", ["--model", *argv[1:]]
    if two not in VERBS:
        return argv[0], argv[1:]
    flags = argv[2:]
    return two, flags if not flags or flags[0].startswith("-") else ["--data", *flags]


def _run(verb: str, flags: Sequence[str]) -> None:
    # Imported here, so that the overview is printed at once.
    from fledge.config import nearest, parse

    actions = [name for name in VERBS if name.startswith(f"{verb} ")]
    if actions and verb not in VERBS:
        if flags and flags[0] in ("-h", "--help"):
            print("\n".join(f"fledge {name}: {VERBS[name]}" for name in actions))
            return
        raise UserError(f"one of {', '.join(actions)}; see fledge {actions[0]} --help")
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}; the nearest is {nearest(verb, VERBS)!r}, see fledge --help")
    config_class, run = command(verb)
    try:
        if _ranks() > 1 and verb not in ON_RANKS:
            raise UserError("runs in one process: start it without torchrun")
        config = parse(config_class, verb, flags)
    except UserError:
        if os.environ.get("RANK", "0") != "0":  # all ranks have the same to say: the first does
            sys.exit(2)
        raise
    if config is None:
        return
    try:
        run(config)
    except Exception as error:
        if _is_disk_full(error):
            place = getattr(error, "filename", None) or getattr(config, "out", None) or os.getcwd()
            message = f"disk full: {place}; free room and run the same command again"
            raise UserError(message) from error
        if isinstance(error, OSError) and error.errno in _USERS_FILES and error.filename is not None:
            raise UserError(
                f"{error.filename}: {error.strerror}; check the path and its permissions"
            ) from error
        raise


def _ranks() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# What is wrong with a path that the user named, or with where it lies.
_USERS_FILES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def _is_disk_full(error: Exception) -> bool:
    # safetensors keeps the operating system's error only as text.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)
