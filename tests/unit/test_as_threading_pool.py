"""as_threading(pool): OS threads and tasks that share one ConnectionPool."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import random
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from support.helpers import PATIENCE, until, until_async
from support.pool_stubs import SteppingBackend, SteppingConnection

from aiosync import (
    ConnectionPool,
    PoolClosed,
    PoolEvent,
    PoolTimeout,
    TooManyRequests,
    as_threading,
)
from aiosync._as_threading_pool import ThreadConnectionPool
from aiosync._park import run_in_thread, thread_waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

BACKENDS = ["asyncio", "trio"]


def start(work: Callable[[], T]) -> Future[T]:
    """Run `work` on a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


async def result(future: Future[T]) -> T:
    await until_async(future.done)
    return future.result()


def waiting(pool: ConnectionPool[Any]) -> int:
    return pool.get_stats()["requests_waiting"]


async def check_whole(pool: ConnectionPool[SteppingConnection], backend: SteppingBackend) -> None:
    """Check that every slot can be had, and that no more connections are open."""
    found = [await pool.acquire(PATIENCE) for _ in range(pool.max_size)]
    assert len({id(connection) for connection in found}) == pool.max_size
    for connection in found:
        with connection.used():
            pass
    assert backend.open == pool.max_size
    for connection in found:
        pool.release(connection)
    assert backend.peak <= pool.max_size


@contextmanager
def opened(
    pool: ConnectionPool[SteppingConnection], backend: str
) -> Iterator[anyio.from_thread.BlockingPortal]:
    """Open `pool` on an event loop that runs on another thread."""
    with anyio.from_thread.start_blocking_portal(backend) as portal:
        portal.call(pool.__aenter__)
        try:
            yield portal
        finally:
            portal.call(pool.__aexit__, None, None, None)


