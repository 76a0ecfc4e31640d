"""Maintenance of a pool: what it opens, checks and closes when, and forked processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import CancelScope, WouldBlock, create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    ClosableConnection,
    Connection,
    Emptied,
    FailingHook,
    Virtual,
    borrow_for,
    closed_for,
    give_back,
    in_virtual_asyncio,
    kinds,
    messages,
    nothing,
    some,
    take,
    use,
)
from support.virtual_time import run_virtually, skip_time, spun

from aiosync import (
    ConnectionPool,
    PoolClosed,
    PoolEvent,
    PoolTimeout,
)
from aiosync._park import ThreadWaiter
from aiosync._pool import _maintenance, _pool
from aiosync._pool._entry import Failure, PoolEntry, State
from aiosync._pool._hooks import BackgroundTasks
from aiosync._pool._inventory import Inventory
from aiosync._pool._maintenance import Maintenance
from aiosync._pool._policy import Plan, Snapshot, plan
from aiosync._pool._statistics import describe


def failure() -> Failure:
    return Failure(lambda: PoolClosed("closed"))


@pytest.mark.anyio
class TestMaintenance:
    async def test_it_does_not_check_an_entry_that_another_thread_takes_first(self) -> None:
        checked: list[object] = []
        async with ConnectionPool(
            ClosableConnection, check=checked.append, check_idle=0, max_size=1
        ) as pool:
            pool.release(await pool.acquire())
            inventory = pool._inventory
            (entry,) = inventory.stale
            inventory.stale = Emptied([entry])
            inventory.waiters[ThreadWaiter()] = None
            pool._maintenance._carry_out()
            inventory.waiters.clear()
            inventory.stale = deque([entry])  # the other thread puts it back
            assert not checked
            assert entry.state is State.IDLE

    async def test_a_connection_that_was_given_back_in_time_is_not_closed_by_force(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(ClosableConnection) as pool:
            pool.release(await pool.acquire())
            inventory = pool._inventory
            (idle,) = inventory.entries.values()
            monkeypatch.setattr(Inventory, "borrowed", lambda _: [idle])
            pool._maintenance.closing.close_by_force()
            assert not inventory.reclaimed
            assert idle.state is State.IDLE
            monkeypatch.undo()

    async def test_a_defect_of_the_main_task_closes_the_pool_and_is_raised_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[ClosableConnection] = []

        def connect() -> ClosableConnection:
            made.append(ClosableConnection())
            return made[-1]

        def fail(given: Snapshot, now: float) -> Plan:
            if given.options.max_size:
                raise ZeroDivisionError
            return plan(given, now)

        with pytest.raises(ZeroDivisionError):
            async with ConnectionPool(connect, min_size=2) as pool:
                await pool.wait()
                monkeypatch.setattr(_maintenance, "plan", fail)
                with pytest.raises(PoolClosed):
                    while True:
                        pool._maintenance.core.post(lambda: None)
                        pool.release(await pool.acquire(0))
                        await anyio.sleep(0)
        assert [connection.closings for connection in made] == [1, 1]

    @pytest.mark.parametrize("is_async", [True, False])
    async def test_a_reset_at_the_end_of_a_block_leaves_maintenance_asleep(
        self, is_async: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resets: list[ClosableConnection] = []
        looks: list[Maintenance[Any]] = []
        genuine = Maintenance._carry_out

        async def reset(connection: ClosableConnection) -> None:
            await anyio.lowlevel.checkpoint()
            resets.append(connection)

        def carry_out(maintenance: Maintenance[Any]) -> float:
            looks.append(maintenance)
            return genuine(maintenance)

        monkeypatch.setattr(Maintenance, "_carry_out", carry_out)
        pool = ConnectionPool(
            ClosableConnection, reset=reset if is_async else resets.append, min_size=2
        )
        async with pool:
            await pool.wait()
            async with pool.connection():
                pass  # for an async reset, the first deadline is taken note of
            await settle()
            looks.clear()
            for _ in range(10):
                async with pool.connection():
                    pass
            await settle()
            assert not looks
            assert len(resets) == 11
            await pool.drain()
            await settle()
            assert looks

    async def test_an_error_that_can_not_be_shown_is_named(self) -> None:
        class Shy(Exception):
            def __repr__(self) -> str:
                raise KeyError

        def connect() -> object:
            raise Shy

        assert describe(Shy()) == "Shy"
        async with ConnectionPool(connect, fail_fast=True, timeout=None) as pool:
            with pytest.raises(PoolTimeout, match="connecting fails: Shy") as caught:
                await pool.acquire()
            assert isinstance(caught.value.__cause__, Shy)

    async def test_in_a_child_process_nobody_touches_what_belongs_to_the_parent(self) -> None:
        events: list[PoolEvent] = []
        pool = ConnectionPool(ClosableConnection, min_size=2, on_event=events.append)
        async with pool:
            await pool.wait()
            connection = await pool.acquire()
            made = [kept.alive() for kept in pool._inventory.entries.values()]
            del events[:]
            of_parent = pool._maintenance
            _pool._after_fork()  # as if this were the child
            uses: list[Callable[[], object]] = [
                pool.acquire_nowait, lambda: pool.release(connection),
                lambda: pool.discard(connection),
            ]  # fmt: skip
            for use in uses:
                with pytest.raises(PoolClosed, match="before a fork"):
                    use()
            with pytest.raises(PoolClosed, match="before a fork"):
                await pool.acquire()
            assert "before a fork" in repr(pool)
        gc.collect()
        assert [kept.closings for kept in made if kept is not None] == [0, 0]
        assert events == []
        # The task of the parent, which is ours.
        of_parent.stop()
        while not of_parent.finished:
            await anyio.sleep(0)

    async def test_in_a_child_process_what_was_about_to_be_called_is_not(self) -> None:
        for ticks in range(8):
            resets: list[ClosableConnection] = []
            told: list[PoolEvent] = []
            pool = ConnectionPool(ClosableConnection, reset=resets.append, on_event=told.append)
            async with pool:
                connection = await pool.acquire()
                pool.release(connection)
                for _ in range(ticks):
                    await anyio.lowlevel.checkpoint()
                of_parent = pool._maintenance
                _pool._after_fork()  # as if this were the child
                before = resets.copy(), told.copy()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert (resets, told) == before
            assert connection.closings == 0
            # The task of the parent, which is ours.
            of_parent.stop()
            while not of_parent.finished:
                await anyio.sleep(0)

    async def test_in_a_child_process_what_the_parent_makes_is_nobody_s(self) -> None:
        begun, gate = anyio.Event(), anyio.Event()
        made: list[ClosableConnection] = []
        told: list[str] = []

        async def connect() -> ClosableConnection:
            begun.set()
            await gate.wait()
            made.append(ClosableConnection())
            return made[0]

        async def acquire() -> None:
            with pytest.raises(PoolClosed, match="before a fork"):
                await pool.acquire()

        pool = ConnectionPool(connect, max_size=1, on_event=lambda event: told.append(event.kind))
        async with pool, anyio.create_task_group() as tasks:
            tasks.start_soon(acquire)
            await begun.wait()
            assert pool._inventory.waiters
            of_parent = pool._maintenance
            _pool._after_fork()  # as if this were the child
            gate.set()
        assert not pool._in_use
        assert [connection.closings for connection in made] == [0]
        assert told == []
        of_parent.stop()
        while not of_parent.finished:
            await anyio.sleep(0)

    async def test_a_function_of_the_pool_may_close_it(self) -> None:
        ended = anyio.Event()

        async def complain(event: PoolEvent) -> None:
            if event.kind == "outage":
                await pool.__aexit__(None, None, None)
                ended.set()

        def refuse() -> object:
            raise OSError

        async with ConnectionPool(refuse, min_size=1, on_event=complain) as pool:
            with anyio.fail_after(20):
                await ended.wait()
            with pytest.raises(PoolClosed):
                await pool.acquire()

    async def test_so_it_may_after_it_has_borrowed_a_connection(self) -> None:
        ended = anyio.Event()

        async def try_it(event: PoolEvent) -> None:
            if event.kind == "connected":
                async with pool.connection():
                    pass
                await pool.close()
                ended.set()

        async def reset(_: object) -> None:
            pass

        pool = ConnectionPool(ClosableConnection, min_size=1, reset=reset, on_event=try_it)
        async with pool:
            with anyio.fail_after(PATIENCE):
                await ended.wait()

    async def test_an_event_that_ends_in_a_cancellation_loses_nothing(self) -> None:
        cancelled = anyio.get_cancelled_exc_class()

        def tell(event: PoolEvent) -> None:
            if cancelled is asyncio.CancelledError:
                raise cancelled  # the result of a future that was cancelled, for instance
            raise KeyError

        async with ConnectionPool(ClosableConnection, on_event=tell, min_size=1) as pool:
            await pool.wait()
            pool.release(await pool.acquire())
        assert pool.get_stats()["closed_shutdown"] == 1

    async def test_wait_waits_until_connections_are_configured(self) -> None:
        configured: list[object] = []

        async def configure(connection: ClosableConnection) -> None:
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            configured.append(connection)

        async with ConnectionPool(ClosableConnection, configure=configure, min_size=2) as pool:
            await pool.wait()
            assert len(configured) == 2

    async def test_one_that_is_closed_by_force_is_closed_even_if_it_comes_back_at_once(
        self,
    ) -> None:
        closed: list[object] = []
        pool = ConnectionPool(ClosableConnection, close=closed.append, close_timeout=0)
        await pool.__aenter__()
        connection: ClosableConnection | None = await pool.acquire()
        pool._maintenance.closing.close_by_force()
        assert connection is not None
        pool.release(connection)
        del connection
        gc.collect()
        await pool.__aexit__(None, None, None)
        assert [type(one) for one in closed] == [ClosableConnection]

    async def test_a_block_that_begins_when_its_connection_is_gone_already_ends_quietly(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(ClosableConnection) as pool:
            checkout = pool.connection()
            gone = ClosableConnection()
            pool._inventory.reclaimed[id(gone)] = gone

            async def acquire(*_: object) -> ClosableConnection:
                return gone

            monkeypatch.setattr(ConnectionPool, "_take", acquire)
            async with checkout as connection:
                assert connection is gone
            assert not pool._inventory.reclaimed

    async def test_a_failure_that_nobody_took_is_not_handed_out_on_the_common_path(self) -> None:
        async with ConnectionPool(ClosableConnection, fast_acquire=True) as pool:
            pool.release(await pool.acquire())
            pool._inventory.items.append(failure())
            pool.release(await pool.acquire())
            assert not pool._inventory.stale
            assert pool._inventory.idle() == 1

    async def test_it_is_too_late_to_close_a_pool_whose_loop_has_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(ClosableConnection) as pool:
            monkeypatch.setattr(_maintenance, "loop_ended", lambda _: True)
            with pytest.raises(RuntimeError, match="it is too late to close its connections"):
                await pool.__aexit__(None, None, None)
            monkeypatch.undo()


@pytest.mark.parametrize("backend_name", ["asyncio", "trio"])
class TestInVirtualTime:
    def test_a_replacement_does_not_wait_for_the_end_of_a_slow_close(
        self, backend_name: str
    ) -> None:
        async def close(_: ClosableConnection) -> None:
            await anyio.sleep(4)

        async def main() -> None:
            pool = ConnectionPool(
                ClosableConnection,
                close=close,
                min_size=1,
                max_size=1,
                max_lifetime=100,
                timeout=None,
            )
            async with pool:
                await pool.wait()
                (first,) = pool._inventory.entries.values()
                while first.state is State.IDLE:
                    await anyio.sleep(0.1)
                assert first.state is State.CLOSING
                began = anyio.current_time()
                async with pool.connection():
                    assert first.state is State.CLOSING
                    assert anyio.current_time() == began

        run_virtually(backend_name, main)

    def test_a_reset_that_can_not_be_cancelled_is_given_up(self, backend_name: str) -> None:
        closed: list[ClosableConnection] = []

        async def reset(_: ClosableConnection) -> None:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1000)

        async def main() -> None:
            pool = ConnectionPool(
                ClosableConnection, reset=reset, close=closed.append, max_size=1, check_timeout=5
            )
            async with pool, anyio.create_task_group() as tasks:
                checkout = pool.connection()
                first = await checkout.__aenter__()
                tasks.start_soon(checkout.__aexit__, None, None, None)
                await anyio.sleep(1)
                began = anyio.current_time()
                assert await pool.acquire() is not first
                assert closed == [first]
                assert 4 <= anyio.current_time() - began < 5

        run_virtually(backend_name, main)

    def test_a_reset_that_is_cancelled_has_a_moment_to_end(self, backend_name: str) -> None:
        ended: list[float] = []
        closed: list[float] = []

        async def reset(_: ClosableConnection) -> None:
            try:
                await anyio.sleep(1000)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
                ended.append(anyio.current_time())

        async def main() -> None:
            pool = ConnectionPool(
                ClosableConnection,
                reset=reset,
                close=lambda _: closed.append(anyio.current_time()),
                check_timeout=5,
            )
            async with pool, anyio.create_task_group() as tasks:
                checkout = pool.connection()
                await checkout.__aenter__()
                tasks.start_soon(checkout.__aexit__, None, None, None)
                while not ended:
                    pool._maintenance.core.wake()  # whatever else happens meanwhile
                    await anyio.sleep(0.01)
            assert ended
            assert closed >= ended

        run_virtually(backend_name, main)


@pytest.mark.asyncio
class TestTheMainTaskUnderAsyncio:
    async def test_it_can_be_cancelled_while_it_closes_and_closes_all_the_same(self) -> None:
        gate = asyncio.Event()
        begun = asyncio.Event()
        closed: list[object] = []

        async def close(connection: object) -> None:
            begun.set()
            await gate.wait()
            closed.append(connection)

        before = asyncio.all_tasks()
        pool = ConnectionPool(ClosableConnection, close=close, min_size=1, name="db")
        await pool.__aenter__()
        await pool.wait()
        (main,) = (
            task for task in asyncio.all_tasks() - before if task.get_name() == "db maintain"
        )
        closing = asyncio.ensure_future(pool.__aexit__(None, None, None))
        await begun.wait()
        for _ in range(3):
            main.cancel()
            await asyncio.sleep(0)
        gate.set()
        await closing
        assert len(closed) == 1
        with pytest.raises(asyncio.CancelledError):
            await main

    async def test_it_ends_quietly_if_it_is_collected(self) -> None:
        pool = ConnectionPool(ClosableConnection)
        pool._maintenance.core.clock = asyncio.get_running_loop().time
        main = pool._maintenance._maintain()
        main.send(None)
        main.close()
        assert pool._maintenance.finished


@pytest.mark.parametrize("moment", ["granted", "in its checkpoint"])
def test_in_a_child_process_nobody_is_handed_what_the_parent_lends(moment: str) -> None:
    async def main() -> None:
        pool = ConnectionPool(ClosableConnection, max_size=1, min_size=1)
        async with pool:
            await pool.wait()
            if moment != "in its checkpoint":
                connection = await pool.acquire()
            task = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0)
            if moment == "granted":
                pool.release(connection)
            of_parent = pool._maintenance
            _pool._after_fork()  # as if this were the child
            with pytest.raises(PoolClosed, match="before a fork"):
                await task
            assert not pool._in_use
        # The task of the parent, which is ours.
        of_parent.stop()
        while not of_parent.finished:
            await asyncio.sleep(0)

    asyncio.run(main())


async def sleep(_: object) -> None:
    await anyio.sleep(0)


@pytest.mark.anyio
async def test_a_forked_pool_can_not_be_opened() -> None:
    pool = ConnectionPool(ClosableConnection)
    pool._why_closed = _pool._FORKED
    with pytest.raises(PoolClosed, match="before a fork"):
        await pool.open()


@pytest.mark.anyio
async def test_a_borrower_that_was_interrupted_before_its_reset_costs_no_slot() -> None:
    async with ConnectionPool(
        ClosableConnection, reset=sleep, max_size=1, check_timeout=0.01
    ) as pool:
        connection = await pool.acquire()
        entry = pool._in_use.pop(id(connection))
        entry.connection = connection
        entry.state, entry.since, entry.is_reset = State.RETURNING, pool._clock(), False
        pool._maintenance.core.wake()
        assert await pool.acquire(PATIENCE) is not connection


@pytest.mark.anyio
async def test_what_comes_too_late_finds_a_closed_entry() -> None:
    async with ConnectionPool(ClosableConnection, reset=sleep, max_size=1) as pool:
        validation = pool._maintenance.validation
        gone: PoolEntry[ClosableConnection] = PoolEntry(0.0)
        gone.state = State.CLOSED
        validation.settle(gone)
        validation._validated(gone, "reset", None)
        assert gone.state is State.CLOSED
        assert pool.statistics().size == 0


@pytest.mark.anyio
async def test_an_idle_entry_on_its_way_to_a_waiter_is_not_closed_for_having_been_idle() -> None:
    async with ConnectionPool(ClosableConnection, max_size=1) as pool:
        async with pool.connection():
            pass
        entry = pool._items.pop()
        assert isinstance(entry, PoolEntry)
        pool._maintenance.closing.close(entry, "idle")
        assert entry.state is State.IDLE
        assert entry.expires > pool._clock()
        pool._inventory.put(entry)


@pytest.mark.anyio
class TestAForkedProcess:
    """Tasks of the parent that go on in its child do nothing."""

    async def test_hooks_are_not_called(self) -> None:
        calls: list[object] = []
        tasks = BackgroundTasks("a pool", bool)
        tasks.forked = True
        with pytest.raises(RuntimeError, match="before a fork"):
            tasks.begin(calls.append, 1)
        tasks.notify(1.0, calls.append, 1)

        async def work() -> None:
            calls.append(2)

        tasks.start(work)
        while tasks.pending:
            await anyio.sleep(0)
        assert calls == []

    async def test_connections_are_not_closed(self) -> None:
        calls: list[object] = []
        async with ConnectionPool(ClosableConnection, close=calls.append) as pool:
            async with pool.connection():
                pass
            core = pool._maintenance.core
            entry = pool._items.pop()
            assert isinstance(entry, PoolEntry)
            core.tasks.forked = True
            pool._maintenance.closing.discard(entry, "drain")
            core.tasks.forked = False
        assert calls == []


@pytest.mark.anyio
class TestTime(Virtual):
    async def test_a_timeout_is_exact(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, timeout=7) as pool, pool.connection():
            for timeout, seconds in ((None, 7), (3, 3), (0.25, 0.25), (0, 0), (-5, 0)):
                began = anyio.current_time()
                with pytest.raises(PoolTimeout):
                    await pool.acquire(timeout)
                assert anyio.current_time() - began == pytest.approx(seconds)
            assert pool.get_stats()["timeouts"] == 5
            assert pool.get_stats()["requests_waiting"] == 0
            with pytest.raises(PoolTimeout, match=r"within 0\.25 s"):
                await pool.acquire(0.25)

    async def test_to_wait_for_less_than_no_time_is_not_to_wait(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool, pool.connection():
            with pytest.raises(PoolTimeout, match="at once"):
                await pool.acquire(-1)

    async def test_by_default_it_is_30_seconds(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool, pool.connection():
            began = anyio.current_time()
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            assert anyio.current_time() - began == pytest.approx(30)

    @pytest.mark.parametrize("timeout", [math.inf, None, 10**300])
    async def test_one_may_wait_for_ever(self, backend: Backend, timeout: Any) -> None:
        options = {"timeout": None} if timeout is None else {}
        async with backend.pool(max_size=1, **options) as pool, create_task_group() as tg:
            connection = await pool.acquire()
            taken: list[Connection] = []
            tg.start_soon(take, pool, taken, timeout)
            await anyio.sleep(100_000)
            assert taken == []
            pool.release(connection)
            await settle()
            assert len(taken) == 1
            give_back(pool, taken)

    async def test_a_connection_comes_when_the_time_is_over_and_is_not_lost(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            for _ in range(20):
                connection = await pool.acquire()
                taken: list[Connection] = []

                async def try_it(taken: list[Connection] = taken) -> None:
                    try:
                        taken.append(await pool.acquire(1))
                    except PoolTimeout:
                        pass

                async with create_task_group() as tg:
                    tg.start_soon(try_it)
                    await anyio.sleep(1)
                    pool.release(connection)
                give_back(pool, taken)
                stats = pool.get_stats()
                assert (stats["in_use"], stats["pool_available"]) == (0, 1)

    async def test_no_connection_outlives_max_lifetime_and_not_all_die_together(
        self, backend: Backend
    ) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(
            min_size=50, max_size=50, max_lifetime=100, max_connecting=50, on_event=events.append
        )
        async with pool:
            await pool.wait()
            assert len(set(backend.attempts)) == 1
            began = backend.attempts[0]
            await anyio.sleep(94.9)
            assert backend.closings == []
            await anyio.sleep(5.2)
            assert sorted(backend.closings) == list(range(1, 51))
            ages = [at - began for at in backend.closed_at]
            assert min(ages) >= 95
            assert max(ages) <= 100.001
            assert max(ages) - min(ages) > 2
            assert len(set(ages)) > 25
            assert set(closed_for(events)) == {"lifetime"}
            await pool.wait()
            assert backend.opened == 100
            assert backend.most_open == 51  # an old one goes when its replacement is there

    async def test_an_hour_is_the_lifetime_by_default(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, max_idle=None) as pool:
            async with pool.connection():
                pass
            await anyio.sleep(3600 * 0.95 - 1)
            assert backend.closings == []
            await anyio.sleep(3600 * 0.05 + 2)
            assert backend.closings == [1]

    @pytest.mark.parametrize("lifetime", [math.inf, None])
    async def test_or_they_live_for_ever(self, backend: Backend, lifetime: Any) -> None:
        pool = backend.pool(max_size=1, max_idle=lifetime, max_lifetime=lifetime)
        async with pool:
            async with pool.connection() as connection:
                assert pool.info(connection).expires_in == math.inf
            await anyio.sleep(1e7)
            assert await pool.acquire(0) is connection
            pool.release(connection)

    @pytest.mark.parametrize("limit", ["max_lifetime", "max_idle"])
    @pytest.mark.parametrize("how", ["patient", "impatient", "nowait", "fast"])
    async def test_who_expired_while_the_loop_was_busy_is_not_handed_out(
        self, backend: Backend, limit: str, how: str
    ) -> None:
        pool = backend.pool(max_size=1, fast_acquire=how == "fast", check=nothing, **{limit: 10})
        async with pool:
            old = await pool.acquire()
            pool.release(old)
            await settle()
            skip_time(11)
            if how == "nowait":
                with pytest.raises(WouldBlock):
                    pool.acquire_nowait()
            elif how == "impatient":
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0)
            async with pool.connection() as new:
                assert new is not old
            assert backend.closings == [1]

    async def test_who_expires_while_borrowed_is_replaced_when_it_comes_back(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=1, max_lifetime=10)
        taken: list[Connection] = []
        async with pool:
            old = await pool.acquire()
            await anyio.sleep(15)
            assert backend.closings == []
            assert pool.info(old).expires_in == 0
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                pool.release(old)
            assert taken[0] is not old
            assert backend.opened == 2
            await settle()
            assert pool.get_stats()["closed_lifetime"] == 1
            give_back(pool, taken)

    async def test_idle_ones_are_closed_after_max_idle(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(max_size=3, max_idle=10, on_event=events.append) as pool:
            taken = await some(pool, 3)
            await anyio.sleep(25)
            pool.release(taken[0])
            await anyio.sleep(5)
            pool.release(taken[1])
            began = anyio.current_time()
            await anyio.sleep(4.9)
            assert backend.closings == []
            await anyio.sleep(0.2)
            assert backend.closings == [taken[0].number]
            await anyio.sleep(5)
            assert backend.closings == [taken[0].number, taken[1].number]
            assert [at - began for at in backend.closed_at] == pytest.approx([5, 10])
            assert closed_for(events) == ["idle", "idle"]
            pool.release(taken[2])

    async def test_to_be_reset_is_not_to_be_idle(self, backend: Backend) -> None:
        async def take_long(_: Connection) -> None:
            await anyio.sleep(15)

        pool = backend.pool(max_size=1, max_idle=10, check_timeout=None, reset=take_long)
        async with pool:
            connection = await pool.acquire()
            began = anyio.current_time()
            pool.release(connection)
            await anyio.sleep(40)
            assert [at - began for at in backend.closed_at] == [pytest.approx(25, abs=0.1)]
            assert backend.opened == 1

    async def test_a_new_one_that_nobody_waits_for_any_more_is_idle_from_then_on(
        self, backend: Backend
    ) -> None:
        async def take_long(_: Connection) -> None:
            await anyio.sleep(15)

        pool = backend.pool(min_size=1, max_idle=10, connect_timeout=None, configure=take_long)
        async with pool:
            await pool.wait()
            await anyio.sleep(9)
            assert pool.get_stats()["pool_available"] == 1
            assert backend.closings == []

    @pytest.mark.parametrize("option", ["max_idle", "max_lifetime"])
    async def test_whoever_had_it_before_it_is_closed_when_it_was_idle_for_long(
        self, backend: Backend, option: str
    ) -> None:
        """The pool sees it neither idle nor borrowed just when it looks at all connections."""
        pool = backend.pool(max_size=1, timeout=None, **{"max_idle": None, option: 10})

        async def borrow() -> None:
            pool.release(await pool.acquire())

        missed = 0
        async with pool:
            for _ in range(30):  # trio runs tasks in any order
                connection = await pool.acquire()
                async with create_task_group() as tg:
                    tg.start_soon(borrow)
                    await settle()
                    with pytest.raises(WouldBlock):
                        pool.acquire_nowait()  # so that the pool looks
                    pool.release(connection)
                await anyio.sleep(11)
                missed += len(backend.open())
                await pool.drain()
                await settle()
        assert missed == 0

    async def test_to_be_used_is_not_to_be_idle(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, max_idle=10) as pool:
            for _ in range(10):
                pool.release(await pool.acquire())
                await anyio.sleep(9)
        assert backend.opened == 1

    @pytest.mark.parametrize(
        ("check_idle", "pause", "checks"),
        [
            (0.0, 0.05, 12),  # each time
            (1.0, 5.0, 12),  # all of them are stale whenever somebody comes
            (0.5, 0.1, 1),  # only those that were not used before
        ],
    )
    @pytest.mark.parametrize("fast", [False, True])
    async def test_the_one_that_was_idle_for_longest_is_next_also_if_it_is_to_be_checked(
        self, backend: Backend, check_idle: float, pause: float, checks: int, fast: bool
    ) -> None:
        checked: list[int] = []
        pool = backend.pool(
            max_size=3, lifo=False, check=lambda connection: checked.append(connection.number),
            check_idle=check_idle, fast_acquire=fast,
        )  # fmt: skip
        async with pool:
            taken = await some(pool, 3)
            for connection in taken:
                await anyio.sleep(check_idle / 2)
                pool.release(connection)
            used: list[int] = []
            for _ in range(12):
                await anyio.sleep(pause)
                async with pool.connection() as connection:
                    used.append(connection.number)
        assert sorted(used) == sorted([1, 2, 3] * 4)
        assert used[3:] == used[:-3]
        assert len(checked) == checks

    async def test_a_check_does_not_make_a_connection_last_longer(self, backend: Backend) -> None:
        """Also if all connections are looked at while it runs."""
        pool = backend.pool(max_size=1, max_idle=10, check=lambda _: anyio.sleep(1))
        async with pool:
            pool.release(await pool.acquire())
            began = anyio.current_time()
            await anyio.sleep(9.5)
            await pool.check()
            await anyio.sleep(5)
            assert [at - began for at in backend.closed_at] == [pytest.approx(10.5)]

    async def test_nor_does_one_that_is_due_while_the_loop_is_busy(self, backend: Backend) -> None:
        pool = backend.pool(max_size=2, max_idle=10, lifo=False, check=nothing)
        async with pool:
            old, young = taken = await some(pool, 2)
            pool.release(old)
            await anyio.sleep(9.8)
            pool.release(young)
            later: list[Connection] = []
            async with create_task_group() as tg:
                skip_time(0.4)
                for _ in range(2):
                    tg.start_soon(take, pool, later)
            assert old not in later
            assert backend.closings == [old.number]
            give_back(pool, later)
            del taken

    async def test_who_closes_the_pool_waits_for_no_check_that_is_yet_to_come(
        self, backend: Backend
    ) -> None:
        checked: list[int] = []
        pool = backend.pool(
            max_size=2, lifo=False, fast_acquire=True, check=lambda c: checked.append(c.number)
        )
        async with pool:
            taken = await some(pool, 2)
            pool.release(taken.pop(0))
            await anyio.sleep(1)
            pool.release(taken.pop())
            pool.release(await pool.acquire())
        assert checked == []

    async def test_who_fails_fast_does_not_overlook_one_that_is_about_to_be_checked(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=3, lifo=False, check=nothing, fail_fast=True)
        async with pool:
            taken = await some(pool, 2)
            backend.refuses = True
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            pool.release(taken.pop())
            await anyio.sleep(1)
            pool.release(taken.pop())
            later: list[Connection] = []
            async with create_task_group() as tg:
                for _ in range(2):
                    tg.start_soon(take, pool, later)
            assert len(later) == 2
            give_back(pool, later)

    @pytest.mark.parametrize("lifo", [False, True])
    async def test_of_those_to_be_checked_the_same_is_next(
        self, backend: Backend, lifo: bool
    ) -> None:
        async with backend.pool(max_size=4, lifo=lifo, check=nothing) as pool:
            taken = await some(pool, 4)
            for connection in taken:
                await anyio.sleep(0.001)
                pool.release(connection)
            await anyio.sleep(1)
            order = taken[::-1] if lifo else taken
            with CancelScope() as scope:
                scope.cancel()
                await pool.acquire(0)
            assert [await pool.acquire(), await pool.acquire(0)] == order[:2]
            await pool.resize(0, 3)  # of the others the one that was not used for longest goes
            await settle()
            assert len(backend.closings) == 1
            assert backend.closings == [taken[0 if lifo else 2].number]
            assert await pool.acquire(0) is taken[1 if lifo else 3]
            for connection in (order[0], order[1], taken[1 if lifo else 3]):
                pool.release(connection)

    async def test_who_does_not_wait_has_none_checked_that_is_idle(self, backend: Backend) -> None:
        pool = backend.pool(max_size=4, lifo=False, check=lambda _: anyio.sleep(1))
        async with pool:
            taken = await some(pool, 4)
            give_back(pool, taken[:2])
            await anyio.sleep(1)
            give_back(pool, taken[2:])
            again: list[Connection] = []
            for _ in range(4):
                again.append(pool.acquire_nowait())
                await settle()
            assert set(again) == set(taken)
            give_back(pool, again)

    async def test_to_check_all_does_not_change_who_is_next(self, backend: Backend) -> None:
        for lifo in (False, True):
            async with backend.pool(max_size=3, lifo=lifo, check=nothing) as pool:
                taken = await some(pool, 3)
                for connection in taken:
                    pool.release(connection)
                await pool.check()
                again = await some(pool, 3)
                assert again == (taken[::-1] if lifo else taken)
                give_back(pool, again)

    async def test_ten_minutes_is_max_idle_by_default(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool:
            pool.release(await pool.acquire())
            await anyio.sleep(599)
            assert backend.closings == []
            await anyio.sleep(2)
            assert backend.closings == [1]

    @pytest.mark.parametrize("overlap", [False, True])
    async def test_the_pool_shrinks_to_min_size_and_keeps_that(
        self, backend: Backend, overlap: bool
    ) -> None:
        pool = backend.pool(min_size=2, max_size=6, max_idle=10, overlap=overlap)
        async with pool:
            await pool.wait()
            give_back(pool, await some(pool, 6))
            assert len(backend.open()) == 6
            for _ in range(10):
                await anyio.sleep(10.1)
                await pool.wait(0)
                assert len(backend.open()) == 2
            assert backend.most_open == 6 + overlap

    async def test_an_outage_of_a_pool_that_is_full_does_not_keep_the_loop_busy(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=2) as pool, pool.connection():
            backend.refuses = True
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            assert len(backend.attempts) == 1 + 3
            await pool.resize(0, 1)
            await anyio.sleep(5)
        assert not spun()

    async def test_a_slow_close_during_an_outage_does_not_keep_the_loop_busy(
        self, backend: Backend
    ) -> None:
        backend.at_close = partial(anyio.sleep, 2)
        async with backend.pool(max_size=1, configure=FailingHook("raises")) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
        assert not spun()

    async def test_attempts_to_reconnect_become_rarer_up_to_ten_seconds(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1):
            await anyio.sleep(200)
        # The first three, at once.
        assert len(set(backend.attempts[:3])) == 1
        late = backend.attempts[2:]
        gaps = [b - a for a, b in pairwise(late)]
        for index, gap in enumerate(gaps):
            delay = min(0.1 * 2**index, 10)
            assert 0.5 * delay - 1e-6 <= gap <= delay + 1e-6
        assert 25 <= len(gaps) <= 60
        longest = gaps[8:]
        assert max(longest) - min(longest) > 1  # by chance
        assert backend.most_connecting == 1

    async def test_while_connecting_fails_fewer_are_tried_and_then_one_at_a_time(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        backend.pause = 0.01
        pool = backend.pool(min_size=9, max_connecting=4)
        async with pool:
            await anyio.sleep(0.045)
            # Those that run at the same time count as one failure.
            first = backend.attempts[0]
            begun = [round((at - first) / 0.01) for at in backend.attempts]
            assert begun == [0] * 4 + [1] * 3 + [2]
            assert backend.most_connecting == 4
            backend.most_connecting = 0
            await anyio.sleep(20)
            assert backend.most_connecting == 1
            assert 7 <= len(backend.attempts) - 8 <= 11
            assert 0.06 - 1e-6 <= backend.attempts[8] - backend.attempts[7] <= 0.11 + 1e-6
            backend.refuses = False
            await anyio.sleep(11)
            await pool.wait(0)
            assert backend.most_connecting == 4
        assert backend.most_open == 9

    async def test_failures_at_the_very_same_time_count_as_one(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(min_size=4, max_connecting=4):
            await anyio.sleep(2)
        first, *others = backend.attempts
        # 4, then 3, then 1.
        assert others[:7] == [first] * 7
        assert 0.05 <= others[7] - first <= 0.1 + 1e-6

    async def test_an_outage_ends_by_itself_even_if_nobody_waits(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        backend.refuses = True
        async with backend.pool(on_event=events.append) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
            backend.refuses = False
            await anyio.sleep(10)
            assert kinds(events)[:4] == ["connect_failed"] * 3 + ["outage"]
            assert set(kinds(events)[4:-2]) == {"connect_failed"}
            assert kinds(events)[-2:] == ["recovered", "connected"]
            before = len(backend.attempts)
            await anyio.sleep(100)
            assert len(backend.attempts) == before
            # The next outage begins as the first one did.
            backend.refuses = True
            async with pool.connection():
                began = anyio.current_time()
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0.3)
                assert backend.attempts[before : before + 3] == pytest.approx([began] * 3)
                assert 0.05 <= backend.attempts[before + 3] - began <= 0.1 + 1e-6
            assert kinds(events).count("outage") == 2

    async def test_wait_gives_up_when_its_time_is_over(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1) as pool:
            for timeout in (5, 0, 0.5):
                began = anyio.current_time()
                with pytest.raises(PoolTimeout) as caught:
                    await pool.wait(timeout)
                assert anyio.current_time() - began == pytest.approx(timeout)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            began = anyio.current_time()
            with pytest.raises(PoolTimeout):
                await pool.wait()
            assert anyio.current_time() - began == pytest.approx(30)
            async with create_task_group() as tg:
                tg.start_soon(pool.wait, None)
                await anyio.sleep(1000)
                backend.refuses = False

    async def test_a_leak_is_reported_once_with_the_stack_of_the_borrower(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(name="db", max_size=2, leak_timeout=5, on_event=events.append)

        async def the_one_who_forgets() -> Connection:
            return await pool.acquire()

        def leaks() -> list[PoolEvent]:
            return [event for event in events if event.kind == "leaked"]

        async with pool:
            connection = await the_one_who_forgets()
            await anyio.sleep(4.9)
            async with pool.connection():
                await anyio.sleep(0.05)
            assert leaks() == []
            await anyio.sleep(0.1)
            (leak,) = leaks()
            assert "in the_one_who_forgets" in leak.reason
            assert __file__ in leak.reason
            assert "aiosync/_pool" not in leak.reason
            assert leak.info is not None
            assert leak.info.in_use == pytest.approx(5, abs=0.1)
            assert pool.get_stats()["leaks"] == 1
            (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
            assert "the_one_who_forgets" in record.getMessage()
            assert record.name == "aiosync.pool"
            await anyio.sleep(100)
            assert len(leaks()) == 1
            pool.release(connection)
            # Once each time.
            connection = await the_one_who_forgets()
            await anyio.sleep(5.1)
            assert len(leaks()) == 2
            pool.release(connection)

    async def test_the_stack_of_a_borrower_is_kept_for_the_length_of_the_loan(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=1, leak_timeout=1000) as pool:
            async with pool.connection():
                (entry,) = pool._in_use.values()
                assert entry.stack
            assert entry.stack == []

    async def test_without_leak_timeout_nothing_is_reported(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            async with pool.connection():
                await anyio.sleep(1e6)
            assert pool.get_stats()["leaks"] == 0
        assert not caplog.records

    async def test_borrowers_have_their_grace_period_and_are_then_forced(
        self, backend: Backend
    ) -> None:
        events: list[PoolEvent] = []
        began = anyio.current_time()
        pool = backend.pool(max_size=3, close_timeout=7, on_event=events.append)
        async with create_task_group() as tg:
            async with pool:
                kept, late = await some(pool, 2)
                pool.release(await pool.acquire())

                async def come_back() -> None:
                    await anyio.sleep(3)
                    pool.release(late)
                    await settle()
                    assert late.number in backend.closings

                tg.start_soon(come_back)
            assert anyio.current_time() - began == pytest.approx(7)
        assert Counter(closed_for(events)) == {"shutdown": 2, "forced": 1}
        assert backend.closings[-1] == kept.number
        # Silent, once.
        pool.release(kept)
        with pytest.raises(ValueError, match="not borrowed"):
            pool.release(kept)

    async def test_a_block_that_is_forced_ends_silently(self, backend: Backend) -> None:
        pool = backend.pool(close_timeout=1)
        await pool.__aenter__()
        async with pool.connection() as connection:
            await pool.__aexit__(None, None, None)
            assert backend.closings == [connection.number]
        with pytest.raises(ValueError, match="not borrowed"):
            pool.release(connection)
        pool = Backend().pool(close_timeout=1)
        await pool.__aenter__()
        async with pool.connection() as connection:
            await pool.__aexit__(None, None, None)
            pool.discard(connection)

    async def test_the_grace_period_is_five_seconds_by_default_or_endless(
        self, backend: Backend
    ) -> None:
        began = anyio.current_time()
        async with backend.pool() as pool:
            connection = await pool.acquire()
        assert anyio.current_time() - began == pytest.approx(5)
        pool.release(connection)
        pool = backend.pool(close_timeout=None)
        async with create_task_group() as tg:
            async with pool:
                connection = await pool.acquire()

                async def come_back() -> None:
                    await anyio.sleep(1e5)
                    pool.release(connection)

                tg.start_soon(come_back)
            assert anyio.current_time() - began == pytest.approx(1e5 + 5)

    @in_virtual_asyncio
    async def test_a_connection_on_its_way_to_a_waiter_is_forced_as_well(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=1, close_timeout=0)
        await pool.__aenter__()
        taken: list[Connection] = []
        closed_after: list[float] = []
        began = anyio.current_time()

        async def borrow() -> None:
            async with pool.connection() as connection:
                taken.append(connection)
                await anyio.sleep(100)

        async def close() -> None:
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()  # so that the keeper is woken first
            pool.release(connection)
            await pool.__aexit__(None, None, None)
            closed_after.append(anyio.current_time() - began)

        connection = await pool.acquire()
        async with create_task_group() as tg:
            tg.start_soon(borrow)
            await settle()
            tg.start_soon(close)
        assert closed_after == pytest.approx([0])

    async def test_an_acquire_in_its_checkpoint_when_the_pool_is_closed(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(min_size=1, close_timeout=3)
        await pool.__aenter__()
        await pool.wait()
        taken: list[Connection] = []

        async def borrow() -> None:
            try:
                taken.append(await pool.acquire())
            except PoolClosed:
                return
            await anyio.sleep(1)
            give_back(pool, taken)

        async with create_task_group() as tg:
            tg.start_soon(borrow)
            await anyio.lowlevel.checkpoint()
            tg.start_soon(pool.__aexit__, None, None, None)
        assert backend.closings == [1]


async def watch(seconds: float, look: Callable[[], None]) -> None:
    """Call `look` again and again for so long."""
    end = anyio.current_time() + seconds
    while anyio.current_time() < end:
        look()
        await anyio.sleep(0.04)


@pytest.mark.anyio
class TestWarm(Virtual):
    """What is done so that `min_size` connections are ready, and none is too old."""

    @pytest.mark.parametrize("max_size", [2, 6])
    async def test_min_size_are_always_idle_if_nobody_wants_any(
        self, backend: Backend, max_size: int
    ) -> None:
        backend.pause = 0.05

        def look() -> None:
            assert pool.statistics().idle >= 2

        async with backend.pool(min_size=2, max_size=max_size, max_idle=10) as pool:
            await pool.wait()
            await watch(60, look)
            assert pool.statistics().closed["idle"] >= 2 * 5

    async def test_so_are_those_that_were_borrowed_when_the_pool_looked(
        self, backend: Backend
    ) -> None:
        backend.pause = 0.2

        def look() -> None:
            assert pool.statistics().idle == 1

        async with backend.pool(min_size=1, max_size=1, max_idle=10) as pool:
            await pool.wait()
            async with pool.connection():
                await pool.resize(1, 1)  # it looks now
                await settle()
            await watch(30, look)
            assert pool.statistics().closed["idle"] >= 2

    async def test_those_above_min_size_are_not_replaced(self, backend: Backend) -> None:
        async with backend.pool(min_size=1, max_size=5, max_idle=10) as pool:
            for number in (5, 4):
                give_back(pool, await some(pool, number))
                await anyio.sleep(1)
            await anyio.sleep(10)
            assert backend.open() == {6}
            assert pool.statistics().closed["idle"] == 5

    async def test_a_burst_after_a_quiet_time_finds_min_size(self, backend: Backend) -> None:
        backend.pause = 1
        async with backend.pool(min_size=3, max_size=9, max_idle=10, max_lifetime=25) as pool:
            await pool.wait()
            for _ in range(20):
                began = anyio.current_time()
                give_back(pool, await some(pool, 3))
                assert anyio.current_time() == began
                await anyio.sleep(17.3)

    async def test_the_only_connection_is_replaced_without_a_gap(self, backend: Backend) -> None:
        backend.pause = 0.2
        pool = backend.pool(min_size=1, max_size=1, max_lifetime=0.7)
        async with pool:
            await use(pool)
            assert await borrow_for(pool, 10) == 0
            assert pool.statistics().closed["lifetime"] > 10
        assert backend.most_open == 2

    async def test_without_overlap_the_old_one_goes_first(self, backend: Backend) -> None:
        backend.pause = 0.2
        pool = backend.pool(min_size=1, max_size=1, max_lifetime=0.7, overlap=False)
        async with pool:
            await use(pool)
            # The gap is as short as it can be.
            assert 0.18 < await borrow_for(pool, 10) <= 0.2 + 1e-6
            assert pool.statistics().closed["lifetime"] > 10
        assert backend.most_open == 1

    @pytest.mark.parametrize("overlap", [False, True])
    async def test_where_there_is_room_no_overlap_is_needed(
        self, backend: Backend, overlap: bool
    ) -> None:
        backend.pause = 0.2
        pool = backend.pool(min_size=1, max_size=2, max_lifetime=5, overlap=overlap)
        async with pool:
            await use(pool)
            assert await borrow_for(pool, 30) == 0
            assert pool.statistics().closed["lifetime"] > 4
        assert backend.most_open == 2

    async def test_no_more_than_one_more_than_max_size(self, backend: Backend) -> None:
        backend.pause = 0.2
        async with backend.pool(min_size=3, max_size=3, max_lifetime=10) as pool:
            await pool.wait()

            async def borrow() -> None:
                assert await borrow_for(pool, 25) < 0.05

            def look() -> None:
                assert pool.statistics().in_use <= 3
                assert len(backend.open()) <= 4

            async with create_task_group() as tg:
                for _ in range(5):
                    tg.start_soon(borrow)
                await watch(25, look)
            assert pool.statistics().closed["lifetime"] >= 6
            assert backend.most_open == 4

    @pytest.mark.parametrize("how", ["idle", "borrowed"])
    async def test_the_replacement_is_not_lent_before_the_old_one_is_gone(
        self, backend: Backend, how: str
    ) -> None:
        async with backend.pool(max_size=1, max_lifetime=10) as pool:
            async with pool.connection() as old:
                await anyio.sleep(9.9)
                assert len(backend.open()) == 2
                assert pool.statistics().idle == 0
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0.05)
                if how == "idle":
                    pool.release(old)
                    await settle()
                    assert pool.statistics().idle == 1
            assert await use(pool, 0.001) == 2
            await settle()
            assert backend.open() == {2}

    async def test_a_replacement_that_can_not_be_opened_is_no_outage(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(min_size=1, max_size=1, max_lifetime=10, on_event=events.append)
        async with pool:
            await pool.wait()
            backend.refuses = True
            while len(backend.attempts) < 2:
                await anyio.sleep(0.01)
            await settle()
            assert (pool.healthy, kinds(events)) == (True, ["connected", "connect_failed"])
            # The old one is of use as long as it may be.
            assert await use(pool, 0) == 1
            backend.refuses = False
            await anyio.sleep(0.5)
            assert await use(pool, 0) == 2
            assert closed_for(events) == ["lifetime"]
            assert pool.statistics().connect_errors == 1
            assert "outage" not in kinds(events)
        assert backend.most_open == 1
        assert messages(caplog) == []

    async def test_a_backend_that_allows_no_more_than_max_size(self, backend: Backend) -> None:
        async def connect() -> Connection:
            if len(backend.open()) >= 2:
                raise ConnectionRefusedError("too many connections")
            return await backend.connect()

        pool = ConnectionPool(connect, close=backend.close, min_size=2, max_size=2, max_lifetime=10)
        async with pool:
            await pool.wait()
            assert await borrow_for(pool, 30) == 0
            assert pool.healthy
            assert pool.statistics().closed["lifetime"] >= 4
        assert backend.most_open == 2

    @pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
    async def test_keepalive_checks_what_is_idle(self, backend: Backend, is_plain: bool) -> None:
        checked: list[tuple[int, float]] = []

        def note(connection: Connection) -> None:
            checked.append((connection.number, round(anyio.current_time() - began, 6)))

        async def check(connection: Connection) -> None:
            note(connection)
            await anyio.lowlevel.checkpoint()

        pool = backend.pool(
            min_size=2, max_size=2, check=note if is_plain else check, check_idle=None, keepalive=10
        )
        async with pool:
            await pool.wait()
            began = anyio.current_time()
            await anyio.sleep(25)
            used = await use(pool)
            await anyio.sleep(26)
        times = {number: [at for n, at in checked if n == number] for number in (1, 2)}
        # It was used meanwhile, so it need not be checked so soon.
        assert times.pop(used) == [10, 20, 35, 45]
        assert list(times.values()) == [[10, 20, 30, 40, 50]]
        assert pool.statistics().closed["idle"] == 0

    async def test_what_fails_a_keepalive_is_replaced_before_anybody_gets_it(
        self, backend: Backend
    ) -> None:
        dead: set[int] = set()

        def check(connection: Connection) -> bool:
            return connection.number not in dead

        async with backend.pool(min_size=2, keepalive=10, check=check, check_idle=None) as pool:
            await pool.wait()
            dead |= {1, 2}
            await anyio.sleep(11)
            assert backend.open() == {3, 4}
            assert pool.statistics().failed_checks == 2

    async def test_keepalive_is_no_use(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1, max_idle=10, keepalive=3, check=nothing)
        async with pool:
            await use(pool)
            await anyio.sleep(9.9)
            assert backend.closings == []
            await anyio.sleep(0.2)
            assert backend.closings == [1]

    async def test_keepalive_needs_a_check(self, backend: Backend) -> None:
        async with backend.pool(min_size=1, keepalive=1, max_idle=None) as pool:
            await anyio.sleep(100)
            assert pool.statistics().size == 1
        assert backend.opened == 1
