"""Hooks of a pool: plain and async, those that raise, and those that call the pool."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import WouldBlock, create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    BareConnection,
    Connection,
    Pool,
    kinds,
    nothing,
)

from aiosync import (
    ConnectionPool,
    PoolEvent,
    PoolMisuse,
    PoolTimeout,
    as_threading,
)

pytestmark = pytest.mark.anyio


def fail(_: object) -> None:
    raise ConnectionResetError("no")


class TestPlainHooks:
    @pytest.mark.parametrize("how", ["block", "release"])
    async def test_a_reset_that_raises_has_its_connection_replaced(self, how: str) -> None:
        async with ConnectionPool(BareConnection, reset=fail, max_size=1) as pool:
            if how == "block":
                async with pool.connection() as first:
                    pass
            else:
                first = await pool.acquire()
                pool.release(first)
            assert await pool.acquire(PATIENCE) is not first
        assert pool.statistics().failed_resets == 1

    async def test_a_close_that_raises_gives_its_slot_back(self) -> None:
        async with ConnectionPool(BareConnection, close=fail, max_size=1) as pool:
            first = await pool.acquire()
            pool.discard(first)
            second = await pool.acquire(PATIENCE)
            assert second is not first
            pool.release(second)
        assert pool.statistics().failed_closes == 2

    async def test_a_check_that_raises_has_its_connection_replaced(self) -> None:
        async with ConnectionPool(BareConnection, check=fail, check_idle=0, max_size=1) as pool:
            first = await pool.acquire()
            pool.release(first)
            assert await pool.acquire(PATIENCE) is not first
        assert pool.statistics().failed_checks == 1

    async def test_a_reset_that_is_interrupted_has_its_connection_replaced(self) -> None:
        class Interruption(BaseException):
            pass

        async with ConnectionPool(BareConnection, reset=nothing, max_size=1) as pool:
            first = await pool.acquire()

            def begin(*_: object) -> None:
                raise Interruption

            core: Any = pool._maintenance.core
            original, core.tasks.begin = core.tasks.begin, begin
            with pytest.raises(Interruption):
                pool.release(first)
            core.tasks.begin = original
            assert await pool.acquire(PATIENCE) is not first

    async def test_an_is_fatal_that_gives_the_connection_back_does_no_harm(self) -> None:
        def is_fatal(_: Exception) -> bool:
            pool.release(borrowed[0])
            return False

        borrowed: list[BareConnection] = []
        async with ConnectionPool(BareConnection, is_fatal=is_fatal, max_size=1) as pool:
            with pytest.raises(ConnectionResetError):
                async with pool.connection() as connection:
                    borrowed.append(connection)
                    fail(connection)
            assert await pool.acquire(PATIENCE) is connection
            pool.release(connection)


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

    async def test_on_event_may_be_plain_or_async(
        self, kind_of: Asynchronous, backend: Backend
    ) -> None:
        backend.refuses = True
        events: list[PoolEvent] = []
        async with backend.pool(on_event=kind_of(events.append)) as pool:
            with pytest.raises(WouldBlock):
                pool.acquire_nowait()
            await settle()
            assert sorted(kinds(events)) == ["connect_failed"] * 3 + ["outage"]

    async def test_on_event_may_fail_without_harm(
        self, kind_of: Asynchronous, backend: Backend, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: object) -> None:
            raise KeyError("from the hook")

        backend.refuses = True
        async with backend.pool(on_event=kind_of(fail)) as pool:
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
        gate = anyio.Event()
        errors: list[str] = []

        async def ask(pool: Pool) -> None:
            with pytest.raises(TypeError) as caught:
                await pool.acquire()
            errors.append(str(caught.value))

        async with ConnectionPool(
            lambda: one, close=nothing, configure=lambda _: gate.wait()
        ) as pool:
            async with create_task_group() as tg:
                for _ in range(2):
                    tg.start_soon(ask, pool)
                await settle()
            assert len(errors) == 2
            assert all("a connection that the pool has already" in error for error in errors)
            gate.set()
            await settle()
            assert pool.get_stats()["pool_size"] == 1

    async def test_a_caller_does_not_wait_for_the_next_attempt_to_learn_it(self) -> None:
        async with ConnectionPool(lambda: None) as pool:
            for _ in range(5):  # an outage by now, with long breaks
                with pytest.raises(TypeError, match="returned None"):
                    await pool.acquire()
            attempts = pool.statistics().connects
            for _ in range(3):
                with pytest.raises(TypeError, match="returned None"):
                    await pool.acquire()
            assert pool.statistics().connects <= attempts + 1
            assert pool.statistics().refusals >= 3

    @pytest.mark.parametrize("result", [None, "again"])
    async def test_whoever_waits_is_told_at_once_that_connect_is_wrong(self, result: Any) -> None:
        async with ConnectionPool(lambda: result, min_size=2) as pool:
            with pytest.raises(TypeError, match=r"connect\(\) of the pool returned"):
                await pool.wait()
            if result is None:
                with pytest.raises(TypeError, match="returned None"):
                    await pool.acquire()

    @pytest.mark.parametrize("make", [contextmanager, asynccontextmanager])
    async def test_connect_must_not_return_a_context_manager_that_was_not_entered(
        self, make: Any
    ) -> None:
        async with ConnectionPool(make(nothing), timeout=None) as pool:
            with pytest.raises(TypeError, match=r"was not entered; .* context=True"):
                await pool.acquire()
        assert pool.statistics().size == 0

    @pytest.mark.parametrize("hook", ["connect", "configure"])
    async def test_a_mistake_that_a_hook_tells_is_raised_to_whoever_waits(self, hook: str) -> None:
        cause = KeyError("tenant")
        errors: list[PoolMisuse] = []

        def fail(*_: object) -> None:
            raise PoolMisuse("there is no tenant") from cause

        async def wait(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(PoolMisuse, match="there is no tenant") as caught:
                await call()
            errors.append(caught.value)

        options: Any = {"timeout": None, "min_size": 1, "max_size": 1, "close": nothing}
        connect: Any = fail if hook == "connect" else object
        if hook == "configure":
            options["configure"] = fail
        async with ConnectionPool[Any](connect, **options) as pool:
            borrow = as_threading(pool).acquire
            async with create_task_group() as tg:
                tg.start_soon(wait, partial(pool.wait, None))
                tg.start_soon(wait, partial(anyio.to_thread.run_sync, borrow))
                for _ in range(2):
                    tg.start_soon(wait, pool.acquire)
            await wait(pool.acquire)
        assert len({id(error) for error in errors}) == 5
        assert {error.__cause__ for error in errors} == {cause}

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

    async def test_none_but_reset_runs_in_the_task_of_a_borrower(self) -> None:
        tasks: list[tuple[str, int]] = []

        def noting(name: str) -> Callable[..., None]:
            return lambda *_: tasks.append((name, anyio.get_current_task().id))

        def connect() -> Connection:
            noting("connect")()
            return Connection(1)

        mine = anyio.get_current_task().id
        options: dict[str, Any] = {
            name: noting(name) for name in ("close", "check", "configure", "reset")
        }
        async with ConnectionPool(connect, check_idle=0, **options) as pool:
            for _ in range(2):
                async with pool.connection():
                    pass
                await settle()
        names = [name for name, _ in tasks]
        assert names == ["connect", "configure", "reset", "check", "reset", "close"]
        for name, task in tasks:
            assert (task == mine) is (name == "reset")
