"""What all addresses share: the models, how much may wait, and the way from a plan to what was made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fledge.engine.sampling import broken_scores
from fledge.engine.search import Hypothesis
from fledge.errors import UserError
from fledge.serve.errors import ApiError, busy, stopping
from fledge.serve.metrics import Metrics
from fledge.serve.models import Served
from fledge.serve.plan import Plan
from fledge.serve.relay import Endpoint, Relay
from fledge.serve.responses import Made
from fledge.serve.visits import Visit, unless_gone, visit_of
from fledge.serve.worker import Ended, Run, Step
from fledge.types import Token


@dataclass
class Service:
    """The models by name; `queue` completions may wait for a place, for each model. `relay` has more."""

    models: Mapping[str, Served]
    queue: int = 256
    relay: Relay | None = None
    metrics: Metrics = field(default_factory=Metrics)
    live: dict[str, int] = field(default_factory=dict)
    visits: set[Visit] = field(default_factory=set)
    stopping: bool = False

    def endpoint_of(self, name: str | None) -> Endpoint | None:
        """The way to a model that is elsewhere."""
        if self.relay is None or not (name in self.relay.models or not (name or self.models)):
            return None
        if self.stopping:
            raise stopping()
        return self.relay.endpoint_of(name)

    def find(self, name: str | None) -> Served:
        """The model of a request; ApiError (404) for one that isn't there."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if self.relay is not None and name in self.relay.models:
            message = f"{str(name)[:100]!r} is another server's model, and this address is not passed on"
            raise ApiError(404, message, "model", "model_not_found")
        if name is None or name not in self.models:
            known = ", ".join(self.models) or "none"
            message = f"the model {str(name)[:100]!r} does not exist here; there are: {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.models[name]

    def writer(self, name: str | None) -> Served:
        """A model that writes."""
        if name is None:
            name = next((one for one, served in self.models.items() if served.engine is not None), None)
        served = self.find(name)
        if served.engine is None:
            raise ApiError(
                400, f"{served.name} is a reward model: it judges (/v1/score)", "model", "wrong_model"
            )
        return served

    def take(self, visit: Visit, served: Served, count: int) -> None:
        """Reserve places for completions until the visit's end. Raises ApiError when too many wait."""
        if self.stopping:
            raise stopping()
        rows = 1 if served.worker.scheduler is None else served.worker.scheduler.slots.rows
        live, most = self.live.get(served.name, 0), rows + self.queue
        if count > most:
            raise ApiError(400, f"a request can have {most} completions here, this one has {count}")
        if live + count > most:
            self.metrics.refused += 1
            raise busy(f"{live} completions are being made or wait; try again later", 1 + live // rows)
        self.live[served.name] = live + count
        visit.ends.append(lambda: self._give_back(served.name, count))

    def _give_back(self, name: str, count: int) -> None:
        self.live[name] -= count

    async def begin(self, request: Request, served: Served, plan: Plan, streamed: bool) -> Run:
        """Hand a plan to its model; cancelled at the visit's end."""
        visit = visit_of(request)
        self.take(visit, served, plan.count)
        visit.model, visit.prompt_tokens = served.name, sum(map(len, plan.prompts))
        run = Run(asyncio.get_running_loop(), streamed)
        visit.ends.append(served.worker.wake)
        visit.ends.append(run.cancel)  # also while it is handed over
        await run_in_threadpool(served.worker.submit, run, plan.prompts, plan.params)
        return run

    async def whole(
        self, request: Request, served: Served, plan: Plan
    ) -> tuple[list[Made], list[list[Token]]]:
        """All completions of a plan at their end, and the log-probabilities of its prompts."""
        if plan.beams is not None:
            return await self._searched(request, served, plan), [[] for _ in plan.prompts]
        run = await self.begin(request, served, plan, False)
        made = [Made() for _ in range(run.count)]

        async def gather() -> None:
            async for steps in told(run, visit_of(request)):
                for step in steps:
                    made[step.place].add(step)

        await unless_gone(request, gather())
        return made, run.echoed

    async def _searched(self, request: Request, served: Served, plan: Plan) -> list[Made]:
        """The completions that a beam search finds."""
        visit = visit_of(request)
        self.take(visit, served, plan.count)
        visit.model, visit.prompt_tokens = served.name, sum(map(len, plan.prompts))
        wanted = [True]
        visit.ends.append(wanted.clear)
        beams = plan.beams
        assert beams is not None
        call = served.worker.call(
            lambda: served.beam_search(plan.prompts, plan.params, beams, lambda: bool(wanted))
        )
        found = await unless_gone(request, call)
        made = [_as_made(served, one) for some in found for one in some]
        visit.first_token()
        visit.completion_tokens = sum(len(one.tokens) for one in made)
        return made


async def told(run: Run, visit: Visit) -> AsyncIterator[list[Step]]:
    """The steps of a run, counted. A model that is damaged is the server's fault, not the client's."""
    try:
        async for steps in run.steps():
            visit.first_token()
            for step in steps:
                if step.end is not None:
                    visit.completion_tokens += step.end.made
            yield steps
    except UserError as error:
        if str(error) == str(broken_scores()):
            raise ApiError(500, str(error), code="broken_model") from None
        raise


def _as_made(served: Served, found: Hypothesis) -> Made:
    completion = found.completion
    pairs = zip(completion.ids, completion.logps, completion.sampled_logps, strict=True)
    text = served.tokenizer.decode(completion.ids, skip_special=True)
    made = len(completion.ids)
    end = Ended(completion.finish_reason, None, completion.stop_token, made)
    return Made(text, [Token(*pair) for pair in pairs], end)
