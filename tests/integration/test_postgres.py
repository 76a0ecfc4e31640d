"""The recipes for PostgreSQL, each against a real server, which is killed and started again."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from anyio import create_task_group, fail_after, sleep, to_thread
from support.helpers import until_async
from support.postgres_server import PostgresServer

from aiosync import ConnectionPool, PoolMisuse, PoolTimeout, as_threading
from aiosync.recipes import asyncpg_pool, psycopg_async_pool, psycopg_thread_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

DEADLINE = 30.0


class Driver(NamedTuple):
    """How the tests talk to one driver."""

    make: Callable[..., ConnectionPool[Any]]
    # Execute a statement, and return the first column of its first row, if there is one.
    ask: Callable[[Any, str], Awaitable[Any]]
    backend: tuple[str, dict[str, Any]]
    blocks: bool = False


def make_asyncpg(server: PostgresServer, name: str, **options: Any) -> ConnectionPool[Any]:
    arguments = {
        "host": server.host,
        "user": "postgres",
        "database": "postgres",
        "server_settings": {"application_name": name},
    }
    return asyncpg_pool(kwargs=arguments, name=name, **options)


def make_psycopg(server: PostgresServer, name: str, **options: Any) -> ConnectionPool[Any]:
    kwargs = {"application_name": name, **options.pop("kwargs", {})}
    return psycopg_async_pool(server.conninfo, kwargs=kwargs, name=name, **options)


def make_threaded(server: PostgresServer, name: str, **options: Any) -> ConnectionPool[Any]:
    kwargs = {"application_name": name, **options.pop("kwargs", {})}
    return psycopg_thread_pool(server.conninfo, kwargs=kwargs, name=name, **options)


async def ask_asyncpg(connection: Any, statement: str) -> Any:
    return await connection.fetchval(statement)


async def ask_psycopg(connection: Any, statement: str) -> Any:
    cursor = await connection.execute(statement)
    row = await cursor.fetchone() if cursor.description else None
    return None if row is None else row[0]


def ask_here(connection: Any, statement: str) -> Any:
    cursor = connection.execute(statement)
    row = cursor.fetchone() if cursor.description else None
    return None if row is None else row[0]


async def ask_in_thread(connection: Any, statement: str) -> Any:
    return await to_thread.run_sync(ask_here, connection, statement)


ASYNCIO: tuple[str, dict[str, Any]] = ("asyncio", {"use_uvloop": False})
UVLOOP: tuple[str, dict[str, Any]] = ("asyncio", {"use_uvloop": True})
TRIO: tuple[str, dict[str, Any]] = ("trio", {})

DRIVERS = {
    "asyncpg": Driver(make_asyncpg, ask_asyncpg, ASYNCIO),
    "asyncpg-uvloop": Driver(make_asyncpg, ask_asyncpg, UVLOOP),
    "psycopg": Driver(make_psycopg, ask_psycopg, ASYNCIO),
    "psycopg-uvloop": Driver(make_psycopg, ask_psycopg, UVLOOP),
    "threads": Driver(make_threaded, ask_in_thread, ASYNCIO, blocks=True),
    "threads-trio": Driver(make_threaded, ask_in_thread, TRIO, blocks=True),
}


def need(module: str) -> None:
    """Skip a test whose driver can't be imported."""
    pytest.importorskip(module, exc_type=ImportError)


@pytest.fixture(params=sorted(DRIVERS))
def driver(request: pytest.FixtureRequest) -> Driver:
    need("asyncpg" if "asyncpg" in request.param else "psycopg")
    if "uvloop" in request.param:
        need("uvloop")
    return DRIVERS[request.param]


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run a test under the event loop that its driver is for."""
    if "driver" not in request.fixturenames:
        return ASYNCIO
    found: Driver = request.getfixturevalue("driver")
    return found.backend


@pytest.fixture(scope="session")
def only_server() -> Iterator[PostgresServer]:
    pytest.importorskip("psycopg", reason="the server is driven by psycopg", exc_type=ImportError)
    reason = PostgresServer.why_not()
    if reason is not None:
        in_ci = os.environ.get("CI", "").lower() in {"1", "true", "yes", "on"}
        if in_ci and sys.platform != "win32":
            pytest.fail(f"in CI there has to be a PostgreSQL server: {reason}")
        pytest.skip(f"there is no PostgreSQL server: {reason}")
    with PostgresServer() as server:
        server.start()
        yield server


@pytest.fixture
def server(only_server: PostgresServer) -> Iterator[PostgresServer]:
    """Let the test have the server, running; whatever it has done to it, start it again."""
    try:
        yield only_server
    finally:
        if only_server.is_down:
            only_server.start()


class Observer:
    """Looks at the server from outside, and blocks: that does not matter here."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server

    def ask(self, statement: str, *values: object) -> list[Any]:
        with self.server.connect() as connection:
            return connection.execute(statement, values).fetchall()

    def backends(self, name: str, condition: str = "true") -> list[int]:
        """Return the ids of the server's processes for the connections of a pool."""
        rows = self.ask(
            f"SELECT pid FROM pg_stat_activity WHERE application_name = %s AND {condition}", name
        )
        return [row[0] for row in rows]

    async def until_gone(self, name: str) -> None:
        await until_async(lambda: not self.backends(name))

    async def until_busy(self, name: str) -> None:
        """Wait until a connection of the pool is in the middle of a pg_sleep."""
        await until_async(lambda: self.backends(name, "wait_event = 'PgSleep'"))

    def terminate(self, name: str) -> None:
        """End all connections of a pool, and wait until they are gone."""
        for pid in self.backends(name):
            assert self.ask("SELECT pg_terminate_backend(%s, 20000)", pid) == [(True,)]


