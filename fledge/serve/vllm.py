"""vLLM's own server for a model directory, as a process behind ours: started, awaited, ended.

Flags and addresses are those of `vllm serve` in version 0.32. It listens on a socket's file in a directory
that only this user can enter: its key guards /v1 and a few others, and more paths than those make text.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fledge.engine.products import WeightsName
from fledge.errors import UserError
from fledge.evals.readers import verdicts
from fledge.serve import tied
from fledge.serve.models import is_reward_model
from fledge.serve.relay import Endpoint
from fledge.tokenizer.bpe import Tokenizer

# What a process has to end before it is ended by force.
END_SECONDS = 15.0
# The part of a GPU's memory that vLLM takes; several share it.
MEMORY = 0.9
DTYPES: dict[WeightsName, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Flags on which the way to it depends.
OURS = (
    "--host", "--port", "--uds", "--api-key", "--served-model-name", "--config", "--headless", "--root-path",
    "--ssl-keyfile", "--ssl-certfile",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How vLLM is to run; what is None is left to it."""

    program: str
    weights: WeightsName | None = None
    context: int | None = None
    rows: int | None = None
    answer_tokens: int | None = None
    device: str = "auto"
    share: int = 1
    """How many models share the GPU."""
    flags: str = ""


def find_program(name: str) -> str:
    """Where the program is: beside this Python, as the extra puts it, or on PATH, or at a path. Raises
    UserError if it isn't."""
    beside = shutil.which(name, path=os.path.dirname(sys.executable)) if os.sep not in name else None
    found = beside or shutil.which(name)
    if found is None:
        raise UserError(
            f"--engine vllm: there is no program {name!r} here; pip install 'fledge[vllm]', "
            "or name one of another environment: --vllm DIR/bin/vllm"
        )
    return os.path.abspath(found)


def check_directory(name: str, directory: Path) -> list[str]:
    """What may keep vLLM from serving a directory. Raises UserError for what it cannot read."""
    what, found = verdicts(directory)
    refused = f"--model {name}: vLLM cannot serve {directory}"
    if found["vLLM"].no:
        raise UserError(f"{refused}: {found['vLLM'].no[0]}")
    if what.startswith("an adapter"):
        raise UserError(f"{refused}: it is {what}; make one model of it and its base with fledge merge")
    if is_reward_model(directory):
        raise UserError(f"{refused}: it is {what}, whose scores fledge serve gives without --engine vllm")
    return found["vLLM"].unsure


def flags_for(name: str, directory: Path, wishes: Wishes, socket_file: Path) -> list[str]:
    """What `vllm` is called with. Raises UserError for a flag of the user's that is ours to set."""
    flags = ["serve", str(directory.resolve()), "--served-model-name", name, "--uds", str(socket_file)]
    flags += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]  # our defaults, and our log
    flags += ["--max-model-len", "auto" if wishes.context is None else str(wishes.context)]
    flags += ["--dtype", "auto" if wishes.weights is None else DTYPES[wishes.weights]]
    if wishes.rows is not None:
        flags += ["--max-num-seqs", str(wishes.rows)]
    if wishes.answer_tokens is not None:
        flags += ["--override-generation-config", json.dumps({"max_new_tokens": wishes.answer_tokens})]
    if wishes.share > 1:
        flags += ["--gpu-memory-utilization", f"{MEMORY / wishes.share:.3f}"]
    template = Tokenizer.load(directory).chat_template
    if template is not None and "<tool_call>" in template:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    try:
        more = shlex.split(wishes.flags)
    except ValueError as error:
        raise UserError(f"--vllm-flags: {error}") from None
    for flag in more:
        given = flag.partition("=")[0].replace("_", "-")
        if len(given) > 2 and any(one.startswith(given) for one in OURS):  # a short form is one too
            raise UserError(f"--vllm-flags {given}: fledge serve sets this itself")
    return flags + more


