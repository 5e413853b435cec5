"""What a model works on: requests join and leave between its steps, and nobody waits for it.

The event loop hands requests over and gets what was made as messages, one batch a step. What isn't a
completion (embeddings, scores, a beam search) is a call, made between two steps.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fledge.engine.generation import Generation, Request
from fledge.engine.scheduler import Scheduler
from fledge.engine.stops import TextStream
from fledge.errors import UserError
from fledge.serve.errors import ApiError, stopping
from fledge.serve.turns import Turns
from fledge.types import FinishReason, SamplingParams, Token

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """Why a completion ended: a reason, or an error. `stop_token` is the end token, if one ended it; `made`
    counts the tokens, those that a stop string cut off too."""

    reason: FinishReason | None
    error: Exception | None
    stop_token: Token | None
    made: int


@dataclass(frozen=True)
class Step:
    """What completion number `place` of a request has more: text that is certain, and the tokens of it."""

    place: int
    text: str
    tokens: list[Token]
    end: Ended | None


@dataclass
class _Live:
    """A completion on its way."""

    generation: Generation
    text: TextStream
    pieces: list[str]  # certain, and not told yet
    given: int = 0


class Run:
    """A request that a model works on. `steps` yields what comes; `cancel` wants no more of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, streamed: bool) -> None:
        self.live: dict[int, _Live] = {}  # by place; the worker's
        self.streamed = streamed
        self.cancelled = False
        self.echoed: list[list[Token]] = []  # of each prompt, where it was asked for
        self.count = 0
        self._loop = loop
        self._queue: asyncio.Queue[list[Step]] = asyncio.Queue()

    def cancel(self) -> None:
        """Want no more; from any thread."""
        self.cancelled = True
        for live in list(self.live.values()):
            live.generation.cancel()

    def deliver(self, steps: list[Step]) -> None:
        """In the event loop: hand over what the worker made."""
        self._queue.put_nowait(steps)

    async def steps(self) -> AsyncIterator[list[Step]]:
        """What was made since the last look, until all completions are at their end. Raises the error of a
        completion that has one."""
        left = self.count
        while left:
            steps = await self._queue.get()
            while not self._queue.empty():
                steps = steps + self._queue.get_nowait()
            errors = [step.end.error for step in steps if step.end is not None and step.end.error is not None]
            good = [step for step in steps if step.end is None or step.end.error is None]
            left -= sum(step.end is not None for step in steps)
            if good:
                yield good
            if errors:
                raise errors[0]