@pytest.mark.anyio
class TestThreadsAndTasks:
    async def test_stand_in_one_line(self) -> None:
        backend = SteppingBackend(1)
        served: list[int] = []
        async with backend.pool() as pool:
            view = as_threading(pool)

            def in_thread(number: int) -> None:
                with view.connection(PATIENCE) as connection, connection.used():
                    served.append(number)

            async def in_task(number: int) -> None:
                async with pool.connection(PATIENCE) as connection:
                    with connection.used():
                        served.append(number)
                        await anyio.lowlevel.checkpoint()

            connection = await pool.acquire()
            futures = []
            async with anyio.create_task_group() as tasks:
                for number in range(12):
                    if number % 3:
                        futures.append(start(lambda number=number: in_thread(number)))  # type: ignore[misc]
                    else:
                        tasks.start_soon(in_task, number)
                    await until_async(lambda number=number: waiting(pool) == number + 1)  # type: ignore[misc]
                pool.release(connection)
                for future in futures:
                    await result(future)
            assert served == list(range(12))
            await check_whole(pool, backend)
        backend.check_all_closed()

    @pytest.mark.parametrize("kind", ["thread", "executor", "to_thread"])
    async def test_of_every_kind_borrow_idle_and_new_connections(self, kind: str) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(max_size=3) as pool:
            view = as_threading(pool)

            def use() -> int:
                for _ in range(5):
                    with view.connection() as connection, connection.used():
                        pass
                    connection = view.acquire()
                    with connection.used():
                        pass
                    view.release(connection)
                return threading.get_ident()

            if kind == "to_thread":
                async with anyio.create_task_group() as tasks:
                    for _ in range(6):
                        tasks.start_soon(anyio.to_thread.run_sync, use)
            elif kind == "executor":
                with ThreadPoolExecutor(6) as executor:
                    futures = [executor.submit(use) for _ in range(6)]
                    found = [await result(future) for future in futures]
                assert threading.get_ident() not in found
            else:
                for future in [start(use) for _ in range(6)]:
                    await result(future)
            assert pool.get_stats()["requests_num"] == 60
            await check_whole(pool, backend)
        backend.check_all_closed()

    async def test_may_release_what_the_other_has_borrowed(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            for _ in range(3):
                connection = await result(start(view.acquire))
                pool.release(connection)
                connection = await pool.acquire()
                await result(start(lambda connection=connection: view.release(connection)))  # type: ignore[misc]
                assert pool.get_stats()["pool_available"] == 1
            connection = await result(start(view.acquire))
            pool.discard(connection)
            replacement = await pool.acquire()
            assert replacement is not connection
            await result(start(lambda: view.discard(replacement)))
            await check_whole(pool, backend)
        assert pool.get_stats()["closed_discard"] == 2
        backend.check_all_closed()

    async def test_have_all_functions_called_on_the_loop_of_the_pool(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool("check", "reset", check_idle=0) as pool:
            view = as_threading(pool)

            def use() -> None:
                for _ in range(3):
                    with view.connection():
                        pass
                connection = view.acquire()
                view.discard(connection)
                with view.connection():
                    pass

            await result(start(use))
            await until_async(lambda: pool.get_stats()["pool_available"] == 1)
        assert backend.threads == {threading.get_ident()}
        assert backend.calls == {"connect": 2, "check": 3, "reset": 4, "close": 2}
        backend.check_all_closed()

    async def test_a_thread_waits_for_a_connection_to_be_made_checked_or_reset(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool("check", "reset", check_idle=0) as pool:
            view = as_threading(pool)
            connection = await result(start(view.acquire))
            assert backend.calls == {"connect": 1}
            pool.release(connection)
            await until_async(lambda: pool.get_stats()["pool_available"] == 1)
            assert await result(start(view.acquire)) is connection
            assert backend.calls == {"connect": 1, "reset": 1, "check": 1}
            waiter = start(view.acquire)
            await until_async(lambda: waiting(pool) == 1)
            pool.release(connection)
            assert await result(waiter) is connection
            assert backend.calls == {"connect": 1, "reset": 2, "check": 2}
            pool.release(connection)
        backend.check_all_closed()

    @pytest.mark.slow
    async def test_together_never_have_more_than_allowed(self) -> None:
        threads, tasks_number, rounds = 8, 20, 40
        seed = random.randrange(2**32)
        backend = SteppingBackend(1)
        outcomes: Counter[str] = Counter()
        interval = sys.getswitchinterval()
        async with backend.pool("check", "reset", max_size=4, check_idle=0.001) as pool:
            view = as_threading(pool)

            def in_thread(number: int) -> Counter[str]:
                chance = random.Random(seed + number)
                found: Counter[str] = Counter()
                for _ in range(rounds):
                    timeout = chance.choice([None, None, 0.002, 0])
                    try:
                        connection = view.acquire(timeout)
                    except PoolTimeout:
                        found["timeout"] += 1
                        continue
                    with connection.used():
                        if chance.random() < 0.2:
                            time.sleep(0)
                    back = view.discard if chance.random() < 0.05 else view.release
                    back(connection)
                    found["served"] += 1
                return found

            async def in_task(number: int) -> None:
                chance = random.Random(seed - 1 - number)
                for _ in range(rounds):
                    with anyio.move_on_after(chance.choice([60, 60, 0.002])):
                        async with pool.connection(60) as connection:
                            with connection.used():
                                if chance.random() < 0.3:
                                    with anyio.CancelScope(shield=True):
                                        await anyio.lowlevel.checkpoint()
                            outcomes["task"] += 1

            sys.setswitchinterval(1e-6)
            try:
                futures = [
                    start(lambda number=number: in_thread(number))  # type: ignore[misc]
                    for number in range(threads)
                ]
                async with anyio.create_task_group() as tasks:
                    for number in range(tasks_number):
                        tasks.start_soon(in_task, number)
                for future in futures:
                    found = await result(future)
                    outcomes += found
            finally:
                sys.setswitchinterval(interval)
            assert outcomes["served"] + outcomes["timeout"] == threads * rounds, seed
            assert outcomes["served"] > threads
            assert outcomes["task"] > tasks_number
            await until_async(lambda: pool.get_stats()["in_use"] == waiting(pool) == 0)
            await check_whole(pool, backend)
        assert backend.peak <= 4
        backend.check_all_closed()


@pytest.mark.anyio
class TestWhatAThreadIsTold:
    async def test_its_time_is_over(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(timeout=0.04) as pool:
            view = as_threading(pool)
            connection = await pool.acquire()

            def fail(timeout: float | None) -> float:
                began = time.monotonic()
                with pytest.raises(PoolTimeout, match="in_use=1") as info:
                    view.acquire(timeout)
                assert isinstance(info.value, TimeoutError)
                assert info.value.stats["in_use"] == 1
                with pytest.raises(PoolTimeout), view.connection(timeout):
                    pass
                return (time.monotonic() - began) / 2

            assert await result(start(lambda: fail(0.03))) >= 0.03
            assert await result(start(lambda: fail(None))) >= 0.04  # that of the pool
            with anyio.fail_after(PATIENCE):
                await result(start(lambda: fail(0)))
                await result(start(lambda: fail(-1)))
            assert pool.get_stats()["timeouts"] == 8
            assert waiting(pool) == 0
            pool.release(connection)
            await check_whole(pool, backend)

    async def test_a_timeout_of_0_takes_an_idle_connection(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool("check", check_idle=0, min_size=1) as pool:
            await pool.wait()
            view = as_threading(pool)
            connection = await result(start(lambda: view.acquire(0)))
            view.release(connection)
            await until_async(lambda: pool.get_stats()["pool_available"] == 1)
            assert await result(start(view.acquire_nowait)) is connection
            view.release(connection)
            assert backend.calls["check"] == 0

    async def test_the_error_of_an_outage(self) -> None:
        def connect() -> SteppingConnection:
            raise ConnectionRefusedError

        for fail_fast in (False, True):
            timeout = PATIENCE if fail_fast else 0.05
            async with ConnectionPool(connect, fail_fast=fail_fast) as pool:
                future = start(lambda: as_threading(pool).acquire(timeout))  # noqa: B023
                with pytest.raises(PoolTimeout) as info:
                    await result(future)
                assert isinstance(info.value.__cause__, ConnectionRefusedError)

    async def test_bad_arguments(self) -> None:
        async with SteppingBackend(1).pool() as pool:
            view = as_threading(pool)
            with pytest.raises(ValueError, match="NaN"):
                await result(start(lambda: view.acquire(float("nan"))))
            wrong: Any = "1"
            with pytest.raises(TypeError, match="timeout"):
                await result(start(lambda: view.acquire(wrong)))

    async def test_a_connection_that_is_not_borrowed(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            connection = await pool.acquire()

            def release_all() -> None:
                view.release(connection)
                for refused in (connection, SteppingConnection()):
                    for back in (view.release, view.discard):
                        with pytest.raises(ValueError, match="is not borrowed"):
                            back(refused)

            await result(start(release_all))
            await check_whole(pool, backend)

    async def test_too_many_wait(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(max_waiting=1) as pool:
            view = as_threading(pool)
            connection = await pool.acquire()
            first = start(view.acquire)
            await until_async(lambda: waiting(pool) == 1)
            for _ in range(2):
                with pytest.raises(TooManyRequests, match="1 wait"):
                    await result(start(view.acquire))
                with pytest.raises(TooManyRequests):
                    await pool.acquire()
            pool.release(connection)
            assert await result(first) is connection
            pool.release(connection)
            await check_whole(pool, backend)

    async def test_there_is_nothing_to_take(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            with pytest.raises(anyio.WouldBlock):
                await result(start(view.acquire_nowait))
            # But one is made for the next who asks.
            await until_async(lambda: pool.get_stats()["pool_available"] == 1)
            connection = await result(start(view.acquire_nowait))
            with pytest.raises(anyio.WouldBlock):
                await result(start(view.acquire_nowait))
            view.release(connection)

    async def test_the_pool_is_not_open(self) -> None:
        pool = SteppingBackend(1).pool()
        view = as_threading(pool)

        def refused(state: str) -> None:
            for borrow in (view.acquire, view.acquire_nowait, view.connection().__enter__):
                with pytest.raises(PoolClosed, match=state):
                    borrow()

        await result(start(lambda: refused("not open yet")))
        async with pool:
            connection = await result(start(view.acquire))
            view.release(connection)
        await result(start(lambda: refused("is closed")))


@pytest.mark.anyio
class TestCheckout:
    async def test_gives_back_whatever_happens(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)

            def use() -> None:
                checkout = view.connection(PATIENCE)
                for _ in range(2):
                    with pytest.raises(LookupError), checkout as connection:
                        assert pool.get_stats()["in_use"] == 1
                        raise LookupError
                    assert pool.get_stats()["in_use"] == 0
                with checkout, pytest.raises(RuntimeError, match="already"), checkout:
                    pass
                with view.connection() as connection:
                    view.release(connection)
                with view.connection() as connection:
                    view.discard(connection)
                with view.connection() as replacement:
                    assert replacement is not connection

            await result(start(use))
            await check_whole(pool, backend)
        backend.check_all_closed()

    async def test_does_not_give_back_what_somebody_else_has_borrowed_since(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            view = as_threading(pool)
            with view.connection(0) as connection:
                view.release(connection)
                assert await pool.acquire() is connection
            assert pool.get_stats()["in_use"] == 1
            pool.release(connection)


@pytest.mark.anyio
class TestAThreadWithARunningEventLoop:
    async def test_may_not_block(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            with pytest.raises(RuntimeError, match="would block the event loop"):
                view.acquire()  # one would have to be made
            with pytest.raises(RuntimeError, match="would block the event loop"):
                view.acquire(0.01)
            with pytest.raises(RuntimeError, match="would block"), view.connection():
                pass
            assert waiting(pool) == 0
            assert pool.get_stats()["requests_waiting"] == 0
            await check_whole(pool, backend)

    async def test_may_do_all_that_does_not_block(self) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            view = as_threading(pool)
            view.release(view.acquire())
            view.release(view.acquire(0))
            view.release(view.acquire_nowait())
            with view.connection() as connection:
                assert view.info(connection).uses == 4
                with pytest.raises(PoolTimeout):
                    view.acquire(0)
                with pytest.raises(anyio.WouldBlock):
                    view.acquire_nowait()
            await check_whole(pool, backend)

    @pytest.mark.parametrize("other", BACKENDS)
    async def test_that_is_not_that_of_the_pool_may_do_the_same(self, other: str) -> None:
        backend = SteppingBackend(1)
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            view = as_threading(pool)

            async def main() -> None:
                view.release(view.acquire())
                connection = view.acquire(0)
                with pytest.raises(RuntimeError, match="would block the event loop"):
                    view.acquire()
                with pytest.raises(RuntimeError, match="another event loop"):
                    await pool.acquire()
                view.release(connection)

            await result(start(lambda: anyio.run(main, backend=other)))
            await check_whole(pool, backend)

    @pytest.mark.parametrize("other", BACKENDS)
    async def test_that_is_not_that_of_the_pool_may_take_what_is_idle(self, other: str) -> None:
        async with SteppingBackend(1).pool(min_size=1) as pool:
            await pool.wait()
            view = as_threading(pool)

            async def main() -> None:
                view.release(view.acquire_nowait())

            await result(start(lambda: anyio.run(main, backend=other)))


@pytest.mark.anyio
class TestClosingThePool:
    async def test_sends_away_waiting_threads_before_it_waits_for_anything(self) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool(close_timeout=PATIENCE)
        await pool.__aenter__()
        view = as_threading(pool)
        connection = await result(start(view.acquire))
        waiters = [start(view.acquire) for _ in range(4)]
        await until_async(lambda: waiting(pool) == 4)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.__aexit__, None, None, None)
            for future in waiters:
                with pytest.raises(PoolClosed, match="is closed"):
                    await result(future)
            assert not connection.closed  # there is still time to give it back
            assert pool.get_stats()["in_use"] == 1
            await result(start(lambda: view.release(connection)))
        backend.check_all_closed()
        assert pool.get_stats()["closed_shutdown"] == 1
        assert pool.get_stats()["closed_forced"] == 0

    async def test_takes_from_threads_by_force_what_they_do_not_give_back(self) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool(close_timeout=0.02, max_size=2)
        view = as_threading(pool)
        proceed = threading.Event()

        def use() -> None:
            with view.connection() as connection:
                other = view.acquire()
                borrowed.append(connection)
                assert proceed.wait(PATIENCE)
            view.release(other)
            with pytest.raises(ValueError, match="is not borrowed"):
                view.release(other)

        borrowed: list[SteppingConnection] = []
        async with pool:
            future = start(use)
            await until_async(lambda: bool(borrowed))
        backend.check_all_closed()
        assert pool.get_stats()["closed_forced"] == 2
        proceed.set()
        await result(future)
        backend.check_all_closed()

    async def test_by_force_leaves_nothing_behind_for_those_who_never_come_back(self) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool(close_timeout=0.02)
        async with pool:
            connection = await result(start(as_threading(pool).acquire))
        backend.check_all_closed()
        assert pool.get_stats()["in_use"] == 0
        assert connection.closed == 1


class TestTheLoopOfThePoolHasEnded:
    """Without closing the pool, which is a mistake, but not a reason to hang."""

    @pytest.mark.parametrize("backend_name", BACKENDS)
    def test_threads_that_wait_and_those_that_come_get_an_error(self, backend_name: str) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool(close_timeout=0.02)
        view = as_threading(pool)
        futures: list[Future[SteppingConnection]] = []

        async def main() -> None:
            await pool.__aenter__()
            borrowed.append(await pool.acquire())
            futures.extend(start(view.acquire) for _ in range(3))
            await until_async(lambda: waiting(pool) == 3)

        borrowed: list[SteppingConnection] = []
        if backend_name == "asyncio":
            asyncio.run(main())
        else:
            trio.run(main)
        for future in futures:
            with pytest.raises(PoolClosed):
                future.result(PATIENCE)
        borrow: Callable[[], SteppingConnection]
        for borrow in (view.acquire, lambda: view.acquire(PATIENCE), view.acquire_nowait):
            with pytest.raises(PoolClosed):
                borrow()
        view.release(borrowed.pop())  # it was closed by force
        backend.check_all_closed()

    @pytest.mark.slow
    def test_a_loop_that_was_closed_with_tasks_on_it_serves_nobody(self) -> None:
        with abandoned(PATIENCE) as (view, _):
            with pytest.raises(PoolClosed, match="has ended, without closing the pool"):
                start(view.acquire).result(PATIENCE)
            with pytest.raises(PoolClosed, match="has ended, without closing the pool"):
                start(lambda: view.acquire(PATIENCE)).result(PATIENCE)
            with pytest.raises(PoolClosed, match="has ended, without closing the pool"):
                start(lambda: view.acquire(0)).result(PATIENCE)
            with pytest.raises(PoolClosed, match="has ended, without closing the pool"):
                start(view.acquire_nowait).result(PATIENCE)

    @pytest.mark.slow
    @pytest.mark.parametrize("timeout", [PATIENCE, math.inf])
    def test_a_loop_that_was_closed_with_tasks_on_it_leaves_nobody_waiting(
        self, timeout: float
    ) -> None:
        with abandoned(timeout) as (view, future):
            with pytest.raises(PoolClosed, match="has ended"):
                future.result(PATIENCE)
            stats = view.get_stats()
            assert (stats["requests_errors"], stats["cancelled"]) == (1, 0)

    def test_a_thread_looks_for_that_before_it_says_that_its_time_is_over(self) -> None:
        looks: list[float] = []

        def look() -> None:
            looks.append(timeout)
            if len(looks) == 2:
                raise PoolClosed

        for timeout in (0.01, 0.02):
            sleeper = thread_waiter(look)
            if timeout == 0.02:
                with pytest.raises(PoolClosed):
                    run_in_thread(sleeper.wait_with_timeout(timeout))
            else:
                run_in_thread(sleeper.wait_with_timeout(timeout))
        assert looks == [0.01, 0.02]


def ignore(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    pass


@contextmanager
def abandoned(
    timeout: float,
) -> Iterator[tuple[ThreadConnectionPool[SteppingConnection], Future[SteppingConnection]]]:
    """Open a pool of one connection, which is borrowed; let a thread wait; close the loop."""
    backend = SteppingBackend(1)
    pool = backend.pool(timeout=timeout)
    view = as_threading(pool)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(ignore)  # it will miss the tasks

    async def main() -> Future[SteppingConnection]:
        await pool.__aenter__()
        backend.made.append(await pool.acquire())
        future = start(view.acquire)
        await until_async(lambda: waiting(pool) == 1)
        return future

    future = loop.run_until_complete(main())
    loop.close()
    try:
        yield view, future
    finally:
        until(future.done)


@pytest.mark.anyio
class TestAConnectionThatAThreadHasLost:
    async def test_is_replaced_when_it_is_collected(self) -> None:
        backend = SteppingBackend(1, keep=False)
        events: list[PoolEvent] = []
        async with backend.pool(on_event=events.append) as pool:
            view = as_threading(pool)
            dropped: list[weakref.ref[SteppingConnection]] = []

            def drop() -> None:
                connection = view.acquire()
                dropped.append(weakref.ref(connection))

            waiter = None
            for number in range(3):
                await result(start(drop))
                waiter = start(view.acquire) if number == 2 else None
                gc.collect()
                assert dropped[-1]() is None
                await until_async(lambda number=number: pool.get_stats()["leaks"] == number + 1)  # type: ignore[misc]
                if waiter is None:
                    assert pool.get_stats()["in_use"] == 0
            assert waiter is not None
            connection = await result(waiter)
            assert pool.get_stats()["closed_collected"] == 3
            assert [event.kind for event in events].count("leaked") == 3
            assert backend.number_made == 4
            view.release(connection)
            assert pool.get_stats()["pool_size"] == 1

    async def test_with_a_checkout_that_was_never_left_is_replaced_too(self) -> None:
        backend = SteppingBackend(1, keep=False)
        async with backend.pool() as pool:
            view = as_threading(pool)

            def enter() -> None:
                view.connection().__enter__()

            await result(start(enter))
            gc.collect()
            async with pool.connection(PATIENCE):
                pass
            assert pool.get_stats()["leaks"] == 1


class TestReleasesOutOfNowhere:
    @pytest.mark.anyio
    @pytest.mark.parametrize("waiter", ["thread", "task"])
    async def test_from_a_finalizer(self, waiter: str) -> None:
        class Holder:
            pass

        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            for where in ("here", "in a thread"):
                holder = Holder()
                connection = await pool.acquire()
                weakref.finalize(holder, view.release, connection)
                async with anyio.create_task_group() as tasks:
                    served: list[SteppingConnection] = []

                    async def wait(served: list[SteppingConnection] = served) -> None:
                        if waiter == "thread":
                            served.append(await result(start(view.acquire)))
                        else:
                            served.append(await pool.acquire())

                    tasks.start_soon(wait)
                    await until_async(lambda: waiting(pool) == 1)
                    holders = [holder]
                    del holder
                    if where == "here":
                        holders.clear()
                    else:
                        await result(start(holders.clear))
                assert served == [connection]
                pool.release(connection)
            await check_whole(pool, backend)

    @pytest.mark.anyio
    @pytest.mark.skipif(sys.platform == "win32", reason="there are no timers on Windows")
    @pytest.mark.parametrize("waiter", ["thread", "task"])
    async def test_from_a_signal_handler_while_the_loop_sleeps(self, waiter: str) -> None:
        backend = SteppingBackend(1)
        async with backend.pool() as pool:
            view = as_threading(pool)
            connection = await pool.acquire()
            calls = 0

            def handler(*_: object) -> None:
                nonlocal calls
                calls += 1
                view.release(connection)

            before = signal.signal(signal.SIGALRM, handler)
            try:
                async with anyio.create_task_group() as tasks:
                    served: list[SteppingConnection] = []

                    async def wait() -> None:
                        if waiter == "thread":
                            found = await anyio.to_thread.run_sync(view.acquire)
                        else:
                            found = await pool.acquire()
                        served.append(found)

                    tasks.start_soon(wait)
                    await until_async(lambda: waiting(pool) == 1)
                    signal.setitimer(signal.ITIMER_REAL, 0.02)
                    # Nothing else is going on now, so it is the handler that wakes the loop.
                assert calls == 1
                assert served == [connection]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            pool.release(connection)
            await check_whole(pool, backend)

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no timers on Windows")
    @pytest.mark.parametrize("backend_name", BACKENDS)
    def test_from_a_signal_handler_to_the_very_thread_that_it_interrupts(
        self, backend_name: str
    ) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool()
        view = as_threading(pool)
        with opened(pool, backend_name) as portal:
            connection = view.acquire()
            before = signal.signal(signal.SIGALRM, lambda *_: view.release(connection))
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                assert view.acquire(PATIENCE) is connection
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            view.release(connection)
            portal.call(check_whole, pool, backend)
        backend.check_all_closed()

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no timers on Windows")
    @pytest.mark.parametrize("backend_name", BACKENDS)
    @pytest.mark.parametrize("release_first", [False, True])
    def test_an_exception_from_a_signal_handler_leaves_a_thread_with_nothing(
        self, backend_name: str, release_first: bool
    ) -> None:
        class Interrupt(BaseException):
            pass

        backend = SteppingBackend(1)
        pool = backend.pool()
        view = as_threading(pool)

        def interrupt(*_: object) -> None:
            if release_first:
                view.release(connection)  # it is granted, and must not be lost
            raise Interrupt

        with opened(pool, backend_name) as portal:
            connection = view.acquire()
            before = signal.signal(signal.SIGALRM, interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                with pytest.raises(Interrupt):
                    view.acquire(PATIENCE)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            assert waiting(pool) == 0
            if not release_first:
                view.release(connection)
            assert view.acquire(0) is connection
            view.release(connection)
            portal.call(check_whole, pool, backend)
        backend.check_all_closed()


class TestTheView:
    @pytest.mark.parametrize("wrong", [None, 1, "pool", object(), threading.Lock()])
    def test_of_something_else_is_refused(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match=f"not {type(wrong).__name__}"):
            as_threading(wrong)

    def test_of_a_view_is_refused(self) -> None:
        view: Any = as_threading(SteppingBackend(1).pool())
        with pytest.raises(TypeError, match="not ThreadConnectionPool"):
            as_threading(view)

    @pytest.mark.parametrize("backend_name", BACKENDS)
    def test_tells_the_same_as_the_pool(self, backend_name: str) -> None:
        backend = SteppingBackend(1)
        pool = backend.pool(name="the pool", max_size=2, max_lifetime=100)
        view, other = as_threading(pool), as_threading(pool)
        assert "not open yet" in repr(view)
        with opened(pool, backend_name) as portal:
            connection = view.acquire()
            info = other.info(connection)
            assert info.uses == 1
            assert info.in_use is not None
            assert 0 <= info.in_use <= info.age < PATIENCE
            assert 95 - PATIENCE <= info.expires_in <= 100
            with pytest.raises(ValueError, match="does not belong to the pool"):
                view.info(SteppingConnection())
            assert view.get_stats() == other.get_stats() == pool.get_stats()
            assert view.get_stats()["in_use"] == 1
            other.release(connection)
            assert view.get_stats()["in_use"] == 0
            assert view.info(connection).in_use is None
            assert repr(pool) in repr(view)
            assert repr(view).startswith("<as_threading.ConnectionPool at 0x")
            assert "1 of 2 connections, 1 idle, 0 waiting" in repr(view)
            portal.call(check_whole, pool, backend)
        assert "is closed" in repr(view)

    def test_can_be_weakly_referenced_but_not_copied(self) -> None:
        view = as_threading(SteppingBackend(1).pool())
        assert weakref.ref(view)() is view
        for duplicate in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle or copy"):
                duplicate(view)
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            copy.copy(view.connection())
