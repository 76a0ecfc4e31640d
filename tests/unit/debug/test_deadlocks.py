"""Deadlocks are named, and programs that look like one are not."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group
from support.helpers import settle, until_async

from aiosync import (
    Barrier,
    BrokenBarrierError,
    ConnectionPool,
    PoolTimeout,
    Semaphore,
    as_threading,
    debug,
    from_threading,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def deadlocks() -> str:
    """Return the part of the report that names deadlocks, or an empty string."""
    blocks = debug.report().split("\n\n")
    return "\n\n".join(block for block in blocks if "DEADLOCK:" in block)


async def named() -> str:
    """Wait until a deadlock is named, and return that part of the report."""
    await until_async(deadlocks)
    return deadlocks()


async def blocked(shared: Any, count: int) -> None:
    """Wait until `count` tasks and threads wait for an object."""
    await until_async(lambda: len(debug.waiters(shared)) == count)


async def held(shared: Any, count: int) -> None:
    """Wait until `count` tasks and threads hold something of an object."""
    await until_async(lambda: len(debug.holders(shared)) == count)


class TestTasks:
    async def test_a_task_waits_for_a_permit_that_only_it_holds(self) -> None:
        semaphore = Semaphore(name="mail")

        async def work() -> None:
            async with semaphore, semaphore:
                pass

        async with create_task_group() as tasks:
            tasks.start_soon(work, name="worker")
            await blocked(semaphore, 1)
            assert "DEADLOCK: task 'worker' waits for itself" in await named()
            assert "waits for Semaphore 'mail' at " in await named()
            assert "held by itself since " in await named()
            assert "deadlocks: 1" in debug.report()
            semaphore.release()
        assert deadlocks() == ""

    async def test_two_semaphores_in_different_order(self) -> None:
        first, second = Semaphore(name="first"), Semaphore(name="second")
        met = Barrier(2)

        async def work(one: Semaphore, two: Semaphore) -> None:
            async with one:
                await met.wait()
                async with two:
                    pass

        async with create_task_group() as tasks:
            tasks.start_soon(work, first, second, name="a")
            tasks.start_soon(work, second, first, name="b")
            await blocked(first, 1)
            await blocked(second, 1)
            # One more waits behind them, but has no part in it.
            tasks.start_soon(first.acquire, name="behind")
            await blocked(first, 2)
            found = await named()
            assert found.startswith("DEADLOCK: 2 tasks or threads wait for one another")
            assert "task 'a' waits for Semaphore 'second'" in found
            assert "held by task 'b' since" in found
            assert "task 'b' waits for Semaphore 'first'" in found
            assert "behind" not in found
            tasks.cancel_scope.cancel()

    async def test_nested_checkouts_of_one_pool_by_all_of_its_borrowers(self) -> None:
        met = Barrier(2)
        async with ConnectionPool(object, max_size=2, name="db", timeout=20) as pool:

            async def work() -> None:
                async with pool.connection():
                    await met.wait()
                    async with pool.connection():
                        pass

            async with create_task_group() as tasks:
                for name in "ab":
                    tasks.start_soon(work, name=name)
                await held(pool, 2)
                await blocked(pool, 2)
                found = await named()
                assert found.startswith("DEADLOCK: 2 tasks or threads wait for one another")
                assert "task 'a' waits for ConnectionPool 'db'" in found
                assert "task 'b' waits for ConnectionPool 'db'" in found
                assert "  until the timeout of task '" in found
                tasks.cancel_scope.cancel()

    async def test_a_pool_and_a_semaphore(self) -> None:
        semaphore, met = Semaphore(name="limit"), Barrier(2)
        async with ConnectionPool(object, max_size=1, name="db", timeout=None) as pool:

            async def one() -> None:
                async with pool.connection():
                    await met.wait()
                    async with semaphore:
                        pass

            async def two() -> None:
                async with semaphore:
                    await met.wait()
                    async with pool.connection():
                        pass

            async with create_task_group() as tasks:
                tasks.start_soon(one, name="a")
                tasks.start_soon(two, name="b")
                assert (await named()).startswith("DEADLOCK: 2 tasks or threads")
                tasks.cancel_scope.cancel()

    async def test_the_missing_party_of_a_later_round_waits_for_a_party(self) -> None:
        barrier, semaphore = Barrier(2, name="phase"), Semaphore(name="files")

        async def one() -> None:
            await barrier.wait()
            async with semaphore:
                await barrier.wait()

        async def two() -> None:
            await barrier.wait()
            await held(semaphore, 1)
            async with semaphore:
                pass

        async with create_task_group() as tasks:
            tasks.start_soon(one, name="one")
            tasks.start_soon(two, name="two")
            await blocked(semaphore, 1)
            await blocked(barrier, 1)
            found = await named()
            assert found.startswith("POSSIBLE DEADLOCK: 2 tasks or threads wait for one another")
            assert "task 'one' waits for Barrier 'phase' at " in found
            assert "which needs 1 more; missing: task 'two'" in found
            assert found.endswith("\n  unless another task or thread comes to the barrier")
            assert "absent: task 'two', of earlier rounds" in debug.report()
            # A party may take part for the first time, so no deadlock at a barrier is certain.
            await barrier.wait()
        assert deadlocks() == ""

    async def test_the_missing_party_of_the_first_round_is_likely(self) -> None:
        barrier, semaphore = Barrier(3, name="start"), Semaphore(2, name="files")

        async def work() -> None:
            async with semaphore:
                await barrier.wait()

        async with create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(work, name=name)
            await blocked(semaphore, 1)
            found = await named()
            assert found.startswith("POSSIBLE DEADLOCK: 3 tasks or threads wait for one another")
            assert "which needs 1 more; missing: task '" in found
            assert "unless another task or thread comes to the barrier" in found
            assert "possible deadlocks: 1" in debug.report()
            tasks.cancel_scope.cancel()

    async def test_an_action_waits_for_a_party_of_its_own_barrier(self) -> None:
        semaphore = Semaphore(name="files")

        async def action() -> None:
            async with semaphore:
                pass

        barrier = Barrier(2, action, name="start")

        async def work() -> None:
            async with semaphore:
                await barrier.wait()

        async with create_task_group() as tasks:
            tasks.start_soon(work, name="holder")
            await blocked(barrier, 1)
            tasks.start_soon(barrier.wait, name="last")
            await blocked(semaphore, 1)
            found = await named()
            assert "whose action is run by task 'last'" in found
            assert "task 'last' waits for Semaphore 'files'" in found
            semaphore.release()
        assert deadlocks() == ""

    async def test_permits_that_were_not_taken_by_with(self) -> None:
        semaphore = Semaphore(name="mail")

        async def work() -> None:
            await semaphore.acquire()
            await semaphore.acquire()

        async with create_task_group() as tasks:
            tasks.start_soon(work, name="worker")
            await blocked(semaphore, 1)
            assert (await named()).startswith("POSSIBLE DEADLOCK: task 'worker' waits for itself")
            semaphore.release()

    async def test_a_connection_that_was_not_borrowed_by_with(self) -> None:
        """Another task may give it back."""
        async with ConnectionPool(object, max_size=1, name="db", timeout=None) as pool:

            async def work() -> None:
                borrowed.append(await pool.acquire())
                pool.release(await pool.acquire())

            borrowed: list[object] = []
            async with create_task_group() as tasks:
                tasks.start_soon(work, name="worker")
                await blocked(pool, 1)
                found = await named()
                assert found.startswith("POSSIBLE DEADLOCK: task 'worker' waits for itself")
                assert "unless another task or thread releases a permit or connection" in found
                pool.release(borrowed.pop())
            assert deadlocks() == ""

    async def test_two_deadlocks_at_once(self) -> None:
        semaphores = Semaphore(), Semaphore()

        async def work(semaphore: Semaphore) -> None:
            async with semaphore, semaphore:
                pass

        async with create_task_group() as tasks:
            for semaphore in semaphores:
                tasks.start_soon(work, semaphore)
            for semaphore in semaphores:
                await blocked(semaphore, 1)
            await until_async(lambda: deadlocks().count("DEADLOCK:") == 2)
            tasks.cancel_scope.cancel()

    async def test_a_lock_of_threading(self) -> None:
        lock = from_threading(threading.Lock())

        async def work() -> None:
            async with lock, lock:
                pass

        async with create_task_group() as tasks:
            tasks.start_soon(work, name="worker")
            await blocked(lock, 1)
            assert "task 'worker' waits for itself" in await named()
            tasks.cancel_scope.cancel()


class TestThreads:
    async def test_two_threads(self) -> None:
        first, second = Semaphore(name="first"), Semaphore(name="second")
        met = threading.Barrier(2)

        def work(one: Semaphore, two: Semaphore) -> None:
            with as_threading(one):
                met.wait(20)
                with as_threading(two):
                    pass

        threads = [
            threading.Thread(target=work, args=pair, name=name, daemon=True)
            for name, pair in {"a": (first, second), "b": (second, first)}.items()
        ]
        for thread in threads:
            thread.start()
        await blocked(first, 1)
        await blocked(second, 1)
        assert (await named()).startswith("DEADLOCK: 2 tasks or threads wait for one another")
        assert "thread 'a' waits for Semaphore 'second'" in await named()
        first.release()
        await until_async(lambda: not any(thread.is_alive() for thread in threads))

    async def test_a_thread_and_a_task(self) -> None:
        first, second = Semaphore(name="first"), Semaphore(name="second")

        def work() -> None:
            with as_threading(first), as_threading(second):
                pass

        async with create_task_group() as tasks, second:
            thread = threading.Thread(target=work, name="worker", daemon=True)
            thread.start()
            await blocked(second, 1)
            tasks.start_soon(first.acquire)
            await blocked(first, 1)
            assert deadlocks() == ""  # this task is at work
            with anyio.move_on_after(0.001):
                async with first:
                    pass

            async def look() -> None:
                await blocked(first, 2)
                assert "thread 'worker' waits for Semaphore 'second'" in await named()
                found.append(True)
                scope.cancel()

            found: list[bool] = []
            with anyio.CancelScope() as scope:
                tasks.start_soon(look)
                async with first:
                    pass
            assert found
        await until_async(lambda: not thread.is_alive())

    @pytest.mark.slow
    async def test_a_pool_that_threads_use(self) -> None:
        async with ConnectionPool(object, max_size=1, timeout=20) as pool:
            view = as_threading(pool)
            done = threading.Event()

            def work() -> None:
                with ExitStack() as stack, suppress(PoolTimeout):
                    stack.enter_context(view.connection())
                    stack.enter_context(view.connection(timeout=1))
                done.set()

            thread = threading.Thread(target=work, name="worker", daemon=True)
            thread.start()
            await held(pool, 1)
            await blocked(pool, 1)
            assert "DEADLOCK: thread 'worker' waits for itself" in await named()
            await until_async(done.is_set)

    async def test_threads_at_a_barrier(self) -> None:
        barrier, semaphore = Barrier(2, name="start"), Semaphore(name="files")

        def work() -> None:
            with suppress(BrokenBarrierError), as_threading(semaphore):
                as_threading(barrier).wait()

        threads = [threading.Thread(target=work, name=name, daemon=True) for name in "ab"]
        for thread in threads:
            thread.start()
        await blocked(semaphore, 1)
        await blocked(barrier, 1)
        assert (await named()).startswith("POSSIBLE DEADLOCK: 2 tasks or threads")
        barrier.abort()
        await until_async(lambda: not any(thread.is_alive() for thread in threads))


class TestNoDeadlocks:
    """Programs that look like one."""

    async def test_one_of_the_holders_is_at_work(self) -> None:
        semaphore = Semaphore(2, name="mail")
        async with create_task_group() as tasks:

            async def work() -> None:
                async with semaphore, semaphore:
                    pass

            async with semaphore:
                tasks.start_soon(work)
                await blocked(semaphore, 1)
                assert deadlocks() == ""

    async def test_a_chain(self) -> None:
        """The first waits for the second, and so on, but the last one works."""
        semaphores = [Semaphore() for _ in range(3)]

        async def work(one: Semaphore, two: Semaphore) -> None:
            async with one, two:
                pass

        async with create_task_group() as tasks, semaphores[2]:
            tasks.start_soon(work, semaphores[1], semaphores[2])
            await blocked(semaphores[2], 1)
            tasks.start_soon(work, semaphores[0], semaphores[1])
            await blocked(semaphores[1], 1)
            assert deadlocks() == ""

    async def test_a_signal(self) -> None:
        """Those who release are not those who acquire."""
        jobs = Semaphore(0, name="jobs")
        async with create_task_group() as tasks:

            async def collect() -> None:
                for _ in range(6):
                    await jobs.acquire()

            tasks.start_soon(collect)
            jobs.release()
            await settle()
            await blocked(jobs, 1)
            assert deadlocks() == ""
            jobs.release(5)

    async def test_a_bounded_buffer(self) -> None:
        """The producer takes all slots, and the consumer has released one before."""
        slots = Semaphore(2, name="slots")
        async with create_task_group() as tasks:

            async def produce() -> None:
                for _ in range(4):
                    await slots.acquire()

            tasks.start_soon(produce)
            await blocked(slots, 1)
            slots.release()
            await settle()
            await blocked(slots, 1)
            assert deadlocks() == ""
            slots.release()

    async def test_a_barrier_that_is_filling(self) -> None:
        barrier = Barrier(3)
        async with create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(barrier.wait)
            await blocked(barrier, 2)
            assert deadlocks() == ""
            await barrier.wait()

    async def test_the_missing_party_is_at_work(self) -> None:
        barrier, semaphore = Barrier(2), Semaphore()
        async with create_task_group() as tasks:

            async def work() -> None:
                await barrier.wait()
                async with semaphore:
                    await barrier.wait()

            async def behind() -> None:
                async with semaphore:
                    pass

            tasks.start_soon(work)
            await blocked(barrier, 1)
            await barrier.wait()
            await held(semaphore, 1)
            await blocked(barrier, 1)
            tasks.start_soon(behind)
            await blocked(semaphore, 1)
            assert deadlocks() == ""
            await barrier.wait()

    async def test_too_few_wait_elsewhere_to_be_the_missing_parties(self) -> None:
        barrier, semaphore = Barrier(4), Semaphore()
        async with create_task_group() as tasks:

            async def work() -> None:
                async with semaphore:
                    await barrier.wait()

            for _ in range(2):
                tasks.start_soon(work)
            await blocked(semaphore, 1)
            assert deadlocks() == ""
            tasks.cancel_scope.cancel()

    async def test_a_party_of_an_earlier_round_has_ended(self) -> None:
        barrier = Barrier(2)
        async with create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(barrier.wait)
        async with create_task_group() as tasks:
            tasks.start_soon(barrier.wait)
            await blocked(barrier, 1)
            assert deadlocks() == ""
            await barrier.wait()

    async def test_an_action_that_works(self) -> None:
        leave = anyio.Event()
        barrier = Barrier(2, leave.wait)
        async with create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(barrier.wait)
            await settle()
            assert len(debug.waiters(barrier)) == 2
            assert deadlocks() == ""
            leave.set()

    async def test_a_pool_that_may_grow(self) -> None:
        connecting = anyio.Event()

        async def connect() -> object:
            if made:
                await connecting.wait()
            made.append(object())
            return made[-1]

        made: list[object] = []
        async with ConnectionPool(connect, max_size=2) as pool:

            async def work() -> None:
                async with pool.connection(), pool.connection():
                    pass

            async with create_task_group() as tasks:
                tasks.start_soon(work)
                await blocked(pool, 1)
                await settle()
                assert deadlocks() == ""
                connecting.set()

    async def test_a_permit_on_its_way(self) -> None:
        """A waiter that has been handed a permit, but has not run since, can go on."""
        semaphore, other = Semaphore(2), Semaphore()
        async with create_task_group() as tasks:

            async def work() -> None:
                async with semaphore, other:
                    pass

            async def cross() -> None:
                async with other:
                    await blocked(other, 1)
                    async with semaphore:
                        assert len(debug.holders(semaphore)) == 2

            await semaphore.acquire()
            tasks.start_soon(work)
            await blocked(semaphore, 0)
            tasks.start_soon(cross)
            await settle()
            semaphore.release()
            # Not a step of the event loop since.
            assert deadlocks() == ""

    async def test_a_holder_that_has_ended(self) -> None:
        """Another task may still release its permit."""
        semaphore = Semaphore(name="mail")
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire)
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire)
            await blocked(semaphore, 1)
            assert deadlocks() == ""
            assert "which has ended" in debug.report()
            semaphore.release()

    async def test_a_semaphore_of_threading(self) -> None:
        """Threads may release the object itself."""
        semaphore = from_threading(threading.Semaphore())

        async def work() -> None:
            async with semaphore, semaphore:
                pass

        async with create_task_group() as tasks:
            tasks.start_soon(work)
            await blocked(semaphore, 1)
            assert deadlocks() == ""
            semaphore.release()


class TestReport:
    async def test_layout(self, anyio_backend_name: str) -> None:
        name = f"layout under {anyio_backend_name} {id(self)}"
        semaphore = Semaphore(2, name=name)
        unused = Semaphore()
        async with create_task_group() as tasks:
            for i, task in enumerate(("first", "second", "third", "fourth")):
                tasks.start_soon(semaphore.acquire, True, 20, name=task)
                await blocked(semaphore, max(0, i - 1))
                await held(semaphore, min(2, i + 1))
            summary, *blocks = debug.report().split("\n\n")
            assert re.match(r"aiosync report: in use: \d+, not in use: \d+, waiting: \d+", summary)
            (block,) = [block for block in blocks if name in block]
            title, *rows = block.splitlines()
            assert title == f"Semaphore {name!r}: value=0"
            assert [row.split()[0] for row in rows] == ["held", "held", "waiting", "waiting"]
            assert [row.split("'")[1] for row in rows] == ["first", "second", "third", "fourth"]
            assert all(re.search(r" \d+\.\d s by task ", row) for row in rows)
            assert rows[2].endswith(", timeout 20 s")
            short = debug.report(limit=1)
            assert "held: 1 more" in short
            assert "waiting: 1 more" in short
            tasks.cancel_scope.cancel()
        assert unused.value == 1

    async def test_no_more_lines_than_the_limit(self) -> None:
        """Also of a deadlock of many tasks."""
        barrier = Barrier(100)
        async with ConnectionPool(object, max_size=100, name="db", timeout=None) as pool:

            async def work() -> None:
                async with pool.connection():
                    await barrier.wait()
                    async with pool.connection():
                        pass

            async with create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(work, name=f"worker {number}")
                await blocked(pool, 100)
                await named()
                report = debug.report(limit=3)
                deadlock = report.split("\n\n")[1]
                assert deadlock.startswith("DEADLOCK: 100 tasks or threads wait for one another")
                assert deadlock.count("waits for") == 3
                assert deadlock.endswith("\n  and 97 more")
                assert deadlock.count(" and 97 more\n") == 3
                tasks.cancel_scope.cancel()

    async def test_more_absent_parties_than_the_limit(self) -> None:
        barrier = Barrier(5, name="noon")

        async def work() -> None:
            await barrier.wait()
            await anyio.sleep_forever()

        async with create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(work, name=f"worker {number}")
            await barrier.wait()
            tasks.start_soon(barrier.wait)
            await blocked(barrier, 1)
            await until_async(lambda: " and 3 more, of earlier rounds" in debug.report(limit=2))
            tasks.cancel_scope.cancel()

    def test_in_a_directory_that_was_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        semaphore = Semaphore()
        semaphore.acquire_nowait()
        assert "test_deadlocks.py:" in debug.report()

    async def test_objects_without_a_name(self) -> None:
        semaphore = Semaphore()
        async with semaphore:
            start = f"\n\nSemaphore at {id(semaphore):#x}: value=0, created at "
            assert start in debug.report()
            line = debug.report().partition(start)[2].partition("\n")[0]
            assert re.fullmatch(r".*test_deadlocks\.py:\d+ in test_objects_without_a_name", line), (
                line
            )
