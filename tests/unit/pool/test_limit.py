"""The option `limit` of a pool: each connection takes a permit, which pools share."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from support import pool_process
from support.forking import run_forking
from support.helpers import PATIENCE, settle, until, until_async
from support.pool_process import LEASE, LIMIT
from support.pool_stubs import (
    Backend,
    Connection,
    Pool,
    Virtual,
    closed_for,
    give_back,
    lose_one,
    never,
    some,
    take,
)
from support.postgres_server import PostgresServer

from aiosync import ConnectionLimit, ConnectionPool, PoolEvent, PoolMisuse, PoolTimeout
from aiosync._pool._entry import PoolEntry
from aiosync.redis import BackendUnavailable, DistributedSemaphore, Redis

if TYPE_CHECKING:
    from support.redis_servers import RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class Permit:
    """One permit of a `Limit`."""

    def __init__(self, limit: Limit, elsewhere: bool) -> None:
        self.limit = limit
        self.elsewhere = elsewhere
        self.lost = False
        self.losses: list[Callable[[], object]] = []

    def on_loss(self, token: object, function: Callable[[], object]) -> None:
        self.losses.append(function)
        if self.lost:
            function()

    def give_back(self) -> None:
        if not self.lost:
            self.limit.held.remove(self)
            self.limit.verify()
            self.limit.serve()

    def lose(self) -> None:
        self.limit.held.remove(self)
        self.lost = True
        for function in self.losses:
            function()


class Limit:
    """A limit without a server. It serves in FIFO order, and can be told to fail."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.held: list[Permit] = []
        self.waiting: deque[anyio.Event] = deque()
        self.granted: dict[anyio.Event, Permit] = {}
        self.watchers: list[Callable[[], object]] = []
        # How often it was asked, and by whom that did not wait.
        self.asked = self.tried = 0
        self.error: Exception | None = None
        # Ignores a cancellation, as if the permit had been granted at the same moment.
        self.is_late = False
        # Called when a permit comes back.
        self.verify: Callable[[], object] = bool

    async def take_for_pool(self, *, blocking: bool) -> Permit | None:
        self.asked += 1
        self.tried += not blocking
        if self.error is not None:
            with anyio.CancelScope(shield=self.is_late):
                await anyio.sleep(self.is_late)
            raise self.error
        event = anyio.Event()
        self.waiting.append(event)
        self.serve()
        if not blocking and event in self.waiting:
            self.waiting.remove(event)
            await anyio.lowlevel.checkpoint()
            return None
        try:
            with anyio.CancelScope(shield=self.is_late):
                await event.wait()
        except BaseException:
            if event in self.waiting:
                self.waiting.remove(event)
            else:
                self.granted.pop(event).give_back()
            raise
        return self.granted.pop(event)

    def serve(self) -> None:
        while self.waiting and len(self.held) < self.value:
            event = self.waiting.popleft()
            self.granted[event] = self.occupy(elsewhere=False)
            event.set()

    def occupy(self, elsewhere: bool = True) -> Permit:
        """Take a permit, as another process would."""
        permit = Permit(self, elsewhere)
        self.held.append(permit)
        return permit

    def watch_contention(self, function: Callable[[], object]) -> Callable[[], object]:
        self.watchers.append(function)
        return lambda: self.watchers.remove(function)

    def contend(self) -> None:
        """Tell the pools that others wait."""
        for function in self.watchers:
            function()


class Present(Backend):
    """A backend that sees that there is a permit for each connection, until it is closed."""

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self.limit = limit
        # Connections and attempts that are not over.
        self.present = 0
        self.excesses: list[str] = []
        # How many of them have lost their permit.
        self.lost_permits = 0
        limit.verify = self.verify_permits

    def verify_permits(self) -> None:
        """Take note if there is a connection without a permit. The pool would hide an error."""
        mine = sum(not permit.elsewhere for permit in self.limit.held)
        if self.present - self.lost_permits - len(self.lost) > mine:
            self.excesses.append(f"{self.present} connections, {mine} permits")

    async def connect(self) -> Connection:
        self.present += 1
        self.verify_permits()
        try:
            return await super().connect()
        except BaseException:
            self.present -= 1
            raise

    async def close(self, connection: Connection) -> None:
        try:
            await super().close(connection)
        finally:
            self.present -= 1

    @asynccontextmanager
    async def context(self) -> AsyncIterator[Connection]:
        connection = await self.connect()
        try:
            yield connection
        finally:
            await self.close(connection)

    def pool(self, **options: Any) -> Pool:
        return super().pool(limit=self.limit, **options)

    def context_pool(self, **options: Any) -> Pool:
        return ConnectionPool(self.context, context=True, limit=self.limit, **options)


