"""What asyncio alone can do: `task.cancel()`, `asyncio.timeout`, `wait_for`, `TaskGroup`, `gather`.

A native cancellation comes once, and may come after the grant in the same step, where that of a
scope cannot: so here every await is cancelled before and after its decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore

pytestmark = pytest.mark.asyncio

Kind = type[Semaphore]
kinds = pytest.mark.parametrize("kind", [Semaphore, BoundedSemaphore])
timeouts = pytest.mark.parametrize("timeout", [None, 60])


async def start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Return a task that runs `coroutine`, and has come to its first await."""
    task = asyncio.get_running_loop().create_task(coroutine)
    await asyncio.sleep(0)
    return task


async def finish(*tasks: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


def is_cancelled(outcome: object) -> bool:
    return isinstance(outcome, asyncio.CancelledError)


class TestSemaphore:
    @kinds
    @timeouts
    async def test_cancelled_before_the_grant(self, kind: Kind, timeout: float | None) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        task = await start(semaphore.acquire(timeout=timeout))
        task.cancel()
        semaphore.release()
        semaphore.acquire_nowait()
        [outcome] = await finish(task)
        assert is_cancelled(outcome)
        semaphore.release()
        assert (semaphore.value, semaphore.statistics().waiting) == (1, 0)

    @kinds
    @timeouts
    async def test_cancelled_after_the_grant_the_permit_is_passed_on(
        self, kind: Kind, timeout: float | None
    ) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        tasks = [await start(semaphore.acquire(timeout=timeout)) for _ in range(3)]
        semaphore.release()
        tasks[0].cancel()
        await asyncio.sleep(0)
        tasks[1].cancel()  # it was handed the permit in this very step
        outcomes = await finish(*tasks)
        assert is_cancelled(outcomes[0])
        assert is_cancelled(outcomes[1])
        assert outcomes[2] is True
        assert (semaphore.value, semaphore.statistics().waiting) == (0, 0)
        semaphore.release()
        assert semaphore.value == 1

    @kinds
    async def test_cancelled_in_the_checkpoint(self, kind: Kind) -> None:
        semaphore = kind(1)
        task = asyncio.get_running_loop().create_task(semaphore.acquire())
        waiter = await start(semaphore.acquire())
        assert (semaphore.value, semaphore.statistics().waiting) == (0, 1)
        task.cancel()
        outcomes = await finish(task, waiter)
        assert is_cancelled(outcomes[0])
        assert outcomes[1] is True
        assert semaphore.value == 0

    @kinds
    async def test_cancelled_in_the_checkpoint_of_a_vain_try(self, kind: Kind) -> None:
        semaphore = kind(0)
        task = await start(semaphore.acquire(blocking=False))
        task.cancel()
        [outcome] = await finish(task)
        assert is_cancelled(outcome)
        assert semaphore.value == 0

    @kinds
    @timeouts
    async def test_cancelled_before_it_has_begun(self, kind: Kind, timeout: float | None) -> None:
        semaphore = kind(1)
        task = asyncio.get_running_loop().create_task(semaphore.acquire(timeout=timeout))
        task.cancel()
        [outcome] = await finish(task)
        assert is_cancelled(outcome)
        assert semaphore.value == 1

    async def test_a_task_that_goes_on_after_a_cancellation_holds_nothing(self) -> None:
        semaphore = Semaphore(0)

        async def work() -> str:
            try:
                await semaphore.acquire()
            except asyncio.CancelledError:
                return "went on"
            return "acquired"

        task = await start(work())
        task.cancel()
        await finish(task)
        assert task.result() == "went on"
        semaphore.release()
        assert semaphore.value == 1

    @kinds
    async def test_wait_for_gives_up_and_leaves_nothing(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(semaphore.acquire(), 0.01)
        semaphore.release()
        assert await asyncio.wait_for(semaphore.acquire(), 10) is True

    @kinds
    async def test_timeout_and_task_group(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await semaphore.acquire()
        async with asyncio.TaskGroup() as tg:
            waiter = tg.create_task(semaphore.acquire())
            await asyncio.sleep(0)
            semaphore.release()
        assert waiter.result() is True
        assert semaphore.value == 0

    async def test_the_timer_of_a_wait_that_was_cancelled_is_gone(self) -> None:
        loop = asyncio.get_running_loop()
        semaphore = Semaphore(0)
        timers: list[asyncio.TimerHandle] = []
        call_later = loop.call_later

        def spy(delay: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            timer = call_later(delay, *args, **kwargs)
            if delay == 3600:
                timers.append(timer)
            return timer

        loop.call_later = spy  # type: ignore[method-assign,assignment]
        task = await start(semaphore.acquire(timeout=3600))
        task.cancel()
        await finish(task)
        granted = await start(semaphore.acquire(timeout=3600))
        semaphore.release()
        await finish(granted)
        assert [timer.cancelled() for timer in timers] == [True, True]

    async def test_no_timer_is_made_for_a_free_permit(self) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later = None  # type: ignore[method-assign,assignment]
        semaphore = Semaphore(1)
        assert await semaphore.acquire(timeout=3600) is True

    @kinds
    async def test_release_in_a_callback_of_the_loop_wakes_a_waiter(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        waiter = await start(semaphore.acquire())
        asyncio.get_running_loop().call_soon(semaphore.release)
        assert await finish(waiter) == [True]

    @pytest.mark.parametrize("cancelled", [True, False])
    async def test_a_waiter_cancelled_in_a_callback_after_its_release(
        self, cancelled: bool
    ) -> None:
        # The bell is rung from afar then, and finds a future that is done.
        semaphore = Semaphore(1)
        await semaphore.acquire()
        waiter = await start(semaphore.acquire())

        def callback() -> None:
            semaphore.release()
            if cancelled:
                waiter.cancel()

        asyncio.get_running_loop().call_soon(callback)
        [outcome] = await finish(waiter)
        assert is_cancelled(outcome) is cancelled
        assert semaphore.value == int(cancelled)


class TestBarrier:
    @timeouts
    async def test_cancelled_before_the_trip(self, timeout: float | None) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait(timeout)) for _ in range(2)]
        tasks[0].cancel()
        outcomes = await finish(*tasks)
        assert is_cancelled(outcomes[0])
        assert isinstance(outcomes[1], BrokenBarrierError)
        assert barrier.broken

    @timeouts
    async def test_cancelled_after_the_trip_the_others_pass_and_later_rounds_too(
        self, timeout: float | None
    ) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait(timeout)) for _ in range(2)]
        assert await barrier.wait() == 2
        tasks[0].cancel()
        outcomes = await finish(*tasks)
        assert is_cancelled(outcomes[0])
        assert outcomes[1] == 1
        assert not barrier.broken
        assert sorted(await finish(*[await start(barrier.wait()) for _ in range(3)])) == [0, 1, 2]

    async def test_cancelled_in_the_step_of_the_last_arrival(self) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait()) for _ in range(2)]
        tasks[1].cancel()
        with pytest.raises(BrokenBarrierError, match="broken: cancelled"):
            await barrier.wait()
        outcomes = await finish(*tasks)
        assert isinstance(outcomes[0], BrokenBarrierError)
        assert is_cancelled(outcomes[1])

    async def test_cancelled_in_the_checkpoint_of_a_barrier_of_one(self) -> None:
        barrier = Barrier(1)
        task = await start(barrier.wait())
        task.cancel()
        [outcome] = await finish(task)
        assert is_cancelled(outcome)
        assert await barrier.wait() == 0

    async def test_a_cancelled_action_breaks_the_barrier_and_is_told(self) -> None:
        forever = asyncio.get_running_loop().create_future()

        async def action() -> None:
            await forever

        barrier = Barrier(2, action)
        tasks = [await start(barrier.wait()) for _ in range(2)]
        tasks[1].cancel()
        outcomes = await finish(*tasks)
        assert isinstance(outcomes[0], BrokenBarrierError)
        assert is_cancelled(outcomes[1])

    async def test_a_timeout_in_the_step_of_the_trip(self) -> None:
        barrier = Barrier(2)
        task = await start(asyncio.wait_for(barrier.wait(), 60))
        await asyncio.sleep(0)
        assert await barrier.wait() == 1
        task.cancel()  # as its timeout would
        outcomes = await finish(task)
        assert outcomes == [0] or is_cancelled(outcomes[0])
        assert not barrier.broken
        assert sorted(await finish(*[await start(barrier.wait()) for _ in range(2)])) == [0, 1]