class Worker:
    """Runs a model's requests in the models' thread, as many at once as the scheduler has rows."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler | None,
        stream_of: Callable[[SamplingParams], TextStream],
        turns: Turns,
    ) -> None:
        """`stream_of` makes a completion's text. Without a scheduler there are only calls."""
        self.name, self.scheduler = name, scheduler
        self.tokens_made = 0
        self._stream_of = stream_of
        self._runs: list[Run] = []
        self._arrived: deque[Run] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]] = deque()
        self._turns = turns
        self._closing = False
        self._closed = threading.Event()
        self._calling = False
        self._failure: Exception | None = None  # what all requests end with
        turns.add(self)

    @property
    def running(self) -> int:
        """Completions that are being made."""
        return len(self.scheduler.running) if self.scheduler is not None else 0

    def submit(self, run: Run, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> None:
        """Hand over `params[i].n` completions of each prompt i. From any thread; the run may be cancelled
        meanwhile. Raises UserError for what can never be made."""
        assert self.scheduler is not None
        self._check_open()
        try:
            for number, (prompt, settings) in enumerate(zip(prompts, params, strict=True)):
                texts = [self._stream_of(settings) for _ in range(settings.n)]
                pieces: list[list[str]] = [[] for _ in texts]
                request = Request(prompt, settings, number, _stopped(texts, pieces))
                made = self.scheduler.submit(request)
                run.echoed.append(made[0].echoed)
                for live in map(_Live, made, texts, pieces):
                    run.live[run.count] = live
                    run.count += 1
        except BaseException:
            run.cancel()
            self._turns.wake()
            raise
        if run.cancelled:  # before all of it was there
            run.cancel()
        self._arrived.append(run)
        self._turns.wake()
        if self.ended:  # meanwhile
            run.cancel()
            raise self._failure or stopping()

    async def call(self, function: Callable[[], T]) -> T:
        """What a function gives that needs the model for itself; made between two steps."""
        self._check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.append((function, future, loop))
        self._turns.wake()
        if self.ended:  # meanwhile
            raise self._failure or stopping()
        return await future

    def _check_open(self) -> None:
        if self._closing or self._failure is not None:
            raise self._failure or stopping()

    def turn(self) -> None:
        """One token more for all requests, those of other models too, and their calls; for a call that takes
        long to let others on. Raises what ends all requests."""
        self._turns.step()
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """Look again at who wants no more."""
        self._turns.wake()

    def end_all(self, error: Exception) -> None:
        """End all requests with an error, and take no more."""
        self._failure = error
        self._turns.wake()

    def close(self, seconds: float = 10.0) -> None:
        """End all; waits for it as long."""
        self.begin_to_close()
        self._closed.wait(seconds)

    def begin_to_close(self) -> None:
        """`close` without waiting."""
        self._failure = self._failure or stopping()
        self._closing = True
        self._turns.wake()

    @property
    def ended(self) -> bool:
        """Whether nothing is made any more: after `close`, or because of a defect."""
        return self._closed.is_set()

    def work(self) -> bool:
        """In the models' thread: a token more for all requests, and one of the calls, if none is under way;
        whether anything is left to do. What goes wrong ends this model alone."""
        try:
            busy = self._step()
            if self._calls and not self._calling:
                self._calling = True
                try:
                    self._make(*self._calls.popleft())
                finally:
                    self._calling = False
                busy = True
            if not busy and self._closing:
                self._closed.set()
            return busy
        except BaseException as error:  # the thread is the other models' too
            self._break(error)
            return False

    def _break(self, error: BaseException) -> None:
        """End everything, and take no more."""
        _log(self.name, error)
        self._failure = _broken(self.name)
        self._closed.set()
        self._runs += self._arrived
        self._arrived.clear()
        self._end_runs(self._failure)
        self._runs = []
        while self._calls:
            _, future, loop = self._calls.popleft()
            _post(loop, _settle, future, None, self._failure)

    def _make(
        self, function: Callable[[], Any], future: asyncio.Future[Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        if future.cancelled():
            return
        try:
            if self._failure is not None:
                raise self._failure
            result, error = function(), None
        except Exception as caught:
            result, error = None, caught
            _log(self.name, caught)
        except BaseException:
            _post(loop, _settle, future, None, _broken(self.name))
            raise
        _post(loop, _settle, future, result, error)

    def _step(self) -> bool:
        """One token more for all requests, and its delivery; whether anything is left to do."""
        while self._arrived:
            self._runs.append(self._arrived.popleft())
        if self._failure is not None:
            self._end_runs(self._failure)
        busy = False
        if self.scheduler is not None:
            try:
                busy = self.scheduler.step()
            except Exception as error:  # all of its completions have ended with it
                _log(self.name, error)
        for run in self._runs:
            steps = [step for place in list(run.live) if (step := self._news(run, place)) is not None]
            if steps and not run.cancelled:
                _post(run._loop, run.deliver, steps)
        self._runs = [run for run in self._runs if run.live]
        return busy or bool(self._runs)

    def _news(self, run: Run, place: int) -> Step | None:
        """What a completion has more, if that is to be told."""
        live = run.live[place]
        generation, text = live.generation, live.text
        done = generation.done
        new = len(generation.tokens) - live.given
        if not done and not (run.streamed and (live.pieces or new)):
            return None
        end = None
        if done:
            del run.live[place]
            rest = text.finish()
            live.pieces.append(rest)
            reason = "stop" if text.stopped else generation.reason
            made = len(generation.tokens)
            self.tokens_made += made
            end = Ended(reason, generation.error, generation.stop_token, made)
        upto = text.num_ids if done else text.num_certain
        tokens = generation.tokens[live.given : upto]
        live.given = max(live.given, upto)
        piece = "".join(live.pieces)
        live.pieces.clear()
        if not (piece or tokens or end):
            return None
        return Step(place, piece, tokens, end)

    def _end_runs(self, error: Exception) -> None:
        for run in self._runs:
            if not run.cancelled:
                steps = [Step(place, "", [], Ended(None, error, None, 0)) for place in run.live]
                _post(run._loop, run.deliver, steps)
            run.cancel()


def _stopped(texts: list[TextStream], pieces: list[list[str]]) -> Callable[[int, int], bool]:
    def should_stop(sample: int, token_id: int) -> bool:
        if piece := texts[sample].push(token_id):
            pieces[sample].append(piece)
        return texts[sample].stopped

    return should_stop


def _broken(name: str) -> ApiError:
    return ApiError(500, f"the model {name} has broken; the server's log says why", code="internal_error")


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call in the event loop, if that still runs."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return


def _log(name: str, error: BaseException) -> None:
    if not isinstance(error, UserError | ApiError):
        print(f"model {name}: {''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
