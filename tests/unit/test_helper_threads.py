"""`from_threading` over objects that behave badly: they raise, or block for long."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from typing import Any

import anyio
import pytest
from anyio import create_task_group
from support.helpers import PATIENCE, helper_threads, settle, until_async

from aiosync import _helper_threads, from_threading

pytestmark = pytest.mark.anyio


async def test_what_a_foreign_object_raises_is_raised_by_those_who_wait_for_it() -> None:
    class Semaphore(threading.Semaphore):
        broken = True

        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if blocking and self.broken:
                raise OSError("out of order")
            return super().acquire(blocking, timeout)

    semaphore = Semaphore(0)
    view = from_threading(semaphore)
    with pytest.raises(OSError, match="out of order"):
        await view.acquire()
    with pytest.raises(OSError, match="out of order"):
        await view.acquire(timeout=PATIENCE)
    semaphore.broken = False
    semaphore.release()
    assert await view.acquire() is True
    await until_async(lambda: helper_threads() == 0)


async def test_a_helper_that_can_not_be_started_is_an_error_and_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(run: Any) -> None:
        raise RuntimeError("can't start new thread")

    semaphore, event = threading.Semaphore(0), threading.Event()
    acquire, wait = from_threading(semaphore), from_threading(event)
    with monkeypatch.context() as patch:
        patch.setattr(_helper_threads, "start_thread", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await acquire.acquire()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await wait.wait()
    semaphore.release()
    event.set()
    assert await acquire.acquire(timeout=PATIENCE) is True
    assert await wait.wait(PATIENCE) is True


async def test_an_event_that_is_set_for_an_instant_lets_all_go_who_wait() -> None:
    event = threading.Event()
    view = from_threading(event)
    results: list[bool] = []

    async def wait() -> None:
        results.append(await view.wait(PATIENCE))

    async with create_task_group() as group:
        for _ in range(5):
            group.start_soon(wait)
        await settle()
        # The helper waits inside the event: only then has anybody waited for it at all.
        await until_async(lambda: event._cond._waiters)  # type: ignore[attr-defined]
        event.set()
        event.clear()
    assert results == [True] * 5


@pytest.mark.slow
async def test_a_wait_for_an_event_that_ends_leaves_no_trace() -> None:
    event = threading.Event()
    view = from_threading(event)
    for _ in range(20):
        assert await view.wait(0.001) is False
    assert not view._poller._clients
    await until_async(lambda: helper_threads() == 0)
    event.set()
    assert await view.wait() is True


async def test_a_long_action_of_a_barrier_does_not_freeze_the_loop_of_a_cancelled_task() -> None:
    acting, proceed = threading.Event(), threading.Event()

    def action() -> None:
        acting.set()
        assert proceed.wait(PATIENCE)

    barrier = threading.Barrier(1, action)
    async with create_task_group() as group:
        group.start_soon(from_threading(barrier).wait)
        await until_async(acting.is_set)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)  # the loop goes on
            proceed.set()
    await until_async(lambda: helper_threads() == 0)


def test_a_coroutine_closed_after_its_party_has_passed_does_not_break_the_next_round() -> None:
    barrier = threading.Barrier(2)
    coroutine = from_threading(barrier).wait()

    async def main() -> None:
        coroutine.send(None)

    asyncio.run(main())
    barrier.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while helper_threads():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    coroutine.close()
    assert not barrier.broken


def test_a_coroutine_closed_before_its_party_has_passed_aborts_the_barrier() -> None:
    barrier = threading.Barrier(2)
    coroutine = from_threading(barrier).wait()

    async def main() -> None:
        coroutine.send(None)

    asyncio.run(main())
    coroutine.close()
    deadline = time.monotonic() + PATIENCE
    while helper_threads():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert barrier.broken


@pytest.mark.parametrize("timeout", [math.inf, 1e300])
async def test_for_ever_is_not_the_timeout_of_the_barrier(timeout: float) -> None:
    barrier = threading.Barrier(2, timeout=0.01)
    view = from_threading(barrier)
    with anyio.move_on_after(0.05) as scope:  # five times that of the barrier
        await view.wait(timeout)
    assert scope.cancelled_caught
    assert barrier.broken  # by the cancellation


@pytest.mark.parametrize(
    "view",
    [
        from_threading(threading.Semaphore(0)),
        from_threading(threading.Event()),
        from_threading(threading.Barrier(2)),
    ],
    ids=lambda view: type(view).__name__,
)
def test_outside_of_an_event_loop_the_error_says_so(view: Any) -> None:
    coroutine = (view.acquire if hasattr(view, "acquire") else view.wait)()
    with pytest.raises(RuntimeError, match="no asyncio or trio event loop is running") as caught:
        coroutine.send(None)
    assert caught.value.__context__ is None


def test_the_helper_goes_when_the_loop_of_all_who_wait_has_closed() -> None:
    semaphore = threading.Semaphore(0)
    view = from_threading(semaphore)
    loop = asyncio.new_event_loop()
    coroutine = view.acquire()

    async def main() -> None:
        # By hand, so that no task complains when it is destroyed.
        coroutine.send(None)

    loop.run_until_complete(main())
    assert helper_threads() == 1
    loop.close()
    deadline = time.monotonic() + PATIENCE
    while helper_threads():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    semaphore.release()
    assert semaphore.acquire(blocking=False) is True
    coroutine.close()
    gc.collect()
