"""ConnectionPool under every event loop: the order of borrowers, and the life of a connection.

The connections are stubs, and their backend notes what is opened and closed. At the end of each
test everything that was opened must have been closed, once. Where time matters it is virtual: it
stands still while something runs, and jumps when everybody waits.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Awaitable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio
from anyio import CancelScope, WouldBlock, create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    Connection,
    closed_for,
    give_back,
    kinds,
    nothing,
    some,
    take,
)

from aiosync import (
    ConnectionPool,
    PoolEvent,
    PoolTimeout,
    TooManyRequests,
)


@pytest.mark.anyio
class TestRepr:
    async def test_it_tells_state_size_idle_ones_and_waiters(self, backend: Backend) -> None:
        pool = backend.pool(name="db", max_size=2)
        assert "'db' is not open yet" in repr(pool)
        assert "0 of 2 connections, 0 idle, 0 waiting" in repr(pool)
        taken: list[Connection] = []
        async with pool, create_task_group() as tg:
            taken += await some(pool, 2)
            assert "'db' open: 2 of 2 connections, 0 idle, 0 waiting" in repr(pool)
            tg.start_soon(take, pool, taken)
            await settle()
            assert "2 of 2 connections, 0 idle, 1 waiting" in repr(pool)
            pool.release(taken.pop())
            await settle()
            give_back(pool, taken)
            assert "2 of 2 connections, 2 idle, 0 waiting" in repr(pool)
        assert "'db' is closed: 0 of" in repr(pool)
        assert repr(pool).startswith("<aiosync.ConnectionPool 'db'")


@pytest.mark.anyio
class TestBorrowing:
    @pytest.mark.parametrize("timeout", [0, 0.0, -1, -math.inf, False])
    async def test_without_patience_it_takes_an_idle_one_or_fails(
        self, backend: Backend, timeout: float
    ) -> None:
        pool = backend.pool(max_size=1, min_size=1)
        async with pool:
            await pool.wait()
            connection = await pool.acquire(timeout)
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout)
            assert pool.get_stats()["requests_waiting"] == 0
            pool.release(connection)
            async with pool.connection(timeout) as again:
                assert again is connection

    @pytest.mark.parametrize("nowait", [False, True])
    async def test_without_patience_one_that_is_due_for_a_check_is_taken_as_it_is(
        self, backend: Backend, nowait: bool
    ) -> None:
        checked: list[Connection] = []
        pool = backend.pool(max_size=2, min_size=2, check=checked.append, check_idle=0)
        async with pool:
            await pool.wait()
            for _ in range(3):
                taken = [
                    pool.acquire_nowait() if nowait else await pool.acquire(0) for _ in range(2)
                ]
                give_back(pool, taken)
                # Idle, and checked before a caller that may wait gets it.
                await settle()
            assert checked == []
            assert pool.get_stats()["requests_errors"] == 0

    async def test_a_failure_without_patience_has_one_made_for_the_next_time(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=2)
        async with pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            await settle()
            one = await pool.acquire(0)
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            two = pool.acquire_nowait()
            assert backend.opened == 2
            give_back(pool, [one, two])

    async def test_the_timeout_error_tells_why(self, backend: Backend) -> None:
        async with backend.pool(name="db", max_size=1) as pool, pool.connection():
            with pytest.raises(TimeoutError) as caught:
                await pool.acquire(0)
            # With debugging, the borrowers follow.
            assert str(caught.value).partition("; borrowed by")[0] == (
                "db: no connection available at once (max=1, in_use=1, connecting=0, waiting=0)"
            )
            assert isinstance(caught.value, PoolTimeout)
            assert caught.value.__cause__ is None
            assert caught.value.stats == pool.get_stats()
            assert caught.value.stats["in_use"] == 1
            assert caught.value.stats["timeouts"] == 1

    async def test_the_timeout_error_names_the_borrowers_if_they_are_known(
        self, backend: Backend
    ) -> None:
        async with backend.pool(name="db", max_size=6, leak_timeout=60) as pool:
            taken = await some(pool, 6)
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(0)
            line = some.__code__.co_firstlineno + 1
            places = re.findall(r"pool_stubs\.py:(\d+) for \d+\.\d s", str(caught.value))
            assert places == [str(line)] * 5
            assert str(caught.value).endswith(", ...")
            give_back(pool, taken)

    async def test_the_timeout_error_has_the_connect_error_as_its_cause(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        async with backend.pool() as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(0)
            assert caught.value.__cause__ is None
            await settle()
            with pytest.raises(PoolTimeout, match="connecting fails") as caught:
                await pool.acquire(0)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            # Not any more, when it works again.
            backend.refuses = False
            pool.release(await pool.acquire(PATIENCE))
            await pool.resize(0, 1)
            async with pool.connection():
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(0)
                assert caught.value.__cause__ is None

    @pytest.mark.parametrize("timeout", ["1", b"1", [], object()])
    async def test_a_timeout_must_be_a_number(self, backend: Backend, timeout: Any) -> None:
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            with pytest.raises(TypeError, match="timeout must be a number"):
                await pool.acquire(timeout)
            with pytest.raises(TypeError, match="timeout must be a number"):
                async with pool.connection(timeout):
                    pass
            with pytest.raises(TypeError, match="timeout must be a number"):
                await pool.wait(timeout)
            assert pool.get_stats()["pool_available"] == 1

    async def test_a_timeout_must_not_be_nan(self, backend: Backend) -> None:
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            with pytest.raises(ValueError, match="NaN"):
                await pool.acquire(math.nan)
            with pytest.raises(ValueError, match="NaN"):
                await pool.wait(math.nan)
            assert pool.get_stats()["pool_available"] == 1

    async def test_acquire_nowait_complains_if_there_is_none(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, min_size=1) as pool:
            await pool.wait()
            connection = pool.acquire_nowait()
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            pool.release(connection)
            assert pool.acquire_nowait() is connection
            pool.release(connection)
            assert pool.get_stats()["requests_num"] == 2

    @pytest.mark.parametrize("max_waiting", [1, 3])
    async def test_exactly_max_waiting_may_wait(self, backend: Backend, max_waiting: int) -> None:
        pool = backend.pool(max_size=1, max_waiting=max_waiting)
        taken: list[Connection] = []
        async with pool:
            connection = await pool.acquire()
            async with create_task_group() as tg:
                for _ in range(max_waiting):
                    tg.start_soon(take, pool, taken)
                await settle()
                for _ in range(2):
                    with pytest.raises(TooManyRequests, match=f"^{max_waiting} wait"):
                        await pool.acquire()
                # Who does not wait is not refused for that.
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0)
                assert pool.get_stats()["requests_errors"] == 3
                pool.release(connection)
                await settle()
                # A place is free again.
                tg.start_soon(take, pool, taken)
                await settle()
                if max_waiting > 1:
                    with pytest.raises(TooManyRequests):
                        await pool.acquire()
                tg.cancel_scope.cancel()
            give_back(pool, taken)
            # And all of them after cancellations.
            connection = await pool.acquire()
            async with create_task_group() as tg:
                for _ in range(max_waiting):
                    tg.start_soon(take, pool, taken)
                await settle()
                with pytest.raises(TooManyRequests):
                    await pool.acquire()
                assert pool.get_stats()["requests_waiting"] == max_waiting
                tg.cancel_scope.cancel()
            pool.release(connection)

    async def test_who_was_handed_one_already_waits_no_more(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, max_waiting=1) as pool:
            connection = await pool.acquire()

            async def come_and_go() -> None:
                pool.release(await pool.acquire())

            async with create_task_group() as tg:
                tg.start_soon(come_and_go)
                await settle()
                pool.release(connection)
                # It has not run since.
                assert await pool.acquire() is connection
            pool.release(connection)

    async def test_what_is_not_borrowed_can_not_be_given_back(self, backend: Backend) -> None:
        other = Backend()
        async with backend.pool(name="db", max_size=2) as pool, other.pool() as stranger:
            foreign = await stranger.acquire()
            async with pool.connection() as connection:
                before = pool.get_stats()
                for give in (pool.release, pool.discard):
                    for wrong in (foreign, Connection(1), None):
                        with pytest.raises(ValueError, match="is not borrowed from db"):
                            give(wrong)  # type: ignore[arg-type]
                assert {**pool.get_stats(), "usage_ms": 0} == {**before, "usage_ms": 0}
            for give in (pool.release, pool.discard):
                with pytest.raises(ValueError, match="has been given back before"):
                    give(connection)
            assert pool.get_stats()["pool_available"] == 1
            assert await pool.acquire(0) is connection
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            pool.release(connection)
            stranger.release(foreign)
        other.verify()

    async def test_a_connection_that_somebody_else_has_by_now_is_a_matter_of_the_objects_alone(
        self, backend: Backend
    ) -> None:
        """To give back twice is noticed until somebody else borrows the connection."""
        async with backend.pool(max_size=1) as pool:
            connection = await pool.acquire()
            pool.release(connection)
            with pytest.raises(ValueError, match="not borrowed"):
                pool.release(connection)
            again = await pool.acquire()
            assert again is connection
            pool.release(again)

    async def test_a_discarded_connection_is_closed_and_replaced(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        taken: list[Connection] = []
        async with pool:
            connection = await pool.acquire()
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                pool.discard(connection)
            assert taken[0] is not connection
            assert backend.closings == [1]
            stats = pool.get_stats()
            assert (stats["closed_discard"], stats["returns_bad"]) == (1, 1)
            give_back(pool, taken)
        assert backend.most_open == 1

    async def test_a_checkout_may_be_used_again_but_not_inside_of_itself(
        self, backend: Backend
    ) -> None:
        async with backend.pool() as pool:
            checkout = pool.connection()
            for _ in range(3):
                async with checkout as connection:
                    with pytest.raises(RuntimeError, match="has borrowed a connection already"):
                        async with checkout:
                            pass
                    assert pool.get_stats()["in_use"] == 1
                    assert pool.info(connection).in_use is not None
                assert pool.get_stats()["in_use"] == 0
            assert backend.opened == 1

    async def test_the_block_gives_back_when_it_raises(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            with pytest.raises(KeyError):
                async with pool.connection():
                    raise KeyError
            assert pool.get_stats()["pool_available"] == 1
            with CancelScope() as scope:
                async with pool.connection():
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            assert scope.cancelled_caught
            assert pool.get_stats()["pool_available"] == 1

    @pytest.mark.parametrize("how", ["release", "discard"])
    async def test_what_was_given_back_inside_of_the_block_is_left_alone_at_its_end(
        self, backend: Backend, how: str
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            async with pool.connection() as connection:
                getattr(pool, how)(connection)
                with pytest.raises(ValueError, match="not borrowed"):
                    getattr(pool, how)(connection)
            await settle()
            # Nor is it taken from somebody else who borrows it meanwhile.
            async with pool.connection() as connection:
                getattr(pool, how)(connection)
                other = await pool.acquire(PATIENCE)
            assert pool.get_stats()["in_use"] == 1
            pool.release(other)
            assert pool.get_stats()["pool_available"] == 1
        assert backend.opened == (1 if how == "release" else 3)

    async def test_the_last_one_used_is_the_next_one_used(self, backend: Backend) -> None:
        async with backend.pool(max_size=3) as pool:
            taken = await some(pool, 3)
            for index in (1, 0, 2):
                pool.release(taken[index])
            again = await some(pool, 3)
            assert [taken.index(connection) for connection in again] == [2, 0, 1]
            give_back(pool, again)

    async def test_or_the_one_that_was_idle_for_longest(self, backend: Backend) -> None:
        async with backend.pool(max_size=3, lifo=False) as pool:
            taken = await some(pool, 3)
            for index in (1, 0, 2):
                pool.release(taken[index])
            again = await some(pool, 3)
            assert [taken.index(connection) for connection in again] == [1, 0, 2]
            give_back(pool, again)

    async def test_who_is_cancelled_does_not_spoil_that_order(self, backend: Backend) -> None:
        async with backend.pool(max_size=3, lifo=False) as pool:
            taken = await some(pool, 3)
            order = taken.copy()
            give_back(pool, taken[::-1])
            with CancelScope() as scope:
                scope.cancel()
                await pool.acquire()
            assert await some(pool, 3) == order
            give_back(pool, order)

    @pytest.mark.parametrize("fast", [False, True])
    async def test_only_a_fast_acquire_does_without_a_checkpoint(
        self, backend: Backend, fast: bool
    ) -> None:
        async with backend.pool(fast_acquire=fast) as pool:
            async with pool.connection():
                pass
            for timeout in (None, 0, PATIENCE):
                ran: list[bool] = []

                async def run(ran: list[bool] = ran) -> None:
                    ran.append(True)

                async with create_task_group() as tg:
                    tg.start_soon(run)
                    connection = await pool.acquire(timeout)
                    # Trio runs the two in any order, but never before the checkpoint.
                    if fast:
                        assert ran == []
                    elif sniffio.current_async_library() == "asyncio":
                        assert ran == [True]
                    pool.release(connection)

    @pytest.mark.parametrize("timeout", [None, 0, PATIENCE])
    async def test_a_cancellation_in_the_checkpoint_undoes_the_acquire(
        self, backend: Backend, timeout: float | None
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            async with pool.connection():
                pass
            with CancelScope() as scope:
                scope.cancel()
                await pool.acquire(timeout)
            assert scope.cancelled_caught
            stats = pool.get_stats()
            assert (stats["in_use"], stats["pool_available"], stats["requests_num"]) == (0, 1, 1)
            pool.release(pool.acquire_nowait())

    async def test_a_fast_acquire_of_an_idle_one_ignores_a_pending_cancellation(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=1, fast_acquire=True) as pool:
            async with pool.connection():
                pass
            with CancelScope() as scope:
                scope.cancel()
                pool.release(await pool.acquire())
            assert not scope.cancelled_caught

    async def test_what_is_undone_goes_to_who_waits_meanwhile(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        taken: list[Connection] = []
        async with pool:
            async with pool.connection():
                pass
            async with create_task_group() as tg:
                with CancelScope() as scope:
                    scope.cancel()
                    tg.start_soon(take, pool, taken)
                    await pool.acquire()
            assert scope.cancelled_caught
            assert len(taken) == 1
            give_back(pool, taken)
        assert backend.opened == 1


class Big:
    """Of a size that is rare, so that a place in memory is likely to be used by the next one."""

    __slots__ = (*(f"a{number}" for number in range(50)), "__weakref__")


@pytest.mark.anyio
class TestNativeCancellation:
    """Under asyncio alone, and so in an order that is known."""

    @pytest.fixture
    def anyio_backend(self) -> Any:
        return "asyncio"

    async def test_who_was_handed_a_connection_and_is_cancelled_hands_it_on(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            connection = await pool.acquire()
            first, second = (asyncio.ensure_future(pool.acquire()) for _ in range(2))
            await settle()
            pool.release(connection)
            first.cancel()
            assert await second is connection
            assert first.cancelled()
            pool.release(connection)

    async def test_what_an_impatient_one_took_unchecked_and_hands_on_is_checked(
        self, backend: Backend
    ) -> None:
        checked: list[Connection] = []
        async with backend.pool(max_size=1, check=checked.append, check_idle=0) as pool:
            pool.release(await pool.acquire())
            await settle()
            impatient = asyncio.ensure_future(pool.acquire(0))
            patient = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0)
            impatient.cancel()
            connection = await patient
            pool.release(connection)
            assert impatient.cancelled()
        assert checked == [connection]

    async def test_a_new_connection_may_have_the_address_of_a_lost_one(self) -> None:
        gate = asyncio.Event()
        address = 0
        events: list[PoolEvent] = []
        neighbours = [Big() for _ in range(20)]  # keep the place from being used for others

        async def connect() -> Big:
            if not address:
                return Big()
            await gate.wait()
            while True:
                connection = Big()
                if id(connection) == address or len(neighbours) > 10_000:
                    return connection
                neighbours.append(connection)

        async with ConnectionPool(connect, close=nothing, on_event=events.append) as pool:
            connection = await pool.acquire()
            address = id(connection)
            waiting = asyncio.ensure_future(pool.acquire())
            await settle()
            gate.set()  # wakes the one who connects before the pool hears of the loss
            del connection
            pool.release(await waiting)
        assert "connect_failed" not in kinds(events)

    async def test_a_cancelled_closing_is_done_before_it_is_cancelled(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(close_timeout=PATIENCE)
        entered = asyncio.Event()
        connections: list[Connection] = []

        async def whole() -> None:
            async with pool:
                connections.extend(await some(pool, 2))
                pool.release(connections.pop())
                entered.set()

        closing = asyncio.ensure_future(whole())
        await entered.wait()
        await settle()
        for _ in range(3):
            assert closing.cancel()
            await settle()
            assert not closing.done()
        assert len(backend.open()) == 1
        give_back(pool, connections)
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert closing.cancelled()
        assert not backend.open()

    async def test_tasks_of_the_pool_that_are_cancelled_from_outside_do_no_harm(
        self, backend: Backend
    ) -> None:
        """Whatever a careless ``for task in all_tasks()`` hits, but the main task of the pool."""
        before = asyncio.all_tasks()
        async with backend.pool(max_size=1) as pool:
            await settle()
            keeper = asyncio.all_tasks() - before
            backend.gate = anyio.Event()
            waiting = asyncio.ensure_future(pool.acquire())
            await settle()
            (connecting,) = asyncio.all_tasks() - before - keeper - {waiting}
            connecting.cancel()
            await settle()
            backend.gate.set()
            pool.release(await waiting)
            # Another one has taken its place.
            assert len(backend.attempts) == 2


@pytest.mark.anyio
class TestResize:
    async def test_it_grows_for_those_who_wait(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        taken: list[Connection] = []
        async with pool, create_task_group() as tg:
            for _ in range(4):
                tg.start_soon(take, pool, taken)
            await settle()
            assert len(taken) == 1
            await pool.resize(0, 3)
            assert (pool.min_size, pool.max_size) == (0, 3)
            await settle()
            assert len(taken) == 3
            await pool.resize(0, 4)
            await settle()
            assert len(taken) == 4
            give_back(pool, taken)

    async def test_it_grows_to_min_size(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            await pool.resize(4, 5)
            await pool.wait()
            assert len(backend.open()) == 4
            stats = pool.get_stats()
            assert (stats["pool_min"], stats["pool_max"], stats["pool_available"]) == (4, 5, 4)

    async def test_idle_ones_that_are_too_many_are_closed(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(min_size=5, max_size=5, on_event=events.append) as pool:
            await pool.wait()
            await pool.resize(1, 2)
            await settle()
            assert len(backend.open()) == 2
            assert closed_for(events) == ["resize"] * 3
            await pool.resize(1, 1)
            await settle()
            assert len(backend.open()) == 1
            pool.release(await pool.acquire(0))

    async def test_borrowed_ones_that_are_too_many_are_closed_when_they_come_back(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=4) as pool:
            taken = await some(pool, 4)
            await pool.resize(0, 2)
            await settle()
            assert len(backend.open()) == 4
            give_back(pool, taken)
            await settle()
            assert len(backend.open()) == 2
            assert pool.get_stats()["pool_available"] == 2
            assert pool.get_stats()["closed_resize"] == 2

    async def test_idle_ones_go_before_borrowed_ones(self, backend: Backend) -> None:
        async with backend.pool(min_size=3, max_size=3) as pool:
            await pool.wait()
            async with pool.connection() as connection:
                await pool.resize(0, 1)
                await settle()
                assert backend.open() == {connection.number}
            await settle()
            assert backend.open() == {connection.number}

    async def test_to_shrink_twice_retires_as_many_as_to_shrink_once(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=3) as pool:
            taken = await some(pool, 3)
            await pool.resize(0, 2)
            await settle()
            await pool.resize(0, 1)
            await settle()
            # Whichever they are: of the first two that come back one at least is not wanted.
            pool.release(taken[1])
            pool.release(taken[2])
            await settle()
            still_open = len(backend.open())
            pool.release(taken[0])
            await settle()
            assert len(backend.open()) == 1
        assert still_open == 2

    async def test_while_too_many_are_borrowed_nobody_gets_one_more(self, backend: Backend) -> None:
        pool = backend.pool(max_size=3)
        more: list[Connection] = []
        async with pool:
            taken = await some(pool, 3)
            await pool.resize(0, 1)
            async with create_task_group() as tg:
                tg.start_soon(take, pool, more)
                await settle()
                pool.release(taken[0])
                await settle()
                pool.release(taken[1])
                await settle()
                assert more == []
                pool.release(taken[2])
            await settle()
            assert len(backend.open()) == 1
            give_back(pool, more)
        assert backend.most_open == 3

    @pytest.mark.parametrize(
        ("sizes", "error"),
        [((-1, 1), ValueError), ((0, 0), ValueError), ((3, 2), ValueError), ((0, "1"), TypeError)],
    )
    async def test_wrong_sizes_change_nothing(
        self, backend: Backend, sizes: Any, error: type[Exception]
    ) -> None:
        async with backend.pool(max_size=2) as pool:
            with pytest.raises(error):
                await pool.resize(*sizes)
            assert (pool.min_size, pool.max_size) == (0, 2)

    async def test_a_connect_in_flight_that_is_one_too_many_is_closed(
        self, backend: Backend
    ) -> None:
        backend.gate = anyio.Event()
        async with backend.pool(min_size=3, max_size=3) as pool:
            await settle()
            assert backend.connecting == 3
            await pool.resize(0, 1)
            backend.gate.set()
            await settle()
            assert backend.opened == 3
            assert len(backend.open()) == 1


@pytest.mark.anyio
class TestDrain:
    async def test_all_are_replaced_whatever_they_do(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(min_size=3, max_size=3, max_connecting=1, on_event=events.append)
        async with pool:
            await settle()
            borrowed = await pool.acquire()
            idle = await pool.acquire()
            pool.release(idle)
            other = await pool.acquire()
            pool.discard(other)
            backend.gate = anyio.Event()
            await settle()
            assert backend.connecting == 1
            old = backend.opened + 1
            await pool.drain()
            # None of the old ones can be had any more.
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            backend.gate.set()
            pool.release(borrowed)
            await settle()
            await pool.wait()
            assert min(backend.open()) > old
            assert len(backend.open()) == 3
            taken = await some(pool, 3)
            assert all(connection.number > old for connection in taken)
            give_back(pool, taken)
            assert Counter(closed_for(events)) == {"drain": 3, "discard": 1}

    async def test_an_idle_one_is_not_handed_out_after_a_drain(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool:
            old = await pool.acquire()
            pool.release(old)
            draining = pool.drain()
            async with create_task_group() as tg:
                tg.start_soon(partial(_await, draining))
                await settle()
            new = await pool.acquire(PATIENCE)
            assert new is not old
            pool.release(new)

    async def test_a_connection_that_is_being_reset_is_replaced_too(self, backend: Backend) -> None:
        gate = anyio.Event()
        async with backend.pool(max_size=1, reset=lambda _: gate.wait()) as pool:
            pool.release(await pool.acquire())
            await settle()
            await pool.drain()
            gate.set()
            await settle()
            assert backend.closings == [1]
            assert pool.get_stats()["closed_drain"] == 1


async def _await(awaitable: Awaitable[object]) -> None:
    await awaitable


@pytest.mark.anyio
class TestCheckAndWait:
    async def test_check_looks_at_all_idle_ones_one_at_a_time(self, backend: Backend) -> None:
        checked: list[int] = []
        running = 0

        async def check(connection: Connection) -> bool:
            nonlocal running
            running += 1
            assert running == 1
            await anyio.lowlevel.checkpoint()
            running -= 1
            checked.append(connection.number)
            return connection.number != 2

        events: list[PoolEvent] = []
        pool = backend.pool(min_size=4, max_size=4, check=check, on_event=events.append, lifo=False)
        async with pool:
            await pool.wait()
            borrowed = await pool.acquire()
            await pool.check()
            assert sorted([*checked, borrowed.number]) == [1, 2, 3, 4]
            await settle()
            bad = {2} - {borrowed.number}
            assert set(backend.closings) == bad
            assert closed_for(events) == ["check"] * len(bad)
            # It was replaced.
            assert len(backend.open()) == 4
            assert pool.get_stats()["connections_lost"] == len(bad)
            pool.release(borrowed)

    async def test_others_can_be_had_while_one_is_checked(self, backend: Backend) -> None:
        gate = anyio.Event()
        pool = backend.pool(min_size=2, max_size=2, check=lambda _: gate.wait())
        async with pool:
            await pool.wait()
            async with create_task_group() as tg:
                tg.start_soon(pool.check)
                await settle()
                connection = pool.acquire_nowait()
                with pytest.raises(WouldBlock):
                    pool.acquire_nowait()
                gate.set()
            pool.release(connection)
            assert pool.get_stats()["pool_available"] == 2

    async def test_who_is_cancelled_in_a_check_loses_nothing(self, backend: Backend) -> None:
        gate = anyio.Event()
        checked: list[Connection] = []

        async def check(connection: Connection) -> None:
            await gate.wait()
            checked.append(connection)

        async with backend.pool(min_size=2, max_size=2, check=check) as pool:
            await pool.wait()
            async with create_task_group() as tg:
                tg.start_soon(pool.check)
                await settle()
                tg.cancel_scope.cancel()
            gate.set()
            await settle()
            assert len(checked) == 2
            assert pool.get_stats()["pool_available"] == 2
            assert backend.closings == []

    async def test_without_a_check_there_is_nothing_to_do(self, backend: Backend) -> None:
        async with backend.pool(min_size=1) as pool:
            await pool.wait()
            await pool.check()
            assert pool.get_stats()["pool_available"] == 1

    async def test_check_may_be_the_first_thing_of_all(self, backend: Backend) -> None:
        async with backend.pool(check=nothing) as pool:
            await pool.check()

    async def test_wait_returns_when_min_size_connections_are_there(self, backend: Backend) -> None:
        backend.gate = anyio.Event()
        ready: list[bool] = []
        async with backend.pool(min_size=3, max_connecting=2) as pool:

            async def wait() -> None:
                await pool.wait()
                ready.append(True)
                assert len(backend.open()) == 3

            async with create_task_group() as tg:
                tg.start_soon(wait)
                tg.start_soon(wait)
                await settle()
                assert not ready
                backend.gate.set()
            assert ready == [True, True]
            await pool.wait(0)

    async def test_wait_may_be_cancelled(self, backend: Backend) -> None:
        backend.gate = anyio.Event()
        async with backend.pool(min_size=1) as pool:
            async with create_task_group() as tg:
                tg.start_soon(pool.wait)
                await settle()
                tg.cancel_scope.cancel()
            backend.gate.set()
            await pool.wait()

    async def test_min_size_is_refilled_after_losses(self, backend: Backend) -> None:
        async with backend.pool(min_size=3, max_size=5) as pool:
            await pool.wait()
            taken = await some(pool, 3)
            for connection in taken:
                pool.discard(connection)
            await settle()
            await pool.wait()
            assert backend.open() == {4, 5, 6}
            assert pool.get_stats()["pool_available"] == 3

    async def test_no_more_than_max_connecting_are_made_at_once(self, backend: Backend) -> None:
        backend.gate = anyio.Event()
        async with backend.pool(min_size=8, max_connecting=2) as pool:
            await settle()
            assert pool.get_stats()["connecting"] == 2
            backend.gate.set()
            await pool.wait()
        assert backend.most_connecting == 2
