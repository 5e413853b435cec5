"""fledge's verbs as the commands a user would give: how they are called from here, shown, and waited for."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from fledge.errors import UserError


def program() -> str:
    """How this program is called from here: by its name only if the shell finds it."""
    if shutil.which("fledge"):
        return "fledge"
    called = Path(sys.argv[0])
    return str(called) if called.name == "fledge" else f"{sys.executable} -m fledge"


def run_verb(console: Console, verb: str, **settings: Any) -> None:
    """Show a verb as the command a user would give, and run it; its own errors are shown by itself.

    `settings` are its flags: a list stands for several values, True for none. Raises UserError if it fails,
    KeyboardInterrupt if it is interrupted.
    """
    flags: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    shown = " ".join(map(shlex.quote, flags)).replace("\n", "\\n")
    console.print(f"\n$ fledge {verb} {shown}", style="bold", highlight=False, markup=False, soft_wrap=True)
    code = wait_for([sys.executable, "-m", "fledge", verb, *flags])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"the step `fledge {verb}` failed; what is done is kept: run the same command again")


def wait_for(command: list[str]) -> int:
    """Run a command and return its exit status; a request to end (SIGTERM, SIGHUP) that only this process
    gets is passed on, and the end waited for. Raises KeyboardInterrupt then, and on Ctrl-C."""
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if process is not None:
            process.terminate()  # whichever the signal was: at this one a training saves what it has

    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = subprocess.Popen(command)
        if asked:  # before there was a process to pass it on to
            process.terminate()
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too: let it save what it has
        if process is not None:
            process.wait()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
    return code
