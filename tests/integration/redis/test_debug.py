"""What debugging tells of objects that are shared with other processes."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest
from anyio import create_task_group
from support.debugging import debugging
from support.helpers import InThread, until_async
from support.permits import connect, new_name
from support.redis_servers import RedisServer, ServerProgram

from aiosync import BrokenBarrierError, as_threading, debug
from aiosync.redis import LeaseLost, Redis

__all__ = ["debugging"]

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(60)]


def held_by(shared: object) -> list[str]:
    return [holder.name for holder in debug.holders(shared)]


def waiting(shared: object) -> list[str]:
    return [waiter.name for waiter in debug.waiters(shared)]


async def test_holders_and_waiters(redis: Redis) -> None:
    semaphore = redis.semaphore(new_name())

    async def use() -> None:
        async with semaphore:
            pass

    async with create_task_group() as tasks, semaphore.hold():
        tasks.start_soon(use, name="second")
        await until_async(lambda: waiting(semaphore) == ["second"])
        assert len(held_by(semaphore)) == 1
        report = debug.report()
        assert f"DistributedSemaphore {semaphore.name!r}: permits=1 held_here=1" in report
        assert "test_debug.py" in report
    assert held_by(semaphore) == waiting(semaphore) == []


async def test_plain_calls(redis: Redis) -> None:
    semaphore = redis.semaphore(new_name())
    assert await semaphore.acquire()
    assert await semaphore.acquire(blocking=False) is False
    assert await semaphore.acquire(timeout=0.01) is False
    assert len(held_by(semaphore)) == 1
    async with create_task_group() as tasks:
        tasks.start_soon(semaphore.acquire)
        await until_async(lambda: waiting(semaphore))
        tasks.cancel_scope.cancel()
    assert waiting(semaphore) == []
    semaphore.release()
    assert held_by(semaphore) == []


async def test_a_permit_that_is_released_early(redis: Redis) -> None:
    semaphore = redis.semaphore(new_name())
    async with semaphore.hold() as permit:
        permit.release()
        permit.release()
        assert held_by(semaphore) == []


@pytest.mark.slow
async def test_a_permit_that_was_lost(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        async with connect(server, lease=1) as redis:
            semaphore = redis.semaphore(new_name())
            with pytest.raises(LeaseLost):
                async with semaphore.hold(cancel=False) as permit:
                    assert len(held_by(semaphore)) == 1
                    server.freeze()
                    await until_async(lambda: permit.lost)
                    assert held_by(semaphore) == []
                    server.thaw()


async def test_threads(redis: Redis) -> None:
    semaphore = redis.semaphore(new_name())
    view = as_threading(semaphore)

    def use() -> list[str]:
        with view:
            return held_by(view)

    user = InThread(use)
    await until_async(user.done)
    assert str(user.result()).startswith("['Thread-")
    assert held_by(semaphore) == []


async def test_barriers(redis: Redis) -> None:
    barrier = redis.barrier(new_name(), 2)

    async def wait() -> None:
        with suppress(BrokenBarrierError):
            await barrier.wait(20)

    async with create_task_group() as tasks:
        tasks.start_soon(wait, name="party")
        await until_async(lambda: barrier.n_waiting == 1)
        assert waiting(barrier) == ["party"]
        assert held_by(barrier) == []
        assert debug.waiters(barrier)[0].timeout == 20
        assert f"DistributedBarrier {barrier.name!r}: parties=2 waiting_here=1" in debug.report()
        await barrier.wait()
    async with create_task_group() as tasks:
        tasks.start_soon(wait)
        await until_async(lambda: barrier.n_waiting == 1)
        barrier.abort()
    assert waiting(barrier) == []


async def test_a_deadlock(redis: Redis) -> None:
    """The tasks that wait hold all permits of all processes."""
    semaphore = redis.semaphore(new_name())

    async def use() -> None:
        async with semaphore, semaphore:
            pass

    async with create_task_group() as tasks:
        tasks.start_soon(use, name="worker")
        await until_async(lambda: "DEADLOCK: task 'worker' waits for itself" in debug.report())
        tasks.cancel_scope.cancel()


async def test_holders_in_other_processes_may_release(redis: Redis) -> None:
    semaphore = redis.semaphore(new_name(), 2)

    async def use() -> None:
        async with semaphore, semaphore, semaphore:
            pass

    async with create_task_group() as tasks:
        async with redis.semaphore(semaphore.name, 2):
            tasks.start_soon(use, name="worker")
            await until_async(lambda: len(held_by(semaphore)) == 1)
            await until_async(lambda: waiting(semaphore) == ["worker"])
            await anyio.wait_all_tasks_blocked()
            assert "DEADLOCK" not in debug.report()
        tasks.cancel_scope.cancel()
