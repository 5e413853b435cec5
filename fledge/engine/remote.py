"""A model behind an OpenAI-compatible endpoint, over the same interface as a local one."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import httpx2

from fledge.config import Dataclass
from fledge.engine import answers
from fledge.engine.at_once import as_they_come
from fledge.engine.settings import local_only
from fledge.engine.text import TextCompletion
from fledge.errors import UserError
from fledge.types import Message, SamplingParams

# A text to continue (/completions), or a conversation to answer (/chat/completions).
Asked = str | Sequence[Message]

TRIES = 4
# Of a server that says when it has room again.
BUSY_TRIES = 30
MOST_PARALLEL = 16
JSON = {"content-type": "application/json"}
# Settings that the servers of others do not know, or by other names.
LOCAL_SETTINGS = {
    "top_k", "min_p", "repetition_penalty", "logit_bias", "ban", "min_tokens", "stop_ids", "regex",
    "json_schema", "grammar", "weights", "quantize", "device",
}  # fmt: skip


class EndpointError(UserError):
    """The endpoint gives no answer to anything: it can't be reached, is out of order, or wants a key. (It may
    refuse one conversation and answer others: that is a plain UserError.)"""


class ChatGenerator(Protocol):
    """Conversations in, the assistant's next turns out: `LocalChat` and `RemoteChat` are two."""

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> list[TextCompletion]:
        """`params.n` next turns for each conversation, in the conversations' order."""
        ...

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The next turn piece by piece; closing the iterator cancels the rest."""
        ...


class RemoteChat:
    """Answers conversations with `model` at `endpoint` (as in http://localhost:8000/v1): a `ChatGenerator`.
    Where it is given a text instead of a conversation, it continues it.

    Its completions have no ids and log-probabilities. What an endpoint cannot do is not asked of it: of the
    settings, temperature, top_p, max_tokens, seed, stop and the penalties are sent.
    """

    def __init__(
        self, endpoint: str, model: str, *, key: str | None = None, parallel: int = 4,
        timeout_seconds: float = 300.0, transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """`key` is sent as a bearer token, `parallel` requests at once. UserError for no address."""
        address = endpoint.rstrip("/").removesuffix("/completions").removesuffix("/chat")
        _check_address(address)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.address, self.model, self.parallel, self.sleep = address, model, parallel, sleep
        self._key = key
        self.reached = False  # whether it has ever answered
        self.client = httpx2.Client(headers=headers, timeout=timeout_seconds, transport=transport)
        # Reentrant: a stream that nobody closed may be ended by the garbage collector, wherever that is.
        self._lock = threading.RLock()
        self._under_way, self._closed = 0, False

    def close(self) -> None:
        """Close the connections: at once where nothing is asked, else with the last request under way (a
        stream too), since one that is only now opening its connection would leave it open."""
        with self._lock:
            self._closed = True
            idle = self._under_way == 0
        if idle:
            self.client.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """A request under way."""
        with self._lock:
            if self._closed:
                raise EndpointError(f"{self.address}: the connection was closed before this was asked")
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                last = self._closed and self._under_way == 0
            if last:
                self.client.close()

    def reply(self, asked: Asked, params: SamplingParams) -> TextCompletion:
        """What follows. Raises UserError (EndpointError: see there) when there is none."""
        return answers.completion(self._address(asked), self._post(asked, params), self._key)

    def replies(self, asked: Sequence[Asked], params: SamplingParams) -> list[TextCompletion]:
        """`params.n` completions for each text or conversation, in their order. Each is a request with a seed
        of its own: few servers know `n`."""
        total = len(asked) * params.n
        made: dict[int, TextCompletion] = {}

        def ask(place: int) -> TextCompletion:
            return self.reply(asked[place // params.n], replace(params, n=1, seed=params.seed + place))

        with closing(as_they_come(ask, range(total), min(total, self.parallel))) as found:
            for place, answer in found:
                if isinstance(answer, Exception):
                    raise answer
                made[place] = answer
        return [made[place] for place in range(total)]

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The next turn piece by piece."""
        return self.stream_reply(messages, params)

    def stream_reply(self, asked: Asked, params: SamplingParams) -> Generator[str, None, TextCompletion]:
        """What follows, piece by piece; the whole is the generator's value. Raises as `reply` does."""
        address, text, reason, whole = self._address(asked), "", None, False
        content = self._request(asked, params, stream=True)
        try:
            with self._open(), self.client.stream("POST", address, content=content, headers=JSON) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise UserError(answers.refusal(address, answer, self._key))
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        whole = True
                        break
                    piece, ended = answers.piece(address, data, self._key)
                    text, reason = text + piece, ended or reason
                    if piece:
                        yield piece
        except httpx2.HTTPError as error:
            raise EndpointError(f"{address}: {answers.why(error)}") from None
        if not whole and reason is None:
            raise EndpointError(f"{address}: the answer broke off before its end")
        return TextCompletion(text, [], [], answers.reason(reason))

    def _address(self, asked: Asked) -> str:
        return f"{self.address}/completions" if isinstance(asked, str) else f"{self.address}/chat/completions"

    def _request(self, asked: Asked, params: SamplingParams, stream: bool = False) -> bytes:
        """A request's body. Raises UserError for a text that no UTF-8 can hold."""
        wished = {
            "top_p": params.top_p, "stop": list(params.stop) or None,
            "presence_penalty": params.presence_penalty or None,
            "frequency_penalty": params.frequency_penalty or None, "stream": stream or None,
        }  # fmt: skip
        request = {
            "model": self.model,
            **({"prompt": asked} if isinstance(asked, str) else {"messages": list(asked)}),
            "temperature": params.temperature, "max_tokens": params.max_tokens, "seed": params.seed % 2**31,
            **{name: value for name, value in wished.items() if value is not None},
        }  # fmt: skip
        try:
            return json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("the text has half of a surrogate pair, no valid Unicode; mend it") from None

    def _post(self, asked: Asked, params: SamplingParams) -> Any:
        """The answer to a request; it is sent again where that may help."""
        address, content = self._address(asked), self._request(asked, params)
        for tries in range(1, BUSY_TRIES + 1):
            pause, most = 2.0**tries, TRIES
            kind: type[UserError] = EndpointError
            try:
                with self._open():
                    answer = self.client.post(address, content=content, headers=JSON)
                self.reached = True
                if answer.status_code == 200:
                    return answer.json()
                problem = answers.refusal(address, answer, self._key)
                passing = answer.status_code in answers.PASSING
                if (wished := answers.wished_pause(answer)) is not None:
                    pause, most = wished, BUSY_TRIES
                if not answers.refuses_all(answer.status_code):
                    kind = UserError
            except httpx2.HTTPError as error:
                # An address at which nobody has ever answered is likely wrong.
                passing = isinstance(error, httpx2.TransportError) and (
                    self.reached or not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                )
                problem = f"{address}: {answers.why(error)}"
            except ValueError:
                problem = f"{address}: the answer is no JSON; is this an OpenAI endpoint?"
                passing = False
            if not passing or tries >= most:
                break
            self.sleep(pause)
        raise kind(problem)


def num_tokens(made: TextCompletion) -> int | None:
    """How many tokens a completion has, the one that ended it left out (an endpoint may count it); None where
    an endpoint does not say it."""
    return len(made.ids) if made.ids else made.tokens


def check_remote(config: Dataclass, more: Collection[str] = (), known: Collection[str] = ()) -> None:
    """Raise UserError where a stage's settings have an endpoint and one of `LOCAL_SETTINGS` or `more`, but
    for those that the stage has a use for (`known`); or a key without an endpoint."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if values["endpoint"] is None and values["endpoint_key"] is not None:
        raise UserError("--endpoint-key goes with --endpoint URL")
    for field in dataclasses.fields(config) if values["endpoint"] is not None else ():
        if field.name in LOCAL_SETTINGS.union(more).difference(known) and values[field.name] != field.default:
            raise local_only(f"--{field.name.replace('_', '-')}")


def connect(
    endpoint: str, model: str, key_variable: str | None, environ: Mapping[str, str], parallel: int = 4
) -> RemoteChat:
    """A model at an endpoint; `key_variable` names the environment variable that holds the key. Raises
    UserError where there is no such variable, and for an address that is none."""
    at_once = max(1, min(parallel, MOST_PARALLEL))
    return RemoteChat(endpoint, model, key=endpoint_key(key_variable, environ), parallel=at_once)


def endpoint_key(variable: str | None, environ: Mapping[str, str]) -> str | None:
    """The key in an environment variable, None without one. Raises UserError if it is not there, or would
    break a header (later errors would show it)."""
    if variable is None:
        return None
    key = environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--endpoint-key {variable}: there is no such environment variable")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"--endpoint-key {variable}: its value is no key: one line of ASCII without spaces")
    return key


def _check_address(text: str) -> None:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.userinfo:
        raise UserError("--endpoint: leave name and password out of the address; --endpoint-key is for keys")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--endpoint {text}: not an address; give one as http://localhost:8000/v1")
