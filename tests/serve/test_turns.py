"""The thread that all models share: everybody has turns, and nobody's long call keeps the others waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from fledge.serve.errors import ApiError
from fledge.serve.turns import Turns, alone
from fledge.serve.worker import Worker


def worker(name: str, turns: Turns) -> Worker:
    def no_text(params: object) -> object:
        raise AssertionError("writes nothing")

    return Worker(name, None, no_text, turns)  # type: ignore[arg-type]


def test_all_models_compute_in_one_thread_that_ends_with_the_last() -> None:
    turns = Turns(1)
    one, two = worker("one", turns), worker("two", turns)

    async def ask() -> tuple[threading.Thread, threading.Thread, int]:
        first = await one.call(threading.current_thread)
        second = await two.call(threading.current_thread)
        return first, second, await two.call(torch.get_num_threads)

    first, second, threads = asyncio.run(ask())
    assert first is second is not threading.current_thread()
    assert threads == 1
    one.close()
    assert asyncio.run(two.call(threading.current_thread)) is first
    two.close()
    first.join(10)
    assert not first.is_alive()


def test_a_model_that_comes_when_the_others_have_ended_is_served() -> None:
    turns = Turns()
    for name in ("one", "two"):
        alive = worker(name, turns)
        assert asyncio.run(alive.call(lambda: "done")) == "done"
        alive.close()
        assert alive.ended


def test_calls_of_one_model_let_those_of_others_on() -> None:
    turns = Turns()
    one, two = worker("one", turns), worker("two", turns)
    order: list[str] = []
    begun = threading.Event()

    async def ask() -> None:
        calls = [one.call(begun.wait)] + [one.call(lambda: order.append("one")) for _ in range(3)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(two.call(lambda: order.append("two"))))
        await asyncio.sleep(0)
        begun.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert order.index("two") <= 1, order
    one.close()
    two.close()


def test_a_defect_ends_one_model_and_not_the_thread_of_the_others() -> None:
    class Defect(BaseException):
        pass

    turns = Turns()
    one, two = worker("one", turns), worker("two", turns)

    def fails() -> None:
        raise Defect

    async def ask() -> None:
        waiting = [asyncio.ensure_future(one.call(function)) for function in (fails, lambda: None)]
        for call in waiting:
            with pytest.raises(ApiError, match="the model one has broken") as raised:
                await call
            assert raised.value.status == 500
        with pytest.raises(ApiError, match="the model one has broken"):
            await one.call(lambda: None)
        assert await two.call(lambda: "done") == "done"

    asyncio.run(ask())
    assert one.ended and not two.ended
    two.close()


def test_others_have_their_calls_in_the_midst_of_a_long_one() -> None:
    turns = Turns()
    one, two = worker("one", turns), worker("two", turns)
    order: list[str] = []
    asked = threading.Event()

    def long() -> None:
        asked.wait(10)
        one.turn()
        order.append("long")

    async def ask() -> None:
        tasks = [asyncio.ensure_future(one.call(long))]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.ensure_future(two.call(lambda: order.append("two"))))
        tasks.append(asyncio.ensure_future(one.call(lambda: order.append("one"))))
        await asyncio.sleep(0)
        asked.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert order == ["two", "long", "one"]
    one.close()
    two.close()


def test_alone_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    with alone() as threads:
        assert threads == before
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