@pytest.fixture
def limit() -> Iterator[Limit]:
    limit = Limit(3)
    yield limit
    assert not limit.held, "not all permits have come back"
    assert not limit.waiting
    assert not limit.granted
    assert not limit.watchers


@pytest.fixture
def backend(limit: Limit) -> Iterator[Present]:
    backend = Present(limit)
    yield backend
    backend.verify()
    assert not backend.excesses
    assert not backend.present - len(backend.lost)


@pytest.fixture(params=["plain", "context"])
def new_pool(request: pytest.FixtureRequest, backend: Present) -> Callable[..., Pool]:
    """Return what makes a pool, of connections of either kind."""
    return backend.pool if request.param == "plain" else backend.context_pool


async def ask(pool: Pool, tasks: Any, number: int) -> list[Connection]:
    """Have so many tasks wait for a connection; return the list of those that they get."""
    got: list[Connection] = []
    for _ in range(number):
        tasks.start_soon(take, pool, got)
    await settle()
    return got


async def fail(*_: object) -> None:
    raise ConnectionError("no good")


class TestPermits(Virtual):
    async def test_one_is_taken_before_each_connect_and_comes_back_at_the_end(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        async with new_pool() as pool:
            assert (limit.asked, len(limit.watchers)) == (0, 1)
            connections = await some(pool, 2)
            assert len(limit.held) == 2
            pool.release(connections.pop())
            pool.release(await pool.acquire())
            assert (limit.asked, len(limit.held)) == (2, 2)
            pool.release(connections.pop())
        assert not limit.held

    async def test_it_comes_back_when_the_close_has_ended(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        gate = anyio.Event()
        backend.at_close = gate.wait
        async with new_pool() as pool:
            pool.discard(await pool.acquire())
            await settle()
            assert (backend.closings, len(limit.held)) == ([1], 1)
            gate.set()
            await settle()
            assert not limit.held

    @pytest.mark.parametrize("error", [None, OSError("no")], ids=["hangs", "fails"])
    async def test_it_comes_back_if_the_close_fails(
        self, error: Exception | None, backend: Present, limit: Limit
    ) -> None:
        async def at_close() -> None:
            if error is not None:
                raise error
            await never()

        backend.at_close = at_close
        async with backend.pool() as pool:
            pool.discard(await pool.acquire())
            await anyio.sleep(100)
            assert not limit.held
            assert pool.statistics().failed_closes == 1

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize(
        ("reason", "options"), [("idle", {"max_idle": 5.0}), ("lifetime", {"max_lifetime": 5.0})]
    )
    async def test_a_connection_that_is_too_old(
        self,
        new_pool: Callable[..., Pool],
        limit: Limit,
        reason: Any,
        options: dict[str, float],
        overlap: bool,
    ) -> None:
        async with new_pool(overlap=overlap, **options) as pool:
            pool.release(await pool.acquire())
            await anyio.sleep(7)
            assert not limit.held
            assert pool.statistics().closed[reason] == 1
            await pool.resize(1, 2)
            await anyio.sleep(30)
            await settle()
            assert len(limit.held) == pool.statistics().size == 1
            assert pool.statistics().closed[reason] > 3

    async def test_connections_that_are_of_no_use(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        async with new_pool(reset=fail, max_size=2) as pool:
            connection, other = await some(pool, 2)
            pool.discard(connection)
            pool.release(other)
            await settle()
            assert not limit.held
            closed = pool.statistics().closed
            assert (closed["discard"], closed["reset"]) == (1, 1)

    async def test_failed_checks_drains_and_shrinking(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        async with new_pool(check=fail) as pool:
            for connection in await some(pool, 3):
                pool.release(connection)
            await pool.resize(0, 2)
            await settle()
            assert len(limit.held) == 2
            await pool.check()
            await settle()
            assert not limit.held
            pool.release(await pool.acquire())
            await pool.drain()
            await settle()
            assert not limit.held
            closed = pool.statistics().closed
            assert (closed["resize"], closed["check"], closed["drain"]) == (1, 2, 1)

    async def test_a_connection_that_was_collected(self, backend: Present, limit: Limit) -> None:
        async with backend.pool() as pool:
            backend.lost.add(await lose_one(pool))
            gc.collect()
            await settle()
            assert not limit.held
            assert pool.statistics().closed["collected"] == 1

    async def test_a_failed_configure(self, new_pool: Callable[..., Pool], limit: Limit) -> None:
        async with new_pool(configure=fail, timeout=0.5) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            assert pool.statistics().closed["configure"] == limit.asked

    async def test_a_failed_connect(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        backend.refuses = True
        async with new_pool(timeout=0.5) as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire()
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            await settle()
            assert limit.asked > 2
            backend.refuses = False
            async with pool.connection(60):
                assert len(limit.held) == 1

    async def test_connects_that_hang(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        backend.gate = anyio.Event()
        async with new_pool(connect_timeout=2, max_size=1) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(3)
            assert limit.asked == 2
            assert len(limit.held) == 1

    async def test_closing_the_pool_while_it_connects(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        backend.gate = anyio.Event()
        async with new_pool(min_size=2):
            await settle()
            assert (backend.connecting, len(limit.held)) == (2, 2)

    async def test_a_connection_that_is_closed_by_force(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        async with new_pool(close_timeout=1) as pool:
            connection = await pool.acquire()
            assert len(limit.held) == 1
        assert not limit.held
        pool.release(connection)
        assert pool.statistics().closed["forced"] == 1

    async def test_two_pools_share_a_limit(self, limit: Limit) -> None:
        limit.value = 4
        pools = [
            ConnectionPool(backend.connect, close=backend.close, limit=limit, timeout=1)
            for backend in (Backend(), Backend())
        ]
        async with pools[0], pools[1]:
            mine = await some(pools[0], 3)
            theirs = await some(pools[1], 1)
            with pytest.raises(PoolTimeout):
                await pools[1].acquire()
            pools[0].discard(mine.pop())
            theirs.append(await pools[1].acquire())
            for connection in mine:
                pools[0].release(connection)
            for connection in theirs:
                pools[1].release(connection)


class TestWaiting(Virtual):
    async def test_it_is_not_part_of_the_connect(self, backend: Present, limit: Limit) -> None:
        others = [limit.occupy() for _ in range(3)]
        backend.pause = 0.25
        async with backend.pool(connect_timeout=1) as pool, anyio.create_task_group() as tasks:
            got = await ask(pool, tasks, 1)
            await anyio.sleep(20)
            assert (got, limit.asked) == ([], 1)
            others.pop().give_back()
            await anyio.sleep(1)
            assert len(got) == 1
            statistics = pool.statistics()
            assert (statistics.connects, statistics.connect_errors) == (1, 0)
            assert statistics.connect_time.sum == pytest.approx(0.25)
            assert pool.get_stats()["connections_ms"] == pytest.approx(250, abs=1)
            pool.release(got.pop())
        for permit in others:
            permit.give_back()

    async def test_a_later_permit_is_as_good(self, backend: Present, limit: Limit) -> None:
        async with backend.pool(min_size=5) as pool:
            await settle()
            assert (len(limit.held), len(limit.waiting)) == (3, 2)
            limit.value = 4
            limit.serve()
            await settle()
            assert (len(limit.held), len(limit.waiting)) == (4, 1)
            assert backend.open() == {1, 2, 3, 4}
            await pool.resize(4, 5)
            await settle()
            assert not limit.waiting

    async def test_it_ends_when_nobody_needs_a_connection(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        async with new_pool() as pool, anyio.create_task_group() as tasks:
            connections = await some(pool, 3)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    got = await ask(pool, inner, 2)
                    assert len(limit.waiting) == 2
                    scope.cancel()
            await settle()
            assert not limit.waiting
            assert pool.statistics().size == 3
            # As many as are needed go on, the oldest.
            got = await ask(pool, tasks, 3)
            first = [*limit.waiting]
            assert len(first) == 3
            pool.release(connections.pop())
            await settle()
            assert len(limit.waiting) == 2
            assert set(limit.waiting) < set(first)
            pool.release(connections.pop())
            pool.release(connections.pop())
            await settle()
            assert not limit.waiting
            assert len(got) == 3
            for connection in got:
                pool.release(connection)

    async def test_a_caller_that_runs_out_of_time(self, new_pool: Callable[..., Pool],
                                                  limit: Limit) -> None:  # fmt: skip
        async with new_pool() as pool:
            connections = await some(pool, 3)
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
            await settle()
            assert not limit.waiting
            for connection in connections:
                pool.release(connection)

    @pytest.mark.parametrize("is_late", [False, True], ids=["in time", "too late"])
    async def test_it_ends_when_the_pool_is_closed(
        self, backend: Present, limit: Limit, is_late: bool
    ) -> None:
        others = [limit.occupy() for _ in range(3)]
        limit.is_late = is_late
        pool = backend.pool(min_size=2)
        await pool.open()
        await settle()
        assert len(limit.waiting) == 2
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.close)
            await settle()
            assert pool.statistics().size == 0
            for permit in others:
                permit.give_back()
        assert backend.attempts == []

    async def test_a_permit_that_comes_too_late_goes_back(
        self, backend: Present, limit: Limit
    ) -> None:
        limit.value = 1
        limit.is_late = True
        async with backend.pool() as pool, anyio.create_task_group() as tasks:
            connection = await pool.acquire()
            got = await ask(pool, tasks, 1)
            assert len(limit.waiting) == 1
            pool.release(connection)
            await settle()
            assert len(got) == 1
            limit.value = 2
            limit.serve()
            await settle()
            assert len(limit.held) == 1
            assert backend.opened == 1
            pool.release(got.pop())

    async def test_a_permit_that_comes_at_the_same_moment_goes_back(
        self, backend: Present, limit: Limit
    ) -> None:
        limit.value = 1
        async with backend.pool() as pool, anyio.create_task_group() as tasks:
            connection = await pool.acquire()
            got = await ask(pool, tasks, 1)
            pool.release(connection)
            # Before maintenance can look.
            limit.value = 2
            limit.serve()
            await settle()
            assert len(got) == len(limit.held) == backend.opened == 1
            pool.release(got.pop())

    async def test_an_attempt_that_was_stopped_before_its_task_began(
        self, backend: Present, limit: Limit
    ) -> None:
        pool = backend.pool(min_size=1)
        await pool.open()
        await pool.close()  # maintenance sees both at once, or the attempt has just been made
        pool._options.min_size = 0
        async with pool:
            admission = pool._maintenance.connecting.admission
            pool._maintenance.connecting.connect()
            was_waiting = admission.is_waiting
            admission.stop_needless()
            assert (was_waiting, admission.is_waiting) == (True, False)
            await settle()
        assert pool.statistics().size == 0

    async def test_an_error_of_an_attempt_that_was_stopped_is_of_no_interest(
        self, backend: Present, limit: Limit
    ) -> None:
        limit.error = ConnectionError("no server")
        limit.is_late = True
        pool = backend.pool(min_size=1)
        async with pool:
            await settle()
            assert limit.asked == 1
        statistics = pool.statistics()
        assert (statistics.size, statistics.connects) == (0, 0)

    async def test_one_is_made_for_a_caller_that_does_not_wait(
        self, backend: Present, limit: Limit
    ) -> None:
        async with backend.pool() as pool:
            with pytest.raises(anyio.WouldBlock):
                pool.acquire_nowait()
            await settle()
            connections = [pool.acquire_nowait()]
            limit.value = 1
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            await anyio.sleep(10)
            assert len(limit.waiting) == 1  # it is still wanted
            limit.value = 2
            limit.serve()
            await settle()
            connections.append(pool.acquire_nowait())
            assert not limit.waiting
            for connection in connections:
                pool.release(connection)

    async def test_a_drain_meanwhile_does_not_concern_it(
        self, backend: Present, limit: Limit
    ) -> None:
        limit.value = 1
        async with backend.pool(max_lifetime=60) as pool, anyio.create_task_group() as tasks:
            connection = await pool.acquire()
            got = await ask(pool, tasks, 1)
            tasks.start_soon(pool.drain)
            await settle()
            pool.release(connection)
            await settle()
            assert [connection.number for connection in got] == [2]
            pool.release(got.pop())
            await settle()
            assert (limit.asked, backend.closings) == (2, [1])
            await anyio.sleep(60)
            assert pool.statistics().closed["lifetime"] == 1  # its age is the reason now

    async def test_shrinking_the_pool_ends_it_first(self, backend: Present, limit: Limit) -> None:
        async with backend.pool(min_size=6, max_size=6) as pool:
            await settle()
            assert len(limit.waiting) == 3
            await pool.resize(4, 4)
            await settle()
            assert (len(limit.held), len(limit.waiting)) == (3, 1)
            assert backend.closings == []

    async def test_in_an_outage_one_attempt_goes_on(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        backend.refuses = True
        async with new_pool(timeout=3) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            others = [limit.occupy() for _ in range(3)]
            await anyio.sleep(60)
            assert pool.statistics().connect_errors >= 3
            assert len(limit.waiting) == 1
            backend.refuses = False
            others.pop().give_back()
            await anyio.sleep(1)
            assert pool.healthy
            for permit in others:
                permit.give_back()

    async def test_a_task_of_the_pool_that_is_cancelled_from_outside(
        self, anyio_backend_name: str, backend: Present, limit: Limit
    ) -> None:
        if anyio_backend_name != "asyncio":
            pytest.skip("only asyncio has native cancellation")
        import asyncio

        limit.value = 1
        async with backend.pool() as pool, anyio.create_task_group() as tasks:
            connection = await pool.acquire()
            got = await ask(pool, tasks, 1)
            for waits in True, False:  # the second one before it has begun
                if waits:
                    await settle()
                before = limit.asked
                [task] = [t for t in asyncio.all_tasks() if t.get_name().endswith(" admit")]
                task.cancel()
                while limit.asked == before and not waits:
                    await anyio.sleep(0)
                while not [
                    t
                    for t in asyncio.all_tasks()
                    if t is not task and t.get_name().endswith("admit")
                ]:
                    await anyio.sleep(0)
            await settle()
            assert len(limit.waiting) == 1
            pool.release(connection)
            await settle()
            pool.release(got.pop())


class TestReplacements(Virtual):
    async def test_a_replacement_takes_a_permit_of_its_own(
        self, new_pool: Callable[..., Pool], limit: Limit
    ) -> None:
        limit.value = 2
        async with new_pool(min_size=1, max_size=1, max_lifetime=10) as pool:
            await anyio.sleep(25)
            assert limit.tried == 2
            assert len(limit.held) == 1
            assert pool.statistics().closed["lifetime"] == 2

    async def test_a_replacement_does_not_wait_for_one(
        self, new_pool: Callable[..., Pool], limit: Limit, backend: Present
    ) -> None:
        limit.value = 1
        async with new_pool(min_size=1, max_size=1, max_lifetime=10) as pool:
            await anyio.sleep(25)
            assert limit.tried == 2
            assert backend.most_open == 1
            assert pool.statistics().closed["lifetime"] == 2
            async with pool.connection():
                pass

    async def test_one_that_the_limit_refuses_is_no_failed_connect(
        self, backend: Present, limit: Limit
    ) -> None:
        events: list[PoolEvent] = []
        async with backend.pool(
            min_size=1, max_size=1, max_lifetime=10, on_event=events.append
        ) as pool:
            await pool.wait()
            limit.error = ConnectionError("no server")
            while not any(event.error for event in events):
                await anyio.sleep(0.01)
            assert events[-1].kind == "connect_failed"
            limit.error = None
            await anyio.sleep(5)
            assert backend.opened == 2
            assert pool.healthy


class TestLoss(Virtual):
    async def test_an_idle_connection_is_closed_at_once(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        events: list[PoolEvent] = []
        async with new_pool(on_event=events.append) as pool:
            pool.release(await pool.acquire())
            backend.lost_permits = 1
            limit.held[0].lose()
            await settle()
            backend.lost_permits = 0
            assert closed_for(events) == ["limit"]
            assert backend.closings == [1]
            assert pool.statistics().closed["limit"] == 1

    async def test_a_borrowed_one_when_it_comes_back(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        async with new_pool() as pool:
            async with pool.connection():
                backend.lost_permits = 1
                limit.held[0].lose()
                await settle()
                assert backend.closings == []
            await settle()
            backend.lost_permits = 0
            assert backend.closings == [1]
            assert pool.statistics().closed["limit"] == 1
            async with pool.connection() as connection:
                assert connection.number == 2

    @pytest.mark.parametrize("at", ["connect", "configure", "permit"])
    async def test_one_that_is_being_made(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit, at: str
    ) -> None:
        gate = anyio.Event()
        configured: list[Connection] = []

        async def configure(connection: Connection) -> None:
            configured.append(connection)
            await gate.wait()

        if at == "connect":
            backend.gate = gate
        if at == "permit":  # lost before the pool has it
            gate.set()
            take_for_pool = limit.take_for_pool

            async def take_and_lose(*, blocking: bool) -> Permit | None:
                permit = await take_for_pool(blocking=blocking)
                if permit is not None and backend.opened == 0:
                    backend.lost_permits = 1
                    permit.lose()
                return permit

            limit.take_for_pool = take_and_lose  # type: ignore[method-assign]
        async with new_pool(configure=configure) as pool, anyio.create_task_group() as tasks:
            got = await ask(pool, tasks, 1)
            if at != "permit":
                assert (backend.connecting, len(configured)) == (at == "connect", at != "connect")
                backend.lost_permits = 1
                limit.held[0].lose()
                gate.set()
            await settle()
            backend.lost_permits = 0
            assert [connection.number for connection in got] == [2]
            assert backend.closings == [1]
            assert pool.statistics().closed["limit"] == 1
            pool.release(got.pop())
            configured.clear()

    async def test_one_that_is_ready_to_replace_another(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        async with new_pool(max_size=1, max_lifetime=10) as pool:
            async with pool.connection():
                await anyio.sleep(9.9)
                assert limit.tried == 1
                assert len(limit.held) == 2
                backend.lost_permits = 1
                limit.held[1].lose()
                await settle()
                backend.lost_permits = 0
                assert backend.closings == [2]
            await settle()
            async with pool.connection():
                assert len(limit.held) == 1

    async def test_one_that_is_being_closed(self, backend: Present, limit: Limit) -> None:
        gate = anyio.Event()
        backend.at_close = gate.wait
        async with backend.pool() as pool:
            pool.discard(await pool.acquire())
            await settle()
            backend.lost_permits = 1
            limit.held[0].lose()
            gate.set()
            await settle()
            backend.lost_permits = 0
            closed = pool.statistics().closed
            assert (closed["discard"], closed["limit"]) == (1, 0)


class TestErrors(Virtual):
    async def test_a_limit_without_its_server_counts_as_failed_connects(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        limit.error = BackendUnavailable("no server")
        async with new_pool() as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(5)
            assert caught.value.__cause__ is limit.error
            assert not pool.healthy
            assert backend.attempts == []
            assert pool.statistics().connect_errors > 2
            limit.error = None
            await anyio.sleep(20)
            assert pool.healthy

    @pytest.mark.parametrize(
        "error", [RuntimeError("not entered"), ValueError("other settings")], ids=repr
    )
    async def test_a_mistake_is_told_at_once(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit, error: Exception
    ) -> None:
        limit.error = error
        async with new_pool() as pool:
            with anyio.fail_after(0.01):
                with pytest.raises(PoolMisuse, match=f"limit of the pool: {error}") as caught:
                    await pool.acquire(math_inf)
            assert caught.value.__cause__ is error
            assert backend.attempts == []
            limit.error = None  # now it is entered
            await anyio.sleep(20)
            async with pool.connection():
                pass

    @pytest.mark.parametrize("wrong", [3, "3", object(), anyio.Semaphore(3), Limit])
    async def test_what_is_no_limit(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="limit must be a semaphore"):
            ConnectionPool(object, limit=wrong)

    async def test_one_that_only_counts_is_no_limit(self) -> None:
        class Half:
            async def take_for_pool(self, *, blocking: bool) -> None: ...

        with pytest.raises(TypeError, match="not Half"):
            ConnectionPool(object, limit=Half())  # type: ignore[call-overload]


class TestContention(Virtual):
    async def test_the_one_that_is_idle_for_longest_is_closed(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit
    ) -> None:
        async with new_pool(min_size=0) as pool:
            connections = await some(pool, 3)
            for number in 2, 0, 1:
                pool.release(connections[number])
                await anyio.sleep(1)
            connections.clear()
            for closings in [3], [3, 1], [3, 1, 2], [3, 1, 2]:
                limit.contend()
                await settle()
                assert backend.closings == closings
            assert pool.statistics().closed["limit"] == 3

    async def test_what_is_borrowed_stays(self, backend: Present, limit: Limit) -> None:
        async with backend.pool() as pool, pool.connection():
            limit.contend()
            await settle()
            assert pool.statistics().size == 1
            assert pool.statistics().closed["limit"] == 0

    async def test_not_while_the_pool_has_waiters(self, backend: Present, limit: Limit) -> None:
        checked = anyio.Event()

        async def check(connection: Connection) -> None:
            await checked.wait()

        async with (
            backend.pool(check=check, check_idle=0, max_size=2) as pool,
            anyio.create_task_group() as tasks,
        ):
            for connection in await some(pool, 2):
                pool.release(connection)
            await anyio.sleep(1)
            del connection
            got = await ask(pool, tasks, 1)  # one is checked, the other is idle
            assert pool.statistics().idle == 1
            limit.contend()
            await settle()
            assert backend.closings == []
            checked.set()
            await settle()
            limit.contend()
            await settle()
            assert len(backend.closings) == 1
            pool.release(got.pop())

    async def test_what_min_size_keeps_is_given_up_too_and_asked_for_again(
        self, backend: Present, limit: Limit
    ) -> None:
        async with backend.pool(min_size=3) as pool, anyio.create_task_group() as tasks:
            await pool.wait()
            got: list[Permit | None] = []

            async def take_one() -> None:
                got.append(await limit.take_for_pool(blocking=True))

            tasks.start_soon(take_one)
            await settle()
            limit.contend()
            await settle()
            assert len(got) == 1
            assert pool.statistics().size == 3
            assert (backend.closings, len(limit.waiting)) == ([1], 1)
            permit = got.pop()
            assert permit is not None
            permit.give_back()
            await settle()
            assert backend.opened == 4


async def test_contention_is_told_by_another_thread(backend: Present, limit: Limit) -> None:
    async with backend.pool() as pool:
        pool.release(await pool.acquire())
        await anyio.to_thread.run_sync(limit.contend)
        await until_async(lambda: backend.closings == [1])


math_inf = float("inf")


@pytest.mark.stress
class TestStorm(Virtual):
    @pytest.mark.parametrize("seed", range(12))
    async def test_all_permits_come_back(
        self, new_pool: Callable[..., Pool], backend: Present, limit: Limit, seed: int
    ) -> None:
        rng = random.Random(seed)
        backend.verify_permits()
        limit.value = 4

        async def reset(connection: Connection) -> None:
            await anyio.sleep(rng.uniform(0, 0.1))
            if rng.random() < 0.1:
                raise ConnectionError("reset")

        async def configure(connection: Connection) -> None:
            if rng.random() < 0.1:
                raise ConnectionError("configure")

        async def user(pool: Pool) -> None:
            for _ in range(20):
                await anyio.sleep(rng.expovariate(2))
                with anyio.move_on_after(rng.expovariate(1)):
                    try:
                        checkout = pool.connection(rng.choice([0, 0.5, 3]))
                        async with checkout:
                            await anyio.sleep(rng.expovariate(3))
                            if rng.random() < 0.2:
                                checkout.discard()
                    except PoolTimeout:
                        pass

        async def mischief(pool: Pool) -> None:
            others: list[Permit] = []
            for _ in range(60):
                await anyio.sleep(rng.expovariate(3))
                match rng.randrange(7):
                    case 0:
                        limit.contend()
                    case 1 if others:
                        others.pop().give_back()
                    case 2 if len(limit.held) < limit.value:
                        others.append(limit.occupy())
                    case 3:
                        limit.error = rng.choice([None, BackendUnavailable("no server")])
                    case 4:
                        backend.refuses = rng.random() < 0.3
                    case 5:
                        await pool.drain()
                    case 6:
                        low = rng.randrange(3)
                        await pool.resize(low, low + 1 + rng.randrange(5))
            while others:
                others.pop().give_back()
            limit.error = None
            backend.refuses = False

        backend.pause = 0.05
        async with new_pool(
            max_size=5, max_idle=2.0, max_lifetime=4.0, reset=reset, configure=configure
        ) as pool:
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(user, pool)
                tasks.start_soon(mischief, pool)
            await anyio.sleep(30)
            assert len(limit.held) == pool.statistics().size


FORK = """
import asyncio, gc, os, sys
import anyio, trio
from aiosync import ConnectionPool

class Permit:
    def on_loss(self, token, function):
        pass
    def give_back(self):
        given_back.append(os.getpid())

class Limit:
    taken = 0
    async def take_for_pool(self, *, blocking):
        self.taken += 1
        if self.taken == 4:
            await gate.wait()
        return Permit()
    def watch_contention(self, function):
        return bool

class Connection:
    pass

async def connect():
    if limit.taken == 3:
        await gate.wait()
    return Connection()

async def close(connection):
    pass

async def prepare():
    global gate, limit, given_back, pool, borrowed
    gate, limit, given_back = anyio.Event(), Limit(), []
    pool = ConnectionPool(connect, close=close, min_size=1, limit=limit)
    await pool.open()
    await pool.wait()
    borrowed = [await pool.acquire(), await pool.acquire()]
    pool.release(borrowed.pop())  # one is idle, one borrowed
    await pool.resize(4, 4)  # one connects, one waits for a permit
    while limit.taken < 4:
        await anyio.sleep(0.001)

async def child():
    gate.set()
    borrowed.clear()
    gc.collect()
    await anyio.sleep(0.2)
    await pool.close()
    assert not given_back, given_back

async def parent():
    pool.release(borrowed.pop())
    gate.set()
    await pool.close()
    assert given_back == [os.getpid()] * 4, given_back
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_after_a_fork_the_child_gives_nothing_back(loop: str) -> None:
    done = run_forking(FORK, loop)
    assert done.stdout == "the end\n", done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_attempts_of_a_forked_process_give_nothing_back() -> None:
    limit = Limit(1)
    async with ConnectionPool(object) as pool:  # without a limit
        core = pool._maintenance.core
        attempt: PoolEntry[object] = PoolEntry(0.0)
        attempt.permit = limit.occupy()
        core.attempts.append(attempt)
        core.tasks.forked = True
        core.forget_attempt(attempt)
        core.tasks.forked = False
        assert len(limit.held) == 1
        assert attempt.permit is None


def test_the_protocol_is_what_the_fake_implements() -> None:
    fake: ConnectionLimit = Limit(1)
    assert fake


async def close_soon(connection: Connection) -> None:
    await anyio.lowlevel.checkpoint()


def redis_pool(limit: DistributedSemaphore, **options: Any) -> Pool:
    return ConnectionPool(lambda: Connection(0), close=close_soon, limit=limit, **options)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    redis_server.command("FLUSHALL")
    async with Redis(redis_server.url, lease=1.0, restart_gate=False) as redis:
        yield redis


HOLDERS = "aiosync:{db}:semaphore:holders"


@pytest.mark.redis
@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": False}), ("trio", {})], ids=["asyncio", "trio"]
)
class TestOnAServer:
    async def test_the_server_counts_connections(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        limit = redis.semaphore("db", 2)
        async with redis_pool(limit) as pool:
            connections = await some(pool, 2)
            with pytest.raises(PoolTimeout):
                await pool.acquire(0.05)
            assert redis_server.command("ZCARD", HOLDERS) == 2
            pool.discard(connections.pop())
            connections.append(await pool.acquire())
            give_back(pool, connections)
        await redis.flush()
        assert redis_server.command("ZCARD", HOLDERS) == 0

    @pytest.mark.slow
    async def test_an_idle_pool_gives_way_to_another_of_its_process(self, redis: Redis) -> None:
        limit = redis.semaphore("db", 2)
        async with redis_pool(limit, min_size=2) as idle, redis_pool(limit) as busy:
            await idle.wait()
            async with busy.connection(5):
                assert idle.statistics().closed["limit"] == 1

    @pytest.mark.slow
    async def test_a_pool_does_not_give_way_to_itself(self, redis: Redis) -> None:
        limit = redis.semaphore("db", 2)
        async with redis_pool(limit, min_size=3) as pool:
            await until_async(lambda: pool.statistics().idle == 2)
            await anyio.sleep(1.0)  # three audits
            assert pool.statistics().closed["limit"] == 0

    @pytest.mark.slow
    async def test_a_permit_that_the_server_has_forgotten(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        async with redis_pool(redis.semaphore("db", 2)) as pool:
            pool.release(await pool.acquire())
            redis_server.command("DEL", HOLDERS)
            await until_async(lambda: pool.statistics().closed["limit"])

    async def test_the_limit_is_forgotten_with_its_pool(self, redis: Redis) -> None:
        limit = redis.semaphore("db", 2)
        known = weakref.ref(limit)
        pool = redis_pool(limit)
        async with pool, pool.connection():
            pass
        del limit, pool
        await until_async(lambda: gc.collect() >= 0 and known() is None)

    async def test_without_waiting_there_is_a_permit_or_none(self, redis: Redis) -> None:
        limit = redis.semaphore("db", 1)
        async with limit:
            assert await limit.take_for_pool(blocking=False) is None
        await redis.flush()
        permit = await limit.take_for_pool(blocking=False)
        assert permit is not None
        permit.give_back()

    async def test_one_that_is_not_entered(self, redis_server: RedisServer) -> None:
        redis = Redis(redis_server.url)
        async with redis_pool(redis.semaphore("db", 2)) as pool:
            with pytest.raises(PoolMisuse, match="async with redis"):
                await pool.acquire()


class Process:
    """A process that runs `support.pool_process`."""

    def __init__(self, redis: RedisServer, postgres: PostgresServer, name: str) -> None:
        program = Path(pool_process.__file__)
        self._process = subprocess.Popen(
            [sys.executable, program, redis.url, postgres.host, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, command: str = "look") -> dict[str, Any]:
        """Give a command; return the answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        assert not answer["errors"], answer["errors"]
        return answer

    def leave(self) -> int:
        """End the process in good order; return its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in self._process.stdin, self._process.stdout:
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture(scope="module")
def small_postgres() -> Iterator[PostgresServer]:
    """A server that takes hardly more connections than the limit: one to look, some that end."""
    for module in "asyncpg", "psycopg":
        pytest.importorskip(module, exc_type=ImportError)
    reason = PostgresServer.why_not()
    if reason is not None:
        pytest.skip(f"there is no PostgreSQL server: {reason}")
    with PostgresServer(max_connections=str(LIMIT + 4)) as server:
        server.start()
        yield server


@pytest.mark.redis
@pytest.mark.postgres
@pytest.mark.slow
def test_three_processes_share_a_server(
    redis_server: RedisServer, small_postgres: PostgresServer
) -> None:
    redis_server.command("FLUSHALL")
    with ExitStack() as stack:
        observer = stack.enter_context(small_postgres.connect())
        processes = [Process(redis_server, small_postgres, f"limited {i}") for i in range(3)]
        for process in processes:
            stack.callback(process.kill)
        first, second, third = processes

        def connections() -> int:
            statement = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'limited%'"
            )
            [(found,)] = observer.execute(statement).fetchall()
            # A connection that was closed may still be there for a moment.
            assert found <= LIMIT + 3
            return int(found)

        # One takes them all.
        first.tell("work 60")
        until(lambda: first.tell()["size"] >= LIMIT and connections() == LIMIT)
        first.tell("rest")
        # It is idle, and gives them up to the others.
        second.tell("work 6")
        third.tell("work 6")
        until(lambda: second.tell()["loans"] and third.tell()["loans"])
        # All three have work to do: each gets a share, and none fails.
        first.tell("work 6")
        for process in processes * 5:
            connections()
            until(lambda process=process: process.tell()["loans"])  # type: ignore[misc]
        second.tell("rest")
        third.tell("rest")
        # What one has that is killed passes on.
        until(lambda: first.tell()["size"] > 2)
        first.kill()
        died = time.monotonic()
        second.tell("work 60")
        until(lambda: second.tell()["size"] >= LIMIT and connections() == LIMIT)
        # After a lease, and that of the third process one by one.
        assert time.monotonic() - died < LEASE * (1 + LIMIT / 3) + 3
        second.tell("rest")
        assert second.leave() == third.leave() == 0
        until(lambda: connections() == 0)
        assert redis_server.command("ZCARD", "aiosync:{connections}:semaphore:holders") == 0
