"""A request, and each of its completions while it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fledge.engine.constraints import Constraint
from fledge.engine.sampling import Row
from fledge.types import Completion, FinishReason, SamplingParams, Token


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Completion number i draws from the random numbers of
    (`params.seed`, `number`, i). `should_stop`, called with i and each id that was made, ends it if True."""

    prompt: Sequence[int]
    params: SamplingParams
    number: int = 0
    should_stop: Callable[[int, int], bool] | None = None


class Generation:
    """One completion on its way. Its lists only grow; `reason` or `error` is set at its end."""

    def __init__(
        self,
        request: Request,
        sample: int,
        end_ids: frozenset[int],
        echoed: list[Token],
        constraint: Constraint | None = None,
    ) -> None:
        self.request, self.sample = request, sample
        ids, number = list(request.prompt), request.number
        self.row = Row(request.params, ids, len(ids), end_ids, number, sample, constraint)
        self.tokens: list[Token] = []
        self.forced: list[int] = []  # what comes next for certain: it is read together with the last id
        self.echoed = echoed  # one list for all samples of a request
        self.reason: FinishReason | None = None
        self.stop_token: Token | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self._changed = threading.Event()

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.reason is not None or self.error is not None

    def cancel(self) -> None:
        """Want no more of it: its row is free at the next step. From any thread, at any time."""
        self.cancelled = True

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until something changes; for a thread that does not call `step` itself."""
        self._changed.wait(timeout_seconds)
        self._changed.clear()

    def events(self, advance: Callable[[], object] | None = None) -> Iterator[Token | FinishReason]:
        """Tokens as they come, then the finish reason; closing the iterator cancels the rest.

        `advance` makes progress (a scheduler's `step`); None: another thread does. Raises what went wrong.
        """
        given = 0
        try:
            while True:
                done = self.done  # read first: what comes before the end is then in the list
                new = self.tokens[given:]
                given += len(new)
                yield from new
                if done:
                    break
                (advance or self.wait)()
            if self.error is not None:
                raise self.error
            assert self.reason is not None
            yield self.reason
        finally:
            self.cancel()

    def completion(self) -> Completion:
        """What was made. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        assert self.reason is not None, "not at its end"
        ids, logps, sampled, tops = zip(*self.tokens, strict=True) if self.tokens else ((), (), (), ())
        return Completion(
            list(ids), list(logps), self.reason, list(sampled), list(tops), self.stop_token, self.echoed
        )

    def end(self, outcome: FinishReason | Exception) -> None:
        """Set the finish reason or the error."""
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self.reason = outcome
        self._changed.set()

    def should_stop(self, token_id: int) -> bool:
        """What the request's own function says; what it raises ends this completion alone."""
        try:
            return self.request.should_stop is not None and self.request.should_stop(self.sample, token_id)
        except Exception as error:
            self.end(error)
            return False

    def push(self, token: Token) -> None:
        """Add a token. Raises UserError if the constraint does not know it."""
        if self.row.constraint is not None:
            self.row.constraint.advance(token.id)
        self.tokens.append(token)
        self.row.ids.append(token.id)
        self._changed.set()
