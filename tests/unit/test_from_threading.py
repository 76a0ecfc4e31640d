"""from_threading: tasks await objects that threads own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import math
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import create_autospec

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from support.helpers import (
    PATIENCE,
    Aim,
    InThread,
    helper_threads,
    settle,
    until,
    until_async,
    wait_for_moment,
)

import aiosync
from aiosync import _helper_threads, from_threading

pytestmark = pytest.mark.anyio

# The name of all threads that are started here.

NO_PERMIT: list[Any] = [
    pytest.param(lambda: threading.Semaphore(0), id="Semaphore"),
    pytest.param(lambda: taken(threading.BoundedSemaphore()), id="BoundedSemaphore"),
    pytest.param(lambda: taken(threading.Lock()), id="Lock"),
]
every_acquirable = pytest.mark.parametrize("new", NO_PERMIT)


def taken(owned: Any) -> Any:
    """Return `owned`, of which a permit was taken."""
    assert owned.acquire(blocking=False)
    return owned


@pytest.fixture(autouse=True)
def no_helper_remains() -> Iterator[None]:
    """After each test no thread of ours is left; a test that leaves an event unset sets it."""
    yield
    until(lambda: not helper_threads())


class Call:
    """A call by a task: its scope, and what came of it."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._call = call
        self.scope = anyio.CancelScope()
        self.cancelled = False
        self.done = False
        self.outcome: object = None

    async def __call__(self) -> None:
        with self.scope:
            try:
                self.outcome = await self._call()
            except Exception as error:
                self.outcome = error
            except BaseException:
                self.cancelled = True
                raise
            finally:
                self.done = True


def line(view: Any) -> int:
    """How many tasks wait for what a helper gets."""
    return len(view._poller._queue.waiters)


async def park(tg: Any, view: Any, *calls: Call) -> None:
    """Let tasks wait in line, one after the other."""
    for call in calls:
        before = line(view)
        tg.start_soon(call)
        # On a busy machine its time may be up before we have seen it wait.
        await until_async(lambda: line(view) == before + 1 or call.done)  # noqa: B023


def assert_one_permit(owned: Any) -> None:
    """Check that exactly one permit is free, at once."""
    assert owned.acquire(blocking=False)
    assert not owned.acquire(blocking=False)


# --- Which objects, and the views themselves ---


@pytest.mark.parametrize(
    "wrong",
    [
        threading.RLock(),
        threading.Condition(),
        threading.Thread(),
        asyncio.Semaphore(),
        asyncio.Lock(),
        aiosync.Semaphore(),
        aiosync.Barrier(1),
        aiosync.as_threading(aiosync.Semaphore()),
        from_threading(threading.Lock()),
        threading.Semaphore,
        None,
        3,
    ],
)
def test_anything_else_is_a_type_error_that_says_what_is_accepted(wrong: Any) -> None:
    expected = "takes a Semaphore, BoundedSemaphore, Barrier, Lock or Event of threading, not "
    with pytest.raises(TypeError, match=expected + type(wrong).__name__):
        from_threading(wrong)


ALL: list[Callable[[], Any]] = [
    threading.Semaphore,
    threading.BoundedSemaphore,
    threading.Lock,
    threading.Event,
    lambda: threading.Barrier(2),
]


@pytest.mark.parametrize("new", ALL)
def test_repr_shows_the_object_of_the_threads(new: Callable[[], Any]) -> None:
    owned = new()
    assert repr(from_threading(owned)) == f"<from_threading {owned!r}>"


@pytest.mark.parametrize("new", ALL)
def test_views_cannot_be_pickled_or_copied_but_weakly_referenced(new: Callable[[], Any]) -> None:
    view: Any = from_threading(new())
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle or copy 'Task"):
            attempt(view)
    assert weakref.ref(view)() is view
    assert not hasattr(view, "__dict__")


