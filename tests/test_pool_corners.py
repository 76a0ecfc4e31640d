"""What only happens if two things come together: each is brought about by hand, from the inside."""

from __future__ import annotations

import asyncio
import gc
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio

from aiosync import ConnectionPool, PoolClosed, PoolEvent, PoolTimeout, _park
from aiosync._handoff import HandoffQueue
from aiosync._park import ThreadWaiter
from aiosync._pool import _face
from aiosync._pool._idle import IdleQueue
from aiosync._pool._keeper import Keeper
from aiosync._pool._ledger import describe
from aiosync._pool._records import ALWAYS, Failure, Record


class Connection:
    def __init__(self) -> None:
        self.closings = 0

    async def aclose(self) -> None:
        self.closings += 1


def failure() -> Failure:
    return Failure(lambda: PoolClosed("closed"))


def idle_queue(calls: list[Any] | None = None, lifo: bool = True) -> IdleQueue[Connection]:
    """Return an open queue; `calls` gets the arguments each time that it calls its keeper."""
    found = [] if calls is None else calls

    def call(*args: object) -> None:
        found.append(args)

    queue: IdleQueue[Connection] = IdleQueue(lifo, ALWAYS, failure(), call, call)
    queue.open()
    return queue


def record(good_until: float = ALWAYS, expires: float = ALWAYS) -> Record[Connection]:
    made = Record(Connection(), 0, expires)
    made.good_until = good_until
    return made


class Emptied(deque[Any]):
    """Another thread takes the last one between the look and the removal."""

    def remove(self, value: Any) -> None:
        super().clear()
        super().remove(value)


class Changed(deque[Any]):
    """Another thread changes it during the first attempt to copy it."""

    tries = 0

    def copy(self) -> Any:
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("deque mutated during iteration")
        return super().copy()


class TestTheQueue:
    def test_a_failure_that_nobody_took_is_dropped(self) -> None:
        queue = idle_queue()
        good = record()
        queue.items.extend([good, failure()])
        assert queue.pick(0, True) is good
        queue.put(failure())
        queue.put_back(failure())
        assert not queue.items

    def test_what_was_retired_on_its_way_goes_to_the_keeper(self) -> None:
        calls: list[Any] = []
        queue = idle_queue(calls)
        old = record()
        old.retire("drain")
        queue.put(old)
        assert queue.idle() == 0
        assert calls == [(old, "reset")]

    def test_the_keeper_takes_the_last_dormant_one(self) -> None:
        queue = idle_queue()
        queue.dormant = Emptied([record()])
        assert queue.pick(0, False) is None

    def test_or_the_one_to_be_checked_next(self) -> None:
        calls: list[Any] = []
        queue = idle_queue(calls, lifo=False)
        queue.dormant = Emptied([record()])
        queue.items.append(good := record())
        assert queue.pick(0, True) is good
        assert calls == []

    def test_a_copy_of_what_others_change_is_tried_again(self) -> None:
        queue = idle_queue()
        waiting = record()
        queue.items = Changed([waiting])
        assert queue.snapshot() == [waiting]

    def test_those_whose_time_is_over_are_woken_and_the_next_one_is_known(self) -> None:
        queue: HandoffQueue[int] = HandoffQueue()
        sleepers = [ThreadWaiter() for _ in range(4)]
        for sleeper, deadline in zip(sleepers, (1.0, None, 2.0, 3.0), strict=True):
            queue.join(sleeper, deadline)
        assert queue.expire(2.0) == 3.0
        assert [sleeper._lock.acquire(False) for sleeper in sleepers] == [True, False, True, False]

    def test_to_look_for_those_is_tried_again_if_another_thread_comes_between(self) -> None:
        class ChangedItems(OrderedDict[Any, Any]):
            tries = 0

            def items(self) -> Any:
                self.tries += 1
                if self.tries == 1:
                    raise RuntimeError("OrderedDict mutated during iteration")
                return super().items()

        queue: HandoffQueue[int] = HandoffQueue()
        queue.waiters = ChangedItems()
        assert queue.expire(0) == ALWAYS


