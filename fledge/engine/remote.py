"""Chat with a model behind an OpenAI-compatible endpoint, over the same interface as a local one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import httpx2

from fledge.engine.text import TextCompletion
from fledge.errors import UserError
from fledge.types import FinishReason, Message, SamplingParams

TRIES = 4
# Too many requests, and what a server says while it starts or restarts.
PASSING = {408, 425, 429, 500, 502, 503, 504}


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

    Its completions have text and finish reason, but no ids: the endpoint does not give them. What an endpoint
    cannot do is not asked of it: of the settings, temperature, top_p, max_tokens, seed, stop and the
    penalties are sent.
    """

    def __init__(
        self, endpoint: str, model: str, *, key: str | None = None, parallel: int = 4,
        timeout_seconds: float = 300.0, transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """`key` is sent as a bearer token. Raises UserError for an address that is none."""
        address = endpoint.rstrip("/").removesuffix("/chat/completions")
        if not _is_address(address):
            raise UserError(f"--endpoint {endpoint}: not an address; give one as http://localhost:8000/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.model, self.parallel, self.sleep = model, parallel, sleep
        self.address = f"{address}/chat/completions"
        self.client = httpx2.Client(headers=headers, timeout=timeout_seconds, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def reply(self, messages: Sequence[Message], params: SamplingParams) -> TextCompletion:
        """The assistant's next turn. Raises UserError (EndpointError: see there) when there is none."""
        body = self._post(self._request(messages, params, params.seed))
        try:
            choice = body["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            return TextCompletion(text, [], [], _reason(choice.get("finish_reason")))
        except (KeyError, IndexError, TypeError, AttributeError):
            shown = json.dumps(body)[:200]
            raise UserError(f"{self.address}: the answer is no chat completion: {shown}") from None

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> list[TextCompletion]:
        """`params.n` next turns for each conversation. Each is a request with a seed of its own: few servers
        know `n`."""
        asked = [
            (messages, params.seed + place * params.n + number)
            for place, messages in enumerate(conversations) for number in range(params.n)
        ]  # fmt: skip
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda one: self.reply(one[0], _with_seed(params, one[1])), asked))

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The assistant's next turn, piece by piece."""
        return self.stream_reply(messages, params)

    def stream_reply(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[str, None, TextCompletion]:
        """`stream`, with the whole turn as the generator's value."""
        request = {**self._request(messages, params, params.seed), "stream": True}
        text, reason = "", None
        try:
            with self.client.stream("POST", self.address, json=request) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise UserError(self._said(answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        break
                    piece, ended = self._piece(data)
                    text, reason = text + piece, ended or reason
                    if piece:
                        yield piece
        except httpx2.HTTPError as error:
            raise EndpointError(f"{self.address}: {_why(error)}") from None
        return TextCompletion(text, [], [], _reason(reason))

    def _piece(self, data: str) -> tuple[str, str | None]:
        """The text of an event, and why it was the last; UserError for an error in the middle of a stream."""
        try:
            event = json.loads(data)
            if "choices" not in event and "error" in event:
                said = event["error"]["message"] if isinstance(event["error"], dict) else event["error"]
                raise UserError(f"{self.address}: {' '.join(str(said).split())[:200]}")
            choice = event["choices"][0]
            return choice["delta"].get("content") or "", choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "", None  # usage and comments

    def _request(self, messages: Sequence[Message], params: SamplingParams, seed: int) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model, "messages": list(messages), "temperature": params.temperature,
            "max_tokens": params.max_tokens, "seed": seed % 2**31,
        }  # fmt: skip
        wished = {
            "top_p": params.top_p, "stop": list(params.stop) or None,
            "presence_penalty": params.presence_penalty or None,
            "frequency_penalty": params.frequency_penalty or None,
        }  # fmt: skip
        return request | {name: value for name, value in wished.items() if value is not None}

    def _post(self, request: dict[str, Any]) -> Any:
        for tries in range(1, TRIES + 1):
            try:
                answer = self.client.post(self.address, json=request)
                if answer.status_code == 200:
                    return answer.json()
                problem, passing = self._said(answer), answer.status_code in PASSING
                if not passing and answer.status_code not in (401, 403, 404, 405):
                    raise UserError(problem)
            except httpx2.TransportError as error:
                problem, passing = f"{self.address}: {_why(error)}", True
            except ValueError:
                problem, passing = (
                    f"{self.address}: the answer is no JSON; is this an OpenAI endpoint?",
                    False,
                )
            if not passing or tries == TRIES:
                break
            self.sleep(2.0**tries)
        raise EndpointError(problem)

    def _said(self, answer: httpx2.Response) -> str:
        """What went wrong, in the server's words if it has some."""
        try:
            error = answer.json()["error"]
            said = error if isinstance(error, str) else error["message"]
        except (ValueError, KeyError, TypeError):
            said = answer.text
        hint = {401: "; give a key", 404: "; check address and model"}.get(answer.status_code, "")
        return f"{self.address}: {answer.status_code}: {' '.join(str(said).split())[:200]}{hint}"


def connect(endpoint: str, model: str, key_variable: str | None, environ: Mapping[str, str]) -> RemoteChat:
    """A model at an endpoint; `key_variable` names the environment variable that holds the key. Raises
    UserError where there is no such variable, and for an address that is none."""
    return RemoteChat(endpoint, model, key=endpoint_key(key_variable, environ))


def endpoint_key(variable: str | None, environ: Mapping[str, str]) -> str | None:
    """The key in an environment variable, None without one. Raises UserError if it is not there."""
    if variable is not None and not environ.get(variable):
        raise UserError(f"--endpoint-key {variable}: there is no such environment variable")
    return None if variable is None else environ[variable]


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return replace(params, seed=seed, n=1)


def _reason(value: object) -> FinishReason:
    return "length" if value == "length" else "stop"


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_address(text: str) -> bool:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)
