"""ConnectionPool under every event loop: who gets a connection, what becomes of it, and when.

The connections are stubs, and their backend notes what is opened and closed. At the end of each
test everything that was opened must have been closed, once. Where time matters it is virtual: it
stands still while something runs, and jumps when everybody waits.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import logging
import math
import pickle
import random
import re
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio
import trio
import trio.abc
import trio.testing
from anyio import CancelScope, WouldBlock, create_task_group
from helpers import PATIENCE, run_python
from virtual_time import run_virtually, skip_time, spun, virtual

from aiosync import ConnectionPool, PoolClosed, PoolEvent, PoolTimeout, TooManyRequests

PSYCOPG_KEYS = {
    "pool_min", "pool_max", "pool_size", "pool_available", "requests_waiting", "requests_num",
    "requests_queued", "requests_wait_ms", "requests_errors", "usage_ms", "returns_bad",
    "connections_num", "connections_ms", "connections_errors", "connections_lost",
}  # fmt: skip
REASONS = (
    "lifetime", "idle", "check", "reset", "configure", "discard", "drain", "resize", "collected",
    "shutdown", "forced",
)  # fmt: skip
OTHER_KEYS = {"in_use", "connecting", "timeouts", "cancelled", "leaks"} | {
    f"closed_{reason}" for reason in REASONS
}


class Connection:
    """A stub. Nobody but the pool and its borrowers keeps it, so that it can be collected."""

    def __init__(self, number: int) -> None:
        self.number = number


Pool = ConnectionPool[Connection]


class Backend:
    """Where connections lead to. It notes what happens, and fails or hangs when told to."""

    def __init__(self) -> None:
        self.opened = 0
        self.closings: list[int] = []
        self.closed_at: list[float] = []
        self.attempts: list[float] = []
        self.connecting = self.most_connecting = 0
        self.most_open = 0
        self.refuses = False
        # How long connect takes, and what it waits for besides.
        self.pause = 0.0
        self.gate: anyio.Event | None = None
        # What else to await or raise at each step.
        self.at_close: Callable[[], Awaitable[object]] | None = None
        # Connections that nobody closes: they were collected.
        self.lost: set[int] = set()

    async def connect(self) -> Connection:
        self.attempts.append(anyio.current_time())
        self.connecting += 1
        self.most_connecting = max(self.most_connecting, self.connecting)
        try:
            await anyio.sleep(self.pause)
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.connecting -= 1
        if self.refuses:
            raise ConnectionRefusedError("no")
        self.opened += 1
        self.most_open = max(self.most_open, len(self.open()))
        return Connection(self.opened)

    async def close(self, connection: Connection) -> None:
        self.closings.append(connection.number)
        self.closed_at.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()
        if self.at_close is not None:
            await self.at_close()

    def open(self) -> set[int]:
        return set(range(1, self.opened + 1)) - set(self.closings) - self.lost

    def pool(self, **options: Any) -> Pool:
        return ConnectionPool(self.connect, close=self.close, **options)

    def verify(self) -> None:
        twice = [number for number, times in Counter(self.closings).items() if times > 1]
        assert not twice, f"closed more than once: {twice}"
        assert not self.open(), f"left open: {self.open()}"
        assert not self.connecting


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.verify()


async def settle() -> None:
    """Wait until every other task is blocked. (Anyio's own takes 0.1 seconds under asyncio.)"""
    if sniffio.current_async_library() == "trio":
        await trio.testing.wait_all_tasks_blocked()
        return
    me, calm = asyncio.current_task(), 0
    while calm < 3:
        await asyncio.sleep(0)
        others: list[Any] = [task for task in asyncio.all_tasks() if task is not me]
        waits_for = [task._fut_waiter for task in others]
        calm = 0 if any(waiter is None or waiter.done() for waiter in waits_for) else calm + 1


class Virtual:
    """A base of test classes whose async tests run in virtual time."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> Any:
        return virtual(request.param)

    @pytest.fixture(autouse=True)
    def time_must_pass(self) -> Iterator[None]:
        spun()
        yield
        assert not spun(), "some task ran all the time"


in_virtual_asyncio = pytest.mark.parametrize(
    "anyio_backend", [virtual("asyncio")], ids=["asyncio"]
)  # which, unlike trio, runs tasks in an order that is known


async def never() -> None:
    await anyio.sleep(math.inf)


def nothing(*args: object) -> None:
    pass


async def take(pool: Pool, into: list[Connection], timeout: float | None = None) -> None:
    into.append(await pool.acquire(timeout))


async def some(pool: Pool, number: int) -> list[Connection]:
    return [await pool.acquire() for _ in range(number)]


def give_back(pool: Pool, connections: list[Connection]) -> None:
    while connections:
        pool.release(connections.pop())


async def lose_one(pool: Pool) -> int:
    """Borrow a connection, and forget it. Return its number."""
    connection = await pool.acquire()
    return connection.number


def kinds(events: list[PoolEvent]) -> list[str]:
    return [event.kind for event in events]


def closed_for(events: list[PoolEvent]) -> list[str]:
    return [event.reason for event in events if event.kind == "closed"]


TIMES = (
    "timeout", "max_lifetime", "max_idle", "check_idle", "check_timeout", "connect_timeout",
    "close_timeout", "reconnect_timeout", "leak_timeout",
)  # fmt: skip
HOOKS = ("close", "check", "configure", "reset", "reconnect_failed", "on_event")
COUNTS = ("min_size", "max_size", "max_waiting", "max_connecting")


def with_options(**options: Any) -> ConnectionPool[Any]:
    if "check_idle" in options:
        options.setdefault("check", nothing)
    return ConnectionPool(object, **options)


class TestArguments:
    @pytest.mark.parametrize("connect", [None, 5, "connect"])
    def test_connect_must_be_callable(self, connect: Any) -> None:
        with pytest.raises(TypeError, match="connect must be callable"):
            ConnectionPool(connect)

    @pytest.mark.parametrize("name", HOOKS)
    def test_a_hook_must_be_callable(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be callable or None, not int"):
            with_options(**{name: 5})

    @pytest.mark.parametrize("name", HOOKS)
    def test_a_hook_may_be_none(self, name: str) -> None:
        with_options(**{name: None})

    @pytest.mark.parametrize("name", COUNTS)
    @pytest.mark.parametrize("value", ["1", 1.0, None])
    def test_a_count_must_be_an_int(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            with_options(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("min_size", -1), ("max_size", 0), ("max_waiting", -1), ("max_connecting", 0)],
    )
    def test_a_count_must_not_be_too_small(self, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{name} must be {value + 1} or more"):
            with_options(**{name: value})
        with_options(**{name: value + 1})

    def test_min_size_must_not_exceed_max_size(self) -> None:
        with pytest.raises(ValueError, match=r"min_size \(3\) must not exceed max_size \(2\)"):
            with_options(min_size=3, max_size=2)
        with pytest.raises(ValueError, match="must not exceed"):
            with_options(min_size=11)
        with_options(min_size=2, max_size=2)

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", ["1", b"", (), object()])
    def test_a_time_must_be_a_number(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"^{name}: "):
            with_options(**{name: value})

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", [-1, -0.001, -math.inf, math.nan])
    def test_a_time_must_not_be_negative_nor_nan(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=name):
            with_options(**{name: value})

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", [1, 0.5, math.inf, 10**300, None])
    def test_a_time_may_be_any_positive_number_or_none(self, name: str, value: Any) -> None:
        with_options(**{name: value})

    @pytest.mark.parametrize("option", ["max_lifetime", "max_idle", "leak_timeout"])
    def test_some_times_must_be_more_than_nothing(self, option: str) -> None:
        options: dict[str, Any] = {option: 0}
        with pytest.raises(ValueError, match=f"{option} must be more than 0 seconds"):
            ConnectionPool(object, **options)

    @pytest.mark.parametrize("name", [5, b"pool", object()])
    def test_the_name_must_be_a_string(self, name: Any) -> None:
        with pytest.raises(TypeError, match="name"):
            with_options(name=name)

    def test_an_unknown_argument_is_refused(self) -> None:
        with pytest.raises(TypeError, match="max_sise"):
            with_options(max_sise=3)

    def test_all_but_connect_is_given_by_name(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            ConnectionPool(object, nothing)  # type: ignore[call-overload]

    def test_sizes_by_default_and_as_told(self) -> None:
        pool = with_options()
        assert (pool.min_size, pool.max_size) == (0, 10)
        pool = with_options(min_size=2, max_size=3)
        assert (pool.min_size, pool.max_size) == (2, 3)

    def test_pools_are_numbered_unless_they_have_a_name(self) -> None:
        first, named, second = with_options(), with_options(name="db"), with_options()
        assert named.name == "db"
        numbers = [re.fullmatch(r"pool-(\d+)", pool.name) for pool in (first, second)]
        assert all(numbers)
        a, b = (int(number[1]) for number in numbers if number)
        assert b == a + 1

    def test_a_pool_can_be_referenced_weakly(self) -> None:
        pool = with_options()
        assert weakref.ref(pool)() is pool

    @pytest.mark.parametrize("what", ["pool", "checkout"])
    def test_a_pool_can_neither_be_pickled_nor_copied(self, what: str) -> None:
        pool = with_options()
        it: Any = pool if what == "pool" else pool.connection()
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle or copy"):
                attempt(it)

    def test_an_attribute_that_does_not_exist_can_not_be_set(self) -> None:
        pool: Any = with_options()
        with pytest.raises(AttributeError):
            pool.max_sise = 5
        with pytest.raises(AttributeError):
            pool.max_size = 5

    @pytest.mark.parametrize("min_size", [-1, 3])
    def test_timeouts_of_zero_do_not_hide_a_bad_size(self, min_size: int) -> None:
        with pytest.raises(ValueError, match="min_size"):
            with_options(timeout=0, min_size=min_size, max_size=2)


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


class Asynchronous:
    """Makes a function of any kind out of a plain one."""

    def __init__(self, is_async: bool) -> None:
        self.is_async = is_async

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.is_async:
            return function

        async def work(*args: Any) -> Any:
            await anyio.lowlevel.checkpoint()
            return function(*args)

        return work


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def kind_of(request: pytest.FixtureRequest) -> Asynchronous:
    return Asynchronous(request.param)


class Closable:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls


class WithClose(Closable):
    def close(self) -> None:
        self.calls.append("close")


class WithAsyncClose(Closable):
    async def close(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.calls.append("async close")


class WithBoth(WithClose):
    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.calls.append("aclose")


class WithCloseThatIsNoMethod(Closable):
    close = "no"


@pytest.mark.anyio
class TestCallbacks:
    async def test_all_of_them_may_be_plain_or_async(self, kind_of: Asynchronous) -> None:
        calls: list[str] = []

        def note(name: str, *args: object) -> None:
            calls.append(name)

        def connect() -> Connection:
            calls.append("connect")
            return Connection(1)

        pool: ConnectionPool[Any] = ConnectionPool(
            kind_of(connect),
            close=kind_of(partial(note, "close")),
            check=kind_of(partial(note, "check")),
            configure=kind_of(partial(note, "configure")),
            reset=kind_of(partial(note, "reset")),
            check_idle=0,
        )
        async with pool:
            assert calls == []
            pool.release(await pool.acquire())
            await settle()
            assert calls == ["connect", "configure", "reset"]
            async with pool.connection():
                assert calls == ["connect", "configure", "reset", "check"]
            await settle()
        assert calls == ["connect", "configure", "reset", "check", "reset", "close"]

    async def test_on_event_and_reconnect_failed_may_be_plain_or_async(
        self, kind_of: Asynchronous, backend: Backend
    ) -> None:
        backend.refuses = True
        events: list[PoolEvent] = []
        failed: list[object] = []
        pool = backend.pool(
            on_event=kind_of(events.append),
            reconnect_failed=kind_of(failed.append),
            reconnect_timeout=0,
        )
        async with pool:
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            assert sorted(kinds(events)) == ["connect_failed", "outage"]
            assert failed == [pool]
            assert failed[0] is pool

    @pytest.mark.parametrize("name", ["on_event", "reconnect_failed"])
    async def test_what_only_wants_to_know_may_fail_without_harm(
        self, kind_of: Asynchronous, backend: Backend, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: object) -> None:
            raise KeyError("from the hook")

        backend.refuses = True
        options = {name: kind_of(fail)}
        async with backend.pool(reconnect_timeout=0, **options) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            await settle()
            backend.refuses = False
            pool.release(await pool.acquire(PATIENCE))
        failures = [record for record in caplog.records if record.exc_info]
        assert failures
        assert all("from the hook" in str(record.exc_info) for record in failures)

    @pytest.mark.parametrize(
        ("cls", "calls"),
        [
            (WithClose, ["close"]),
            (WithAsyncClose, ["async close"]),
            (WithBoth, ["aclose"]),
            (Closable, []),
            (WithCloseThatIsNoMethod, []),
        ],
    )
    async def test_by_default_a_connection_is_closed_by_its_own_method(
        self, cls: type[Closable], calls: list[str]
    ) -> None:
        found: list[str] = []
        async with ConnectionPool(lambda: cls(found)) as pool, pool.connection():
            assert found == []
        assert found == calls
        assert pool.get_stats()["closed_shutdown"] == 1

    async def test_connect_must_not_return_none(self) -> None:
        async with ConnectionPool(lambda: None) as pool:
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(0)
        assert isinstance(caught.value.__cause__, TypeError)
        assert "returned None" in str(caught.value.__cause__)

    async def test_connect_must_not_return_the_same_object_twice(self) -> None:
        one = Connection(1)
        closed: list[Connection] = []
        async with ConnectionPool(lambda: one, close=closed.append) as pool:
            async with pool.connection() as connection:
                assert connection is one
                with pytest.raises(WouldBlock):
                    pool.acquire_nowait()
                await settle()
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(0)
                assert isinstance(caught.value.__cause__, TypeError)
                assert "has already" in str(caught.value.__cause__)
                assert pool.get_stats()["pool_size"] == 1
            assert closed == []
        assert closed == [one]

    async def test_connect_must_not_return_the_same_object_while_that_is_configured(self) -> None:
        one = Connection(1)
        taken: list[Connection] = []
        async with ConnectionPool(
            lambda: one, close=nothing, configure=lambda _: anyio.lowlevel.checkpoint()
        ) as pool:
            async with create_task_group() as tg:
                for _ in range(2):
                    tg.start_soon(take, pool, taken)
                await settle()
                lent = len(taken)
                tg.cancel_scope.cancel()
            pool.release(one)
        assert lent == 1

    async def test_the_same_object_may_come_again_after_it_was_closed(self) -> None:
        one = Connection(1)
        closed: list[Connection] = []
        async with ConnectionPool(lambda: one, close=closed.append, max_size=1) as pool:
            for _ in range(3):
                pool.discard(await pool.acquire(PATIENCE))
            await settle()
            assert closed == [one] * 3
            assert pool.get_stats()["connections_errors"] == 0

    async def test_connections_need_not_be_hashable_comparable_or_weakly_referenced(self) -> None:
        connections: list[list[int]] = [[], []]
        closed: list[list[int]] = []
        supply = iter(connections)
        async with ConnectionPool(lambda: next(supply), close=closed.append) as pool:
            a, b = await pool.acquire(), await pool.acquire()
            assert a is not b
            pool.release(a)
            assert await pool.acquire() is a
            pool.release(b)
            pool.release(a)
        assert sorted(map(id, closed)) == sorted(map(id, connections))

    async def test_none_of_them_runs_in_the_task_of_a_borrower(self) -> None:
        tasks: list[int] = []

        def note(*_: object) -> None:
            tasks.append(anyio.get_current_task().id)

        def connect() -> Connection:
            note()
            return Connection(1)

        mine = anyio.get_current_task().id
        async with ConnectionPool(
            connect, close=note, check=note, configure=note, reset=note, check_idle=0
        ) as pool:
            for _ in range(2):
                async with pool.connection():
                    pass
                await settle()
        assert len(tasks) == 7 - 1  # connect, configure, reset, check, reset, close
        assert mine not in tasks


@pytest.mark.anyio
class TestTakingTurns:
    async def test_five_workers_with_three_connections_each_get_one_in_turn(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=3)
        inside: list[int] = []
        served: list[int] = []
        leave = [anyio.Event() for _ in range(5)]

        async def work(number: int) -> None:
            async with pool.connection() as connection:
                assert connection.number not in inside
                inside.append(connection.number)
                served.append(number)
                await leave[number].wait()
                inside.remove(connection.number)

        async with pool:
            async with create_task_group() as tg:
                for number in range(5):
                    tg.start_soon(work, number)
                    await settle()
                assert served == [0, 1, 2]
                assert sorted(inside) == [1, 2, 3]
                assert pool.get_stats()["requests_waiting"] == 2
                leave[1].set()
                await settle()
                assert served == [0, 1, 2, 3]
                assert sorted(inside) == [1, 2, 3]
                leave[3].set()
                await settle()
                assert served == [0, 1, 2, 3, 4]
                for event in leave:
                    event.set()
            assert inside == []
            assert pool.get_stats()["pool_available"] == 3
        assert backend.opened == 3
        assert backend.most_open == 3

    async def test_waiters_are_served_first_come_first_served(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        order: list[int] = []

        async def work(number: int) -> None:
            async with pool.connection():
                order.append(number)
                await anyio.lowlevel.checkpoint()

        async with pool:
            async with create_task_group() as tg, pool.connection():
                for number in range(20):
                    tg.start_soon(work, number)
                    await settle()
            assert order == list(range(20))
        assert backend.opened == 1

    async def test_who_returns_and_asks_again_goes_to_the_end(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1, fast_acquire=True)
        order: list[str] = []

        async def work(name: str, times: int) -> None:
            for _ in range(times):
                connection = await pool.acquire()
                order.append(name)
                await settle()
                pool.release(connection)

        async with pool, create_task_group() as tg:
            for name in "abc":
                tg.start_soon(work, name, 3)
                await anyio.sleep(0)
                while pool.get_stats()["requests_waiting"] < len(order):
                    await anyio.sleep(0)
        assert Counter(order) == Counter("abcabcabc")
        assert all(order[i] != order[i + 1] for i in range(6))
        assert order[:3] == order[3:6] == order[6:]

    async def test_a_newcomer_does_not_overtake_who_was_handed_a_connection(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=1)
        taken: list[Connection] = []
        async with pool:
            connection = await pool.acquire()
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                pool.release(connection)
                # The waiter has not run yet, but the connection is its own.
                with pytest.raises(WouldBlock):
                    pool.acquire_nowait()
                assert taken == []
            assert taken == [connection]
            pool.release(connection)

    async def test_a_hundred_tasks_get_ten_connections_equally_often(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=10)
        served: Counter[int] = Counter()

        async def work(number: int) -> None:
            while served.total() < 4000:
                async with pool.connection():
                    served[number] += 1
                    await anyio.lowlevel.checkpoint()

        async with pool, create_task_group() as tg:
            for number in range(100):
                tg.start_soon(work, number)
        assert len(served) == 100
        assert max(served.values()) <= 1.05 * min(served.values())
        assert backend.opened == backend.most_open == 10

    async def test_no_more_connections_are_made_than_there_are_workers(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=10)

        async def work() -> None:
            for _ in range(50):
                async with pool.connection():
                    await anyio.lowlevel.checkpoint()

        async with pool, create_task_group() as tg:
            for _ in range(4):
                tg.start_soon(work)
        assert 1 <= backend.opened <= 4

    async def test_a_waiter_is_served_by_whatever_is_there_first(self, backend: Backend) -> None:
        pool = backend.pool(max_size=2)
        taken: list[Connection] = []
        async with pool:
            first = await pool.acquire()
            backend.gate = anyio.Event()
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                assert backend.connecting == 1
                pool.release(first)
                await settle()
                assert taken == [first]
                # The one that comes too late is idle.
                backend.gate.set()
                await settle()
                assert pool.get_stats()["pool_available"] == 1
            give_back(pool, taken)

    async def test_cancelling_a_waiter_does_not_cancel_the_connect(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        backend.gate = anyio.Event()
        async with pool:
            for _ in range(3):
                async with create_task_group() as tg:
                    tg.start_soon(take, pool, [])
                    await settle()
                    tg.cancel_scope.cancel()
                assert backend.connecting == 1
            backend.gate.set()
            await settle()
            assert backend.opened == 1
            stats = pool.get_stats()
            assert (stats["pool_available"], stats["cancelled"]) == (1, 3)
            assert len(backend.attempts) == 1

    @pytest.mark.parametrize("seed", range(5))
    async def test_whoever_is_cancelled_no_slot_and_no_turn_is_lost(
        self, backend: Backend, seed: int
    ) -> None:
        chance = random.Random(seed)
        pool = backend.pool(
            max_size=3, reset=lambda _: anyio.lowlevel.checkpoint(), check=nothing, check_idle=0
        )
        scopes: list[CancelScope] = []
        done = Counter[str]()

        async def work() -> None:
            with CancelScope() as scope:
                scopes.append(scope)
                async with pool.connection() as connection:
                    done["served"] += 1
                    for _ in range(chance.randrange(3)):
                        await anyio.lowlevel.checkpoint()
                    if chance.random() < 0.2:
                        pool.discard(connection)

        async with pool:
            async with create_task_group() as tg:
                for _ in range(150):
                    tg.start_soon(work)
                    if chance.random() < 0.3:
                        await anyio.lowlevel.checkpoint()
                    if scopes and chance.random() < 0.5:
                        chance.choice(scopes).cancel()
            await settle()
            stats = pool.get_stats()
            assert done["served"] > 30
            assert (stats["in_use"], stats["requests_waiting"], stats["connecting"]) == (0, 0, 0)
            assert stats["pool_size"] == stats["pool_available"] == len(backend.open())
            # All three slots are still there.
            taken = [await pool.acquire(PATIENCE) for _ in range(3)]
            give_back(pool, taken)
        assert backend.most_open <= 3


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
                # Idle, and not to be had without a check by anybody who has the time.
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
            with pytest.raises(TimeoutError, match="db had no connection at once: of 1") as caught:
                await pool.acquire(0)
            assert isinstance(caught.value, PoolTimeout)
            assert caught.value.__cause__ is None
            assert caught.value.stats == pool.get_stats()
            assert caught.value.stats["in_use"] == 1
            assert caught.value.stats["timeouts"] == 1

    async def test_the_timeout_error_counts_from_the_last_pop_stats(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool, pool.connection():
            for _ in range(2):
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(0)
                assert caught.value.stats == pool.get_stats()
                pool.pop_stats()

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
class TestOpenAndClosed:
    async def test_a_pool_must_be_open(self, backend: Backend) -> None:
        pool = backend.pool(name="db")
        uses: list[Callable[[], Awaitable[object]]] = [
            pool.acquire, partial(pool.acquire, 0), pool.connection().__aenter__, pool.wait,
            partial(pool.resize, 1, 2), pool.drain, pool.check,
        ]  # fmt: skip
        for message in ("db is not open yet", "db is closed"):
            for use in uses:
                with pytest.raises(PoolClosed, match=message):
                    await use()
            with pytest.raises(PoolClosed, match=message):
                pool.acquire_nowait()
            with pytest.raises(ValueError, match="not borrowed"):
                pool.release(Connection(1))
            with pytest.raises(ValueError, match="does not belong"):
                pool.info(Connection(1))
            assert pool.get_stats()["pool_size"] == 0
            if "not open" in message:
                async with pool:
                    pass
        assert issubclass(PoolClosed, RuntimeError)
        assert (pool.min_size, backend.opened) == (0, 0)

    async def test_a_pool_can_be_opened_only_once(self, backend: Backend) -> None:
        pool = backend.pool()
        async with pool as itself:
            assert itself is pool
            with pytest.raises(PoolClosed, match="opened only once"):
                await pool.__aenter__()
            pool.release(await pool.acquire())
        with pytest.raises(PoolClosed, match="opened only once"):
            async with pool:
                pass

    async def test_waiters_are_told_at_once_that_the_pool_is_closed(self, backend: Backend) -> None:
        pool = backend.pool(name="db", max_size=1, close_timeout=PATIENCE)
        errors: list[Exception] = []

        async def wait() -> None:
            with pytest.raises(PoolClosed, match="db is closed") as caught:
                await pool.acquire()
            errors.append(caught.value)

        await pool.__aenter__()
        connection = await pool.acquire()
        async with create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(wait)
            await settle()
            tg.start_soon(pool.__aexit__, None, None, None)
            await settle()
            assert len(errors) == 3
            with pytest.raises(PoolClosed):
                await pool.acquire()
            # The borrower has its grace period.
            assert backend.open() == {1}
            pool.release(connection)
        assert pool.get_stats()["closed_shutdown"] == 1
        assert pool.get_stats()["requests_errors"] == 3

    async def test_who_waits_for_min_size_is_told_at_once_that_the_pool_is_closed(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(max_size=2, close_timeout=PATIENCE)
        told: list[bool] = []

        async def wait() -> None:
            with pytest.raises(PoolClosed):
                await pool.wait(None)
            told.append(True)

        await pool.__aenter__()
        connection = await pool.acquire()
        backend.gate = anyio.Event()
        await pool.resize(2, 2)
        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            tg.start_soon(pool.__aexit__, None, None, None)
            await settle()
            at_once = bool(told)
            pool.release(connection)
        assert told == [True]
        assert at_once

    async def test_who_waits_for_min_size_is_told_when_the_pool_is_closed(
        self, backend: Backend
    ) -> None:
        backend.gate = anyio.Event()
        pool = backend.pool(min_size=1)
        await pool.__aenter__()

        async def wait() -> None:
            with pytest.raises(PoolClosed):
                await pool.wait(None)

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            tg.start_soon(pool.__aexit__, None, None, None)

    async def test_connects_in_flight_are_given_up_at_closing(self, backend: Backend) -> None:
        backend.gate = anyio.Event()
        events: list[PoolEvent] = []
        async with backend.pool(min_size=5, max_connecting=4, on_event=events.append):
            await settle()
            assert backend.connecting == 4
        assert backend.connecting == 0
        assert backend.opened == 0
        assert events == []

    async def test_a_connection_that_is_configured_at_closing_is_closed(
        self, backend: Backend
    ) -> None:
        entered = anyio.Event()

        async def configure(_: Connection) -> None:
            entered.set()
            await never()

        async with backend.pool(min_size=1, configure=configure):
            await entered.wait()
        assert backend.closings == [1]

    async def test_a_connect_that_can_not_be_given_up_is_closed_when_it_is_done(
        self, backend: Backend
    ) -> None:
        gate, entered = anyio.Event(), anyio.Event()

        async def connect() -> Connection:
            with CancelScope(shield=True):
                entered.set()
                await gate.wait()
            return Connection(1)

        closed: list[Connection] = []
        pool = ConnectionPool(connect, close=closed.append, min_size=1)
        await pool.__aenter__()
        await entered.wait()
        async with create_task_group() as tg:
            tg.start_soon(pool.__aexit__, None, None, None)
            await settle()
            gate.set()
        assert len(closed) == 1

    async def test_a_connection_that_is_being_reset_or_checked_at_closing_is_closed(
        self, backend: Backend
    ) -> None:
        gate = anyio.Event()
        entered: list[str] = []

        async def hold(_: Connection) -> None:
            entered.append("")
            await gate.wait()

        pool = backend.pool(min_size=2, max_size=2, reset=hold, check=hold)
        await pool.__aenter__()
        await pool.wait()
        pool.release(await pool.acquire())

        async def check() -> None:
            with pytest.raises(PoolClosed):
                await pool.check()

        async with create_task_group() as tg:
            tg.start_soon(check)
            await settle()
            assert len(entered) == 2
            tg.start_soon(pool.__aexit__, None, None, None)
            await settle()
            gate.set()
        assert sorted(backend.closings) == [1, 2]

    async def test_who_is_cancelled_in_closing_closes_all_the_same(self, backend: Backend) -> None:
        with CancelScope() as scope:
            async with backend.pool(min_size=3) as pool:
                await pool.wait()
                scope.cancel()
            assert not backend.open()
            await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught

    async def test_what_the_block_raises_is_raised(self, backend: Backend) -> None:
        with pytest.raises(KeyError, match="mine"):
            async with backend.pool(min_size=1) as pool:
                await pool.wait()
                raise KeyError("mine")

    async def test_closing_at_once_after_opening_leaves_nothing(self, backend: Backend) -> None:
        async with backend.pool(min_size=3):
            pass
        assert backend.opened == len(backend.closings)

    @pytest.mark.parametrize("ticks", range(1, 8))
    async def test_closing_at_any_moment_of_opening_leaves_nothing(
        self, backend: Backend, ticks: int
    ) -> None:
        async with backend.pool(min_size=3, max_connecting=3, configure=nothing):
            for _ in range(ticks):
                await anyio.lowlevel.checkpoint()
        assert backend.opened == len(backend.closings)

    async def test_one_task_opens_and_another_closes(self, backend: Backend) -> None:
        pool = backend.pool(min_size=1)
        async with create_task_group() as tg:
            tg.start_soon(pool.__aenter__)
        # The cancellation of the task group that opened it is none of the pool's business.
        async with create_task_group() as tg:
            tg.cancel_scope.cancel()
        await pool.wait()
        async with pool.connection():
            pass
        async with create_task_group() as tg:
            tg.start_soon(pool.__aexit__, None, None, None)
        assert backend.closings == [1]

    async def test_the_scope_of_who_opens_it_does_not_reach_the_pool(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(min_size=1)
        with CancelScope() as scope:
            await pool.__aenter__()
            scope.cancel()
        await settle()
        async with pool.connection(PATIENCE):
            pass
        await pool.__aexit__(None, None, None)

    async def test_another_event_loop_can_not_use_it(self, backend: Backend) -> None:
        def in_a_loop_of_its_own(use: Callable[[], Awaitable[object]]) -> None:
            async def main() -> None:
                with pytest.raises(RuntimeError, match="opened on another event loop") as caught:
                    await use()
                assert not isinstance(caught.value, PoolClosed)

            for name in ("asyncio", "trio"):
                anyio.run(main, backend=name)

        async with backend.pool(min_size=1) as pool:
            await pool.wait()

            async def acquire_nowait() -> None:
                pool.acquire_nowait()

            uses: list[Callable[[], Awaitable[object]]] = [
                pool.acquire, partial(pool.acquire, 0), partial(pool.acquire, 1),
                pool.connection().__aenter__, acquire_nowait, pool.wait,
                partial(pool.resize, 1, 2), pool.drain, pool.check,
            ]  # fmt: skip
            for use in uses:
                await anyio.to_thread.run_sync(in_a_loop_of_its_own, use)
            assert pool.get_stats()["pool_available"] == 1

    async def test_another_event_loop_may_give_back(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        taken: list[Connection] = []
        async with pool:
            connection = await pool.acquire()

            async def main() -> None:
                pool.release(connection)

            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                await anyio.to_thread.run_sync(lambda: anyio.run(main))
            assert taken == [connection]
            give_back(pool, taken)

    async def test_acquire_nowait_and_release_need_no_task(self, backend: Backend) -> None:
        async with backend.pool(min_size=1) as pool:
            await pool.wait()

            def work() -> None:
                pool.release(pool.acquire_nowait())

            await anyio.to_thread.run_sync(work)
            assert pool.get_stats()["requests_num"] == 1


def test_a_pool_can_be_opened_by_a_task_only(backend: Backend) -> None:
    opening = backend.pool().__aenter__()
    with pytest.raises(anyio.NoEventLoopError):
        opening.send(None)


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


class Step:
    """A hook that does something bad while it is told to."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.bad = True

    async def __call__(self, _: object = None) -> bool:
        await anyio.lowlevel.checkpoint()
        if self.bad:
            if self.how == "hangs":
                await never()
            if self.how == "raises":
                raise KeyError("bad")
        return not self.bad or self.how != "returns False"


@pytest.mark.anyio
class TestBadConnections(Virtual):
    """In each case the slot comes back, and the connection is closed exactly once."""

    @pytest.mark.parametrize("how", ["raises", "returns False", "hangs"])
    async def test_one_that_fails_its_check_is_replaced(self, backend: Backend, how: str) -> None:
        check = Step(how)
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

    async def test_one_that_passes_its_check_is_handed_out(self, backend: Backend) -> None:
        check = Step("raises")
        check.bad = False
        async with backend.pool(max_size=1, check=check, check_idle=0) as pool:
            first = await pool.acquire()
            pool.release(first)
            async with pool.connection() as second:
                assert second is first
            assert backend.closings == []

    @pytest.mark.parametrize("result", [None, 0, "", True])
    async def test_only_false_itself_fails_a_check(self, backend: Backend, result: object) -> None:
        async with backend.pool(max_size=1, check=lambda _: result, check_idle=0) as pool:
            pool.release(await pool.acquire())
            await pool.check()
            pool.release(await pool.acquire())
            assert backend.closings == []

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    async def test_one_that_fails_its_reset_is_replaced(self, backend: Backend, how: str) -> None:
        reset = Step(how)
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
        configure = Step(how)
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
            assert kinds(events)[:3] == ["connect_failed", "outage", "closed"]
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
        close = Step(how)
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
            assert backend.most_open == 50

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
            await anyio.sleep(20)
            assert backend.closings == []
            assert pool.info(old).expires_in == 0
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken)
                await settle()
                pool.release(old)
            assert taken[0] is not old
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

    async def test_the_pool_shrinks_to_min_size_and_keeps_that(self, backend: Backend) -> None:
        async with backend.pool(min_size=2, max_size=6, max_idle=10) as pool:
            await pool.wait()
            give_back(pool, await some(pool, 6))
            assert len(backend.open()) == 6
            for _ in range(10):
                await anyio.sleep(10.1)
                await pool.wait(0)
                assert len(backend.open()) == 2
            assert backend.most_open == 6

    async def test_an_outage_of_a_pool_that_is_full_does_not_keep_the_loop_busy(
        self, backend: Backend
    ) -> None:
        async with backend.pool(max_size=2) as pool, pool.connection():
            backend.refuses = True
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            assert len(backend.attempts) == 2
            await pool.resize(0, 1)
            await anyio.sleep(5)
        assert not spun()

    async def test_a_slow_close_during_an_outage_does_not_keep_the_loop_busy(
        self, backend: Backend
    ) -> None:
        backend.at_close = partial(anyio.sleep, 2)
        async with backend.pool(max_size=1, configure=Step("raises")) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
        assert not spun()

    async def test_attempts_to_reconnect_become_rarer_up_to_ten_seconds(
        self, backend: Backend
    ) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1, reconnect_timeout=None):
            await anyio.sleep(200)
        gaps = [b - a for a, b in zip(backend.attempts, backend.attempts[1:], strict=False)]
        for index, gap in enumerate(gaps):
            delay = min(0.1 * 2**index, 10)
            assert 0.5 * delay - 1e-6 <= gap <= delay + 1e-6
        assert 25 <= len(gaps) <= 60
        late = gaps[8:]
        assert max(late) - min(late) > 1  # by chance
        assert backend.most_connecting == 1

    async def test_while_connecting_fails_one_at_a_time_is_tried(self, backend: Backend) -> None:
        backend.refuses = True
        backend.pause = 0.01
        pool = backend.pool(min_size=9, max_connecting=4, reconnect_timeout=None)
        async with pool:
            await anyio.sleep(0.02)
            assert len(backend.attempts) == backend.most_connecting == 4
            backend.most_connecting = 0
            await anyio.sleep(20)
            assert backend.most_connecting == 1
            assert 7 <= len(backend.attempts) - 4 <= 11
            # The failures of the beginning count as one.
            assert 0.05 <= backend.attempts[4] - backend.attempts[3] <= 0.11 + 0.01
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
        assert others[:3] == [first] * 3
        assert 0.05 <= others[3] - first <= 0.1 + 1e-6

    async def test_an_outage_ends_by_itself_even_if_nobody_waits(self, backend: Backend) -> None:
        events: list[PoolEvent] = []
        backend.refuses = True
        async with backend.pool(on_event=events.append) as pool:
            with pytest.raises(PoolTimeout):
                await pool.acquire(1)
            backend.refuses = False
            await anyio.sleep(10)
            assert kinds(events)[:2] == ["connect_failed", "outage"]
            assert set(kinds(events)[2:-2]) == {"connect_failed"}
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
                assert backend.attempts[before] == pytest.approx(began)
                assert 0.05 <= backend.attempts[before + 1] - began <= 0.1 + 1e-6
            assert kinds(events).count("outage") == 2

    async def test_a_long_outage_is_reported_and_the_pool_goes_on(self, backend: Backend) -> None:
        backend.refuses = True
        calls: list[float] = []

        def failed(of: Pool) -> None:
            assert of is pool
            calls.append(anyio.current_time())

        pool = backend.pool(min_size=1, reconnect_timeout=60, reconnect_failed=failed)
        began = anyio.current_time()
        async with pool:
            await anyio.sleep(59.9)
            assert calls == []
            await anyio.sleep(10.2)
            assert len(calls) == 1
            await anyio.sleep(140)
            assert len(calls) == 3
            assert all(b - a >= 60 for a, b in zip([began, *calls], calls, strict=False))
            backend.refuses = False
            await anyio.sleep(10)
            await pool.wait(0)
            await anyio.sleep(200)
            assert len(calls) == 3

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


