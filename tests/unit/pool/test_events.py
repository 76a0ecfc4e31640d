"""Events of a pool: the option `on_event`, and the log."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import create_task_group
from support.helpers import settle
from support.pool_stubs import (
    Backend,
    Connection,
    Pool,
    Virtual,
    borrow_for,
    closed_for,
    kinds,
    messages,
    nothing,
    take_and_keep,
    use,
)

from aiosync import (
    ConnectionPool,
    PoolEvent,
    PoolTimeout,
    as_threading,
)


@pytest.mark.anyio
class TestEvents(Virtual):
    async def test_what_they_tell(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(name="db", max_size=1, on_event=events.append) as pool:
            async with pool.connection() as connection:
                await anyio.sleep(2)
            await anyio.sleep(1)
            async with pool.connection():
                await anyio.sleep(4)
                pool.discard(connection)
            await anyio.sleep(0.5)
        connected, closed = events
        assert (connected.kind, connected.pool, connected.reason) == ("connected", "db", "")
        assert connected.error is None
        assert connected.info is not None
        assert (connected.info.uses, connected.info.usage) == (0, 0)
        assert connected.info.in_use is None
        assert 0.95 * 3600 <= connected.info.expires_in <= 3600
        assert (closed.kind, closed.pool, closed.reason) == ("closed", "db", "discard")
        assert closed.error is None
        assert closed.info is not None
        assert closed.info.age == pytest.approx(7)
        assert (closed.info.uses, closed.info.in_use) == (2, None)
        assert closed.info.usage == pytest.approx(6)

    async def test_failures_to_connect(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        backend.refuses = True
        async with backend.pool(min_size=1, on_event=events.append):
            await settle()
            assert kinds(events) == ["connect_failed"] * 3 + ["outage"]
            for event in events:
                assert isinstance(event.error, ConnectionRefusedError)
                assert event.info is None
                assert event.reason == ""
            backend.refuses = False
            await anyio.sleep(1)
            recovered = events[4]
            assert (recovered.kind, recovered.error, recovered.info) == ("recovered", None, None)
            assert events[5].kind == "connected"

    async def test_every_connection_is_closed_for_one_reason(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(min_size=3, on_event=events.append) as pool:
            await pool.wait()
        assert kinds(events) == ["connected"] * 3 + ["closed"] * 3
        assert closed_for(events) == ["shutdown"] * 3

    async def test_an_event_can_not_be_changed(self, backend: Backend) -> None:
        events: list[Any] = []
        async with backend.pool(min_size=1, on_event=events.append) as pool:
            await pool.wait()
        with pytest.raises(AttributeError):
            events[0].kind = "closed"
        with pytest.raises(AttributeError):
            events[0].info.uses = 3

    async def test_a_hook_may_use_the_pool(self, backend: Backend) -> None:
        seen: list[int] = []

        def look(event: PoolEvent) -> None:
            seen.append(pool.get_stats()["pool_size"])
            repr(pool)

        pool = backend.pool(min_size=1, on_event=look)
        async with pool:
            await pool.wait()
        assert len(seen) == 2


@pytest.mark.anyio
class TestLoanEvents:
    async def test_they_are_told_to_those_who_ask(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(
            max_size=1, name="db", reset=nothing, on_event=events.append, loan_events=True
        )
        async with pool:
            async with pool.connection():
                await settle()
                loan = events[-1]
            pool.discard(await pool.acquire())
            await settle()
        assert kinds(events) == [
            "connected", "acquired", "released", "acquired", "released", "closed",
        ]  # fmt: skip
        assert (loan.pool, loan.reason, loan.error) == ("db", "", None)
        assert loan.info is not None
        assert loan.info.uses == 1
        assert loan.info.in_use is not None
        released = events[2].info
        assert released is not None
        assert released.in_use is None

    async def test_they_are_told_to_nobody_else(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(on_event=events.append) as pool:
            await use(pool)
            await settle()
            assert kinds(events) == ["connected"]

    async def test_without_on_event_nobody_is_told(self, backend: Backend) -> None:
        async with backend.pool(loan_events=True) as pool:
            await use(pool)
            assert await use(pool) == 1

    def test_of_threads_too(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(on_event=events.append, loan_events=True)
        with as_threading(pool) as view, view.connection():
            pass
        assert kinds(events) == ["connected", "acquired", "released", "closed"]


@pytest.mark.anyio
class TestLog(Virtual):
    """The logger `aiosync.pool`."""

    @pytest.fixture(autouse=True)
    def listen(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "aiosync.pool")

    async def test_nothing_is_said_if_nothing_is_wrong(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        pool = backend.pool(min_size=2, check_idle=0, check=nothing, reset=nothing, max_lifetime=10)
        async with pool:
            await borrow_for(pool, 15)
            pool.discard(await pool.acquire())
            await pool.drain()
        assert messages(caplog) == []

    async def test_the_begin_and_the_end_of_an_outage(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1, name="db") as pool:
            await anyio.sleep(60)
            began = ("WARNING", "db: cannot connect: ConnectionRefusedError('no')")
            assert messages(caplog) == [began]
            backend.refuses = False
            await pool.wait(11)
            assert messages(caplog) == [began, ("INFO", "db: connected again")]

    async def test_nothing_of_a_single_failure(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        failures = 2

        async def configure(_: Connection) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError("no")

        async with backend.pool(min_size=1, configure=configure) as pool:
            await pool.wait(0.01)
            assert pool.statistics().connect_errors == 2
            assert pool.healthy
        assert messages(caplog) == []

    async def test_a_failed_check_and_a_failed_close(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail() -> None:
            raise OSError("not even that")

        backend.at_close = fail
        async with backend.pool(min_size=1, name="db", check=lambda _: False) as pool:
            await pool.wait()
            await pool.check()
            await settle()
            assert messages(caplog) == [
                ("INFO", "db: check failed: ConnectionError('check() returned False')"),
                ("WARNING", "db: close failed: OSError('not even that')"),
            ]

    async def test_a_connection_that_is_closed_by_force(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with backend.pool(name="db", close_timeout=1) as pool:
            connection = await pool.acquire()
        assert messages(caplog) == [("WARNING", "db: closing a connection that is borrowed")]
        pool.release(connection)

    async def test_a_leak_with_its_borrower(
        self, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with backend.pool(name="db", leak_timeout=5) as pool:
            await take_and_keep(pool, 20)
        [(level, message)] = messages(caplog)
        assert level == "WARNING"
        assert message.startswith("db: a connection is borrowed for more than 5 s by task ")
        assert __file__ in message
        assert "take_and_keep" in message
        assert pool.statistics().leaks == 1


@pytest.mark.anyio
class TestFailuresToConnect(Virtual):
    async def test_wait_heeds_fail_fast(self, backend: Backend) -> None:
        backend.refuses = True
        backend.pause = 0.25
        async with backend.pool(min_size=1, fail_fast=True) as pool:
            began = anyio.current_time()
            for after in (0.75, 0.75):
                with pytest.raises(PoolTimeout, match="while connecting fails") as caught:
                    await pool.wait(30)
                assert isinstance(caught.value.__cause__, ConnectionRefusedError)
                assert anyio.current_time() - began == pytest.approx(after)
            backend.refuses = False
            await anyio.sleep(11)
            await pool.wait(0)

    async def test_without_fail_fast_it_waits(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1) as pool:
            began = anyio.current_time()
            with pytest.raises(PoolTimeout, match="within 30 s"):
                await pool.wait()
            assert anyio.current_time() - began == pytest.approx(30)

    async def test_wait_does_not_fail_if_there_is_hope(self, backend: Backend) -> None:
        async with backend.pool(min_size=1, max_size=1, fail_fast=True) as pool:
            connection = await pool.acquire()
            backend.refuses = True
            await pool.wait(1)
            pool.release(connection)

    async def test_one_that_fails_does_not_stop_the_others(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        attempts = 0

        async def connect() -> Connection:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                await anyio.sleep(0.5)
                raise ConnectionRefusedError("no")
            return await backend.connect()

        waits: list[float] = []

        async def borrow() -> None:
            async with pool.connection():
                waits.append(anyio.current_time() - began)
                await anyio.sleep(10)

        backend.pause = 1
        pool = ConnectionPool(connect, close=backend.close, max_size=10, on_event=events.append)
        async with pool:
            began = anyio.current_time()
            async with create_task_group() as tg:
                for _ in range(10):
                    tg.start_soon(borrow)
            # It was tried again at once.
            assert waits == pytest.approx([1] * 9 + [1.5])
            assert kinds(events).count("connect_failed") == 1
            assert "outage" not in kinds(events)
            assert pool.healthy

    async def test_as_many_as_are_needed_connect_at_the_same_time(self, backend: Backend) -> None:
        backend.pause = 1
        async with backend.pool(max_size=30) as pool:
            began = anyio.current_time()
            async with create_task_group() as tg:
                for _ in range(20):
                    tg.start_soon(take_and_keep, pool, 5)
            assert anyio.current_time() - began == pytest.approx(6)
            assert backend.most_connecting == backend.opened == 20

    async def test_the_attempts_of_an_outage_are_few(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(max_size=100) as pool:
            async with create_task_group() as tg:
                for _ in range(50):
                    tg.start_soon(fail_to_acquire, pool, 60)
            first = backend.attempts[0]
            at_once = [at for at in backend.attempts if at - first < 0.05 - 1e-6]
            # As many as are needed, then 3, then 1; then an outage, and one at a time.
            assert len(at_once) == 50 + 3 + 1
            # In 60 seconds: after 0.1 to 0.05 s, twice that, and so on, up to 10 s.
            assert 10 <= len(backend.attempts) - len(at_once) <= 21
            assert not pool.healthy

    async def test_a_row_of_failures_that_lasts_for_a_second_is_an_outage(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        backend.pause = 0.6
        events: list[PoolEvent] = []
        async with backend.pool(min_size=1, on_event=events.append) as pool:
            await anyio.sleep(1.1)
            assert kinds(events) == ["connect_failed"]
            assert pool.healthy
            await anyio.sleep(0.2)
            assert kinds(events) == ["connect_failed", "connect_failed", "outage"]
            assert not pool.healthy


async def fail_to_acquire(pool: Pool, timeout: float) -> None:
    with pytest.raises(PoolTimeout):
        await pool.acquire(timeout)
