"""Bugs that other libraries have had, each as a test named after its symptom.

Where the trigger is a native cancellation or `asyncio.timeout`, asyncio is the only place to show
it; the others run under every event loop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio import WouldBlock, create_task_group, wait_all_tasks_blocked

from aiosync import Barrier, BrokenBarrierError, Semaphore
from aiosync._park import run_in_thread

native = pytest.mark.asyncio


async def start(coroutine: Any) -> asyncio.Task[Any]:
    task = asyncio.get_running_loop().create_task(coroutine)
    await asyncio.sleep(0)
    return task


async def finish(*tasks: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


class TestAsyncioBarrier:
    @native
    async def test_index_repeats_after_a_cancel(self) -> None:
        # A and B wait, three are needed; A is cancelled; C and D arrive: asyncio gives [1, 1, 2].
        barrier = Barrier(3)
        a, b = await start(barrier.wait()), await start(barrier.wait())
        a.cancel()
        await finish(a, b)
        barrier.reset()
        tasks = [await start(barrier.wait()) for _ in range(3)]
        assert await finish(*tasks) == [0, 1, 2]

    @native
    async def test_reset_just_after_a_trip_splits_the_round(self) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait()) for _ in range(2)]
        assert await barrier.wait() == 2
        barrier.reset()
        assert await finish(*tasks) == [0, 1]

    @native
    async def test_a_cancelled_party_leaves_the_survivors_hanging(self) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait()) for _ in range(2)]
        tasks[0].cancel()
        outcomes = await finish(*tasks)
        assert isinstance(outcomes[1], BrokenBarrierError)

    @native
    async def test_a_timeout_in_the_step_of_the_trip_splits_the_round(self) -> None:
        barrier = Barrier(3)
        tasks = [await start(barrier.wait()) for _ in range(2)]
        # What asyncio.timeout() does when its time is over, before and after the trip.
        assert await barrier.wait() == 2
        tasks[1].cancel()
        outcomes = await finish(*tasks)
        assert outcomes[0] == 0
        assert isinstance(outcomes[1], asyncio.CancelledError)

        tasks = [await start(barrier.wait()) for _ in range(2)]
        tasks[1].cancel()
        with pytest.raises(BrokenBarrierError):
            await barrier.wait()
        outcomes = await finish(*tasks)
        assert isinstance(outcomes[0], BrokenBarrierError)


class TestAiologicBarrier:
    @native
    async def test_a_native_cancel_after_the_trip_breaks_the_next_round(self) -> None:
        barrier = Barrier(2)
        task = await start(barrier.wait())
        assert await barrier.wait() == 1
        task.cancel()
        await finish(task)
        assert not barrier.broken
        tasks = [await start(barrier.wait()) for _ in range(2)]
        assert await finish(*tasks) == [0, 1]


class TestAnyioPrimitives:
    @native
    async def test_a_permit_is_lost_when_the_picked_waiter_is_natively_cancelled(self) -> None:
        semaphore = Semaphore(1)
        await semaphore.acquire()
        first, second = await start(semaphore.acquire()), await start(semaphore.acquire())
        semaphore.release()
        first.cancel()
        outcomes = await finish(first, second)
        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert outcomes[1] is True

    @native
    async def test_a_fresh_acquire_between_handover_and_resumption_oversubscribes(self) -> None:
        semaphore = Semaphore(1, fast_acquire=True)
        await semaphore.acquire()
        waiter = await start(semaphore.acquire())
        semaphore.release()
        with pytest.raises(WouldBlock):
            semaphore.acquire_nowait()
        assert await finish(waiter) == [True]
        assert semaphore.value == 0

    @pytest.mark.anyio
    async def test_acquire_nowait_fails_although_the_only_waiter_was_cancelled(self) -> None:
        semaphore = Semaphore(1)
        await semaphore.acquire()
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire)
            await wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
            semaphore.release()
            semaphore.acquire_nowait()

    def test_an_object_made_outside_a_loop_works_under_one_kind_of_loop_only(self) -> None:
        semaphore, barrier = Semaphore(1), Barrier(2)

        async def main() -> None:
            async with create_task_group() as tg:
                for _ in range(2):
                    tg.start_soon(contend)

        async def contend() -> None:
            await barrier.wait()
            async with semaphore:
                await anyio.lowlevel.checkpoint()

        for backend in ("asyncio", "trio", "asyncio", "trio"):
            anyio.run(main, backend=backend)
        assert semaphore.value == 1
        assert not barrier.broken


class TestBridges:
    def test_a_permit_granted_as_a_thread_gives_up_belongs_to_nobody(self) -> None:
        # The release races with the end of the timeout, in many small ways.
        semaphore = Semaphore(0)
        twin = semaphore._for_threads()
        start_now = threading.Barrier(2)
        outcomes: list[bool] = []

        def wait() -> None:
            for _ in range(300):
                start_now.wait(10)
                outcomes.append(run_in_thread(twin.acquire(timeout=0.0005)))
                start_now.wait(10)

        thread = threading.Thread(target=wait)
        thread.start()
        for number in range(300):
            start_now.wait(10)
            end = time.perf_counter() + 0.0005 * (number % 20) / 10
            while time.perf_counter() < end:
                pass
            semaphore.release()
            start_now.wait(10)
            # Exactly one of the two has it.
            assert semaphore.value + outcomes[-1] == 1
            if not outcomes[-1]:
                semaphore.acquire_nowait()
        thread.join(10)
        assert semaphore.value == 0

    @pytest.mark.anyio
    async def test_a_thread_that_gave_up_eats_a_later_permit(self) -> None:
        semaphore = Semaphore(0)
        twin = semaphore._for_threads()

        def give_up() -> bool:
            return run_in_thread(twin.acquire(timeout=0.01))

        assert await anyio.to_thread.run_sync(give_up) is False
        semaphore.release()
        assert semaphore.value == 1


class TestThreadingBarrier:
    @pytest.mark.skipif(sys.platform == "win32", reason="there is no setitimer on Windows")
    def test_a_party_that_a_signal_interrupts_leaves_the_others_waiting(self) -> None:
        class Interrupt(Exception):
            pass

        def handler(number: int, frame: object) -> None:
            raise Interrupt

        barrier = Barrier(3)
        twin = barrier._for_threads()
        outcomes: list[object] = []

        def wait() -> None:
            try:
                outcomes.append(run_in_thread(twin.wait(30)))
            except BrokenBarrierError as error:
                outcomes.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while barrier.n_waiting < 1:
            time.sleep(0.001)
        previous = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupt):
                run_in_thread(twin.wait(30))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        thread.join(10)
        assert isinstance(outcomes[0], BrokenBarrierError)


class TestAsyncioSemaphoreOfOld:
    @native
    async def test_a_waiter_cancelled_as_the_holder_releases_makes_a_fresh_acquire_hang(
        self,
    ) -> None:
        semaphore = Semaphore(1)
        await semaphore.acquire()
        waiter = await start(semaphore.acquire())
        semaphore.release()
        waiter.cancel()
        assert await asyncio.wait_for(semaphore.acquire(), 10) is True
        [outcome] = await finish(waiter)
        assert isinstance(outcome, asyncio.CancelledError)


class TestVirtualTime:
    """Timeouts to the second, on trio's clock that jumps."""

    def test_a_semaphore_waits_as_long_as_it_was_told(self) -> None:
        semaphore = Semaphore(0)

        async def main() -> None:
            begin = trio.current_time()
            assert await semaphore.acquire(timeout=1000) is False
            assert trio.current_time() - begin == pytest.approx(1000)
            with trio.move_on_after(10) as scope:
                await semaphore.acquire(timeout=1000)
            assert scope.cancelled_caught
            assert trio.current_time() - begin == pytest.approx(1010)
            with trio.move_on_after(1000) as scope:
                assert await semaphore.acquire(timeout=10) is False
            assert not scope.cancelled_caught

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert semaphore.statistics().tasks_waiting == 0

    def test_a_grant_at_the_very_end_of_the_timeout_is_a_grant_or_is_not(self) -> None:
        semaphore = Semaphore(0)
        outcomes: list[bool] = []

        async def wait() -> None:
            outcomes.append(await semaphore.acquire(timeout=10))

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.sleep(10)
                semaphore.release()

        for _ in range(20):  # trio runs the two in any order
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
            assert outcomes[-1] + semaphore.value == 1
            while semaphore.value:
                semaphore.acquire_nowait()

    def test_a_barrier_waits_as_long_as_it_was_told(self) -> None:
        barrier = Barrier(3, timeout=1000)
        ended: list[float] = []

        async def wait(timeout: float | None) -> None:
            with pytest.raises(BrokenBarrierError):
                await barrier.wait(timeout)
            ended.append(trio.current_time())

        async def main() -> None:
            begin = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, None)
                nursery.start_soon(wait, 100)
            assert ended == [pytest.approx(begin + 100)] * 2

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