@pytest.mark.anyio
class TestTheKeeper:
    async def test_somebody_who_does_not_wait_takes_the_dormant_one_first(self) -> None:
        async with ConnectionPool(Connection, check=lambda _: None) as pool:
            keeper = pool._keeper
            keeper.idle.dormant = Emptied([record()])
            keeper.idle.waiters[ThreadWaiter()] = None
            keeper._wake_dormant(keeper.clock())
            keeper.idle.waiters.clear()
            assert not keeper.serving

    async def test_who_gave_back_in_time_is_not_forced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(Connection) as pool:
            pool.release(await pool.acquire())
            (idle,) = pool._keeper.records.values()
            monkeypatch.setattr(pool._keeper, "_borrowed", lambda: [idle])
            pool._keeper._force()
            assert not pool._keeper.forced
            monkeypatch.undo()

    async def test_a_defect_of_the_main_task_closes_the_pool_and_is_raised_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Connection] = []

        def connect() -> Connection:
            made.append(Connection())
            return made[-1]

        def fail() -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with ConnectionPool(connect, min_size=2) as pool:
                await pool.wait()
                monkeypatch.setattr(pool._keeper, "_review", fail)
                with pytest.raises(PoolClosed):
                    while True:
                        pool._keeper.post(lambda: None)
                        pool.release(await pool.acquire(0))
                        await anyio.sleep(0)
        assert [connection.closings for connection in made] == [1, 1]

    async def test_a_reset_does_not_make_the_keeper_look_at_all_connections(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resets: list[Connection] = []
        looks: list[float] = []
        genuine = Keeper._look_at_all

        def look_at_all(keeper: Keeper[Any], now: float) -> None:
            looks.append(now)
            genuine(keeper, now)

        monkeypatch.setattr(Keeper, "_look_at_all", look_at_all)
        async with ConnectionPool(Connection, reset=resets.append, min_size=2) as pool:
            await pool.wait()
            await anyio.wait_all_tasks_blocked()
            looks.clear()
            for number in range(10):
                async with pool.connection():
                    pass
                while len(resets) == number:
                    await anyio.sleep(0)
            assert not looks
            await pool.drain()
            await anyio.wait_all_tasks_blocked()
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
        pool = ConnectionPool(Connection, min_size=2, on_event=events.append)
        async with pool:
            await pool.wait()
            connection = await pool.acquire()
            made = [kept.alive() for kept in pool._keeper.records.values()]
            del events[:]
            _face._after_fork()  # as if this were the child
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
        pool._keeper.post(pool._keeper.stop)
        while not pool._keeper.finished:
            await anyio.sleep(0)

    async def test_in_a_child_process_what_was_about_to_be_called_is_not(self) -> None:
        for ticks in range(8):
            resets: list[Connection] = []
            told: list[PoolEvent] = []
            pool = ConnectionPool(Connection, reset=resets.append, on_event=told.append)
            async with pool:
                connection = await pool.acquire()
                pool.release(connection)
                for _ in range(ticks):
                    await anyio.lowlevel.checkpoint()
                _face._after_fork()  # as if this were the child
                before = resets.copy(), told.copy()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert (resets, told) == before
            assert connection.closings == 0
            # The task of the parent, which is ours.
            pool._keeper.post(pool._keeper.stop)
            while not pool._keeper.finished:
                await anyio.sleep(0)

    async def test_in_a_child_process_what_the_parent_makes_is_nobody_s(self) -> None:
        begun, gate = anyio.Event(), anyio.Event()
        made: list[Connection] = []
        told: list[str] = []

        async def connect() -> Connection:
            begun.set()
            await gate.wait()
            made.append(Connection())
            return made[0]

        pool = ConnectionPool(connect, max_size=1, on_event=lambda event: told.append(event.kind))
        async with pool, anyio.create_task_group() as tasks:
            tasks.start_soon(pool.acquire)
            await begun.wait()
            assert pool._idle.waiters
            _face._after_fork()  # as if this were the child
            gate.set()
            while pool._keeper.opening:
                await anyio.sleep(0)
            await anyio.sleep(0)
            assert not pool._lent
            tasks.cancel_scope.cancel()
        assert [connection.closings for connection in made] == [0]
        assert told == []
        pool._keeper.post(pool._keeper.stop)
        while not pool._keeper.finished:
            await anyio.sleep(0)

    async def test_a_function_of_the_pool_may_close_it(self) -> None:
        ended = anyio.Event()

        async def complain(pool: ConnectionPool[object]) -> None:
            await pool.__aexit__(None, None, None)
            ended.set()

        def refuse() -> object:
            raise OSError

        async with ConnectionPool(
            refuse, min_size=1, reconnect_timeout=0, reconnect_failed=complain
        ) as pool:
            with anyio.fail_after(20):
                await ended.wait()
            with pytest.raises(PoolClosed):
                await pool.acquire()

    async def test_an_event_that_ends_in_a_cancellation_loses_nothing(self) -> None:
        cancelled = anyio.get_cancelled_exc_class()

        def tell(event: PoolEvent) -> None:
            if cancelled is asyncio.CancelledError:
                raise cancelled  # the result of a future that was cancelled, for instance
            raise KeyError

        async with ConnectionPool(Connection, on_event=tell, min_size=1) as pool:
            await pool.wait()
            pool.release(await pool.acquire())
        assert pool.get_stats()["closed_shutdown"] == 1

    async def test_wait_waits_until_connections_are_configured(self) -> None:
        configured: list[object] = []

        async def configure(connection: Connection) -> None:
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            configured.append(connection)

        async with ConnectionPool(Connection, configure=configure, min_size=2) as pool:
            await pool.wait()
            assert len(configured) == 2

    async def test_one_that_is_closed_by_force_is_closed_even_if_it_comes_back_at_once(
        self,
    ) -> None:
        closed: list[object] = []
        pool = ConnectionPool(Connection, close=closed.append, close_timeout=0)
        await pool.__aenter__()
        connection: Connection | None = await pool.acquire()
        pool._keeper._force()
        assert connection is not None
        pool.release(connection)
        del connection
        gc.collect()
        await pool.__aexit__(None, None, None)
        assert [type(one) for one in closed] == [Connection]

    async def test_a_block_that_begins_when_its_connection_is_gone_already_ends_quietly(
        self,
    ) -> None:
        async with ConnectionPool(Connection) as pool:
            checkout = pool.connection()
            gone = Connection()
            pool._keeper.forced[id(gone)] = gone

            async def acquire() -> Connection:
                return gone

            assert await checkout._borrow(acquire()) is gone
            checkout._give_back()
            assert not pool._keeper.forced

    async def test_a_failure_that_nobody_took_is_not_handed_out_on_the_common_path(self) -> None:
        async with ConnectionPool(Connection, fast_acquire=True) as pool:
            pool.release(await pool.acquire())
            pool._idle.items.append(failure())
            pool.release(await pool.acquire())
            assert not pool._idle.dormant
            assert pool._idle.idle() == 1

    async def test_it_is_too_late_to_close_a_pool_whose_loop_has_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(Connection) as pool:
            monkeypatch.setattr(_face, "loop_ended", lambda _: True)
            with pytest.raises(RuntimeError, match="it is too late to close its connections"):
                await pool.__aexit__(None, None, None)
            monkeypatch.undo()


@pytest.mark.asyncio
async def test_to_wake_one_whose_time_is_over_and_who_was_cancelled_does_no_harm() -> None:
    queue: HandoffQueue[int] = HandoffQueue()
    waiter = _park.task_waiter()
    queue.join(waiter, 1.0)
    assert isinstance(waiter, asyncio.Future)
    waiter.cancel()
    assert queue.expire(2.0) == ALWAYS
    assert queue.leave(waiter) is None


def test_it_can_be_told_whether_a_loop_has_ended() -> None:
    found: list[object] = []

    async def main() -> None:
        found.append(_park.current_token())
        assert not _park.loop_ended(found[-1])

    trio.run(main)
    asyncio.run(main())
    assert all(map(_park.loop_ended, found))


def test_the_tasks_of_a_loop_that_was_closed_without_a_word_are_forgotten() -> None:
    async def sleep_on() -> None:
        await asyncio.sleep(1000)

    async def start() -> None:
        _park.start_background_task(sleep_on, "sleeper", lambda: None)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    (task,) = _park._background
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    asyncio.run(start())
    assert not _park._background


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
        pool = ConnectionPool(Connection, close=close, min_size=1, name="db")
        await pool.__aenter__()
        await pool.wait()
        (main,) = (task for task in asyncio.all_tasks() - before if task.get_name() == "db")
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
        pool = ConnectionPool(Connection)
        pool._keeper.clock = asyncio.get_running_loop().time
        main = pool._keeper._run()
        main.send(None)
        main.close()
        assert pool._keeper.finished


class TestBlocks:
    @pytest.mark.anyio
    async def test_a_block_that_has_given_back_early_leaves_the_next_borrower_alone(self) -> None:
        pool = ConnectionPool(Connection, max_size=1, close_timeout=0.01)
        async with pool:
            async with pool.connection() as connection:
                pool.release(connection)
                assert await pool.acquire() is connection
                await pool.__aexit__(None, None, None)  # by force
            pool.release(connection)  # as is allowed once after that
            with pytest.raises(ValueError, match="given back before"):
                pool.release(connection)

    @pytest.mark.anyio
    async def test_one_that_is_entered_twice_at_once_is_refused(self) -> None:
        async with ConnectionPool(Connection, max_size=1) as pool:
            checkout = pool.connection()
            other = await pool.acquire()
            outcomes: list[object] = []

            async def enter() -> None:
                try:
                    outcomes.append(await checkout.__aenter__())
                except RuntimeError as error:
                    outcomes.append(str(error))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(enter)
                tasks.start_soon(enter)
                await anyio.wait_all_tasks_blocked()
                assert outcomes == [
                    "this has borrowed a connection already; call connection() again"
                ]
                pool.release(other)
            assert outcomes[1:] == [other]
            await checkout.__aexit__(None, None, None)
            assert pool.get_stats()["in_use"] == 0
            # It may be entered again, also after it was cancelled.
            with anyio.CancelScope() as scope:
                scope.cancel()
                await checkout.__aenter__()
            async with checkout as connection:
                assert connection is other


def test_who_comes_while_another_lays_a_stale_connection_aside_is_seen_to() -> None:
    calls: list[Any] = []
    queue = idle_queue(calls)
    stale = record(good_until=0)
    queue.items.append(stale)

    class Slow(deque[Any]):
        """Somebody begins to wait just before it is there."""

        def append(self, item: Any) -> None:
            queue.join(ThreadWaiter())
            assert not calls
            super().append(item)

    queue.dormant = Slow()
    assert queue.pick(1, True) is None  # and does not come to wait
    assert list(queue.dormant) == [stale]
    assert calls == [()]


@pytest.mark.parametrize("moment", ["granted", "in its checkpoint", "out of time"])
def test_in_a_child_process_nobody_is_handed_what_the_parent_lends(moment: str) -> None:
    async def main() -> None:
        pool = ConnectionPool(Connection, max_size=1, min_size=1)
        async with pool:
            await pool.wait()
            if moment != "in its checkpoint":
                connection = await pool.acquire()
            task = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0)
            if moment == "granted":
                pool.release(connection)
            if moment == "out of time":
                for waiter in pool._idle.waiters:
                    _park.wake_all([waiter])  # as if the keeper had found that it is so
            _face._after_fork()  # as if this were the child
            with pytest.raises(PoolClosed, match="before a fork"):
                await task
            assert not pool._lent
        # The task of the parent, which is ours.
        pool._keeper.post(pool._keeper.stop)
        while not pool._keeper.finished:
            await asyncio.sleep(0)

    asyncio.run(main())
