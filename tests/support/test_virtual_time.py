"""Timeouts to the second, on trio's clock that jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from aiosync import Barrier, BrokenBarrierError, Semaphore


def test_a_semaphore_waits_as_long_as_it_was_told() -> None:
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
    assert semaphore.statistics().waiting == 0


def test_a_grant_at_the_very_end_of_the_timeout_is_a_grant_or_is_not() -> None:
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


def test_a_barrier_waits_as_long_as_it_was_told() -> None:
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