def environment_for(key: str, device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The process's environment: the key that it asks for, no reports of use to its makers, and of GPUs only
    `cuda:INDEX`. Raises UserError for a device that isn't ours to choose."""
    made = {"VLLM_NO_USAGE_STATS": "1", **environ, "VLLM_API_KEY": key, "PYTHONUNBUFFERED": "1"}
    kind, colon, index = device.partition(":")
    if kind not in ("auto", "cuda") or (colon and not index.isdecimal()):
        raise UserError(f"--device {device}: vLLM runs on what it was built for; auto, cuda or cuda:INDEX")
    if colon:
        visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if visible != [""] and int(index) >= len(visible):
            raise UserError(f"--device {device}: CUDA_VISIBLE_DEVICES names {len(visible)}")
        made["CUDA_VISIBLE_DEVICES"] = index if visible == [""] else visible[int(index)]
    return made


class VllmProcess:
    """A vLLM for one model. What it writes is told line by line; `when_ended` is called once it has ended."""

    def __init__(self, name: str, directory: Path, wishes: Wishes, tell: Callable[[str], None]) -> None:
        """Starts it, from the main thread: the system ends it with the thread that started it."""
        self.name, self.tell, self.key = name, tell, secrets.token_urlsafe(32)
        self.when_ended: Callable[[], None] = _nothing
        environment = environment_for(self.key, wishes.device, os.environ)
        self.place = Path(tempfile.mkdtemp(prefix="fledge-vllm-"))  # only this user may enter
        self.lines: deque[str] = deque(maxlen=3)
        try:
            flags = flags_for(name, directory, wishes, self.socket_file)
            self.process = subprocess.Popen(
                [sys.executable, "-I", tied.__file__, str(os.getpid()), wishes.program, *flags],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,  # Ctrl-C is for us alone
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(self.place, ignore_errors=True)
            raise
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def socket_file(self) -> Path:
        """Where it listens."""
        return self.place / "socket"

    @property
    def has_ended(self) -> bool:
        """Whether it is there no more."""
        return self.process.poll() is not None

    def ended(self) -> UserError:
        """What to tell of one that ended by itself, with its last lines."""
        code, lines = self.process.wait(), " / ".join(self.lines) or "it wrote nothing"
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return UserError(f"--model {self.name}: vLLM {how}: {lines[:600]}")

    def ready(self, seconds: float) -> Endpoint:
        """Waits until it serves. Raises UserError if it ends before, or takes longer."""
        deadline, pause = time.monotonic() + seconds, 0.05
        while not is_healthy(self.socket_file):
            if self.has_ended:
                self.reader.join(1.0)  # its last lines
                raise self.ended()
            if time.monotonic() > deadline:
                raise UserError(
                    f"--start-seconds {seconds:g}: vLLM has not begun to serve {self.name} in that time"
                )
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        return Endpoint("http://vllm/v1", self.key, socket_file=self.socket_file)

    def terminate(self) -> None:
        """Ask it to end."""
        if not self.has_ended:
            self.process.terminate()

    def close(self) -> None:
        """End it and what it started, by force if need be."""
        self.when_ended = _nothing
        try:
            self.terminate()
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.tell(f"{self.name}: vLLM did not end in {END_SECONDS:g} s, it is ended by force")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join(1.0)
            shutil.rmtree(self.place, ignore_errors=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if text := line.strip():
                    self.lines.append(text)
                    self.tell(f"{self.name}: {text}")

    def _wait(self) -> None:
        self.process.wait()
        self.when_ended()


def is_healthy(socket_file: Path) -> bool:
    """Whether a server that listens there says at /health that it can work."""
    with socket.socket(socket.AF_UNIX) as way, suppress(OSError):
        way.settimeout(10.0)
        way.connect(str(socket_file))
        way.sendall(b"GET /health HTTP/1.1\r\nHost: vllm\r\nConnection: close\r\n\r\n")
        with way.makefile("rb") as answer:
            return answer.readline().split()[1:2] == [b"200"]
    return False


def close_all(processes: Sequence[VllmProcess]) -> None:
    """End them at the same time."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.close()


def _nothing() -> None:
    pass
