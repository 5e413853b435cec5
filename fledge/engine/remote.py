"""A model behind an OpenAI-compatible endpoint, over the same interface as a local one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx2

from fledge.config import Dataclass
from fledge.engine.at_once import as_they_come
from fledge.engine.text import TextCompletion, terminal_safe
from fledge.errors import UserError
from fledge.types import FinishReason, Message, SamplingParams

# A text to continue (/completions), or a conversation to answer (/chat/completions).
Asked = str | Sequence[Message]

TRIES = 4
# Of a server that says when it has room again; a longer pause than this one is not waited for.
BUSY_TRIES = 30
LONGEST_PAUSE_SECONDS = 60.0
MOST_PARALLEL = 16
# Too many requests, and what a server says while it starts or restarts.
PASSING = {408, 425, 429, 500, 502, 503, 504}
JSON = {"content-type": "application/json"}
# Settings that the servers of others do not know, or by other names.
LOCAL_SETTINGS = {
    "top_k", "min_p", "repetition_penalty", "logit_bias", "ban", "min_tokens", "stop_ids", "regex",
    "json_schema", "grammar", "weights", "quantize", "device",
}  # fmt: skip


class EndpointError(UserError):
    """The endpoint gives no answer to anything: it can't be reached, is out of order, or wants a key. (It may
    refuse one conversation and answer others: that is a plain UserError.)"""


@dataclass(frozen=True)
class RemoteCompletion(TextCompletion):
    """A completion without ids and log-probabilities: the endpoint does not give them. `tokens` is how many
    it counts, None if it says nothing of it."""

    tokens: int | None = None


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

    Its completions are `RemoteCompletion`s. What an endpoint cannot do is not asked of it: of the settings,
    temperature, top_p, max_tokens, seed, stop and the penalties are sent.
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
        self.reached = False  # whether it has ever answered
        self.client = httpx2.Client(headers=headers, timeout=timeout_seconds, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def reply(self, asked: Asked, params: SamplingParams) -> RemoteCompletion:
        """What follows. Raises UserError (EndpointError: see there) when there is none."""
        body = self._post(asked, params)
        try:
            choice = body["choices"][0]
            text = choice["text"] if isinstance(asked, str) else choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            return RemoteCompletion(text, [], [], _reason(choice.get("finish_reason")), tokens=_tokens(body))
        except (KeyError, IndexError, TypeError, AttributeError):
            what = f"no {'text' if isinstance(asked, str) else 'chat'} completion: {json.dumps(body)[:200]}"
            raise UserError(f"{self._address(asked)}: the answer is {what}") from None

    def replies(self, asked: Sequence[Asked], params: SamplingParams) -> list[TextCompletion]:
        """`params.n` completions for each text or conversation, in their order. Each is a request with a seed
        of its own: few servers know `n`."""
        wanted = [
            (one, replace(params, n=1, seed=params.seed + place * params.n + number))
            for place, one in enumerate(asked) for number in range(params.n)
        ]  # fmt: skip
        made: dict[int, TextCompletion] = {}
        with closing(as_they_come(lambda one: self.reply(*one), wanted, self.parallel)) as answers:
            for place, answer in answers:
                if isinstance(answer, Exception):
                    raise answer
                made[place] = answer
        return [made[place] for place in range(len(wanted))]

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The next turn piece by piece."""
        return self.stream_reply(messages, params)

    def stream_reply(self, asked: Asked, params: SamplingParams) -> Generator[str, None, RemoteCompletion]:
        """What follows, piece by piece; the whole is the generator's value. Raises as `reply` does."""
        address, text, reason, whole = self._address(asked), "", None, False
        content = self._request(asked, params, stream=True)
        try:
            with self.client.stream("POST", address, content=content, headers=JSON) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise UserError(_said(address, answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        whole = True
                        break
                    piece, ended = _piece(address, data)
                    text, reason = text + piece, ended or reason
                    if piece:
                        yield piece
        except httpx2.HTTPError as error:
            raise EndpointError(f"{address}: {_why(error)}") from None
        if not whole and reason is None:
            raise EndpointError(f"{address}: the answer broke off before its end")
        return RemoteCompletion(text, [], [], _reason(reason))

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
                answer = self.client.post(address, content=content, headers=JSON)
                self.reached = True
                if answer.status_code == 200:
                    return answer.json()
                problem, passing = _said(address, answer), answer.status_code in PASSING
                if (wished := _wished_pause(answer)) is not None:
                    pause, most = wished, BUSY_TRIES
                if answer.status_code == 500 or not (passing or answer.status_code in (401, 403, 404, 405)):
                    kind = UserError
            except httpx2.HTTPError as error:
                # An address at which nobody has ever answered is likely wrong.
                passing = isinstance(error, httpx2.TransportError) and (
                    self.reached or not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                )
                problem = f"{address}: {_why(error)}"
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
    return made.tokens if isinstance(made, RemoteCompletion) else len(made.ids)


def check_remote(config: Dataclass, more: Collection[str] = (), known: Collection[str] = ()) -> None:
    """Raise UserError where a stage's settings have an endpoint and one of `LOCAL_SETTINGS` or `more`, but
    for those that the stage has a use for (`known`); or a key without an endpoint."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if values["endpoint"] is None and values["endpoint_key"] is not None:
        raise UserError("--endpoint-key goes with --endpoint URL")
    for field in dataclasses.fields(config) if values["endpoint"] is not None else ():
        if field.name in LOCAL_SETTINGS.union(more).difference(known) and values[field.name] != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} goes with a local model; leave it out, or leave out --endpoint")


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


def _said(address: str, answer: httpx2.Response) -> str:
    """What went wrong, in the server's words if it has some."""
    try:
        error = answer.json()["error"]
        said = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.text
    chats = "" if "/chat/" in address else ", or ask in chats: not every server continues texts"
    hints = {401: "; give a key with --endpoint-key", 404: f"; check address and model{chats}"}
    return f"{address}: {answer.status_code}: {_short(said)}{hints.get(answer.status_code, '')}"


def _piece(address: str, data: str) -> tuple[str, str | None]:
    """The text of an event, and why it was the last; UserError for an error in the middle of a stream."""
    try:
        event = json.loads(data)
        if "choices" not in event and "error" in event:
            said = event["error"]["message"] if isinstance(event["error"], dict) else event["error"]
            raise UserError(f"{address}: {_short(said)}")
        choice = event["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        return text or "", choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "", None  # usage and comments


def _tokens(body: dict[str, Any]) -> int | None:
    usage = body.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _wished_pause(answer: httpx2.Response) -> float | None:
    """Seconds until the server wants to be asked again (`Retry-After`)."""
    try:
        seconds = float(answer.headers["retry-after"])
    except (KeyError, ValueError):  # it may be a date, too
        return None
    return seconds if 0 <= seconds <= LONGEST_PAUSE_SECONDS else None


def _reason(value: object) -> FinishReason:
    return "length" if value == "length" else "stop"


def _short(said: object) -> str:
    """A server's words as a part of one line, which cannot steer a terminal."""
    return terminal_safe(" ".join(str(said).split())[:200])


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
