"""The holders and waiters of an object, as `holders` and `waiters` return them."""

from __future__ import annotations

import _thread
import asyncio
import gc
import inspect
import logging
import sqlite3
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio import WouldBlock, create_task_group
from support.helpers import InThread, settle, until, until_async

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolTimeout,
    Semaphore,
    TaskBarrier,
    ThreadSemaphore,
    _callers,
    as_threading,
    debug,
    from_threading,
)
from aiosync._observed import Hold, Record, Wait, observe, record_of
from aiosync.recipes import sqlite_pool

pytestmark = pytest.mark.anyio


class Connection:
    """A connection to nothing."""


def held_by(shared: object) -> list[str]:
    return [holder.name for holder in debug.holders(shared)]


def waiting(shared: object) -> list[str]:
    return [waiter.name for waiter in debug.waiters(shared)]


def line() -> int:
    """Return the line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def thread(name: str, work: Any) -> threading.Thread:
    started = threading.Thread(target=work, name=name, daemon=True)
    started.start()
    return started


class TestSemaphores:
    @pytest.fixture(params=[Semaphore, BoundedSemaphore])
    def semaphore(self, request: pytest.FixtureRequest) -> Semaphore:
        made: Semaphore = request.param(1, name="mail")
        return made

    async def test_holder_and_waiter(self, semaphore: Semaphore, anyio_backend_name: str) -> None:
        async def use() -> None:
            async with semaphore:
                pass

        async with create_task_group() as tasks, semaphore:
            here = line() - 1
            tasks.start_soon(use, name="second")
            await settle()
            (holder,) = debug.holders(semaphore)
            assert holder.kind == "task"
            assert holder.loop == f"{anyio_backend_name} in MainThread"
            assert (holder.file, holder.line) == (__file__, here)
            assert holder.function == "test_holder_and_waiter"
            assert 0 <= holder.age < 20
            assert not holder.ended
            (waiter,) = debug.waiters(semaphore)
            assert waiter.name == "second"
            assert waiter.function == "use"
            assert waiter.timeout is None
        assert not debug.holders(semaphore)
        assert not debug.waiters(semaphore)

    async def test_every_way_to_acquire(self, semaphore: Semaphore) -> None:
        assert await semaphore.acquire()
        assert len(held_by(semaphore)) == 1
        assert not await semaphore.acquire(blocking=False)
        assert not await semaphore.acquire(timeout=0)
        assert not await semaphore.acquire(timeout=0.001)
        with pytest.raises(WouldBlock):
            semaphore.acquire_nowait()
        assert len(held_by(semaphore)) == 1
        semaphore.release()
        assert held_by(semaphore) == []
        semaphore.acquire_nowait()
        assert len(held_by(semaphore)) == 1
        semaphore.release()
        assert await semaphore.acquire(timeout=5)
        assert await semaphore.acquire(blocking=False) is False
        semaphore.release(1)
        assert held_by(semaphore) == waiting(semaphore) == []

    async def test_wrong_arguments_leave_no_record(self, semaphore: Semaphore) -> None:
        wrong: Any = "x"
        with pytest.raises(TypeError):
            await semaphore.acquire(wrong)
        with pytest.raises(TypeError):
            await semaphore.acquire(timeout=wrong)
        with pytest.raises(TypeError):
            semaphore.release(wrong)
        assert held_by(semaphore) == waiting(semaphore) == []

    async def test_cancelled(self, semaphore: Semaphore) -> None:
        await semaphore.acquire()
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire)
            await settle()
            assert len(waiting(semaphore)) == 1
            tasks.cancel_scope.cancel()
        assert waiting(semaphore) == []
        assert len(held_by(semaphore)) == 1

    async def test_a_permit_is_given_back_if_the_checkpoint_is_cancelled(
        self, semaphore: Semaphore
    ) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await semaphore.acquire()
        assert semaphore.value == 1
        assert held_by(semaphore) == waiting(semaphore) == []

    async def test_threads_and_tasks(self, semaphore: Semaphore) -> None:
        view = as_threading(semaphore)
        entered, leave = threading.Event(), threading.Event()

        def use() -> None:
            with view:
                entered.set()
                leave.wait(20)

        async with create_task_group() as tasks:
            await semaphore.acquire()
            user = thread("worker", use)
            await until_async(lambda: waiting(semaphore) == ["worker"])
            (waiter,) = debug.waiters(view)
            assert waiter.kind == "thread"
            assert waiter.loop is None
            semaphore.release()
            await until_async(entered.is_set)
            assert held_by(view) == ["worker"]
            tasks.start_soon(semaphore.acquire, name="task")
            await until_async(lambda: waiting(semaphore) == ["task"])
            leave.set()
        user.join(20)
        assert held_by(semaphore) == ["task"]

    def test_a_view_without_with(self, semaphore: Semaphore) -> None:
        view = as_threading(semaphore)
        assert view.acquire()
        assert not view.acquire(blocking=False)
        assert not view.acquire(timeout=0.001)
        assert held_by(view) == [threading.current_thread().name]
        view.release()
        assert held_by(view) == []
        assert semaphore.value == 1

    async def test_the_name_of_a_task_that_is_gone(self, semaphore: Semaphore) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire, name="gone")
        gc.collect()
        (holder,) = debug.holders(semaphore)
        assert holder.name == "gone"
        assert holder.ended
        assert "by task 'gone'" in debug.report()
        assert "which has ended" in debug.report()

    def test_a_thread_that_has_ended(self, semaphore: Semaphore) -> None:
        view = as_threading(semaphore)
        thread("gone", view.acquire).join(20)
        assert debug.holders(semaphore)[0].ended

    async def test_a_permit_that_another_task_releases(self) -> None:
        semaphore = Semaphore(2)
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire, name="first")
            await settle()
            tasks.start_soon(semaphore.acquire, name="second")
        semaphore.release()
        # Permits are all alike, so the oldest holder is taken for the one.
        assert held_by(semaphore) == ["second"]
        semaphore.release(2)
        assert held_by(semaphore) == []
        assert semaphore.value == 3

    async def test_its_own_latest_permit_is_the_one_that_a_task_releases(self) -> None:
        semaphore = Semaphore(3)
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire, name="other")
        await semaphore.acquire()
        await semaphore.acquire()
        first = debug.holders(semaphore)[1].line
        semaphore.release()
        assert len(held_by(semaphore)) == 2
        assert debug.holders(semaphore)[1].line == first

    def test_class_and_repr_stay(self, semaphore: Semaphore) -> None:
        assert type(semaphore).__name__ in {"Semaphore", "BoundedSemaphore"}
        assert type(semaphore).__module__ == "aiosync"
        assert isinstance(semaphore, Semaphore)
        assert repr(semaphore).startswith(f"<aiosync.{type(semaphore).__name__} 'mail' value=1")

    def test_subclasses_of_users(self) -> None:
        class Mine(Semaphore):
            def __init__(self) -> None:
                super().__init__(2)
                self.extra = 1

        mine = Mine()
        assert isinstance(mine, Mine)
        assert (mine.extra, mine.value) == (1, 2)
        mine.acquire_nowait()
        assert len(held_by(mine)) == 1

    def test_several_listeners(self) -> None:
        class Listener:
            def __init__(self) -> None:
                self.told: list[str] = []

            def wait_began(self, wait: Wait) -> None:
                self.told.append("waits")

            def wait_ended(self, wait: Wait, outcome: str) -> None:
                self.told.append(outcome)

            def hold_began(self, hold: Hold) -> None:
                self.told.append("holds")

            def hold_ended(self, hold: Hold) -> None:
                self.told.append("ended")

            def happened(self, record: Record, event: object) -> None:
                self.told.append(str(event))

        semaphore, listeners = Semaphore(), [Listener(), Listener()]
        records = {observe(semaphore, listener) for listener in listeners}
        assert records == {record_of(semaphore)}
        view = as_threading(semaphore)
        view.acquire()
        view.release()
        for listener in listeners:
            assert listener.told == ["waits", "got", "holds", "ended"]

    def test_it_can_be_collected(self) -> None:
        semaphore = Semaphore(name="collected")
        semaphore.acquire_nowait()
        gone = weakref.ref(semaphore)
        del semaphore
        gc.collect()
        assert gone() is None
        assert "collected" not in debug.report()


class TestInterrupts:
    @pytest.mark.parametrize("blocking", [True, False])
    def test_ctrl_c_just_after_a_permit_was_taken_gives_it_back(
        self, monkeypatch: pytest.MonkeyPatch, blocking: bool
    ) -> None:
        semaphore = Semaphore()
        record: Any = record_of(semaphore)

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(record, "hold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            as_threading(semaphore).acquire(blocking=blocking)
        assert semaphore.value == 1
        assert waiting(semaphore) == []

    @pytest.mark.parametrize("method", ["wait_began", "wait_ended", "hold_began"])
    def test_ctrl_c_while_a_listener_is_told(self, method: str) -> None:
        told: list[str] = []

        class Listener:
            def __getattr__(self, name: str) -> Any:
                def tell(*_: object) -> None:
                    told.append(name)
                    if name == method and told.count(name) == 1:
                        raise KeyboardInterrupt

                return tell

        semaphore = Semaphore()
        observe(semaphore, Listener())
        with pytest.raises(KeyboardInterrupt):
            as_threading(semaphore).acquire()
        assert semaphore.value == 1
        assert waiting(semaphore) == []
        assert held_by(semaphore) == []
        assert told.count("wait_ended") == 1

    def test_an_error_of_a_listener_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        class Listener:
            def __getattr__(self, name: str) -> Any:
                raise LookupError(name)

        semaphore = Semaphore(name="mail")
        observe(semaphore, Listener())
        with as_threading(semaphore):
            assert len(held_by(semaphore)) == 1
        assert semaphore.value == 1
        assert "hold_began of Semaphore 'mail'" in caplog.text


class TestBarriers:
    async def test_parties(self) -> None:
        barrier = Barrier(3, name="start")
        view = as_threading(barrier)

        async def enter() -> None:
            async with barrier:
                pass

        async with create_task_group() as tasks:
            tasks.start_soon(barrier.wait, 20, name="one")
            await settle()
            other = InThread(view.wait)
            await until_async(lambda: len(waiting(barrier)) == 2)
            one, two = debug.waiters(view)
            assert (one.name, one.timeout, two.kind) == ("one", 20, "thread")
            assert debug.holders(barrier) == []
            tasks.start_soon(enter)
            await until_async(lambda: not waiting(barrier))
        assert other.result() in {0, 1, 2}

    async def test_broken(self) -> None:
        barrier = Barrier(2)
        async with create_task_group() as tasks:

            async def wait() -> None:
                with suppress(BrokenBarrierError):
                    await barrier.wait()

            tasks.start_soon(wait)
            await settle()
            assert len(waiting(barrier)) == 1
            barrier.abort()
        assert waiting(barrier) == []
        with pytest.raises(BrokenBarrierError):
            await barrier.wait(timeout=1)
        wrong: Any = "x"
        with pytest.raises(TypeError):
            await barrier.wait(wrong)

    async def test_the_default_timeout(self) -> None:
        barrier = Barrier(2, timeout=20)
        async with create_task_group() as tasks:
            tasks.start_soon(barrier.wait)
            await settle()
            assert debug.waiters(barrier)[0].timeout == 20
            await barrier.wait()


class TestPools:
    @pytest.fixture
    async def pool(self, anyio_backend: Any) -> Any:
        async with ConnectionPool(Connection, max_size=1, name="db") as pool:
            yield pool

    async def test_borrower_and_waiter(self, pool: ConnectionPool[Connection]) -> None:
        async def use() -> None:
            async with pool.connection(timeout=20):
                pass

        async with create_task_group() as tasks, pool.connection():
            here = line() - 1
            tasks.start_soon(use, name="second")
            await until_async(lambda: waiting(pool) == ["second"])
            (holder,) = debug.holders(pool)
            assert (holder.file, holder.line) == (__file__, here)
            assert debug.waiters(pool)[0].timeout == 20
        assert held_by(pool) == waiting(pool) == []

    async def test_every_way_to_borrow(self, pool: ConnectionPool[Connection]) -> None:
        connection = await pool.acquire()
        assert len(held_by(pool)) == 1
        with pytest.raises(PoolTimeout, match=r"borrowed by task '.*' at .*test_records\.py:\d+ "):
            await pool.acquire(0)
        with pytest.raises(WouldBlock):
            pool.acquire_nowait()
        pool.release(connection)
        assert held_by(pool) == []
        connection = pool.acquire_nowait()
        assert len(held_by(pool)) == 1
        pool.discard(connection)
        assert held_by(pool) == []
        async with create_task_group() as tasks:
            connection = await pool.acquire()
            tasks.start_soon(pool.acquire)
            await until_async(lambda: waiting(pool))
            tasks.cancel_scope.cancel()
        assert waiting(pool) == []
        pool.release(connection)

    async def test_threads(self, pool: ConnectionPool[Connection]) -> None:
        view = as_threading(pool)
        entered, leave = threading.Event(), threading.Event()

        def use() -> None:
            with view.connection():
                entered.set()
                leave.wait(20)

        user = thread("worker", use)
        await until_async(entered.is_set)
        assert held_by(view) == ["worker"]
        leave.set()
        await until_async(lambda: not user.is_alive())
        assert held_by(pool) == []

    async def test_a_connection_that_is_taken_away_by_force(self) -> None:
        pool = ConnectionPool(Connection, max_size=1, close_timeout=0)
        async with pool:
            connection = await pool.acquire()
            assert len(held_by(pool)) == 1
        assert held_by(pool) == []
        pool.release(connection)

    async def test_a_block_that_raises(self, pool: ConnectionPool[Connection]) -> None:
        with pytest.raises(ZeroDivisionError):
            async with pool.connection():
                raise ZeroDivisionError
        assert held_by(pool) == []

    async def test_a_pool_that_is_opened_again(self) -> None:
        pool = ConnectionPool(Connection, reset=lambda connection: None)
        for _ in range(2):
            async with pool, pool.connection():
                assert len(held_by(pool)) == 1

    async def test_the_hook_of_the_user_is_called_too(self) -> None:
        events: list[str] = []
        async with (
            ConnectionPool(Connection, on_event=lambda event: events.append(event.kind)) as pool,
            pool.connection(),
        ):
            pass
        assert events == ["connected", "closed"]


class TestViewsOfThreadingObjects:
    @pytest.mark.parametrize("make", [threading.Lock, threading.Semaphore])
    async def test_locks_and_semaphores(self, make: Any) -> None:
        owned = make()
        view = from_threading(owned)
        async with create_task_group() as tasks, view:
            assert len(held_by(view)) == 1
            tasks.start_soon(view.acquire, name="second")
            await until_async(lambda: waiting(view) == ["second"])
            assert "waiting" in debug.report()
        assert held_by(view) == ["second"]
        assert not await view.acquire(timeout=0.001)
        view.release()
        assert held_by(view) == []
        async with create_task_group() as tasks:
            await view.acquire()
            tasks.start_soon(view.acquire)
            await until_async(lambda: waiting(view))
            tasks.cancel_scope.cancel()
        assert waiting(view) == []

    async def test_events(self) -> None:
        event = from_threading(threading.Event())
        async with create_task_group() as tasks:
            tasks.start_soon(event.wait, name="one")
            await until_async(lambda: waiting(event) == ["one"])
            assert held_by(event) == []
            assert ": not set" in debug.report()
            event.set()
        assert await event.wait()
        event.clear()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await event.wait()
        assert waiting(event) == []

    async def test_barriers(self) -> None:
        owned = threading.Barrier(2)
        barrier: TaskBarrier = from_threading(owned)
        async with create_task_group() as tasks:
            tasks.start_soon(barrier.wait, name="one")
            await until_async(lambda: owned.n_waiting == 1)
            assert waiting(barrier) == ["one"]
            assert "parties=2 arrived=1" in debug.report()
            await barrier.wait()
        barrier.abort()
        with pytest.raises(threading.BrokenBarrierError):
            await barrier.wait()
        assert waiting(barrier) == []
        assert held_by(barrier) == []


class TestTimeouts:
    async def test_a_timeout_is_logged_with_the_holders(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "aiosync.debug")
        semaphore = Semaphore(name="mail")
        async with semaphore:
            assert not await semaphore.acquire(timeout=0.001)
        (logged,) = [record.getMessage() for record in caplog.records]
        assert "timed out waiting for Semaphore 'mail'" in logged
        assert "Semaphore 'mail': value=0\n  held " in logged
        assert "test_records.py" in logged

    async def test_not_if_nobody_listens(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "aiosync.debug")
        assert not await Semaphore(0).acquire(timeout=0.001)
        assert not caplog.records

    async def test_a_leak_report_names_a_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "aiosync.pool")
        debug.disable()  # reports of leaks do without
        pool = ConnectionPool(Connection, leak_timeout=0.01, name="db")
        async with pool:
            await pool.wait()

            def keep() -> None:
                with as_threading(pool).connection():
                    until(lambda: caplog.records)

            keeper = thread("keeper", keep)
            await until_async(lambda: not keeper.is_alive())
        assert "by thread 'keeper'" in caplog.text

    async def test_a_leak_report_names_the_borrower(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "aiosync.pool")
        async with (
            ConnectionPool(Connection, leak_timeout=0.01, name="db") as pool,
            create_task_group() as tasks,
        ):
            await pool.wait()

            async def keep() -> None:
                async with pool.connection():
                    await until_async(lambda: caplog.records)

            tasks.start_soon(keep, name="keeper")
        assert "borrowed for more than 0.01 s by task 'keeper'\n" in caplog.text


class TestEnabling:
    def test_disabled(self) -> None:
        before = Semaphore()
        debug.disable()
        assert not debug.enabled()
        debug.disable()
        semaphore = Semaphore()
        assert type(semaphore) is Semaphore
        with pytest.raises(ValueError, match=r"call aiosync\.debug\.enable\(\) before"):
            debug.holders(semaphore)
        with pytest.raises(ValueError, match="keeps no record"):
            debug.waiters(as_threading(semaphore))
        before.acquire_nowait()
        assert len(held_by(before)) == 1
        debug.enable(watchdog=None)
        debug.enable(watchdog=None)
        assert debug.enabled()
        assert debug.holders(Semaphore()) == []

    @pytest.mark.parametrize(
        ("wrong", "error"), [(0, ValueError), (-1, ValueError), ("x", TypeError)]
    )
    def test_wrong_thresholds(self, wrong: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            debug.enable(watchdog=wrong)

    @pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (1.5, TypeError)])
    def test_wrong_limits(self, wrong: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            debug.report(limit=wrong)

    def test_something_else(self) -> None:
        with pytest.raises(ValueError, match="keeps no record"):
            debug.holders(threading.Lock())

    def test_a_view_made_by_hand(self) -> None:
        view = ThreadSemaphore(Semaphore(2, name="mail"))
        assert view.acquire()
        assert len(held_by(view)) == 1


class TestCallers:
    async def test_asyncio_tasks_may_change_their_name(self) -> None:
        if asyncio._get_running_loop() is None:
            pytest.skip("trio has no such call")
        semaphore = Semaphore()
        await semaphore.acquire()
        task = asyncio.current_task()
        assert task is not None
        task.set_name("later")
        assert held_by(semaphore) == ["later"]

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="wait_for makes a task of its own")
    async def test_wait_for(self) -> None:
        if asyncio._get_running_loop() is None:
            pytest.skip("trio has no such call")
        semaphore = Semaphore(0)

        async def work() -> None:
            await asyncio.wait_for(semaphore.acquire(), 20)

        async with create_task_group() as tasks:
            tasks.start_soon(work)
            await until_async(lambda: debug.waiters(semaphore))
            assert debug.waiters(semaphore)[0].function == "work"
            semaphore.release()

    def test_a_callback_of_an_event_loop_has_no_line(self) -> None:
        semaphore = Semaphore()

        async def main() -> None:
            asyncio.get_running_loop().call_soon(semaphore.acquire_nowait)
            await asyncio.sleep(0)

        asyncio.run(main())
        (holder,) = debug.holders(semaphore)
        assert (holder.kind, holder.file, holder.line) == ("thread", "", 0)
        assert "at an unknown line" in debug.report()

    def test_a_thread_that_runs_nothing_else(self) -> None:
        semaphore = Semaphore()
        _thread.start_new_thread(as_threading(semaphore).acquire, ())
        until(lambda: debug.holders(semaphore))
        (holder,) = debug.holders(semaphore)
        assert (holder.kind, holder.file) == ("thread", "")

    def test_nothing_outside_of_the_package_is_running(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same, in a thread that a tracer sees."""
        monkeypatch.setattr(_callers, "module_of", lambda _: "aiosync.main")
        assert _callers.call_site() is None

    def test_a_callback_of_trio(self) -> None:
        semaphore = Semaphore()

        async def main() -> None:
            trio.lowlevel.current_trio_token().run_sync_soon(semaphore.acquire_nowait)
            await settle()

        trio.run(main)
        assert debug.holders(semaphore)[0].function in {"", "main"}


async def test_a_real_driver(tmp_path: Path) -> None:
    async with sqlite_pool(tmp_path / "db", max_size=1, name="files") as pool:
        async with pool.connection() as connection:
            assert len(held_by(pool)) == 1
            assert isinstance(connection, sqlite3.Connection)
            assert "ConnectionPool 'files': max=1 in_use=1" in debug.report()
        assert held_by(pool) == []
        assert await pool.run(lambda connection: held_by(pool)) != []
    assert held_by(pool) == []