@pytest.fixture
def observer(server: PostgresServer) -> Observer:
    return Observer(server)


async def until_it_fails(work: Callable[[], Awaitable[object]]) -> None:
    """Wait until the process at the other end has noticed that its server was killed."""
    with fail_after(DEADLINE):
        while True:
            try:
                await work()
            except Exception:
                return
            await sleep(0.01)


async def until_idle(pool: ConnectionPool[Any]) -> None:
    """Wait until what has been given back is reset."""
    await until_async(lambda: pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"])


@asynccontextmanager
async def opened(
    observer: Observer, pool: ConnectionPool[Any]
) -> AsyncIterator[ConnectionPool[Any]]:
    """Open a pool; see that in the end all is closed, here and on the server."""
    async with pool:
        yield pool
    stats = pool.get_stats()
    assert stats["pool_size"] == stats["in_use"] == stats["connecting"] == 0
    await observer.until_gone(pool.name)


async def test_many_tasks_on_few_connections(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    answers: list[int] = []

    async def work(number: int) -> None:
        for _ in range(4):
            async with pool.connection() as connection:
                answers.append(await driver.ask(connection, f"SELECT {number}"))

    pool = driver.make(server, "many", max_size=3, timeout=DEADLINE)
    async with opened(observer, pool):
        async with create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(work, number)
        await until_idle(pool)
        stats = pool.get_stats()
        assert len(observer.backends("many")) == stats["pool_size"]
        await pool.check()
        assert pool.get_stats()["connections_lost"] == 0
    assert sorted(answers) == sorted(list(range(10)) * 4)
    assert 1 <= stats["pool_size"] <= 3
    assert stats["requests_num"] == 40
    assert stats["requests_errors"] == stats["returns_bad"] == stats["requests_waiting"] == 0


async def test_a_transaction_left_open_is_rolled_back_before_the_next_one_comes(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    async with opened(observer, driver.make(server, "reset", max_size=1)) as pool:
        first = await pool.acquire()
        await driver.ask(first, "BEGIN")
        await driver.ask(first, "CREATE TABLE forgotten (number int)")
        pool.release(first)
        async with pool.connection() as second:
            assert second is first
            assert await driver.ask(second, "SELECT to_regclass('forgotten') IS NULL")
        assert pool.get_stats()["returns_bad"] == 0


async def test_a_transaction_that_has_failed_is_rolled_back(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    async with opened(observer, driver.make(server, "failed", max_size=1)) as pool:
        async with pool.connection() as first:
            await driver.ask(first, "BEGIN")
            with pytest.raises(Exception, match="zero"):
                await driver.ask(first, "SELECT 1 / 0")
        async with pool.connection() as second:
            assert second is first
            assert await driver.ask(second, "SELECT 1") == 1


async def test_a_connection_that_its_borrower_has_closed_is_replaced(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    async with opened(observer, driver.make(server, "closed", max_size=1)) as pool:
        async with pool.connection() as first:
            closing = first.close()
            if closing is not None:
                await closing
        async with pool.connection() as second:
            assert second is not first
            assert await driver.ask(second, "SELECT 1") == 1
        assert pool.get_stats()["closed_reset"] == 1


async def test_an_idle_connection_that_the_server_has_closed_is_seen_by_nobody(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    pool = driver.make(server, "idle", min_size=2, max_size=2, check_idle=0)
    async with opened(observer, pool):
        await pool.wait(DEADLINE)
        before = observer.backends("idle")
        assert len(before) == 2
        observer.terminate("idle")
        async with pool.connection(DEADLINE) as one, pool.connection(DEADLINE) as other:
            pids = [await driver.ask(one, "SELECT pg_backend_pid()")]
            pids.append(await driver.ask(other, "SELECT pg_backend_pid()"))
        assert not set(pids) & set(before)
        assert pool.get_stats()["connections_lost"] == 2


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("driver", ["psycopg", "threads-trio"], indirect=True)
async def test_a_check_by_psycopg_leaves_no_trace(
    driver: Driver, server: PostgresServer, observer: Observer, autocommit: bool
) -> None:
    options: dict[str, Any] = {"min_size": 1, "max_size": 1, "check_idle": 0}
    pool = driver.make(server, "trace", **options, kwargs={"autocommit": autocommit})
    async with opened(observer, pool):
        await pool.wait(DEADLINE)
        async with pool.connection() as connection:
            assert connection.autocommit is autocommit
            assert connection.info.transaction_status.name == "IDLE"
            assert await driver.ask(connection, "SELECT 1") == 1
        assert pool.get_stats()["connections_num"] == 1


async def test_a_query_cancelled_half_way_leaves_no_broken_connection_behind(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    async def sleep_there() -> None:
        async with pool.connection() as connection:
            with suppress(Exception) if driver.blocks else nothing():
                await driver.ask(connection, "SELECT pg_sleep(60)")

    async with opened(observer, driver.make(server, "cancelled", max_size=2)) as pool:
        for _ in range(2):
            with fail_after(DEADLINE):
                async with create_task_group() as tasks:
                    tasks.start_soon(sleep_there)
                    tasks.start_soon(sleep_there)
                    await until_async(
                        lambda: len(observer.backends("cancelled", "wait_event = 'PgSleep'")) == 2
                    )
                    tasks.cancel_scope.cancel()
                    if driver.blocks:
                        # A cancelled task waits for its thread; so it takes somebody to end that.
                        for pid in observer.backends("cancelled"):
                            observer.ask("SELECT pg_cancel_backend(%s)", pid)
            async with pool.connection(DEADLINE) as one, pool.connection(DEADLINE) as other:
                assert await driver.ask(one, "SELECT 1") == 1
                assert await driver.ask(other, "SELECT 2") == 2
        assert pool.get_stats()["in_use"] == 0


@contextmanager
def nothing() -> Iterator[None]:
    yield


async def test_the_pool_survives_the_death_of_the_server(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    pool = driver.make(server, "killed", min_size=2, max_size=2, timeout=DEADLINE)
    hasty = driver.make(server, "hasty", max_size=1, fail_fast=True, check_idle=0)
    async with opened(observer, pool), opened(observer, hasty):
        await pool.wait(DEADLINE)
        async with hasty.connection(), pool.connection() as borrowed:
            server.kill()
            await until_it_fails(lambda: driver.ask(borrowed, "SELECT 1"))
        # One of them has come back broken, and the others have been idle.
        for each in pool, hasty:
            with fail_after(DEADLINE):
                while each.get_stats()["pool_size"]:
                    await each.check()
                    await sleep(0.01)
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(0.3)
        with pytest.raises(PoolTimeout) as caught_at_once:
            await hasty.acquire(DEADLINE)
        for error in caught.value, caught_at_once.value:
            assert error.__cause__ is not None
        assert pool.get_stats()["pool_size"] == 0

        server.start()
        async with pool.connection() as one, pool.connection() as other:
            assert await driver.ask(one, "SELECT 1") == 1
            assert await driver.ask(other, "SELECT 2") == 2
        await until_async(lambda: hasty.get_stats()["pool_available"])
        async with hasty.connection() as one:
            assert await driver.ask(one, "SELECT 1") == 1


async def test_a_server_that_does_not_answer_any_more_delays_nobody_for_long(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    pool = driver.make(
        server, "frozen", min_size=1, max_size=1, check_idle=0, check_timeout=0.2, close_timeout=0.2
    )
    async with opened(observer, pool):
        await pool.wait(DEADLINE)
        [frozen] = observer.backends("frozen")
        os.kill(frozen, signal.SIGSTOP)
        try:
            async with pool.connection(DEADLINE) as connection:
                assert await driver.ask(connection, "SELECT pg_backend_pid()") != frozen
            assert pool.get_stats()["connections_lost"] == 1
        finally:
            os.kill(frozen, signal.SIGCONT)


async def test_a_pool_closed_by_force_ends_what_its_borrower_is_doing(
    driver: Driver, server: PostgresServer, observer: Observer
) -> None:
    errors: list[Exception] = []

    async def borrow() -> None:
        async with pool.connection() as connection:
            try:
                await driver.ask(connection, "SELECT pg_sleep(60)")
            except Exception as error:
                errors.append(error)

    pool = driver.make(server, "forced", close_timeout=1)
    with fail_after(DEADLINE):
        async with create_task_group() as tasks, opened(observer, pool):
            tasks.start_soon(borrow)
            await observer.until_busy("forced")
    assert len(errors) == 1
    assert pool.get_stats()["closed_forced"] == 1


async def test_threads_share_the_pool_with_tasks(
    server: PostgresServer, observer: Observer
) -> None:
    answers: list[int] = []

    def work_in_thread(number: int) -> None:
        for _ in range(4):
            with view.connection(timeout=DEADLINE) as connection:
                answers.append(ask_here(connection, f"SELECT {number}"))

    async def work(number: int) -> None:
        for _ in range(4):
            async with pool.connection(timeout=DEADLINE) as connection:
                answers.append(await ask_in_thread(connection, f"SELECT {number}"))

    pool = make_threaded(server, "shared", max_size=2)
    async with opened(observer, pool):
        view = as_threading(pool)
        threads = [threading.Thread(target=work_in_thread, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        async with create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(work, number)
        for thread in threads:
            await to_thread.run_sync(thread.join)
    assert sorted(answers) == sorted(list(range(4)) * 8)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "threads", "threads-trio"], indirect=True)
async def test_a_server_that_accepts_but_never_speaks_does_not_keep_the_pool_from_closing(
    driver: Driver,
) -> None:
    def make_for(port: int) -> ConnectionPool[Any]:
        options: dict[str, Any] = {"connect_timeout": 0.1, "max_connecting": 1}
        where = {"host": "127.0.0.1", "port": port, "user": "nobody"}
        if driver.make is make_asyncpg:
            return asyncpg_pool(kwargs={**where, "ssl": False}, **options)
        make = psycopg_async_pool if driver.make is make_psycopg else psycopg_thread_pool
        return make(kwargs={**where, "sslmode": "disable", "gssencmode": "disable"}, **options)

    with socket.create_server(("127.0.0.1", 0)) as silent, fail_after(DEADLINE):
        async with make_for(silent.getsockname()[1]) as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(0.5)
        assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("anyio_backend", [TRIO], ids=["trio"])
@pytest.mark.parametrize("make", [asyncpg_pool, psycopg_async_pool])
async def test_a_driver_for_asyncio_says_so_under_trio(
    make: Callable[..., ConnectionPool[Any]], anyio_backend: Any
) -> None:
    need("asyncpg" if make is asyncpg_pool else "psycopg")
    async with make() as pool:
        with pytest.raises(PoolMisuse, match="psycopg_thread_pool"):
            await pool.acquire(math.inf)


@pytest.mark.parametrize("anyio_backend", [ASYNCIO], ids=["asyncio"])
@pytest.mark.parametrize("make", [asyncpg_pool, psycopg_async_pool, psycopg_thread_pool])
@pytest.mark.parametrize(
    ("where", "kwargs"),
    [
        (None, {"hots": "127.0.0.1"}),
        ("nonsense:", {}),
        (lambda: 5, {}),
        (None, lambda: {"host": 5}),
        (None, lambda: {"host": "127.0.0.1", "port": 54.32}),
        (None, lambda: 5),
    ],
    ids=["argument", "where", "type", "host", "port", "kwargs"],
)
async def test_wrong_arguments_of_connect_are_told_at_once(
    make: Callable[..., ConnectionPool[Any]], where: Any, kwargs: Any, anyio_backend: Any
) -> None:
    need("asyncpg" if make is asyncpg_pool else "psycopg")
    async with make(*() if where is None else (where,), kwargs=kwargs) as pool:
        with pytest.raises(PoolMisuse):
            await pool.acquire(math.inf)


@pytest.mark.parametrize("make", [asyncpg_pool, psycopg_async_pool, psycopg_thread_pool])
def test_wrong_types_are_refused_when_the_pool_is_made(
    make: Callable[..., ConnectionPool[Any]],
) -> None:
    need("asyncpg" if make is asyncpg_pool else "psycopg")
    with pytest.raises(TypeError, match="must be a str, not int"):
        make(5)
    with pytest.raises(TypeError, match="port can't be of type float"):
        make(kwargs={"port": 54.32})
    with pytest.raises(TypeError, match="host can't be of type int"):
        make(kwargs={"host": 5})


@pytest.mark.parametrize(
    ("make", "module"),
    [
        (asyncpg_pool, "asyncpg"),
        (psycopg_async_pool, "psycopg"),
        (psycopg_thread_pool, "psycopg"),
    ],
)
def test_who_lacks_a_driver_learns_how_to_install_it(
    make: Callable[..., ConnectionPool[Any]], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'aiosync\[{module}\]'"):
        make()
