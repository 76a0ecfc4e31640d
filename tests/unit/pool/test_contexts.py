"""ConnectionPool(context=True): resources that enter a task group or a cancel scope."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

import anyio
import anyio.abc
import pytest
from support.helpers import PATIENCE, settle, until_async

from aiosync import ConnectionPool, PoolEvent, PoolTimeout

pytestmark = pytest.mark.anyio


class Session:
    """A client whose connection is served by a task of its own."""

    def __init__(self) -> None:
        self.group = anyio.create_task_group()
        self.is_open = False

    def fail(self) -> None:
        async def fail() -> None:
            raise ConnectionResetError("the peer has gone")

        self.group.start_soon(fail)


class Sessions:
    """Opens sessions; notes in which tasks that is done."""

    def __init__(self) -> None:
        self.entered: list[int] = []
        self.left: list[int] = []
        self.delay: anyio.Event | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Session]:
        session = Session()
        async with session.group:
            session.group.start_soon(anyio.sleep_forever)
            self.entered.append(anyio.get_current_task().id)
            if self.delay is not None:
                await self.delay.wait()
            session.is_open = True
            try:
                yield session
            finally:
                session.is_open = False
                self.left.append(anyio.get_current_task().id)
                session.group.cancel_scope.cancel()

    def pool(self, **options: Any) -> ConnectionPool[Session]:
        return ConnectionPool(self.open, context=True, **options)


async def ended(session: Session) -> None:
    """Wait until the pool has noticed that `session` has ended."""
    while session.is_open:
        await anyio.sleep(0)
    await settle()


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


async def test_each_is_entered_and_left_in_one_task_of_its_own(sessions: Sessions) -> None:
    async with sessions.pool(max_size=2) as pool:
        async with pool.connection() as first, pool.connection() as second:
            assert first.is_open
            assert second.is_open
        pool.discard(await pool.acquire())
        async with pool.connection() as third:
            assert third.is_open
    assert len(set(sessions.entered)) == len(sessions.entered)
    assert sorted(sessions.left) == sorted(sessions.entered)
    assert anyio.get_current_task().id not in sessions.entered
    assert pool.statistics().closed["discard"] == 1
    assert pool.statistics().failed_closes == 0


async def test_connect_may_be_async_and_return_one(sessions: Sessions) -> None:
    async def connect() -> Any:
        return sessions.open()

    pool: ConnectionPool[Any] = ConnectionPool(connect, context=True)
    async with pool, pool.connection() as session:
        assert session.is_open
    assert len(sessions.left) == 1


async def test_anything_else_is_refused_at_once() -> None:
    pool: ConnectionPool[Any] = ConnectionPool(object, context=True)  # type: ignore[call-overload]
    async with pool:
        with pytest.raises(TypeError, match="async context manager, not object"):
            await pool.acquire()


async def test_one_that_ends_by_itself_is_replaced(
    sessions: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    async with sessions.pool(min_size=1, max_size=1) as pool:
        async with pool.connection() as session:
            session.fail()
            await ended(session)
        async with pool.connection(PATIENCE) as other:
            assert other is not session
            assert other.is_open
        async with pool.connection() as idle:
            pass
        idle.fail()
        await ended(idle)
        async with pool.connection(PATIENCE) as other:
            assert other is not idle
    assert pool.statistics().closed["check"] == 2
    records = [record for record in caplog.records if "a connection has ended" in record.message]
    assert [record.levelno for record in records] == [logging.WARNING] * 2
    assert "the peer has gone" in records[0].message


async def test_one_that_takes_too_long_to_enter_is_given_up(sessions: Sessions) -> None:
    sessions.delay = anyio.Event()
    async with sessions.pool(connect_timeout=0.02, timeout=PATIENCE) as pool:
        with pytest.raises(anyio.WouldBlock):
            pool.acquire_nowait()
        while not pool.statistics().connect_errors:
            await anyio.sleep(0.005)
        sessions.delay.set()
        async with pool.connection() as session:
            assert session.is_open


async def test_one_whose_configure_fails_is_left(sessions: Sessions) -> None:
    def configure(_: Session) -> None:
        if len(sessions.entered) == 1:
            raise ValueError("no")

    async with sessions.pool(configure=configure) as pool, pool.connection() as session:
        assert session.is_open
        assert len(sessions.left) == 1
    assert pool.statistics().closed["configure"] == 1
    assert len(sessions.left) == 2


async def test_one_that_hides_why_its_configure_fails_has_failed_to_connect() -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[object]:
        with suppress(ValueError):
            yield object()

    def configure(_: object) -> None:
        raise ValueError("no")

    async with ConnectionPool(connect, context=True, configure=configure) as pool:
        with pytest.raises(PoolTimeout, match="hides why it can't be configured"):
            await pool.acquire(0.05)
        assert pool.statistics().connect_errors < 10  # not one after the other, without a pause


async def test_one_that_is_configured_too_late_is_closed_for_that_reason() -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[object]:
        yield object()

    async def configure(_: object) -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep(PATIENCE)

    closed = anyio.Event()
    errors: list[BaseException | None] = []

    def on_event(event: PoolEvent) -> None:
        if event.kind == "closed" and not errors:
            errors.append(event.error)
            closed.set()

    pool = ConnectionPool(
        connect, context=True, configure=configure, connect_timeout=0.01, on_event=on_event
    )
    async with pool:
        with suppress(anyio.WouldBlock):
            pool.acquire_nowait()
        with anyio.fail_after(PATIENCE):
            await closed.wait()
    assert repr(errors[0]) == "TimeoutError('it takes too long to connect')"


async def test_a_close_hook_is_called_before_it_is_left(sessions: Sessions) -> None:
    states: list[bool] = []
    pool = sessions.pool(close=lambda session: states.append(session.is_open))
    async with pool, pool.connection():
        pass
    assert states == [True]
    assert len(sessions.left) == 1


async def test_one_that_fails_to_leave_gives_its_slot_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[object]:
        yield object()
        raise OSError("it is stuck")

    async with ConnectionPool(connect, context=True, max_size=1) as pool:
        for _ in range(2):
            pool.discard(await pool.acquire(PATIENCE))
    assert pool.statistics().failed_closes == 2
    assert sum("close failed" in record.message for record in caplog.records) == 2


async def test_a_pool_that_closes_leaves_those_that_are_borrowed_by_force(
    sessions: Sessions,
) -> None:
    pool = sessions.pool(close_timeout=0.01)
    async with pool:
        session = await pool.acquire()
        await pool.close()
        assert not session.is_open
    assert pool.statistics().closed["forced"] == 1


async def test_a_plain_connect_that_leaves_a_scope_open_is_refused_with_one_error() -> None:
    class Client:
        async def __aenter__(self) -> Self:
            self.group = anyio.create_task_group()
            await self.group.__aenter__()
            return self

        async def aclose(self) -> None:
            await self.group.__aexit__(None, None, None)

    async def connect() -> Client:
        return await Client().__aenter__()

    async with ConnectionPool(connect) as pool:
        with pytest.raises(TypeError, match="context=True"):
            await pool.acquire()
        assert pool.statistics().loans == 0


async def test_it_is_so_even_if_nothing_closes_the_scope() -> None:
    groups: list[anyio.abc.TaskGroup] = []

    async def connect() -> object:
        group = anyio.create_task_group()
        await group.__aenter__()
        groups.append(group)  # otherwise it is collected, and complains
        return object()

    async with ConnectionPool(connect, min_size=1) as pool:
        with pytest.raises(TypeError, match="context=True"):
            await pool.acquire()
        with pytest.raises(TypeError, match="context=True"):
            await pool.wait()
    assert pool.statistics().loans == 0


class TestContexts:
    async def test_a_pool_that_closes_at_once_enters_none(self) -> None:
        entered: list[int] = []

        @asynccontextmanager
        async def connect() -> AsyncIterator[object]:
            entered.append(1)
            yield object()

        pool = ConnectionPool(connect, context=True)
        async with pool:
            pool._maintenance.core.stopping = True
            pool._maintenance.connecting.connect()
        assert entered == []

    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_one_whose_task_is_cancelled_natively_is_replaced(self) -> None:
        @asynccontextmanager
        async def connect() -> AsyncIterator[object]:
            yield object()

        async with ConnectionPool(connect, context=True, max_size=1, name="a pool") as pool:
            async with pool.connection() as connection:
                pass
            (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "a pool connect"]
            task.cancel()
            await until_async(task.done)
            async with pool.connection(PATIENCE) as other:
                assert other is not connection
