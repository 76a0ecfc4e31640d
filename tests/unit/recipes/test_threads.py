"""Calls in worker threads, and what becomes of them if the caller is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, fail_after, to_thread
from support.helpers import until_async

from aiosync.recipes._threads import Threads

pytestmark = pytest.mark.anyio

DEADLINE = 20.0


async def test_a_call_that_is_made_anyway() -> None:
    calls: list[int] = []
    await Threads().run_anyway(calls.append, 1)
    assert calls == [1]


async def test_a_call_that_is_cancelled_before_its_thread_has_begun_is_made_anyway() -> None:
    calls: list[int] = []
    with CancelScope() as scope:
        scope.cancel()
        await Threads().run_anyway(calls.append, 1)
    assert scope.cancelled_caught
    await until_async(lambda: calls == [1])


async def test_a_call_whose_thread_begins_after_it_was_made_elsewhere_is_not_made_again() -> None:
    calls: list[int] = []
    late: list[Callable[[], object]] = []

    class BusyThreads(Threads):
        async def run(self, work: Callable[..., Any], *args: Any) -> Any:
            late.append(partial(work, *args))
            await anyio.sleep_forever()

    with CancelScope() as scope:
        scope.cancel()
        await BusyThreads().run_anyway(calls.append, 1)
    await until_async(lambda: calls == [1])
    late[0]()
    assert calls == [1]


async def test_a_call_that_has_begun_is_not_made_again() -> None:
    calls: list[str] = []
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        calls.append("begun")
        begun.set()
        may_end.wait(DEADLINE)
        calls.append("ended")

    with CancelScope() as scope:

        async def cancel() -> None:
            await until_async(begun.is_set)
            scope.cancel()

        async with create_task_group() as tasks:
            tasks.start_soon(cancel)
            await Threads().run_anyway(work)
    may_end.set()
    await until_async(lambda: "ended" in calls)
    assert calls == ["begun", "ended"]


class TestThreads:
    async def test_a_cancelled_call_is_interrupted_and_waited_for(self) -> None:
        begun, interrupted = threading.Event(), threading.Event()
        ended: list[bool] = []

        def work() -> None:
            begun.set()
            interrupted.wait(DEADLINE)
            ended.append(True)

        async def run() -> None:
            try:
                await Threads().run_to_end(work, interrupted.set)
            finally:
                assert ended

        with fail_after(DEADLINE):
            async with create_task_group() as tasks:
                tasks.start_soon(run)
                await to_thread.run_sync(begun.wait, DEADLINE)
                tasks.cancel_scope.cancel()
        assert ended

    async def test_an_interruption_that_fails_or_comes_too_early_is_repeated(self) -> None:
        begun, interrupted = threading.Event(), threading.Event()
        calls: list[int] = []

        async def interrupt() -> None:
            calls.append(len(calls))
            if len(calls) == 1:
                raise OSError("not now")
            if len(calls) == 3:
                interrupted.set()

        def work() -> None:
            begun.set()
            interrupted.wait(DEADLINE)

        with fail_after(DEADLINE):
            async with create_task_group() as tasks:
                tasks.start_soon(Threads().run_to_end, work, interrupt)
                await to_thread.run_sync(begun.wait, DEADLINE)
                tasks.cancel_scope.cancel()
        assert len(calls) >= 3

    async def test_a_call_cancelled_before_its_thread_begins_is_not_made(self) -> None:
        calls: list[bool] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            await Threads().run_to_end(lambda: calls.append(True))
        await Threads().run(bool)
        assert calls == []

    async def test_what_the_call_raises_is_raised(self) -> None:
        def work() -> None:
            raise OSError("no")

        with pytest.raises(OSError, match="no"):
            await Threads().run_to_end(work)
