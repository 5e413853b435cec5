"""Becomes another program that the system ends (SIGTERM) when the process that started it ends, however.

Run as a file: `python tied.py PARENT PROGRAM ARGUMENT...`, where PARENT is the number of that process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Ask for the signal, which outlives the change of program, and change."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        raise SystemExit("the process that wanted this one has ended")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