def test_outside_of_an_event_loop_nothing_is_taken_and_no_thread_is_started() -> None:
    def run(coroutine: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(anyio.NoEventLoopError):
            coroutine.send(None)

    semaphore = threading.Semaphore()
    run(from_threading(semaphore).acquire())
    assert semaphore.acquire(blocking=False)
    run(from_threading(semaphore).acquire())
    event = threading.Event()
    run(from_threading(event).wait())
    event.set()
    run(from_threading(event).wait())
    barrier = threading.Barrier(2)
    run(from_threading(barrier).wait())
    assert barrier.n_waiting == 0
    assert helper_threads() == 0


# --- Semaphores and locks ---


@every_acquirable
class TestAcquire:
    async def test_a_free_one_is_taken_without_a_thread(self, new: Callable[[], Any]) -> None:
        owned = new()
        owned.release()
        view: Any = from_threading(owned)
        assert await view.acquire() is True
        assert not owned.acquire(blocking=False)
        view.release()
        assert await view.acquire(True, 5) is True
        assert await view.acquire(blocking=False) is False
        assert await view.acquire(timeout=0) is False
        assert await view.acquire(timeout=-1) is False
        view.release()
        assert await view.acquire(blocking=False) is True
        view.release()
        assert await view.acquire(timeout=0) is True
        view.release()
        assert helper_threads() == 0
        assert_one_permit(owned)

    async def test_async_with_takes_it_and_gives_it_back_whatever_happens(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        owned.release()
        view: Any = from_threading(owned)
        async with view as acquired:
            assert acquired is True
            assert not owned.acquire(blocking=False)
        with pytest.raises(ZeroDivisionError):
            async with view:
                1 / 0  # noqa: B018
        assert_one_permit(owned)

    async def test_a_release_by_a_thread_wakes_a_task(self, new: Callable[[], Any]) -> None:
        owned = new()
        view: Any = from_threading(owned)
        call = Call(view.acquire)
        async with anyio.create_task_group() as tg:
            await park(tg, view, call)
            assert InThread(owned.release).result() is None
        assert call.outcome is True
        assert not owned.acquire(blocking=False)

    async def test_a_release_by_a_task_wakes_a_thread(self, new: Callable[[], Any]) -> None:
        owned = new()
        view: Any = from_threading(owned)
        thread = InThread(lambda: owned.acquire(timeout=PATIENCE))
        view.release()
        await until_async(thread.done)
        assert thread.result() is True
        assert not owned.acquire(blocking=False)

    async def test_a_timed_acquire_gets_what_is_released_in_time(
        self, new: Callable[[], Any]
    ) -> None:
        for timeout in (PATIENCE, math.inf, 1e100):
            owned = new()
            view: Any = from_threading(owned)
            call = Call(lambda: view.acquire(timeout=timeout))  # noqa: B023
            async with anyio.create_task_group() as tg:
                await park(tg, view, call)
                owned.release()
            assert call.outcome is True
            assert not owned.acquire(blocking=False)

    @pytest.mark.stress
    async def test_after_a_timeout_no_helper_takes_what_is_released(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        for number in range(10):
            before = time.monotonic()
            timeout = number * 0.004 + 0.001
            assert await view.acquire(timeout=timeout) is False
            assert timeout * 0.9 < time.monotonic() - before < PATIENCE
            owned.release()
            assert_one_permit(owned)

    async def test_bad_arguments_are_refused_and_take_nothing(self, new: Callable[[], Any]) -> None:
        owned = new()
        owned.release()
        view: Any = from_threading(owned)
        with pytest.raises(ValueError, match="timeout for a non-blocking acquire"):
            await view.acquire(False, 1)
        with pytest.raises(ValueError, match="NaN"):
            await view.acquire(timeout=math.nan)
        with pytest.raises(TypeError, match="timeout must be a number"):
            await view.acquire(timeout="1")
        assert_one_permit(owned)

    async def test_tasks_are_served_in_the_order_in_which_they_came(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        calls = [Call(view.acquire) for _ in range(10)]
        async with anyio.create_task_group() as tg:
            await park(tg, view, *calls)
            for served, call in enumerate(calls):
                assert [call.done for call in calls] == [True] * served + [False] * (10 - served)
                assert await view.acquire(blocking=False) is False
                owned.release()
                await until_async(lambda: call.done)  # noqa: B023
        assert [call.outcome for call in calls] == [True] * 10
        assert not owned.acquire(blocking=False)

    async def test_a_permit_taken_at_once_is_given_back_if_the_task_is_cancelled(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        owned.release()
        view: Any = from_threading(owned)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await view.acquire()
            pytest.fail("the cancellation was swallowed")
        assert_one_permit(owned)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await view.acquire(blocking=False)
            pytest.fail("the cancellation was swallowed")
        owned.release()
        assert_one_permit(owned)

    async def test_a_task_that_is_cancelled_before_it_waits_takes_nothing(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        for timeout in (None, PATIENCE):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await view.acquire(timeout=timeout)
                pytest.fail("the cancellation was swallowed")
            owned.release()
            assert_one_permit(owned)

    @pytest.mark.stress
    async def test_after_a_cancelled_wait_no_helper_takes_what_is_released(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        rng = random.Random(0)
        for number in range(16):
            timeout = PATIENCE if number % 2 else None
            call = Call(lambda: view.acquire(timeout=timeout))  # noqa: B023
            async with anyio.create_task_group() as tg:
                await park(tg, view, call)
                await anyio.sleep(rng.uniform(0, 0.03))
                call.scope.cancel()
                await until_async(lambda: call.done)  # noqa: B023
                # At once, in the same step.
                owned.release()
                assert_one_permit(owned)
            assert call.cancelled

    async def test_a_permit_handed_to_a_task_that_is_cancelled_goes_back_to_the_threads(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        for number in range(10):
            timeout = PATIENCE if number % 2 else None
            call = Call(lambda: view.acquire(timeout=timeout))  # noqa: B023
            async with anyio.create_task_group() as tg:
                await park(tg, view, call)
                owned.release()
                # Without a chance for the loop to tell the task.
                until(lambda: not line(view))
                thread = InThread(lambda: owned.acquire(timeout=PATIENCE))
                call.scope.cancel()
                await until_async(thread.done)
            assert call.cancelled
            assert thread.result() is True
            assert not owned.acquire(blocking=False)

    async def test_a_permit_handed_to_a_task_that_is_cancelled_goes_to_the_next_task(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        calls = [Call(view.acquire), Call(view.acquire)]
        async with anyio.create_task_group() as tg:
            await park(tg, view, *calls)
            owned.release()
            until(lambda: line(view) == 1)
            calls[0].scope.cancel()
        assert calls[0].cancelled
        assert calls[1].outcome is True
        assert not owned.acquire(blocking=False)

    async def test_who_is_cancelled_while_others_wait_costs_them_nothing(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        calls = [Call(view.acquire) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            await park(tg, view, *calls)
            calls[0].scope.cancel()
            await until_async(lambda: calls[0].done)
            owned.release()
            await until_async(lambda: calls[1].done)
            assert not calls[2].done
            owned.release()
        assert [call.outcome for call in calls] == [None, True, True]
        assert not owned.acquire(blocking=False)

    @pytest.mark.stress
    async def test_many_races_of_timeout_and_release_lose_no_permit(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        timeout = 0.005
        aim = Aim(timeout, 1e-4)

        def release_at(moment: float) -> None:
            wait_for_moment(moment, lambda: time.sleep(0))
            owned.release()

        for _ in range(60):
            call = Call(lambda: view.acquire(timeout=timeout))
            async with anyio.create_task_group() as tg:
                start = time.perf_counter()
                await park(tg, view, call)
                moment = aim.moment(start)
                release = InThread(lambda: release_at(moment))  # noqa: B023
            assert release.result() is None
            # One permit, and it is here or there.
            assert owned.acquire(blocking=False) is (call.outcome is False)
            aim.learn(call.outcome is True)
        assert min(aim.outcomes) >= 3

    async def test_threads_and_tasks_exclude_each_other(self, new: Callable[[], Any]) -> None:
        owned = new()
        owned.release()
        view: Any = from_threading(owned)
        inside = most = 0

        def enter() -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)

        def leave() -> None:
            nonlocal inside
            inside -= 1

        def in_thread() -> None:
            for _ in range(20):
                assert owned.acquire(timeout=PATIENCE)
                enter()
                time.sleep(0.0002)
                leave()
                owned.release()
                time.sleep(0.0005)

        async def in_task() -> None:
            for _ in range(20):
                async with view:
                    enter()
                    await anyio.sleep(0.0002)
                    leave()

        threads = [InThread(in_thread) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(in_task)
        await until_async(lambda: all(thread.done() for thread in threads))
        assert [thread.result() for thread in threads] == [None] * 3
        assert most == 1
        assert_one_permit(owned)

    def test_one_view_serves_several_loops_at_once(self, new: Callable[[], Any]) -> None:
        owned = new()
        view: Any = from_threading(owned)
        done: list[int] = []

        async def work(number: int) -> None:
            async with view:
                done.append(number)

        with (
            anyio.from_thread.start_blocking_portal("asyncio") as one,
            anyio.from_thread.start_blocking_portal("trio") as two,
        ):
            futures = []
            for number in range(10):
                portal = two if number % 2 else one
                futures.append(portal.start_task_soon(work, number))
                until(lambda: line(view) == number + 1)  # noqa: B023
            owned.release()
            for future in futures:
                future.result(PATIENCE)
        assert done == list(range(10))
        assert_one_permit(owned)

    @pytest.mark.stress
    def test_native_cancellation_leaves_no_helper_that_takes_something(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)

        async def main() -> None:
            for number in range(20):
                task = asyncio.create_task(view.acquire())
                await until_async(lambda: line(view) == 1)
                await asyncio.sleep(number * 0.0015)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                owned.release()
                assert_one_permit(owned)

        asyncio.run(main())

    def test_a_native_cancellation_after_the_grant_gives_the_permit_back(
        self, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)

        async def main() -> None:
            task = asyncio.create_task(view.acquire())
            await until_async(lambda: line(view) == 1)
            owned.release()
            until(lambda: not line(view))
            # Now the loop rings the bell, and the task is cancelled before it runs.
            asyncio.get_running_loop().call_soon(task.cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_one_permit(owned)

        asyncio.run(main())

    def test_a_coroutine_that_is_closed_leaves_no_permit(self, new: Callable[[], Any]) -> None:
        async def main() -> None:
            owned = new()
            view: Any = from_threading(owned)
            # Closed while it waits.
            coroutine = view.acquire()
            coroutine.send(None)
            coroutine.close()
            assert line(view) == 0
            owned.release()
            until(lambda: owned.acquire(blocking=False))
            # Closed when it has been handed a permit.
            coroutine = view.acquire()
            coroutine.send(None)
            owned.release()
            until(lambda: not line(view))
            assert not owned.acquire(blocking=False)
            coroutine.close()
            assert_one_permit(owned)

        asyncio.run(main())

    def test_a_task_whose_loop_was_closed_takes_nothing(self, new: Callable[[], Any]) -> None:
        owned = new()
        view: Any = from_threading(owned)
        loop = asyncio.new_event_loop()
        coroutine = view.acquire()
        task: Any = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        assert line(view) == 1
        loop.close()
        owned.release()
        until(lambda: owned.acquire(blocking=False))
        until(lambda: not helper_threads())
        assert not owned.acquire(blocking=False)
        coroutine.close()
        owned.release()
        assert_one_permit(owned)
        # It will never be done, which is not worth a word in the log.
        task._log_destroy_pending = False

    async def test_a_thread_that_cannot_be_started_is_an_error_and_nothing_else(
        self, new: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)

        def start(self: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await view.acquire()
        assert line(view) == 0
        call = Call(view.acquire)
        async with anyio.create_task_group() as tg:
            await park(tg, view, call)
            owned.release()
        assert call.outcome is True


class Watched(threading.Semaphore):
    """A semaphore that knows how many threads block in it."""

    inside = 0

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if not blocking:
            return super().acquire(blocking)
        self.inside += 1
        try:
            return super().acquire(blocking, timeout)
        finally:
            self.inside -= 1


@pytest.mark.stress
async def test_no_helper_is_inside_when_a_cancelled_or_timed_out_call_returns() -> None:
    owned = Watched(0)
    view = from_threading(owned)
    for number in range(30):
        timeout = 0.002 if number % 2 else None
        call = Call(lambda: view.acquire(timeout=timeout))  # noqa: B023
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await until_async(lambda: owned.inside == 1 or call.done)  # noqa: B023
            if timeout is None:
                call.scope.cancel()
            await until_async(lambda: call.done)  # noqa: B023
            assert owned.inside == 0
        assert call.cancelled is (timeout is None)


@pytest.mark.stress
@pytest.mark.parametrize("timeout", [None, 0.001])
def test_no_helper_is_inside_when_a_call_returns_that_was_natively_cancelled_once_more(
    timeout: float | None,
) -> None:
    owned = Watched(0)
    view = from_threading(owned)

    async def main() -> None:
        for _ in range(10):
            task = asyncio.create_task(view.acquire(timeout=timeout))
            await until_async(lambda: owned.inside == 1 or task.done())  # noqa: B023
            if timeout is None:
                task.cancel()
            # It waits for the helper to come out now.
            await until_async(lambda: line(view) == 0)
            for _ in range(5):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([task])
            assert task.cancelled() or task.result() is False
            assert owned.inside == 0
            until(lambda: not helper_threads())

    asyncio.run(main())


async def test_release_of_several_passes_through_and_wakes_tasks_and_threads() -> None:
    owned = threading.Semaphore(0)
    view = from_threading(owned)
    calls = [Call(view.acquire) for _ in range(3)]
    async with anyio.create_task_group() as tg:
        await park(tg, view, *calls)
        threads = [InThread(lambda: owned.acquire(timeout=PATIENCE)) for _ in range(3)]
        view.release(4)
        view.release(n=2)
    await until_async(lambda: all(thread.done() for thread in threads))
    assert [thread.result() for thread in threads] == [True] * 3
    assert [call.outcome for call in calls] == [True] * 3
    assert not owned.acquire(blocking=False)
    with pytest.raises(ValueError, match="n must be 1 or more"):
        view.release(0)


async def test_errors_of_release_pass_through() -> None:
    bounded = from_threading(threading.BoundedSemaphore())
    with pytest.raises(ValueError, match="Semaphore released too many times"):
        bounded.release()
    lock = from_threading(threading.Lock())
    with pytest.raises(RuntimeError):
        lock.release()
    assert not lock.locked()
    assert await lock.acquire()
    assert lock.locked()
    lock.release()


@pytest.mark.parametrize("new", NO_PERMIT[1:])
async def test_who_is_cancelled_does_not_give_back_what_somebody_else_has_released_for_him(
    new: Callable[[], Any],
) -> None:
    owned = new()
    view: Any = from_threading(owned)
    call = Call(view.acquire)
    async with anyio.create_task_group() as tg:
        await park(tg, view, call)
        owned.release()
        until(lambda: not line(view))
        owned.release()  # by somebody who takes the permit of the task for his own
        call.scope.cancel()
    assert call.cancelled
    assert_one_permit(owned)


async def test_an_object_that_raises_in_the_helper_raises_in_the_task() -> None:
    class Strange(threading.Semaphore):
        broken = False

        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if self.broken and blocking:
                raise ZeroDivisionError
            return super().acquire(blocking, timeout)

    owned = Strange(0)
    view = from_threading(owned)
    calls = [Call(view.acquire), Call(lambda: view.acquire(timeout=PATIENCE))]
    async with anyio.create_task_group() as tg:
        await park(tg, view, *calls)
        owned.broken = True
    assert [type(call.outcome) for call in calls] == [ZeroDivisionError] * 2
    owned.broken = False
    call = Call(view.acquire)
    async with anyio.create_task_group() as tg:
        await park(tg, view, call)
        owned.release()
    assert call.outcome is True


@pytest.mark.slow
def test_a_task_gets_its_turn_among_threads_that_always_contend() -> None:
    owned = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with owned:
                time.sleep(0.015)

    async def main() -> bool:
        return await from_threading(owned).acquire(timeout=PATIENCE / 4)

    threads = [InThread(work) for _ in range(4)]
    until(owned.locked)
    try:
        assert anyio.run(main) is True
        owned.release()
    finally:
        stop.set()
    assert [thread.result() for thread in threads] == [None] * 4


async def test_an_error_of_the_object_that_nobody_waits_for_is_dropped() -> None:
    gate = threading.Event()

    class Strange(threading.Semaphore):
        inside = False

        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if blocking:
                self.inside = True
                assert gate.wait(PATIENCE)
                raise ZeroDivisionError
            return super().acquire(blocking)

    owned = Strange(0)
    view = from_threading(owned)
    call = Call(view.acquire)
    async with anyio.create_task_group() as tg:
        tg.start_soon(call)
        await until_async(lambda: owned.inside)
        call.scope.cancel()
        await until_async(lambda: line(view) == 0)
        gate.set()
    assert call.cancelled
    owned.release()
    assert_one_permit(owned)


def test_a_coroutine_that_is_closed_while_it_waits_for_the_helper_leaves_no_permit() -> None:
    owned = Watched(0)
    view = from_threading(owned)

    async def main() -> None:
        coroutine = view.acquire()
        coroutine.send(None)
        until(lambda: owned.inside == 1)
        coroutine.throw(asyncio.CancelledError())  # it does not end before the helper is out
        coroutine.close()
        owned.release()
        until(lambda: owned.acquire(blocking=False))

    asyncio.run(main())
    until(lambda: not helper_threads())
    assert not owned.acquire(blocking=False)


# --- Event ---


class TestEvent:
    async def test_set_clear_and_is_set_pass_through(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        assert not view.is_set()
        assert await view.wait(0) is False
        assert await view.wait(-1) is False
        view.set()
        assert owned.is_set()
        assert view.is_set()
        assert await view.wait() is True
        assert await view.wait(0) is True
        assert await view.wait(timeout=1) is True
        view.clear()
        assert not owned.is_set()
        assert helper_threads() == 0

    @pytest.mark.parametrize("timeout", [None, PATIENCE, math.inf])
    async def test_set_by_a_thread_wakes_all_tasks(self, timeout: float | None) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        calls = [Call(lambda: view.wait(timeout)) for _ in range(50)]
        async with anyio.create_task_group() as tg:
            for call in calls:
                tg.start_soon(call)
            await settle()
            assert not any(call.done for call in calls)
            assert helper_threads() == 1
            InThread(owned.set).result()
        assert [call.outcome for call in calls] == [True] * 50

    async def test_set_wakes_all_tasks_even_if_it_is_cleared_at_once(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        calls = [Call(lambda: view.wait(PATIENCE)) for _ in range(10)]
        async with anyio.create_task_group() as tg:
            for call in calls:
                tg.start_soon(call)
            await settle()
            # The helper is in the event as well as a thread would be.
            await until_async(lambda: owned._cond._waiters)  # type: ignore[attr-defined]
            owned.set()
            owned.clear()
        assert [call.outcome for call in calls] == [True] * 10

    async def test_a_wait_without_a_limit_never_says_that_the_event_was_not_set(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        owned.set()
        call = Call(view.wait)
        other = Call(anyio.lowlevel.checkpoint)

        async def clear_in_between() -> None:
            owned.clear()
            await anyio.lowlevel.checkpoint()

        for _ in range(20):  # trio runs them in either order
            owned.set()
            call, other = Call(lambda: view.wait(PATIENCE)), Call(clear_in_between)
            async with anyio.create_task_group() as tg:
                tg.start_soon(call)
                tg.start_soon(other)
                await until_async(lambda: other.done)  # noqa: B023
                owned.set()
            assert call.outcome is True

    async def test_timeout_says_no_and_takes_nothing(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        before = time.monotonic()
        assert await view.wait(0.05) is False
        assert 0.04 < time.monotonic() - before < PATIENCE
        assert await view.wait(0.01) is False
        owned.set()
        assert await view.wait(0.01) is True

    async def test_bad_timeouts_are_refused(self) -> None:
        view: Any = from_threading(threading.Event())
        with pytest.raises(ValueError, match="NaN"):
            await view.wait(math.nan)
        with pytest.raises(TypeError, match="timeout must be a number"):
            await view.wait("1")

    async def test_cancellation_is_raised_and_others_still_wait(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        calls = [Call(view.wait) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            for call in calls:
                tg.start_soon(call)
            await settle()
            calls[1].scope.cancel()
            await until_async(lambda: calls[1].done)
            assert [call.done for call in calls] == [False, True, False]
            owned.set()
        assert [call.outcome for call in calls] == [True, None, True]
        with anyio.CancelScope() as scope:
            scope.cancel()
            await view.wait()
            pytest.fail("the cancellation was swallowed")

    async def test_many_rounds_of_waits_and_cancels_take_one_thread(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        for _ in range(20):
            with anyio.move_on_after(0.001):
                await view.wait()
            assert helper_threads() <= 1
        owned.set()

    async def test_a_helper_that_nobody_waits_for_ends_though_the_event_is_never_set(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_helper_threads, "_MAX_POLL", 0.01)  # how often it looks around
        owned = threading.Event()
        view = from_threading(owned)
        assert await view.wait(0.05) is False
        await until_async(lambda: not helper_threads())
        assert not owned.is_set()
        call = Call(view.wait)
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await anyio.sleep(0.05)
            owned.set()
        assert call.outcome is True

    def test_tasks_of_several_loops_and_threads_are_woken_by_one_set(self) -> None:
        owned = threading.Event()
        view = from_threading(owned)
        threads = [InThread(lambda: owned.wait(PATIENCE)) for _ in range(2)]
        with (
            anyio.from_thread.start_blocking_portal("asyncio") as one,
            anyio.from_thread.start_blocking_portal("trio") as two,
        ):
            futures = [portal.start_task_soon(view.wait) for portal in (one, two) * 3]
            until(helper_threads)
            view.set()
            assert [future.result(PATIENCE) for future in futures] == [True] * 6
        assert [thread.result() for thread in threads] == [True] * 2

    def test_a_coroutine_that_is_closed_leaves_nothing(self) -> None:
        async def main() -> None:
            owned = threading.Event()
            view = from_threading(owned)
            coroutine = view.wait()
            coroutine.send(None)
            coroutine.close()
            owned.set()
            assert await view.wait() is True

        asyncio.run(main())


# --- Barrier ---


async def arrive(tg: Any, owned: threading.Barrier, *calls: Call) -> None:
    """Let tasks arrive, one after the other."""
    for call in calls:
        before = owned.n_waiting
        tg.start_soon(call)
        await until_async(lambda: call.done or owned.n_waiting == before + 1)  # noqa: B023


class TestBarrier:
    async def test_threads_and_tasks_pass_together_and_get_each_index_once(self) -> None:
        actions: list[int] = []
        owned = threading.Barrier(6, lambda: actions.append(1))
        view = from_threading(owned)
        indices: list[int] = []

        def in_thread() -> None:
            for _ in range(10):
                index = owned.wait(PATIENCE)
                indices.append(index)

        async def in_task() -> None:
            for _ in range(10):
                index = await view.wait(PATIENCE)
                indices.append(index)

        threads = [InThread(in_thread) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(in_task)
        await until_async(lambda: all(thread.done() for thread in threads))
        assert sorted(indices) == sorted([*range(6)] * 10)
        assert len(actions) == 10

    async def test_properties_abort_and_reset_pass_through(self) -> None:
        owned = threading.Barrier(2)
        view = from_threading(owned)
        assert (view.parties, view.n_waiting, view.broken) == (2, 0, False)
        for end in (view.abort, view.reset):
            call = Call(view.wait)
            async with anyio.create_task_group() as tg:
                await arrive(tg, owned, call)
                assert view.n_waiting == 1
                end()
            assert isinstance(call.outcome, threading.BrokenBarrierError)
            assert view.broken is owned.broken is (end == view.abort)
            owned.reset()

    async def test_fifty_tasks_need_no_worker_thread_of_anyio(self) -> None:
        limiter = anyio.to_thread.current_default_thread_limiter()
        before = limiter.total_tokens
        limiter.total_tokens = 1
        owned = threading.Barrier(50)
        view = from_threading(owned)
        calls = [Call(lambda: view.wait(PATIENCE)) for _ in range(50)]
        try:
            async with anyio.create_task_group() as tg:
                for call in calls[1:]:
                    tg.start_soon(call)
                await until_async(lambda: owned.n_waiting == 49)
                assert limiter.borrowed_tokens == 0
                assert await anyio.to_thread.run_sync(lambda: 5) == 5
                tg.start_soon(calls[0])
        finally:
            limiter.total_tokens = before
        indices: Any = [call.outcome for call in calls]
        assert sorted(indices) == list(range(50))

    @pytest.mark.parametrize("timeout", [0, -1, 0.02])
    async def test_timeout_breaks_the_barrier_for_all(self, timeout: float) -> None:
        owned = threading.Barrier(4)
        view = from_threading(owned)
        thread = InThread(owned.wait)
        await until_async(lambda: owned.n_waiting == 1)
        patient = Call(view.wait)
        async with anyio.create_task_group() as tg:
            await arrive(tg, owned, patient)
            with pytest.raises(threading.BrokenBarrierError):
                await view.wait(timeout)
        assert isinstance(patient.outcome, threading.BrokenBarrierError)
        assert isinstance(thread.result(), threading.BrokenBarrierError)
        assert owned.broken

    async def test_wait_without_a_timeout_uses_that_of_the_barrier(self) -> None:
        owned = threading.Barrier(2, timeout=0.01)
        with pytest.raises(threading.BrokenBarrierError):
            await from_threading(owned).wait()
        assert owned.broken

    @pytest.mark.parametrize("timeout", [math.inf, 1e100, 1e9])
    async def test_wait_with_a_huge_timeout_waits_longer_than_that_of_the_barrier(
        self, timeout: float
    ) -> None:
        owned = threading.Barrier(2, timeout=0.01)
        view = from_threading(owned)
        call = Call(lambda: view.wait(timeout))
        async with anyio.create_task_group() as tg:
            await arrive(tg, owned, call)
            await anyio.sleep(0.05)  # five times that of the barrier
            assert await view.wait(PATIENCE) == 1
        assert call.outcome == 0

    async def test_bad_timeouts_are_refused_before_it_arrives(self) -> None:
        owned = threading.Barrier(1)
        view: Any = from_threading(owned)
        with pytest.raises(ValueError, match="NaN"):
            await view.wait(math.nan)
        with pytest.raises(TypeError, match="timeout must be a number"):
            await view.wait("1")
        assert (owned.n_waiting, owned.broken, helper_threads()) == (0, False, 0)

    async def test_the_error_of_an_action_goes_to_who_arrives_last(self) -> None:
        def action() -> None:
            raise ZeroDivisionError

        owned = threading.Barrier(3, action)
        view = from_threading(owned)
        calls = [Call(view.wait) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            await arrive(tg, owned, *calls)
        assert [type(call.outcome) for call in calls] == [
            threading.BrokenBarrierError,
            threading.BrokenBarrierError,
            ZeroDivisionError,
        ]
        assert owned.broken

    async def test_a_cancelled_wait_spares_a_round_that_lets_its_parties_out(self) -> None:
        class Slow(threading.Barrier):
            """Our thread is the last to come out, and takes its time."""

            looks = 0

            def wait(self, timeout: float | None = None) -> int:
                index = super().wait(timeout)
                if index == 0:
                    assert go.wait(PATIENCE)
                return index

            @property
            def n_waiting(self) -> int:
                self.looks += 1
                return super().n_waiting

        go = threading.Event()
        owned = Slow(2)
        call = Call(from_threading(owned).wait)
        async with anyio.create_task_group() as tg:
            await arrive(tg, owned, call)
            assert await anyio.to_thread.run_sync(owned.wait) == 1
            call.scope.cancel()
            looked = owned.looks
            await until_async(lambda: owned.looks >= looked + 3)
            assert not owned.broken
            go.set()
        assert not owned.broken

    async def test_a_cancelled_wait_aborts_the_barrier_for_threads_and_tasks(self) -> None:
        for _ in range(10):
            owned = threading.Barrier(4)
            view = from_threading(owned)
            thread = InThread(owned.wait)
            await until_async(lambda: owned.n_waiting == 1)  # noqa: B023
            calls = [Call(view.wait), Call(lambda: view.wait(PATIENCE))]  # noqa: B023
            async with anyio.create_task_group() as tg:
                await arrive(tg, owned, *calls)
                calls[1].scope.cancel()
                await until_async(lambda: calls[1].done)  # noqa: B023
                # Its thread has come out already.
                assert owned.broken
            assert calls[1].cancelled
            assert isinstance(calls[0].outcome, threading.BrokenBarrierError)
            assert isinstance(thread.result(), threading.BrokenBarrierError)
            assert owned.n_waiting == 0

    def test_a_native_cancellation_aborts_the_barrier(self) -> None:
        owned = threading.Barrier(2)

        async def main() -> None:
            task = asyncio.create_task(from_threading(owned).wait())
            await until_async(lambda: owned.n_waiting == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (owned.broken, owned.n_waiting) == (True, 0)

        asyncio.run(main())

    async def test_a_wait_that_is_cancelled_before_its_thread_has_arrived_aborts_the_barrier(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owned = threading.Barrier(3)
        other = InThread(owned.wait)
        await until_async(lambda: owned.n_waiting == 1)
        view = from_threading(owned)
        gate = threading.Event()
        real_wait = owned.wait

        def late(timeout: float | None = None) -> int:
            assert gate.wait(PATIENCE)
            return real_wait(timeout)

        monkeypatch.setattr(owned, "wait", late)
        call = Call(view.wait)
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await settle()
            call.scope.cancel()
            await until_async(lambda: owned.broken)
            assert isinstance(other.result(), threading.BrokenBarrierError)
            assert not call.done
            # Even if somebody makes the barrier as new in the meantime.
            owned.reset()
            gate.set()
        assert call.cancelled
        assert (owned.broken, owned.n_waiting) == (True, 0)

    async def test_a_cancelled_wait_does_not_stop_the_loop_while_an_action_runs(self) -> None:
        acting, go_on = threading.Event(), threading.Event()
        released_in_time: list[bool] = []

        def action() -> None:
            acting.set()
            released_in_time.append(go_on.wait(PATIENCE / 4))

        view = from_threading(threading.Barrier(1, action))
        call = Call(view.wait)
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await until_async(acting.is_set)
            call.scope.cancel()
            for _ in range(10):
                await anyio.sleep(0.001)
            go_on.set()
        assert call.cancelled
        assert released_in_time == [True]

    async def test_a_cancelled_wait_aborts_the_barrier_though_no_thread_can_be_started(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(self: object) -> None:
            raise RuntimeError("can't start new thread")

        owned = threading.Barrier(2)
        call = Call(from_threading(owned).wait)
        async with anyio.create_task_group() as tg:
            await arrive(tg, owned, call)
            monkeypatch.setattr(threading.Thread, "start", start)
            call.scope.cancel()
            await until_async(lambda: call.done)
        assert call.cancelled
        assert (owned.broken, owned.n_waiting) == (True, 0)

    async def test_a_cancellation_after_the_trip_leaves_the_barrier_alone(self) -> None:
        owned = threading.Barrier(2)
        view = from_threading(owned)
        for _ in range(5):
            call = Call(view.wait)
            async with anyio.create_task_group() as tg:
                await arrive(tg, owned, call)
                # Without a chance for the loop to tell the task.
                assert owned.wait(PATIENCE) == 1
                until(lambda: not helper_threads())
                call.scope.cancel()
            assert call.cancelled
            assert not owned.broken
            assert owned.n_waiting == 0

    def test_a_coroutine_that_is_closed_aborts_the_barrier(self) -> None:
        async def main() -> None:
            owned = threading.Barrier(2)
            coroutine = from_threading(owned).wait()
            coroutine.send(None)
            until(lambda: owned.n_waiting == 1)
            coroutine.close()
            until(lambda: owned.broken)

        asyncio.run(main())

    def test_a_coroutine_that_is_closed_after_the_trip_leaves_the_barrier_alone(self) -> None:
        async def main() -> None:
            owned = threading.Barrier(2)
            coroutine = from_threading(owned).wait()
            coroutine.send(None)
            assert owned.wait(PATIENCE) == 1
            until(lambda: not helper_threads())
            coroutine.close()
            until(lambda: not helper_threads())
            assert not owned.broken

        asyncio.run(main())

    def test_a_task_whose_loop_was_closed_still_takes_part(self) -> None:
        owned = threading.Barrier(2)
        loop = asyncio.new_event_loop()
        coroutine = from_threading(owned).wait()
        task: Any = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        until(lambda: owned.n_waiting == 1)
        loop.close()
        assert owned.wait(PATIENCE) == 1
        until(lambda: not helper_threads())
        coroutine.close()
        assert not owned.broken
        task._log_destroy_pending = False

    def test_a_round_may_mix_threads_and_tasks_of_several_loops(self) -> None:
        owned = threading.Barrier(6)
        view = from_threading(owned)

        async def work() -> list[int]:
            return [await view.wait(PATIENCE) for _ in range(10)]

        with (
            anyio.from_thread.start_blocking_portal("asyncio") as one,
            anyio.from_thread.start_blocking_portal("trio") as two,
        ):
            futures = [portal.start_task_soon(work) for portal in (one, two) * 2]
            threads = [
                InThread(lambda: [owned.wait(PATIENCE) for _ in range(10)]) for _ in range(2)
            ]
            results: list[Any] = [future.result(PATIENCE) for future in futures]
            results += [thread.result() for thread in threads]
        for round in zip(*results, strict=True):
            assert sorted(round) == list(range(6))


# --- Storms ---


class BridgeStorm:
    """Threads and tasks of two loops compete for three permits, and often change their mind."""

    def __init__(self, seed: int) -> None:
        self.owned = threading.Semaphore(3)
        self.view = from_threading(self.owned)
        self.seed = seed
        self.end = time.monotonic() + 1.5
        self.lock = threading.Lock()
        self.holders = 0
        self.most = 0
        self.served = {"thread": 0, "asyncio": 0, "trio": 0}
        self.refused = dict(self.served)

    def going(self) -> bool:
        return time.monotonic() < self.end

    def enter(self, kind: str) -> None:
        with self.lock:
            self.holders += 1
            self.most = max(self.most, self.holders)
            self.served[kind] += 1

    def leave(self) -> None:
        with self.lock:
            self.holders -= 1

    def refuse(self, kind: str) -> None:
        with self.lock:
            self.refused[kind] += 1

    def in_thread(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while self.going():
            if self.owned.acquire(timeout=rng.choice([0.001, 0.01, PATIENCE])):
                self.enter("thread")
                time.sleep(rng.uniform(0, 0.002))
                self.leave()
                self.owned.release()
                time.sleep(rng.uniform(0, 0.003))
            else:
                self.refuse("thread")

    async def attempt(self, kind: str, rng: random.Random) -> None:
        if await self.view.acquire(timeout=rng.choice([None, 0, 0.001, 0.01, 0.03])):
            self.enter(kind)
            try:
                await anyio.sleep(rng.uniform(0, 0.002))
            finally:
                self.leave()
                self.view.release()
        else:
            self.refuse(kind)

    async def in_task(self, kind: str, number: int) -> None:
        rng = random.Random(f"{self.seed} {kind} {number}")
        while self.going():
            delay = rng.choice([0, 0.001, 0.005, 0.02, 0.04])
            if kind == "asyncio" and rng.random() < 0.5:
                task = asyncio.create_task(self.attempt(kind, rng))
                await asyncio.wait([task], timeout=delay)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
            else:
                with anyio.move_on_after(delay):
                    await self.attempt(kind, rng)

    async def in_tasks(self, kind: str) -> None:
        async with anyio.create_task_group() as tg:
            for number in range(6):
                tg.start_soon(self.in_task, kind, number)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
def test_no_permit_is_lost_or_invented_in_a_storm_of_threads_and_tasks(seed: int) -> None:
    storm = BridgeStorm(seed)
    with contextlib.ExitStack() as stack:
        futures = [
            stack.enter_context(anyio.from_thread.start_blocking_portal(kind)).start_task_soon(
                storm.in_tasks, kind
            )
            for kind in ("asyncio", "trio")
        ]
        threads = [InThread(lambda n=n: storm.in_thread(n)) for n in range(3)]  # type: ignore[misc]
        assert [thread.result() for thread in threads] == [None] * 3
        assert [future.result(PATIENCE) for future in futures] == [None] * 2
    assert storm.holders == 0
    assert 1 < storm.most <= 3
    assert all(storm.served.values())
    assert storm.refused["asyncio"]
    assert storm.refused["trio"]
    assert [storm.owned.acquire(blocking=False) for _ in range(4)] == [True] * 3 + [False]


# --- What is refused, and test doubles ---


def test_with_a_view_is_a_type_error_that_names_async_with() -> None:
    for new in ALL[:3]:
        view: Any = from_threading(new())
        expected = f"^{type(view).__name__} needs 'async with' in a task"
        with pytest.raises(TypeError, match=expected), view:
            pytest.fail("entered")


def test_release_takes_integers_only() -> None:
    class Integer:
        def __index__(self) -> int:
            return 2

    owned = threading.Semaphore(0)
    view: Any = from_threading(owned)
    for wrong in (1.0, 2.5, "1", None):
        with pytest.raises(TypeError, match="n must be an int"):
            view.release(wrong)
    for few in (0, -1):
        with pytest.raises(ValueError, match="n must be 1 or more"):
            view.release(few)
    assert not owned.acquire(blocking=False)
    view.release(True)
    assert_one_permit(owned)
    view.release(Integer())
    assert [owned.acquire(blocking=False) for _ in range(3)] == [True, True, False]


@every_acquirable
async def test_blocking_is_a_bool(new: Callable[[], Any]) -> None:
    owned = new()
    owned.release()
    view: Any = from_threading(owned)
    for wrong in (0.5, 2, "x", None, timedelta(seconds=1)):
        with pytest.raises(TypeError, match="timeout="):
            await view.acquire(wrong)
    with pytest.raises(TypeError, match=r"\.total_seconds\(\)"):
        await view.acquire(timeout=timedelta(seconds=1))
    assert_one_permit(owned)


@pytest.mark.parametrize("new", [threading.Event, lambda: threading.Barrier(1)])
async def test_the_timeout_of_a_wait_is_no_timedelta(new: Callable[[], Any]) -> None:
    view: Any = from_threading(new())
    with pytest.raises(TypeError, match=r"\.total_seconds\(\)"):
        await view.wait(timedelta(seconds=1))


@pytest.mark.parametrize("cls", [aiosync.TaskSemaphore, aiosync.TaskLock])
async def test_autospec_of_a_view_works_in_async_with(cls: Any) -> None:
    assert inspect.iscoroutinefunction(cls.__aenter__)
    double = create_autospec(cls, instance=True)
    async with double:
        pass
    double.__aexit__.assert_awaited_once()
    double.acquire.return_value = True
    assert await double.acquire(timeout=1) is True


@pytest.mark.parametrize("cls", [aiosync.TaskEvent, aiosync.TaskBarrier])
async def test_autospec_of_a_view_can_be_awaited(cls: Any) -> None:
    double = create_autospec(cls, instance=True)
    await double.wait(1)
    double.wait.assert_awaited_once_with(1)


# --- A clock that stands still, as freezegun and time-machine make it ---


async def spin(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition` is true; a frozen event loop cannot sleep."""
    end = time.perf_counter() + PATIENCE
    while not condition():
        assert time.perf_counter() < end
        await anyio.lowlevel.checkpoint()


class TestFrozenClock:
    @every_acquirable
    async def test_a_task_gets_what_a_thread_releases(
        self, frozen_clock: None, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        calls = [Call(view.acquire), Call(lambda: view.acquire(timeout=PATIENCE))]
        async with anyio.create_task_group() as tg:
            for number, call in enumerate(calls):
                tg.start_soon(call)
                await spin(lambda: line(view) == number + 1)  # noqa: B023
            for call in calls:
                owned.release()
                await spin(lambda: call.done)  # noqa: B023
        assert [call.outcome for call in calls] == [True] * 2

    @every_acquirable
    async def test_a_cancelled_task_does_not_hang(
        self, frozen_clock: None, new: Callable[[], Any]
    ) -> None:
        owned = new()
        view: Any = from_threading(owned)
        call = Call(view.acquire)
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await spin(lambda: line(view) == 1)
            call.scope.cancel()
            await spin(lambda: call.done and not helper_threads())
        assert call.cancelled

    async def test_an_event_wakes_tasks(self, frozen_clock: None) -> None:
        owned = threading.Event()
        call = Call(lambda: from_threading(owned).wait(PATIENCE))
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await spin(helper_threads)
            owned.set()
            await spin(lambda: call.done)
        assert call.outcome is True

    async def test_a_cancelled_task_leaves_its_barrier(self, frozen_clock: None) -> None:
        owned = threading.Barrier(2)
        call = Call(from_threading(owned).wait)
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await spin(lambda: owned.n_waiting == 1)
            call.scope.cancel()
            await spin(lambda: call.done)
        assert call.cancelled
        assert owned.broken

    async def test_a_barrier_breaks_after_the_timeout_of_a_task(self, frozen_clock: None) -> None:
        owned = threading.Barrier(2)
        call = Call(lambda: from_threading(owned).wait(0.01))
        async with anyio.create_task_group() as tg:
            tg.start_soon(call)
            await spin(lambda: call.done)
        assert isinstance(call.outcome, threading.BrokenBarrierError)


# --- The threads that serve tasks ---


async def test_a_cancelled_task_does_not_wait_for_tasks_that_came_during_its_last_poll() -> None:
    polling, go_on = threading.Event(), threading.Event()

    class Gated(threading.Semaphore):
        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if blocking:
                polling.set()
                assert go_on.wait(PATIENCE)
                timeout = 0.001
            return super().acquire(blocking, timeout)

    owned = Gated(0)
    view = from_threading(owned)
    first, second = Call(view.acquire), Call(view.acquire)
    async with anyio.create_task_group() as tg:
        await park(tg, view, first)
        await until_async(polling.is_set)
        first.scope.cancel()
        await until_async(lambda: view._poller._stop_waiters)
        await park(tg, view, second)
        go_on.set()
        await until_async(lambda: first.done)
        assert not second.done
        owned.release()
    assert first.cancelled
    assert second.outcome is True


async def test_a_poller_takes_nothing_while_its_only_task_was_served_but_has_not_run() -> None:
    owned = Watched(0)
    view = from_threading(owned)
    call = Call(view.acquire)
    async with anyio.create_task_group() as tg:
        await park(tg, view, call)
        await until_async(lambda: owned.inside == 1)
        owned.release(2)
        # The event loop stands still, so the task stays a client of the poller.
        until(lambda: not line(view) and not owned.inside)
        for _ in range(20):
            assert owned.inside == 0
            time.sleep(0.0005)
        assert_one_permit(owned)
    assert call.outcome is True


async def test_a_closed_coroutine_can_be_finalized_while_its_view_holds_its_lock() -> None:
    for view in (from_threading(threading.Semaphore(0)), from_threading(threading.Event())):
        coroutine: Any = view.acquire() if hasattr(view, "acquire") else view.wait()
        coroutine.send(None)
        with view._poller._lock:
            closing = InThread(coroutine.close)
            until(closing.done)
        assert closing.result() is None
        if isinstance(view, aiosync.TaskEvent):
            view.set()