@pytest.mark.anyio
class TestLoss:
    async def test_a_connection_that_is_collected_while_borrowed_leaves_its_slot(
        self, backend: Backend
    ) -> None:
        events: list[PoolEvent] = []
        pool = backend.pool(max_size=1, leak_timeout=1000, on_event=events.append)
        taken: list[Connection] = []
        async with pool:
            backend.lost.add(await lose_one(pool))
            async with create_task_group() as tg:
                tg.start_soon(take, pool, taken, PATIENCE)
                await settle()
                gc.collect()
            assert taken[0].number == 2
            assert kinds(events) == ["connected", "leaked", "closed", "connected"]
            leaked, closed = events[1:3]
            assert "garbage collected" in leaked.reason
            assert "in lose_one" in leaked.reason
            assert closed.reason == "collected"
            stats = pool.get_stats()
            assert (stats["leaks"], stats["closed_collected"]) == (1, 1)
            give_back(pool, taken)
        assert backend.closings == [2]

    async def test_min_size_is_refilled_after_a_collection(self, backend: Backend) -> None:
        async with backend.pool(min_size=2, max_size=2) as pool:
            await pool.wait()
            backend.lost.add(await lose_one(pool))
            gc.collect()
            await settle()
            assert pool.get_stats()["pool_available"] == 2
            assert backend.opened == 3

    async def test_an_idle_connection_is_not_collected(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool:
            pool.release(await pool.acquire())
            gc.collect()
            await settle()
            assert pool.get_stats()["pool_available"] == 1
            assert await lose_one(pool) == 1
            backend.lost.add(1)
            gc.collect()
            await settle()
            assert pool.get_stats()["pool_size"] == 0

    async def test_who_is_lost_at_closing_does_not_hold_it_up(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, close_timeout=None) as pool:
            backend.lost.add(await lose_one(pool))
            gc.collect()
        assert pool.get_stats()["closed_collected"] == 1


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
            failed, outage = events
            assert (failed.kind, outage.kind) == ("connect_failed", "outage")
            for event in events:
                assert isinstance(event.error, ConnectionRefusedError)
                assert event.info is None
                assert event.reason == ""
            backend.refuses = False
            await anyio.sleep(1)
            recovered = events[2]
            assert (recovered.kind, recovered.error, recovered.info) == ("recovered", None, None)
            assert events[3].kind == "connected"

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
class TestStats(Virtual):
    async def test_the_keys_are_those_of_psycopg_pool_and_some_more(self, backend: Backend) -> None:
        pool = backend.pool()
        assert set(pool.get_stats()) == PSYCOPG_KEYS | OTHER_KEYS
        async with pool:
            await settle()
            assert set(pool.get_stats()) == PSYCOPG_KEYS | OTHER_KEYS
        assert all(type(value) is int for value in pool.get_stats().values())
        assert len(PSYCOPG_KEYS) == 15

    async def test_every_number_of_a_short_story(self, backend: Backend) -> None:
        backend.pause = 0.25
        async with backend.pool(min_size=1, max_size=2, timeout=10) as pool:
            zero = dict.fromkeys(PSYCOPG_KEYS | OTHER_KEYS, 0)
            zero.update(pool_min=1, pool_max=2)
            assert pool.get_stats() == zero
            await settle()
            assert pool.get_stats() == {**zero, "pool_size": 1, "connecting": 1}
            await pool.wait()
            connected = {"connections_num": 1, "connections_ms": 250}
            assert pool.get_stats() == {**zero, **connected, "pool_size": 1, "pool_available": 1}
            one = await pool.acquire()
            two = await pool.acquire()  # after 0.25 seconds
            async with create_task_group() as tg:
                tg.start_soon(take, pool, [])
                await settle()
                assert pool.get_stats()["requests_waiting"] == 1
                await anyio.sleep(0.75)
                tg.cancel_scope.cancel()
            with pytest.raises(PoolTimeout):
                await pool.acquire(0.5)
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            now = {
                **zero,
                "pool_size": 2, "in_use": 2,
                "connections_num": 2, "connections_ms": 500,
                "requests_num": 5, "requests_queued": 3, "requests_wait_ms": 1500,
                "requests_errors": 2, "timeouts": 2, "cancelled": 1,
            }  # fmt: skip
            assert pool.get_stats() == now
            pool.release(one)  # after 1.5 seconds
            pool.discard(two)  # after 1.25 seconds
            await settle()
            now.update(
                pool_size=1, pool_available=1, in_use=0, usage_ms=2750, closed_discard=1,
                returns_bad=1,
            )  # fmt: skip
            assert pool.get_stats() == now
            assert pool.pop_stats() == now
            gauges = {"pool_min": 1, "pool_max": 2, "pool_size": 1, "pool_available": 1}
            assert pool.get_stats() == {**zero, **gauges}
            async with pool.connection():
                await anyio.sleep(0.125)
            assert pool.pop_stats() == {**zero, **gauges, "requests_num": 1, "usage_ms": 125}
            assert pool.pop_stats() == {**zero, **gauges}
        after = {**zero, "pool_min": 0, "pool_max": 0, "closed_shutdown": 1}
        assert pool.get_stats() == after

    async def test_errors_of_connecting(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1) as pool:
            await anyio.sleep(1000)
            stats = pool.get_stats()
            assert stats["connections_num"] == stats["connections_errors"] == len(backend.attempts)
            assert stats["connections_ms"] == 0

    async def test_what_info_tells_of_a_connection(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, max_lifetime=1000) as pool:
            connection = await pool.acquire()
            await anyio.sleep(3)
            info = pool.info(connection)
            assert info.age == pytest.approx(3)
            assert info.in_use == pytest.approx(3)
            assert (info.uses, info.usage) == (1, 0)
            assert 947 <= info.expires_in <= 997
            pool.release(connection)
            await anyio.sleep(10)
            info = pool.info(connection)
            assert info.age == pytest.approx(13)
            assert info.in_use is None
            assert info.usage == pytest.approx(3)
            with pytest.raises(ValueError, match="Connection does not belong to"):
                pool.info(Connection(1))
            await pool.drain()
            await settle()
            with pytest.raises(ValueError, match="does not belong"):
                pool.info(connection)


@pytest.fixture(params=["asyncio", "trio"])
def loop_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class TestEndOfTheLoop:
    """The event loop ends, and nobody has closed the pool."""

    def test_all_connections_are_closed(self, backend: Backend, loop_name: str) -> None:
        pool = backend.pool(min_size=2)

        async def main() -> None:
            await pool.__aenter__()
            await pool.wait()
            pool.release(await pool.acquire())

        run_virtually(loop_name, main)
        assert sorted(backend.closings) == [1, 2]
        with pytest.raises(PoolClosed):
            pool.acquire_nowait()

        async def use() -> None:
            with pytest.raises(PoolClosed):
                await pool.acquire()
            with pytest.raises(PoolClosed):
                await pool.wait()
            # Closing it is over at once.
            await pool.__aexit__(None, None, None)

        run_virtually(loop_name, use)

    def test_borrowed_ones_are_closed_after_the_grace_period(
        self, backend: Backend, loop_name: str
    ) -> None:
        pool = backend.pool(close_timeout=3)
        kept: list[Connection] = []

        async def main() -> None:
            await pool.__aenter__()
            kept.extend(await some(pool, 2))

        run_virtually(loop_name, main)
        assert sorted(backend.closings) == [1, 2]
        give_back(pool, kept)

    def test_tasks_that_end_with_the_loop_give_back(self, backend: Backend, loop_name: str) -> None:
        pool = backend.pool(close_timeout=None)

        async def borrow() -> None:
            async with pool.connection():
                await never()

        async def main() -> None:
            await pool.__aenter__()
            async with create_task_group() as tg:
                tg.start_soon(borrow)
                await settle()
                tg.cancel_scope.cancel()

        run_virtually(loop_name, main)
        assert backend.closings == [1]

    @pytest.mark.parametrize("ticks", range(8))
    @pytest.mark.parametrize("what", ["open", "want", "release", "discard", "drain", "check"])
    def test_whatever_goes_on_at_that_moment(
        self,
        backend: Backend,
        loop_name: str,
        what: str,
        ticks: int,
        request: pytest.FixtureRequest,
    ) -> None:
        pool = backend.pool(
            max_size=2,
            min_size=1 if what == "open" else 0,
            reset=nothing if what == "release" else None,
            check=nothing,
        )

        async def main() -> None:
            await pool.__aenter__()
            if what == "want":
                await settle()
                with pytest.raises(WouldBlock):
                    pool.acquire_nowait()
            elif what in {"release", "discard"}:
                connection = await pool.acquire()
                await settle()
                getattr(pool, what)(connection)
            elif what != "open":
                pool.release(await pool.acquire())
                await settle()
                await (pool.drain() if what == "drain" else pool.check())
            for _ in range(ticks):
                await anyio.lowlevel.checkpoint()

        try:
            run_virtually(loop_name, main)
        finally:
            left = backend.open()
            backend.lost |= left  # complain here, and once
            gc.collect()
        assert not left


ABANDONED = """
import asyncio, os, sys
from aiosync import ConnectionPool

pool = ConnectionPool(object)
loop = asyncio.new_event_loop()
loop.run_until_complete(pool.__aenter__())
loop.close()

async def main():
    try:
        await pool.acquire()
    except RuntimeError as error:
        print(error)
    closing = asyncio.ensure_future(pool.__aexit__(None, None, None))
    await asyncio.wait([closing], timeout=1)
    print("closed" if closing.done() else "hangs")
    sys.stdout.flush()
    os._exit(0)

asyncio.run(main())
"""


def test_to_close_a_pool_whose_loop_was_closed_without_a_word_does_not_hang() -> None:
    done = run_python("-c", ABANDONED)
    lines = done.stdout.splitlines()
    assert "was opened on another event loop" in lines[0]
    assert lines[1:] == ["closed"]


FORK = """
import gc, os, sys
import anyio, anyio.lowlevel
from aiosync import ConnectionPool, PoolClosed, as_threading

calls = []

class Connection:
    def __del__(self):
        if os.getpid() != parent:
            calls.append("del")

parent = os.getpid()

def close(connection):
    calls.append("close")

def outcome(use):
    # Runs a coroutine that has no reason to wait.
    try:
        result = use()
        if hasattr(result, "send"):
            result.send(None)
    except PoolClosed as error:
        assert "before a fork" in str(error), error
        return "closed"
    except StopIteration:
        return "done"
    return "waits"

def child(pool, borrowed, checkout):
    results = {}
    uses = dict(
        acquire=pool.acquire, acquire_0=lambda: pool.acquire(0), nowait=pool.acquire_nowait,
        connection=pool.connection().__aenter__, wait=pool.wait, drain=pool.drain,
        check=pool.check, resize=lambda: pool.resize(1, 2), open=pool.__aenter__,
        release=lambda: pool.release(borrowed), discard=lambda: pool.discard(borrowed),
        foreign=lambda: pool.release(Connection.__new__(Connection)),
        thread=lambda: as_threading(pool).acquire(),
        thread_with=lambda: as_threading(pool).connection().__enter__(),
    )
    for name, use in uses.items():
        results[name] = outcome(use) if name != "open" else open_again(pool)
    calls.clear()  # of those that were made here
    bad = {name: result for name, result in results.items() if result != "closed"}
    assert not bad, bad
    # The end of a block, and closing, are silent.
    assert outcome(lambda: checkout.__aexit__(None, None, None)) == "done"
    assert outcome(lambda: pool.__aexit__(None, None, None)) == "done"
    repr(pool), pool.get_stats()
    del borrowed, checkout, uses
    gc.collect()
    assert calls == [], calls

def open_again(pool):
    try:
        pool.__aenter__().send(None)
    except PoolClosed:
        return "closed"

async def main():
    unopened = ConnectionPool(Connection, close=close)
    pool = ConnectionPool(Connection, close=close, min_size=2, max_size=3)
    async with pool:
        await pool.wait()
        checkout = pool.connection()
        borrowed = await pool.acquire()
        async with checkout as other:
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    child(pool, borrowed, checkout)
                    assert "not open yet" in repr(unopened)
                    status = 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            assert status == 0, "the child has failed"
        # The parent goes on.
        pool.release(borrowed)
        assert calls == []
        async with pool.connection() as again, pool.connection(), pool.connection():
            assert again in (borrowed, other)
        stats = pool.get_stats()
        assert stats["pool_size"] == 3, stats
    assert calls == ["close"] * 3, calls

anyio.run(main, backend=sys.argv[1])
print("the end")
"""


FORK_AND_GO_ON = """
import asyncio, gc, os, sys
import anyio, trio
from aiosync import ConnectionPool, PoolClosed

parent = os.getpid()
calls = []

class Connection:
    def __init__(self):
        calls.append("connect")

    def __del__(self):
        if os.getpid() != parent:
            calls.append("del")

async def close(connection):
    calls.append("close")
    await sleep()

async def reset(connection):
    calls.append("reset")
    await sleep()

async def check(connection):
    calls.append("check")

async def slow():
    await sleep()
    return Connection()

async def sleep():
    await anyio.sleep(0.05)

pool = ConnectionPool(
    slow, close=close, reset=reset, check=check, check_idle=0, min_size=4, max_size=5,
    max_idle=0.1, max_connecting=4,
)

async def prepare():
    await pool.__aenter__()
    await pool.wait()
    taken = [await pool.acquire() for _ in range(4)]
    pool.release(taken[0])
    pool.discard(taken[1])
    await anyio.sleep(0.02)  # one is being reset, one closed, and one made in its place
    pool.release(taken[2])  # so is this in a moment
    del calls[:]

async def child():
    await anyio.sleep(0.5)
    gc.collect()
    try:
        await pool.acquire()
    except PoolClosed:
        pass
    await pool.__aexit__(None, None, None)
    assert calls in ([], ["connect"]), calls  # that was under way

def fork():
    if os.fork():
        assert os.wait()[1] == 0, "the child has failed"
        return False
    return True

def leave():
    sys.stderr.flush()
    os._exit(0)

async def run_trio():
    await prepare()
    if fork():
        await child()
        leave()
    await pool.__aexit__(None, None, None)

if sys.argv[1] == "trio":
    trio.run(run_trio)
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(prepare())
    if fork():
        loop.run_until_complete(child())
        leave()
    loop.run_until_complete(pool.__aexit__(None, None, None))
    loop.close()
assert "close" in calls, calls
print("the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_child_process_that_runs_the_inherited_loop_leaves_them_alone_too(
    loop_name: str,
) -> None:
    done = run_python("-c", FORK_AND_GO_ON, loop_name)
    assert done.stdout == "the end\n", done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_child_process_leaves_the_connections_to_its_parent(loop_name: str) -> None:
    done = run_python("-W", "error", "-c", textwrap.dedent(FORK), loop_name)
    assert done.stdout == "the end\n", done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_signature_of_the_constructor_is_what_the_tests_know() -> None:
    parameters = set(inspect.signature(ConnectionPool.__init__).parameters)
    known = {*TIMES, *HOOKS, *COUNTS, "name", "lifo", "fail_fast", "fast_acquire"}
    assert parameters == known | {"self", "connect"}
