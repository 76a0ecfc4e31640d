"""Checks, resets and commits: connections that may be broken, and hooks that fail or hang."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import CancelScope, create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    Connection,
    FailingHook,
    Pool,
    Virtual,
    closed_for,
    give_back,
    in_virtual_asyncio,
    kinds,
    messages,
    never,
    nothing,
    take,
    use,
)

from aiosync import (
    Checkout,
    ConnectionPool,
    PoolEvent,
    PoolTimeout,
    as_threading,
)

pytestmark = pytest.mark.anyio


class CheckedConnection:
    def __init__(self) -> None:
        self.closed = False
        self.checks = 0


def check(connection: CheckedConnection) -> None:
    connection.checks += 1


def make(**options: Any) -> ConnectionPool[CheckedConnection]:
    return ConnectionPool(CheckedConnection, max_size=1, **options)


def is_closed(connection: CheckedConnection) -> bool:
    return connection.closed


class TestAClosedConnection:
    @pytest.mark.parametrize("fast_acquire", [False, True])
    async def test_is_not_lent_if_it_was_closed_while_idle(self, fast_acquire: bool) -> None:
        async with make(is_closed=is_closed, fast_acquire=fast_acquire) as pool:
            async with pool.connection() as connection:
                pass
            connection.closed = True
            async with pool.connection(PATIENCE) as other:
                assert other is not connection
        assert pool.statistics().closed["check"] == 1

    @pytest.mark.parametrize("reset", [None, lambda _: None])
    async def test_is_not_handed_to_a_waiter(self, reset: Any) -> None:
        got: list[CheckedConnection] = []

        async def wait(pool: ConnectionPool[CheckedConnection]) -> None:
            async with pool.connection(PATIENCE) as connection:
                got.append(connection)

        pool = make(is_closed=is_closed, reset=reset)
        async with pool, anyio.create_task_group() as tasks, pool.connection() as connection:
            tasks.start_soon(wait, pool)
            await settle()
            connection.closed = True
        assert got[0] is not connection

    async def test_is_not_taken_without_waiting_either(self) -> None:
        async with make(is_closed=is_closed, check=check, check_idle=0) as pool:
            async with pool.connection() as connection:
                pass
            connection.closed = True
            with pytest.raises(anyio.WouldBlock):
                pool.acquire_nowait()

    async def test_is_one_if_the_driver_fails_to_tell(self) -> None:
        def fail(_: CheckedConnection) -> bool:
            raise OSError("it is gone")

        async with make(is_closed=fail, max_lifetime=None) as pool:
            with pytest.raises(TimeoutError):
                await pool.acquire(0.01)


class TestABlockThatRaises:
    async def test_has_its_connection_checked_before_anybody_gets_it(self) -> None:
        async with make(check=check, check_idle=None) as pool:
            with pytest.raises(ConnectionResetError):
                async with pool.connection() as connection:
                    raise ConnectionResetError
            with pytest.raises(anyio.WouldBlock):
                pool.acquire_nowait()
            assert connection.checks == 0
            for _ in range(2):
                async with pool.connection() as again:
                    assert again is connection
            assert connection.checks == 1

    async def test_hands_it_to_a_waiter_only_after_the_check(self) -> None:
        seen: list[int] = []

        async def wait(pool: ConnectionPool[CheckedConnection]) -> None:
            async with pool.connection(PATIENCE) as connection:
                seen.append(connection.checks)

        pool = make(check=check, check_idle=None, fast_acquire=True)
        async with pool, anyio.create_task_group() as tasks:
            with pytest.raises(ValueError, match="mine"):
                async with pool.connection():
                    tasks.start_soon(wait, pool)
                    await settle()
                    raise ValueError("mine")
        assert seen == [1]

    async def test_has_it_replaced_if_the_error_is_fatal(self) -> None:
        def is_fatal(error: Exception) -> bool:
            return isinstance(error, OSError)

        async with make(check=check, is_fatal=is_fatal) as pool:
            with pytest.raises(ConnectionResetError):
                async with pool.connection() as connection:
                    raise ConnectionResetError
            async with pool.connection(PATIENCE) as other:
                assert other is not connection
            with pytest.raises(KeyError):
                async with pool.connection():
                    raise KeyError
            async with pool.connection(PATIENCE) as again:
                assert again is other
                assert again.checks == 1
        assert pool.statistics().closed["discard"] == 1

    async def test_has_it_replaced_if_nobody_can_tell_whether_the_error_is_fatal(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def is_fatal(_: Exception) -> bool:
            raise ValueError("in is_fatal")

        async with make(is_fatal=is_fatal) as pool:
            with pytest.raises(KeyError, match="mine"):
                async with pool.connection() as connection:
                    raise KeyError("mine")
            async with pool.connection(PATIENCE) as other:
                assert other is not connection
        assert pool.statistics().closed["discard"] == 1
        assert "in is_fatal" in str([record.exc_info for record in caplog.records])

    async def test_by_a_cancellation_leaves_it_as_it_is(self) -> None:
        async with make(check=check) as pool:
            with anyio.CancelScope() as scope:
                async with pool.connection() as connection:
                    scope.cancel()
                    await anyio.sleep_forever()
            async with pool.connection() as again:
                assert again is connection
        assert connection.checks == 0

    async def test_does_the_same_in_a_thread(self) -> None:
        def use(pool: ConnectionPool[CheckedConnection]) -> CheckedConnection:
            with as_threading(pool).connection() as connection:
                if not connection.checks:
                    raise ConnectionResetError
                return connection

        async with make(check=check, check_idle=None) as pool:
            with pytest.raises(ConnectionResetError):
                await anyio.to_thread.run_sync(use, pool)
            assert (await anyio.to_thread.run_sync(use, pool)).checks == 1

    async def test_that_has_given_it_back_before_does_no_harm(self) -> None:
        async with make(check=check) as pool:
            with pytest.raises(ValueError, match="mine"):
                async with pool.connection() as connection:
                    pool.release(connection)
                    raise ValueError("mine")
            async with pool.connection() as again:
                assert again is connection
        assert connection.checks == 0


class TestCommit:
    async def test_is_called_if_the_block_raised_nothing(self) -> None:
        calls: list[str] = []

        async def commit(_: CheckedConnection) -> None:
            await anyio.sleep(0)
            calls.append("commit")

        def reset(_: CheckedConnection) -> None:
            calls.append("reset")

        async with make(commit=commit, reset=reset) as pool:
            async with pool.connection():
                pass
            with pytest.raises(ValueError, match="mine"):
                async with pool.connection():
                    raise ValueError("mine")
            async with pool.connection() as connection:
                pool.release(connection)
        assert calls == ["commit", "reset", "reset", "reset"]

    async def test_has_its_error_raised_by_the_block(self) -> None:
        def commit(_: CheckedConnection) -> None:
            raise ConnectionResetError("in commit")

        async with make(commit=commit, check=check, check_idle=None) as pool:
            with pytest.raises(ConnectionResetError, match="in commit"):
                async with pool.connection() as connection:
                    pass
            again = await pool.acquire()
            assert again is connection
            assert again.checks == 1
            pool.release(again)

            def use() -> None:
                with as_threading(pool).connection():
                    pass

            with pytest.raises(ConnectionResetError, match="in commit"):
                await anyio.to_thread.run_sync(use)
        assert pool.get_stats()["in_use"] == 0

    async def test_that_is_async_is_refused_in_a_thread(self) -> None:
        async def commit(_: CheckedConnection) -> None:
            await anyio.sleep(0)

        def use() -> None:
            with as_threading(pool).connection():
                pass

        async with make(commit=commit) as pool:
            with pytest.raises(RuntimeError, match="event loop"):
                await anyio.to_thread.run_sync(use)
            async with pool.connection(PATIENCE):
                pass


class TestAResetThatHangs(Virtual):
    async def test_a_reset_that_hangs_is_ended_by_its_deadline_although_the_pool_is_being_closed(
        self,
    ) -> None:
        async def reset(_: object) -> None:
            await anyio.sleep_forever()

        async def use() -> None:
            async with pool.connection():
                pass

        pool = ConnectionPool(object, reset=reset, check_timeout=7, close_timeout=None)
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks, pool:
            tasks.start_soon(use)
            await anyio.sleep(1)
        assert anyio.current_time() - began == pytest.approx(7)
        assert pool.get_stats()["closed_reset"] == 1

    async def test_a_reset_that_was_cancelled_may_clean_up_before_its_connection_is_closed(
        self,
    ) -> None:
        log: list[str] = []

        async def reset(_: object) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
                log.append("cleaned up")

        pool = ConnectionPool(
            object, reset=reset, close=lambda _: log.append("closed"), check_timeout=1, max_size=1
        )
        async with pool:
            async with anyio.create_task_group() as tasks:

                async def use() -> None:
                    async with pool.connection():
                        pass

                tasks.start_soon(use)
                await anyio.sleep(1.02)
                await pool.resize(0, 1)  # maintenance looks at it
            await anyio.sleep(0.1)
            assert log == ["cleaned up", "closed"]

    async def test_the_slot_of_a_reset_that_ignores_its_cancellation_comes_back(self) -> None:
        async def reset(_: object) -> None:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(60)

        pool = ConnectionPool(object, reset=reset, check_timeout=1, max_size=1)
        async with pool, anyio.create_task_group() as tasks:
            began = anyio.current_time()

            async def use() -> None:
                async with pool.connection():
                    pass

            tasks.start_soon(use)
            await anyio.sleep(0.5)
            pool.release(await pool.acquire())
            assert anyio.current_time() - began == pytest.approx(1.1)
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
class TestBadConnections(Virtual):
    """In each case the slot comes back, and the connection is closed exactly once."""

    @pytest.mark.parametrize("how", ["raises", "returns False", "hangs"])
    async def test_one_that_fails_its_check_is_replaced(self, backend: Backend, how: str) -> None:
        check = FailingHook(how)
        events: list[PoolEvent] = []
        pool = backend.pool(
            max_size=1, check=check, check_idle=0, check_timeout=2, on_event=events.append
        )
        async with pool:
            began = anyio.current_time()
            first = await pool.acquire()
            pool.release(first)
            async with pool.connection() as second:
                assert second is not first
            assert anyio.current_time() - began == pytest.approx(2 if how == "hangs" else 0)
            assert backend.closings == [1]
            assert closed_for(events) == ["check"]
            (closed,) = (event for event in events if event.kind == "closed")
            expected = {"raises": KeyError, "returns False": ConnectionError, "hangs": TimeoutError}
            assert isinstance(closed.error, expected[how])
            assert pool.get_stats()["connections_lost"] == 1
            check.bad = False
        assert backend.most_open == 1

    @pytest.mark.parametrize("result", [None, 0, "", True])
    async def test_only_false_itself_fails_a_check(self, backend: Backend, result: object) -> None:
        async with backend.pool(max_size=1, check=lambda _: result, check_idle=0) as pool:
            first = await pool.acquire()
            pool.release(first)
            await pool.check()
            async with pool.connection() as second:
                assert second is first
            assert backend.closings == []

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    async def test_one_that_fails_its_reset_is_replaced(self, backend: Backend, how: str) -> None:
        reset = FailingHook(how)
        events: list[PoolEvent] = []
        pool = backend.pool(max_size=1, reset=reset, check_timeout=2, on_event=events.append)
        async with pool:
            began = anyio.current_time()
            first = await pool.acquire()
            pool.release(first)
            async with pool.connection() as second:
                assert second is not first
                reset.bad = False
            assert anyio.current_time() - began == pytest.approx(2 if how == "hangs" else 0)
            assert backend.closings == [1]
            assert closed_for(events) == ["reset"]
            assert pool.get_stats()["returns_bad"] == 1
            await settle()
            async with pool.connection() as third:
                assert third is second
        assert backend.most_open == 1

    async def test_a_reset_that_returns_false_has_not_failed(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, reset=lambda _: False) as pool:
            for _ in range(2):
                pool.release(await pool.acquire())
            await settle()
            assert backend.closings == []

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    async def test_one_that_fails_to_be_configured_is_closed(
        self, backend: Backend, how: str
    ) -> None:
        configure = FailingHook(how)
        events: list[PoolEvent] = []
        pool = backend.pool(
            max_size=1, configure=configure, connect_timeout=2, on_event=events.append
        )
        async with pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(2.01)
            error = TimeoutError if how == "hangs" else KeyError
            assert isinstance(caught.value.__cause__, error)
            configure.bad = False
            async with pool.connection(100) as connection:
                assert connection.number == backend.opened
            assert closed_for(events) == ["configure"] * (backend.opened - 1)
            before_the_outage = {
                "raises": ["connect_failed", "closed"] * 2,
                # A row of failures that lasts for a second is an outage.
                "hangs": [],
            }[how]
            outage = [*before_the_outage, "connect_failed", "outage", "closed"]
            assert kinds(events)[: len(outage)] == outage
            assert kinds(events)[-2:] == ["recovered", "connected"]
        assert backend.most_open == 1

    async def test_a_connect_that_hangs_is_given_up(self, backend: Backend) -> None:
        backend.gate = anyio.Event()
        async with backend.pool(max_size=1, connect_timeout=3) as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(3.01)
            assert isinstance(caught.value.__cause__, TimeoutError)
            backend.gate = None
            pool.release(await pool.acquire(30))

    async def test_connecting_may_take_as_long_as_waiting_unless_told_otherwise(
        self, backend: Backend
    ) -> None:
        backend.gate = anyio.Event()
        async with backend.pool(timeout=7) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            await settle()
            assert pool.get_stats()["connections_errors"] == 1
            assert backend.connecting == 0
            backend.gate = None

    async def test_a_pool_whose_callers_never_wait_still_connects(self, backend: Backend) -> None:
        async with backend.pool(timeout=0, min_size=1) as pool:
            await pool.wait(60)

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    async def test_a_close_that_fails_gives_the_slot_back(self, backend: Backend, how: str) -> None:
        close = FailingHook(how)
        backend.at_close = close
        events: list[PoolEvent] = []
        pool = backend.pool(max_size=1, close_timeout=2, on_event=events.append)
        async with pool:
            began = anyio.current_time()
            pool.discard(await pool.acquire())
            async with pool.connection():
                # Not before the old one is gone: there are never more than max_size.
                assert anyio.current_time() - began == pytest.approx(2 if how == "hangs" else 0)
            assert kinds(events) == ["connected", "close_failed", "closed", "connected"]
            assert isinstance(events[1].error, TimeoutError if how == "hangs" else KeyError)
        assert anyio.current_time() - began == pytest.approx(4 if how == "hangs" else 0)
        assert backend.closings == [1, 2]

    async def test_waiters_get_their_turn_whatever_fails(self, backend: Backend) -> None:
        # Configure, which fails the same way, is left to the tests of outages.
        chance = random.Random(1)

        async def fail_sometimes(_: Connection) -> None:
            await anyio.lowlevel.checkpoint()
            if chance.random() < 0.3:
                if chance.random() < 0.5:
                    await never()
                raise KeyError

        backend.at_close = partial(fail_sometimes, Connection(0))
        pool = backend.pool(
            max_size=3, check=fail_sometimes, reset=fail_sometimes, check_idle=0,
            close_timeout=1, check_timeout=1, timeout=None,
        )  # fmt: skip
        served = 0

        async def work() -> None:
            nonlocal served
            for _ in range(5):
                async with pool.connection():
                    served += 1
                    await anyio.lowlevel.checkpoint()

        async with pool:
            async with create_task_group() as tg:
                for _ in range(10):
                    tg.start_soon(work)
            assert served == 50
            await anyio.sleep(60)
            stats = pool.get_stats()
            assert stats["pool_size"] == stats["pool_available"] == len(backend.open())
        assert backend.most_open <= 3

    async def test_who_fails_fast_still_gets_an_idle_one_that_has_to_be_checked(
        self, backend: Backend
    ) -> None:
        async with backend.pool(
            min_size=1, max_size=2, check=nothing, check_idle=1, fail_fast=True
        ) as pool:
            await pool.wait()
            backend.refuses = True
            connection = await pool.acquire()
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            pool.release(connection)
            await anyio.sleep(2)
            pool.release(await pool.acquire())

    async def test_who_fails_fast_does_not_wait_while_connecting_fails(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        began = anyio.current_time()
        async with backend.pool(fail_fast=True, max_size=2) as pool:
            errors: list[BaseException | None] = []

            async def fail() -> None:
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire()
                errors.append(caught.value.__cause__)

            async with create_task_group() as tg:
                for _ in range(5):
                    tg.start_soon(fail)
            assert anyio.current_time() == pytest.approx(began)
            assert [type(error) for error in errors] == [ConnectionRefusedError] * 5
            await fail()
            assert anyio.current_time() == pytest.approx(began)
            assert pool.get_stats()["timeouts"] == 6
            backend.refuses = False
            await anyio.sleep(1)
            async with pool.connection() as connection:
                # It fails fast only while connecting fails.
                assert connection.number == 1
                pool.release(await pool.acquire())

    async def test_who_does_not_fail_fast_waits_while_connecting_fails(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        async with backend.pool(max_size=1) as pool, create_task_group() as tg:
            taken: list[Connection] = []
            tg.start_soon(take, pool, taken)
            await anyio.sleep(20)
            assert taken == []
            backend.refuses = False
            await anyio.sleep(10)
            assert len(taken) == 1
            give_back(pool, taken)

    @pytest.mark.parametrize("idle", [0.4, 0.6])
    async def test_only_who_was_idle_for_long_is_checked(
        self, backend: Backend, idle: float
    ) -> None:
        checked: list[Connection] = []
        async with backend.pool(max_size=1, check=checked.append) as pool:
            for _ in range(3):
                connection = await pool.acquire()
                pool.release(connection)
                await anyio.sleep(idle)
            pool.release(await pool.acquire())
        assert checked == ([] if idle < 0.5 else [connection] * 3)

    async def test_nobody_is_checked_if_check_idle_is_none(self, backend: Backend) -> None:
        checked: list[Connection] = []
        async with backend.pool(max_size=1, check=checked.append, check_idle=None) as pool:
            for _ in range(3):
                pool.release(await pool.acquire())
                await anyio.sleep(100)
            assert checked == []
            await pool.check()
            assert len(checked) == 1

    async def test_everybody_is_checked_each_time_if_check_idle_is_0(
        self, backend: Backend
    ) -> None:
        checked: list[Connection] = []
        async with backend.pool(max_size=1, check=checked.append, check_idle=0) as pool:
            taken: list[Connection] = []
            # A new one has just been made; all others are checked, even on their way to a waiter.
            connection = await pool.acquire()
            assert checked == []
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                pool.release(connection)
            assert checked == [connection]
            give_back(pool, taken)
            pool.release(await pool.acquire())
            assert checked == [connection] * 2

    @in_virtual_asyncio
    async def test_a_connect_that_cancels_itself_is_not_repeated_without_a_pause(self) -> None:
        attempts: list[float] = []

        def connect() -> Connection:
            attempts.append(anyio.current_time())
            if len(attempts) > 100:
                raise ConnectionRefusedError
            raise asyncio.CancelledError

        async with ConnectionPool(connect) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
        assert len(attempts) < 20


async def stay(seconds: float) -> None:
    """Sleep, and take no notice of a cancellation, not even of a native one."""
    end = anyio.current_time() + seconds
    with CancelScope(shield=True):
        while anyio.current_time() < end:
            try:
                await anyio.sleep_until(end)
            except asyncio.CancelledError:
                pass


class Reset:
    """A reset hook that notes where and when it runs, and does what it is told.

    :param work: what to await; if None, the hook is plain
    """

    def __init__(self, work: Callable[[], Any] | None = anyio.lowlevel.checkpoint) -> None:
        self.work = work
        self.entered = anyio.Event()
        self.tasks: list[int] = []
        self.awaited_in: list[int] = []
        self.ended: list[int] = []

    def __call__(self, connection: Connection) -> Any:
        self.tasks.append(anyio.get_current_task().id)
        self.entered.set()
        return None if self.work is None else self._work(connection, self.work)

    async def _work(self, connection: Connection, work: Callable[[], Any]) -> None:
        self.awaited_in.append(anyio.get_current_task().id)
        await work()
        self.ended.append(connection.number)


def my_task() -> int:
    return anyio.get_current_task().id


def ends_at_once(work: Any) -> bool:
    """Run an awaitable as far as it comes without the event loop. Return whether that is its end.

    If not, it is closed.
    """
    try:
        work.send(None)
    except StopIteration:
        return True
    work.close()
    return False


@pytest.mark.anyio
class TestReset:
    """Where `reset` runs, and what becomes of its connection."""

    @pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
    async def test_it_runs_in_the_task_of_a_block_that_raises_nothing(
        self, backend: Backend, is_plain: bool
    ) -> None:
        reset = Reset(None) if is_plain else Reset()
        async with backend.pool(max_size=1, reset=reset) as pool:
            for _ in range(3):
                await use(pool)
                assert pool.statistics().idle == 1  # when the block has ended, it is done
            assert reset.tasks == [my_task()] * 3
        assert backend.opened == 1

    @pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
    @pytest.mark.parametrize("how", ["error", "release", "early release", "cancelled"])
    async def test_otherwise_an_async_one_runs_in_a_task_of_the_pool(
        self, backend: Backend, how: str, is_plain: bool
    ) -> None:
        reset = Reset(None) if is_plain else Reset()
        async with backend.pool(max_size=1, reset=reset) as pool:
            if how == "error":
                with pytest.raises(KeyError, match="mine"):
                    async with pool.connection():
                        raise KeyError("mine")
            elif how == "release":
                pool.release(await pool.acquire())
            elif how == "early release":
                checkout = pool.connection()
                async with checkout:
                    checkout.release()
            else:
                with CancelScope() as scope:
                    async with pool.connection():
                        scope.cancel()
                        await never()
            # A plain one is over at once.
            assert pool.statistics().idle == is_plain
            assert reset.tasks == [my_task()]
            await settle()
            assert len(reset.awaited_in) == (0 if is_plain else 1)
            assert my_task() not in reset.awaited_in
            assert await use(pool) == 1

    @pytest.mark.parametrize("ending", ["plain", "async without a wait", "async"])
    async def test_a_block_ends_without_a_task_switch_if_the_hook_does_not_wait(
        self, backend: Backend, ending: str
    ) -> None:
        async def no_wait() -> None:
            pass

        work = {"plain": None, "async without a wait": no_wait, "async": settle}[ending]
        async with backend.pool(max_size=1, reset=Reset(work)) as pool:
            checkout = pool.connection()
            await checkout.__aenter__()
            at_once = ends_at_once(checkout.__aexit__(None, None, None))
            assert at_once is (ending != "async")
            if at_once:
                assert pool.statistics().idle == 1
                assert await use(pool) == 1

    async def test_a_waiter_gets_the_connection_after_the_reset(self, backend: Backend) -> None:
        gate = anyio.Event()
        reset = Reset(gate.wait)
        taken: list[Connection] = []
        async with backend.pool(max_size=1, reset=reset) as pool, create_task_group() as tg:
            tg.start_soon(use, pool)
            await reset.entered.wait()
            tg.start_soon(take, pool, taken)
            await settle()
            assert taken == []
            gate.set()
            await settle()
            assert [connection.number for connection in taken] == [1]
            reset.work = None
            give_back(pool, taken)

    async def test_the_loan_has_ended_when_it_begins(self, backend: Backend) -> None:
        checkouts: list[Checkout[Connection]] = []
        seen: list[tuple[bool, int, float | None]] = []

        def reset(connection: Connection) -> None:
            in_use = pool.statistics().in_use
            seen.append((checkouts[0].borrowed, in_use, pool.info(connection).in_use))

        async with backend.pool(reset=reset) as pool:
            checkouts.append(pool.connection())
            async with checkouts[0]:
                pass
        assert seen == [(False, 0, None)]

    @pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
    async def test_if_it_fails_the_block_does_not(
        self, backend: Backend, is_plain: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: object) -> None:
            raise KeyError("no")

        async def fail_later(_: Connection) -> None:
            await anyio.lowlevel.checkpoint()
            fail()

        events: list[PoolEvent] = []
        pool = backend.pool(
            max_size=1, name="db", reset=fail if is_plain else fail_later, on_event=events.append
        )
        async with pool:
            assert await use(pool) == 1
            assert await use(pool) == 2
            await settle()
            assert sorted(backend.closings) == [1, 2]
            assert closed_for(events) == ["reset", "reset"]
            errors = [event.error for event in events if event.kind == "closed"]
            assert [type(error) for error in errors] == [KeyError, KeyError]
            assert pool.statistics().failed_resets == 2
            assert pool.get_stats()["returns_bad"] == 2
        assert messages(caplog) == [("WARNING", "db: reset failed: KeyError('no')")] * 2

    @pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
    async def test_after_a_block_that_raises_a_check_follows(
        self, backend: Backend, is_plain: bool
    ) -> None:
        calls: list[object] = []
        reset = Reset(None) if is_plain else Reset()
        async with backend.pool(
            max_size=1, reset=reset, check=calls.append, check_idle=None
        ) as pool:
            with pytest.raises(KeyError, match="mine"):
                async with pool.connection():
                    raise KeyError("mine")
            async with pool.connection() as connection:
                assert calls == [connection]

    async def test_a_failed_reset_does_not_hide_what_the_block_raises(
        self, backend: Backend
    ) -> None:
        def fail(_: Connection) -> None:
            raise KeyError("no")

        async with backend.pool(reset=fail) as pool:
            with pytest.raises(ValueError, match="mine"):
                async with pool.connection():
                    raise ValueError("mine")

    async def test_a_connection_that_is_to_be_closed_is_not_reset(self, backend: Backend) -> None:
        reset = Reset()
        async with backend.pool(max_size=1, reset=reset) as pool:
            async with pool.connection() as connection:
                pool.discard(connection)
            async with pool.connection():
                await pool.drain()
            checkout = pool.connection()
            async with checkout:
                checkout.discard()
            assert await use(pool) == 4
            assert reset.ended == [4]
        assert reset.ended == [4]
        assert pool.statistics().closed["discard"] == 2
        assert pool.statistics().closed["drain"] == 1

    async def test_it_is_shielded_from_a_cancel_scope(self, backend: Backend) -> None:
        gate = anyio.Event()
        reset = Reset(gate.wait)
        scope = CancelScope()
        after: list[str] = []

        async def borrow() -> None:
            with scope:
                await use(pool)
                after.append("block")
                await anyio.lowlevel.checkpoint()
                after.append("checkpoint")

        async with backend.pool(max_size=1, reset=reset) as pool:
            async with create_task_group() as tg:
                tg.start_soon(borrow)
                await reset.entered.wait()
                scope.cancel()
                await settle()
                assert after == []
                assert pool.statistics().idle == 0
                gate.set()
            assert after == ["block"]
            assert scope.cancelled_caught
            assert reset.ended == [1]
            assert await use(pool) == 1

    async def test_it_runs_in_the_task_of_the_block_even_if_a_scope_is_cancelled(
        self, backend: Backend
    ) -> None:
        reset = Reset()
        async with backend.pool(max_size=1, reset=reset) as pool:
            with CancelScope() as scope:
                async with pool.connection():
                    scope.cancel()
            assert reset.tasks == [my_task()]
            assert reset.ended == [1]
            assert await use(pool) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestResetAndNativeCancellation:
    """`Task.cancel` of asyncio, which no shield stops."""

    @pytest.fixture(params=[False, True], ids=["", "in a scope"])
    def in_scope(self, request: pytest.FixtureRequest) -> bool:
        """Whether there is a cancel scope around the block. The pool shields it by other means."""
        return bool(request.param)

    def begin(self, pool: Pool, in_scope: bool) -> asyncio.Task[int]:
        async def borrow() -> int:
            with CancelScope() if in_scope else nullcontext():
                return await use(pool)
            raise AssertionError  # nobody has cancelled the scope

        return asyncio.create_task(borrow())

    async def test_it_closes_the_connection_and_is_raised(
        self, backend: Backend, in_scope: bool
    ) -> None:
        reset = Reset(never)
        events: list[PoolEvent] = []
        async with backend.pool(max_size=1, reset=reset, on_event=events.append) as pool:
            task = self.begin(pool, in_scope)
            await reset.entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
            reset.work = None
            assert await use(pool) == 2
            assert closed_for(events) == ["reset"]
            assert reset.ended == []

    async def test_so_it_is_at_any_moment(self, backend: Backend, in_scope: bool) -> None:
        async def slowly() -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        outcomes = set()
        async with backend.pool(max_size=1, reset=Reset(slowly)) as pool:
            for ticks in range(12):
                loans = pool.statistics().loans
                task = self.begin(pool, in_scope)
                for _ in range(ticks):
                    await asyncio.sleep(0)
                was_over = task.done()
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() is not was_over
                await settle()
                # The slot is back: one connection at most, and nobody has it.
                assert pool.statistics().size == pool.statistics().idle <= 1
                assert backend.most_open <= 1
                outcomes.add((was_over, pool.statistics().loans - loans))
                await use(pool)
        assert outcomes == {(False, 0), (False, 1), (True, 1)}

    async def test_a_waiter_gets_another_connection(self, backend: Backend, in_scope: bool) -> None:
        reset = Reset(never)
        taken: list[Connection] = []
        async with backend.pool(max_size=1, reset=reset) as pool, create_task_group() as tg:
            task = self.begin(pool, in_scope)
            await reset.entered.wait()
            tg.start_soon(take, pool, taken)
            await settle()
            task.cancel()
            await settle()
            assert [connection.number for connection in taken] == [2]
            reset.work = None
            give_back(pool, taken)

    async def test_a_reset_that_takes_no_notice_of_it_is_awaited(
        self, backend: Backend, in_scope: bool
    ) -> None:
        gate = asyncio.Event()

        async def stubborn() -> None:
            while not gate.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    pass

        reset = Reset(stubborn)
        async with backend.pool(max_size=1, reset=reset) as pool:
            task = self.begin(pool, in_scope)
            await reset.entered.wait()
            task.cancel()
            await settle()
            assert not task.done()
            gate.set()
            # The hook, not the pool, has swallowed the cancellation.
            assert await task == 1
            assert await use(pool) == 1

    async def test_a_second_one_changes_nothing(self, backend: Backend, in_scope: bool) -> None:
        async def cleans_up() -> None:
            try:
                await never()
            finally:
                await never()

        reset = Reset(cleans_up)
        async with backend.pool(max_size=1, reset=reset) as pool:
            task = self.begin(pool, in_scope)
            await reset.entered.wait()
            for _ in range(2):
                assert not task.done()
                task.cancel()
                await settle()
            assert task.cancelled()
            reset.work = None
            assert await use(pool) == 2


@pytest.mark.anyio
class TestResetThatTakesTooLong(Virtual):
    @pytest.fixture(params=[False, True], ids=["", "in a scope"])
    def in_scope(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    async def borrow(self, pool: Pool, in_scope: bool = False) -> float:
        """Borrow a connection. Return how long that took, in seconds."""
        began = anyio.current_time()
        with CancelScope() if in_scope else nullcontext():
            await use(pool)
        return anyio.current_time() - began

    async def test_it_is_cancelled_and_its_connection_replaced(
        self, backend: Backend, in_scope: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        events: list[PoolEvent] = []
        reset = Reset(never)
        pool = backend.pool(
            max_size=1, name="db", reset=reset, check_timeout=2, on_event=events.append
        )
        async with pool:
            assert await self.borrow(pool, in_scope) == pytest.approx(2)
            await anyio.lowlevel.checkpoint()  # the cancellation of the reset ended with it
            reset.work = None
            assert await use(pool) == 2
            assert closed_for(events) == ["reset"]
            [error] = [event.error for event in events if event.kind == "closed"]
            assert isinstance(error, TimeoutError)
            assert str(error) == "reset() took longer than 2 s"
        assert messages(caplog) == [("WARNING", f"db: reset failed: {error!r}")]

    async def test_a_waiter_gets_another_connection_then(
        self, backend: Backend, in_scope: bool
    ) -> None:
        reset = Reset(never)
        pool = backend.pool(max_size=1, reset=reset, check_timeout=2)
        async with pool, create_task_group() as tg:
            tg.start_soon(self.borrow, pool, in_scope)
            await anyio.sleep(0.5)
            began = anyio.current_time()
            async with pool.connection() as connection:
                assert anyio.current_time() - began == pytest.approx(1.5)
                assert connection.number == 2
                reset.work = None

    async def test_one_that_is_stubborn_loses_its_connection(
        self, backend: Backend, in_scope: bool
    ) -> None:
        reset = Reset(partial(stay, 10))
        events: list[PoolEvent] = []
        took: list[float] = []

        async def borrow() -> None:
            took.append(await self.borrow(pool, in_scope))

        async with backend.pool(
            max_size=1, reset=reset, check_timeout=2, on_event=events.append
        ) as pool:
            async with create_task_group() as tg:
                tg.start_soon(borrow)
                await anyio.sleep(0.5)
                reset.work = None
                began = anyio.current_time()
                async with pool.connection() as connection:
                    # Soon after it was cancelled.
                    assert anyio.current_time() - began == pytest.approx(1.5 + 0.1)
                    assert connection.number == 2
            # Its borrower goes on when it ends.
            assert took == [pytest.approx(10)]
            assert reset.ended == [1]
            assert closed_for(events) == ["reset"]
            assert pool.statistics().idle == pool.statistics().size == 1

    async def test_one_that_ends_soon_after_it_was_cancelled_is_good(
        self, backend: Backend, in_scope: bool
    ) -> None:
        reset = Reset(partial(stay, 2.05))
        async with backend.pool(max_size=1, reset=reset, check_timeout=2) as pool:
            assert await self.borrow(pool, in_scope) == pytest.approx(2.05)
            await anyio.sleep(5)
            assert await use(pool) == 1

    async def test_one_that_cleans_up_after_its_cancellation_may_do_so(
        self, backend: Backend, in_scope: bool
    ) -> None:
        async def cleans_up() -> None:
            try:
                await never()
            finally:
                with CancelScope(shield=True):
                    await anyio.sleep(0.05)
                    assert backend.open() == {1}

        async with backend.pool(max_size=1, reset=Reset(cleans_up), check_timeout=2) as pool:
            assert await self.borrow(pool, in_scope) == pytest.approx(2.05)
            await settle()
            assert backend.closings == [1]

    async def test_each_of_many_has_a_deadline_of_its_own(self, backend: Backend) -> None:
        ends: list[float] = []

        async def borrow(begins: float) -> None:
            await anyio.sleep(begins)
            await self.borrow(pool)
            ends.append(anyio.current_time() - began)

        async with backend.pool(max_size=5, reset=Reset(never), check_timeout=2) as pool:
            began = anyio.current_time()
            async with create_task_group() as tg:
                for begins in (0.3, 0, 0.1, 1, 2.5):
                    tg.start_soon(borrow, begins)
            assert ends == pytest.approx([2, 2.1, 2.3, 3, 4.5])

    async def test_without_check_timeout_it_may_take_for_ever(self, backend: Backend) -> None:
        reset = Reset(lambda: anyio.sleep(10_000))
        pool = backend.pool(max_size=1, reset=reset, check_timeout=None, max_lifetime=None)
        async with pool:
            assert await self.borrow(pool) == pytest.approx(10_000)
            assert reset.ended == [1]
            assert await use(pool) == 1

    async def test_with_a_check_timeout_of_0_it_must_not_wait(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, reset=Reset(None), check_timeout=0) as pool:
            for _ in range(3):
                assert await use(pool) == 1

    async def test_an_old_connection_is_not_reset(self, backend: Backend) -> None:
        reset = Reset()
        async with backend.pool(max_size=1, max_lifetime=10, reset=reset) as pool:
            async with pool.connection():
                await anyio.sleep(10)
            assert reset.tasks == []
            assert await use(pool) == 2
            assert reset.ended == [2]
            await settle()
            assert pool.statistics().closed["lifetime"] == 1


@pytest.mark.anyio
class TestResetInTheBackground(Virtual):
    """What `release` leaves to a task of the pool."""

    async def release(self, pool: Pool, by: str) -> None:
        connection = await pool.acquire()
        if by == "task":
            pool.release(connection)
        else:
            thread = threading.Thread(target=pool.release, args=[connection])
            thread.start()
            thread.join()  # no time passes

    @pytest.mark.parametrize("by", ["task", "thread"])
    async def test_one_that_hangs_is_ended_even_if_it_has_no_time_at_all(
        self, backend: Backend, by: str
    ) -> None:
        reset = Reset(never)
        async with backend.pool(max_size=1, reset=reset, check_timeout=0) as pool:
            await self.release(pool, by)
            await anyio.sleep(1)
            assert backend.closings == [1]
            reset.work = None
            began = anyio.current_time()
        assert anyio.current_time() == began  # the pool has no reason to wait

    @pytest.mark.parametrize("by", ["task", "thread"])
    async def test_while_the_loop_is_busy_its_time_does_not_pass(
        self, backend: Backend, by: str
    ) -> None:
        reset = Reset(lambda: anyio.sleep(1))
        async with backend.pool(max_size=1, reset=reset, check_timeout=2) as pool:
            # It is given back long before the loop comes to it.
            now = pool._clock() - 5
            pool._clock = lambda: now
            await self.release(pool, by)
            await anyio.sleep(1.5)
            assert reset.ended == [1]
            assert pool.statistics().closed["reset"] == 0

    @pytest.mark.parametrize("by", ["task", "thread"])
    async def test_one_that_ignores_its_first_cancellation_is_cancelled_again(
        self, backend: Backend, by: str
    ) -> None:
        async def ignore() -> None:
            try:
                await never()
            except anyio.get_cancelled_exc_class():
                await never()

        async with backend.pool(max_size=1, reset=Reset(ignore), check_timeout=2) as pool:
            await self.release(pool, by)
            await anyio.sleep(3)
            assert backend.closings == [1]
            began = anyio.current_time()
        assert anyio.current_time() == began  # the pool has no reason to wait

    @in_virtual_asyncio
    async def test_a_cancellation_that_a_plain_one_raises_is_a_failure(
        self, backend: Backend
    ) -> None:
        def reset(_: Connection) -> None:
            raise asyncio.CancelledError  # the result of a Future, perhaps

        async with backend.pool(max_size=1, reset=reset) as pool:
            await self.release(pool, "thread")
            await settle()
            assert pool.statistics().closed["reset"] == 1
            assert not pool.closed


@pytest.mark.anyio
class TestResetWhileThePoolIsClosed(Virtual):
    async def close_during(self, pool: Pool, reset: Reset) -> float:
        """Close the pool while a block resets its connection. Return how long that took."""
        took: list[float] = []
        async with create_task_group() as tg:
            async with pool:
                tg.start_soon(use, pool)
                await reset.entered.wait()
                await anyio.sleep(1)
                began = anyio.current_time()
            took.append(anyio.current_time() - began)
        return took[0]

    async def test_it_may_go_on_until_close_timeout(self, backend: Backend) -> None:
        reset = Reset(lambda: anyio.sleep(3))
        pool = backend.pool(reset=reset, close_timeout=5)
        assert await self.close_during(pool, reset) == pytest.approx(2)
        assert reset.ended == [1]
        assert pool.statistics().closed["shutdown"] == 1

    async def test_then_it_is_cancelled(self, backend: Backend) -> None:
        reset = Reset(never)
        pool = backend.pool(reset=reset, check_timeout=60, close_timeout=5)
        assert await self.close_during(pool, reset) == pytest.approx(5)
        assert pool.statistics().closed["reset"] == 1

    async def test_if_that_does_not_help_its_connection_is_closed(self, backend: Backend) -> None:
        reset = Reset(partial(stay, 100))
        pool = backend.pool(reset=reset, check_timeout=60, close_timeout=5)
        took = None

        async def close() -> None:
            nonlocal took
            await anyio.sleep(1)
            began = anyio.current_time()
            await pool.close()
            took = anyio.current_time() - began

        await pool.open()
        async with create_task_group() as tg:
            tg.start_soon(use, pool)
            tg.start_soon(close)
            await anyio.sleep(50)
            assert took == pytest.approx(5.1)
            assert backend.closings == [1]
        assert reset.ended == [1]
        assert pool.statistics().closed["reset"] == 1

    async def test_one_that_fails_is_no_obstacle(self, backend: Backend) -> None:
        async def fail() -> None:
            await anyio.sleep(3)
            raise KeyError("no")

        reset = Reset(fail)
        pool = backend.pool(reset=reset, close_timeout=5)
        assert await self.close_during(pool, reset) == pytest.approx(2)
        assert backend.closings == [1]

    @pytest.mark.parametrize("how", ["block", "release"])
    async def test_the_hook_itself_may_close_the_pool(self, backend: Backend, how: str) -> None:
        reset = Reset(lambda: pool.close())
        pool = backend.pool(reset=reset, check_timeout=None, close_timeout=None)
        await pool.open()
        if how == "block":
            await use(pool)
        else:
            pool.release(await pool.acquire())
            await reset.entered.wait()
        await pool.close()
        assert reset.ended == backend.closings == [1]
        assert pool.statistics().closed["shutdown"] == 1

    async def test_a_block_that_ends_later_is_not_reset(self, backend: Backend) -> None:
        reset = Reset()
        pool = backend.pool(reset=reset, close_timeout=5)

        async def borrow() -> None:
            async with pool.connection():
                await anyio.sleep(3)

        async with create_task_group() as tg:
            async with pool:
                tg.start_soon(borrow)
                await anyio.sleep(1)
                began = anyio.current_time()
            assert anyio.current_time() - began == pytest.approx(2)
        assert reset.tasks == []
        assert pool.statistics().closed["shutdown"] == 1
