"""The recipes for PostgreSQL: no borrower sees anything of the last, nothing is lost silently."""

from __future__ import annotations

import logging
import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group, fail_after, to_thread
from support.helpers import until_async

from aiosync import ConnectionPool, PoolMisuse, PoolTimeout, as_threading
from aiosync.recipes import BlockingPool, asyncpg_pool, psycopg_async_pool, psycopg_thread_pool
from integration.test_postgres import (
    DEADLINE,
    Driver,
    Observer,
    anyio_backend,
    ask_here,
    driver,
    make_asyncpg,
    make_psycopg,
    make_threaded,
    need,
    observer,
    only_server,
    opened,
    server,
    until_idle,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.postgres_server import PostgresServer

__all__ = ["anyio_backend", "driver", "observer", "only_server", "server"]  # fixtures

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

psycopg_only = pytest.mark.parametrize(
    "driver", ["psycopg", "threads", "threads-trio"], indirect=True
)
each_driver = pytest.mark.parametrize(
    "driver", ["asyncpg", "psycopg", "threads", "threads-trio"], indirect=True
)

# What a borrower does, and a question whose answer shows whether the next one sees it; the answer
# has to be true.
TRACES = {
    "role": ("SET ROLE tenant", "SELECT current_user = 'postgres'"),
    "authorization": ("SET SESSION AUTHORIZATION tenant", "SELECT session_user = 'postgres'"),
    "setting": (
        "SET statement_timeout TO 4321",
        "SELECT current_setting('statement_timeout') = '0'",
    ),
    "own setting": (
        "SET my.tenant TO 'a'",
        "SELECT coalesce(current_setting('my.tenant', true), '') = ''",
    ),
    "temporary table": (
        "CREATE TEMP TABLE mine (x int)",
        "SELECT to_regclass('pg_temp.mine') IS NULL",
    ),
    "advisory lock": (
        "SELECT pg_advisory_lock(77)",
        "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    "listener": ("LISTEN news", "SELECT count(*) = 0 FROM pg_listening_channels()"),
    "prepared": (
        "PREPARE mine AS SELECT 1",
        "SELECT count(*) = 0 FROM pg_prepared_statements WHERE from_sql",
    ),
    "cursor": (
        "DECLARE mine CURSOR WITH HOLD FOR SELECT generate_series(1, 9)",
        "SELECT count(*) = 0 FROM pg_cursors WHERE name = 'mine'",
    ),
}


@pytest.fixture(scope="session", autouse=True)
def tenant(only_server: PostgresServer) -> None:
    with only_server.connect() as connection:
        connection.execute("CREATE ROLE tenant")


@pytest.fixture(autouse=True)
def tables(server: PostgresServer) -> None:
    with server.connect() as connection:
        connection.execute("DROP TABLE IF EXISTS visits, places CASCADE")
        connection.execute("CREATE TABLE places (name text PRIMARY KEY)")
        connection.execute(
            "CREATE TABLE visits (who text REFERENCES places DEFERRABLE INITIALLY DEFERRED)"
        )
        connection.execute("INSERT INTO places VALUES ('here')")


def set_password(server: PostgresServer, password: str) -> None:
    with server.connect() as connection:
        connection.execute(f"ALTER ROLE guest PASSWORD '{password}'")


@contextmanager
def requiring_passwords(server: PostgresServer) -> Iterator[None]:
    """Let the role "guest" connect by a password only, which is to be set."""
    rules = server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()

    def load(text: str) -> None:
        rules.write_text(text)
        with server.connect() as connection:
            connection.execute("SELECT pg_reload_conf()")

    with server.connect() as connection:
        connection.execute("CREATE ROLE guest LOGIN")
    load("local all guest scram-sha-256\n" + before)
    try:
        yield
    finally:
        load(before)
        with server.connect() as connection:
            connection.execute("DROP ROLE guest")


VISIT = "INSERT INTO visits VALUES ('here')"
VISIT_NOWHERE = "INSERT INTO visits VALUES ('nowhere')"


def visits(observer: Observer) -> int:
    number: int = observer.ask("SELECT count(*) FROM visits")[0][0]
    return number


class TestSession:
    @each_driver
    @pytest.mark.parametrize("trace", sorted(TRACES))
    async def test_the_next_borrower_sees_nothing_of_the_last(
        self, driver: Driver, server: PostgresServer, observer: Observer, trace: str
    ) -> None:
        statement, question = TRACES[trace]
        async with opened(observer, driver.make(server, "traces", max_size=1)) as pool:
            async with pool.connection() as first:
                await driver.ask(first, statement)
            async with pool.connection() as second:
                assert second is first
                assert await driver.ask(second, question) is True

    @psycopg_only
    async def test_without_reset_session_only_the_transaction_ends(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        pool = driver.make(server, "kept", max_size=1, reset_session=False)
        async with opened(observer, pool):
            async with pool.connection() as connection:
                await driver.ask(connection, "SET statement_timeout TO 4321")
            async with pool.connection() as connection:
                assert await driver.ask(connection, "SHOW statement_timeout") == "4321ms"

    @each_driver
    async def test_statements_prepared_by_the_driver_stay(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        count = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql"
        async with opened(observer, driver.make(server, "prepared", max_size=1)) as pool:
            for _ in range(20):
                async with pool.connection() as connection:
                    assert await driver.ask(connection, "SELECT 7") == 7
            async with pool.connection() as connection:
                assert await driver.ask(connection, count) > 0
            assert pool.get_stats()["connections_num"] == 1

    @each_driver
    async def test_what_configure_has_set_is_there_for_every_borrower(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        async def configure(connection: Any) -> None:
            await driver.ask(connection, "SET statement_timeout TO 4321")
            if driver.make is not make_asyncpg:
                commit = connection.commit()
                if commit is not None:
                    await commit

        pool = driver.make(server, "configured", max_size=1, configure=configure)
        async with opened(observer, pool):
            for _ in range(3):
                async with pool.connection() as connection:
                    assert await driver.ask(connection, "SHOW statement_timeout") == "4321ms"
                    await driver.ask(connection, "SET statement_timeout TO 1234")
            assert pool.get_stats()["connections_num"] == 1

    @each_driver
    async def test_a_configure_that_leaves_a_transaction_open_is_refused(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        async def configure(connection: Any) -> None:
            if driver.make is make_asyncpg:
                await driver.ask(connection, "BEGIN")
            await driver.ask(connection, "SET statement_timeout TO 4321")

        pool = driver.make(server, "open", configure=configure, min_size=1)
        async with opened(observer, pool):
            for call in pool.wait, pool.acquire:
                with pytest.raises(PoolMisuse, match=r"configure\(\) has left a transaction open"):
                    await call(math.inf)

    async def test_a_plain_configure_of_threads_is_called_in_a_thread(
        self, server: PostgresServer
    ) -> None:
        threads: list[int] = []

        def configure(connection: Any) -> None:
            threads.append(threading.get_ident())
            connection.execute("SET statement_timeout TO 4321")
            connection.commit()

        async with make_threaded(server, "plain", max_size=1, configure=configure) as pool:
            for _ in range(2):
                async with pool.connection():
                    pass
        assert len(threads) >= 2
        assert threading.get_ident() not in threads


class TestAsyncpg:
    async def test_what_asyncpg_keeps_on_this_side_is_not_added_again(
        self, server: PostgresServer
    ) -> None:
        need("asyncpg")
        added: list[int] = []

        async def configure(connection: Any) -> None:
            await connection.set_type_codec(
                "int4", schema="pg_catalog", encoder=str, decoder=lambda text: f"<{text}>"
            )
            connection.add_query_logger(log)
            added.append(1)

        def log(record: Any) -> None:
            queries.append(record.query)

        queries: list[str] = []
        async with make_asyncpg(server, "codecs", max_size=1, configure=configure) as pool:
            for _ in range(3):
                async with pool.connection() as connection:
                    assert await connection.fetchval("SELECT 7::int4") == "<7>"
            await until_idle(pool)
            assert pool.get_stats()["connections_num"] == 1
        assert len(added) == 4
        assert queries.count("SELECT 7::int4") == 3
        assert not any("typname" in query for query in queries)  # types are looked up once

    @pytest.mark.parametrize("change", ["codec", "query logger", "termination listener"])
    async def test_a_connection_with_codecs_or_callbacks_of_its_borrower_is_replaced(
        self, server: PostgresServer, change: str
    ) -> None:
        need("asyncpg")
        async with make_asyncpg(server, "changed", max_size=1) as pool:
            async with pool.connection() as first:
                if change == "codec":
                    await first.set_type_codec(
                        "int4", schema="pg_catalog", encoder=str, decoder=str
                    )
                elif change == "query logger":
                    first.add_query_logger(lambda _: None)
                else:
                    first.add_termination_listener(lambda _: None)
            async with pool.connection() as second:
                assert second is not first
                assert await second.fetchval("SELECT 7::int4") == 7

    async def test_server_settings_and_no_statement_cache_and_a_class_of_the_caller(
        self, server: PostgresServer
    ) -> None:
        asyncpg = pytest.importorskip("asyncpg")

        base: Any = asyncpg.Connection

        class Mine(base):  # type: ignore[misc]
            __slots__ = ("mine",)

            def get_reset_query(self) -> str:
                return f"{super().get_reset_query()}\nSET my.reset TO 'yes';"

        kwargs = {
            "host": server.host,
            "user": "postgres",
            "database": "postgres",
            "server_settings": {"statement_timeout": "4321", "role": "tenant"},
            "statement_cache_size": 0,
            "connection_class": Mine,
        }
        async with asyncpg_pool(kwargs=kwargs, max_size=1) as pool:
            async with pool.connection() as connection:
                assert isinstance(connection, Mine)
                await connection.execute(
                    "SET statement_timeout TO 1; RESET ROLE; SET ROLE postgres"
                )
            async with pool.connection() as same:
                assert same is connection
                assert await same.fetchval("SHOW statement_timeout") == "4321ms"
                assert await same.fetchval("SELECT current_user") == "tenant"
                assert await same.fetchval("SHOW my.reset") == "yes"

    async def test_one_that_its_borrower_has_terminated_is_replaced_because_it_is_closed(
        self, server: PostgresServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        need("asyncpg")
        async with make_asyncpg(server, "terminates", max_size=1) as pool:
            async with pool.connection() as connection:
                connection.terminate()
            async with pool.connection() as other:
                assert other is not connection
        assert ["connection is closed" in record.message for record in caplog.records] == [True]

    async def test_a_reset_of_a_class_of_the_caller_is_called(self, server: PostgresServer) -> None:
        asyncpg = pytest.importorskip("asyncpg")
        base: Any = asyncpg.Connection

        class Mine(base):  # type: ignore[misc]
            async def reset(self, *, timeout: float | None = None) -> None:
                await super().reset(timeout=timeout)
                self.mine = "reset"

        kwargs = {"host": server.host, "user": "postgres", "connection_class": Mine}
        async with asyncpg_pool(kwargs=kwargs, max_size=1) as pool:
            async with pool.connection() as connection:
                connection.mine = "set"
            async with pool.connection() as same:
                assert same is connection
                assert same.mine == "reset"

    @pytest.mark.parametrize(
        "method", ["execute", "executemany", "fetch", "fetchmany", "fetchval", "prepare"]
    )
    async def test_a_prepared_statement_is_dropped_whatever_method_made_it(
        self, server: PostgresServer, method: str
    ) -> None:
        need("asyncpg")
        async with make_asyncpg(server, "prepares", max_size=1) as pool:
            async with pool.connection() as connection:
                arguments: list[Any] = [[()]] if method.endswith("many") else []
                made = await getattr(connection, method)("PREPARE mine AS SELECT 1", *arguments)
                if method == "prepare":
                    await made.fetch()
            async with pool.connection() as connection:
                left = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"
                assert await connection.fetchval(left) == 0

    async def test_a_class_that_is_none_of_asyncpg_is_refused(self, server: PostgresServer) -> None:
        need("asyncpg")
        kwargs = {"host": server.host, "user": "postgres", "connection_class": object}
        async with asyncpg_pool(kwargs=kwargs) as pool:
            with pytest.raises(PoolMisuse, match=r"subclass of asyncpg\.Connection"):
                await pool.acquire(math.inf)


class TestPsycopg:
    @psycopg_only
    @pytest.mark.parametrize("reset_session", [False, True])
    @pytest.mark.parametrize("autocommit", [False, True])
    async def test_what_psycopg_keeps_on_this_side_is_restored(
        self, driver: Driver, server: PostgresServer, reset_session: bool, autocommit: bool
    ) -> None:
        from psycopg import AsyncClientCursor, ClientCursor, IsolationLevel
        from psycopg.rows import dict_row
        from psycopg.types.numeric import IntDumper

        class Dumper(IntDumper):
            pass

        async def change(connection: Any, name: str, value: object) -> None:
            if driver.blocks:
                setattr(connection, name, value)
            else:
                await getattr(connection, f"set_{name}")(value)

        def state(connection: Any) -> dict[str, object]:
            names = (
                "autocommit", "isolation_level", "read_only", "deferrable", "row_factory",
                "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max",
            )  # fmt: skip
            handlers = [list(connection._notice_handlers), list(connection._notify_handlers)]
            dumper = connection.adapters.get_dumper(int, "s")
            return {**{name: getattr(connection, name) for name in names}, "": (handlers, dumper)}

        def configure(connection: Any) -> None:
            connection.row_factory = dict_row
            connection.prepare_threshold = 3

        pool = driver.make(
            server,
            "state",
            max_size=1,
            reset_session=reset_session,
            configure=configure,
            kwargs={"autocommit": autocommit},
        )
        async with pool:
            async with pool.connection() as connection:
                before = state(connection)
                assert before["autocommit"] is autocommit
                assert before["row_factory"] is dict_row
                await change(connection, "autocommit", not autocommit)
                await change(connection, "isolation_level", IsolationLevel.SERIALIZABLE)
                await change(connection, "read_only", True)
                await change(connection, "deferrable", True)
                connection.row_factory = None
                connection.cursor_factory = ClientCursor if driver.blocks else AsyncClientCursor
                connection.server_cursor_factory = ClientCursor
                connection.prepare_threshold = None
                connection.prepared_max = 7
                connection.add_notice_handler(print)
                connection.add_notify_handler(print)
                connection.adapters.register_dumper(int, Dumper)
            async with pool.connection() as same:
                assert same is connection
                assert state(same) == before

    @psycopg_only
    async def test_a_connection_in_pipeline_mode_is_replaced(
        self, driver: Driver, server: PostgresServer
    ) -> None:
        async with driver.make(server, "pipeline", max_size=1) as pool:
            first = await pool.acquire()
            pipeline = first.pipeline()
            if driver.blocks:
                pipeline.__enter__()
            else:
                await pipeline.__aenter__()
            pool.release(first)
            async with pool.connection() as second:
                assert second is not first
                assert await driver.ask(second, "SELECT 7") == 7
            del pipeline

    @psycopg_only
    async def test_a_pipeline_that_has_ended_is_fine(
        self, driver: Driver, server: PostgresServer
    ) -> None:
        def work(connection: Any) -> None:
            with connection.pipeline():
                connection.execute(VISIT)

        async with driver.make(server, "pipeline", max_size=1) as pool:
            async with pool.connection() as first:
                if driver.blocks:
                    await to_thread.run_sync(work, first)
                else:
                    async with first.pipeline():
                        await first.execute(VISIT)
            async with pool.connection() as second:
                assert second is first

    @psycopg_only
    async def test_notifications_of_the_last_borrower_are_gone(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        async with driver.make(server, "notified", max_size=1) as pool:
            async with pool.connection() as connection:
                await driver.ask(connection, "LISTEN news")
            # Not in the same transaction: only then it is notified.
            async with pool.connection() as connection:
                await driver.ask(connection, "LISTEN news")
                await driver.ask(connection, "COMMIT")
                observer.ask("SELECT pg_notify('news', 'old')")
                await driver.ask(connection, "SELECT 1")
            async with pool.connection() as connection:
                assert not connection._notifies_backlog


class TestCommit:
    @psycopg_only
    async def test_a_block_that_ends_normally_is_committed(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        async with driver.make(server, "commits", max_size=1) as pool:
            async with pool.connection() as connection:
                await driver.ask(connection, VISIT)
            assert visits(observer) == 1

    @psycopg_only
    async def test_a_block_that_raises_is_rolled_back(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        async with driver.make(server, "rolls back", max_size=1) as pool:
            with pytest.raises(LookupError, match="mine"):
                async with pool.connection() as connection:
                    await driver.ask(connection, VISIT)
                    raise LookupError("mine")
            async with pool.connection() as connection:
                assert await driver.ask(connection, "SELECT count(*) FROM visits") == 0

    @psycopg_only
    async def test_a_transaction_that_is_released_open_is_reported_once_for_each_line(
        self, driver: Driver, server: PostgresServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def forget(in_thread: bool) -> None:
            connection = await pool.acquire()
            await driver.ask(connection, VISIT)
            if in_thread:
                await to_thread.run_sync(pool.release, connection)
            else:
                pool.release(connection)

        async with driver.make(server, "forgets", max_size=1) as pool:
            with caplog.at_level(logging.INFO, "aiosync.pool"):
                for in_thread in False, False, True:
                    await forget(in_thread)
                with pytest.raises(LookupError):
                    async with pool.connection() as connection:
                        await driver.ask(connection, VISIT)
                        raise LookupError
                async with pool.connection() as connection:
                    assert await driver.ask(connection, "SELECT count(*) FROM visits") == 0
        told = [(r.levelname, r.getMessage()) for r in caplog.records if "rolled" in r.getMessage()]
        line = f"{__file__}:{forget.__code__.co_firstlineno + 6}"
        assert told == [
            (
                "WARNING",
                "forgets: rolled back a transaction that was open when its connection was "
                f"released: {line}",
            ),
            ("INFO", "forgets: rolled back a transaction of a thread"),
        ]

    @psycopg_only
    async def test_the_error_of_a_commit_is_raised_by_the_block(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        from psycopg.errors import ForeignKeyViolation

        async with driver.make(server, "violates", max_size=1) as pool:
            with pytest.raises(ForeignKeyViolation):
                async with pool.connection() as connection:
                    await driver.ask(connection, VISIT_NOWHERE)
            async with pool.connection() as connection:
                assert await driver.ask(connection, "SELECT 7") == 7
        assert visits(observer) == 0

    async def test_blocks_of_threads_commit_too(
        self, server: PostgresServer, observer: Observer
    ) -> None:
        from psycopg.errors import ForeignKeyViolation

        def work() -> None:
            with view.connection(DEADLINE) as connection:
                ask_here(connection, VISIT)
            with pytest.raises(LookupError, match="mine"), view.connection(DEADLINE) as connection:
                ask_here(connection, VISIT)
                raise LookupError("mine")
            with pytest.raises(ForeignKeyViolation), view.connection(DEADLINE) as connection:
                ask_here(connection, VISIT_NOWHERE)

        async with make_threaded(server, "threads", max_size=1) as pool:
            view = as_threading(pool)
            await to_thread.run_sync(work)
        assert visits(observer) == 1

    @psycopg_only
    async def test_a_commit_of_the_caller_runs_before(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        states: list[str] = []

        def commit(connection: Any) -> None:
            states.append(connection.info.transaction_status.name)

        pool = driver.make(server, "both", max_size=1, commit=commit)
        async with pool, pool.connection() as connection:
            await driver.ask(connection, VISIT)
        assert states == ["INTRANS"]
        assert visits(observer) == 1


class TestRun:
    @pytest.mark.parametrize("driver", ["threads", "threads-trio"], indirect=True)
    async def test_run_commits_or_rolls_back(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        from psycopg.errors import ForeignKeyViolation

        def fail(connection: Any) -> None:
            ask_here(connection, VISIT)
            raise LookupError("mine")

        async with driver.make(server, "run", max_size=1) as pool:
            assert isinstance(pool, BlockingPool)
            await pool.run(ask_here, VISIT)
            assert visits(observer) == 1
            assert await pool.run(lambda connection: connection.autocommit) is False
            with pytest.raises(LookupError, match="mine"):
                await pool.run(fail)
            with pytest.raises(ForeignKeyViolation):
                await pool.run(ask_here, VISIT_NOWHERE)
            assert await pool.run(ask_here, "SELECT count(*) FROM visits", timeout=DEADLINE) == 1

    @pytest.mark.parametrize("driver", ["threads", "threads-trio"], indirect=True)
    async def test_a_cancelled_call_cancels_its_command(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        pool: Any = driver.make(server, "cancelled", max_size=1)
        with fail_after(DEADLINE):
            async with opened(observer, pool):
                async with create_task_group() as tasks:
                    tasks.start_soon(pool.run, ask_here, "SELECT pg_sleep(60)")
                    await observer.until_busy("cancelled")
                    tasks.cancel_scope.cancel()
                assert await pool.run(ask_here, "SELECT 7") == 7
                assert pool.get_stats()["connections_num"] == 1


class TestHooks:
    @each_driver
    async def test_the_hooks_of_the_caller_run_too(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        calls: list[str] = []

        async def note(connection: Any, name: str) -> None:
            assert await driver.ask(connection, "SELECT 7") == 7
            if driver.make is not make_asyncpg:
                end = connection.rollback()
                if end is not None:
                    await end
            calls.append(name)

        async def reset(connection: Any) -> None:
            await note(connection, "reset")

        async def check(connection: Any) -> None:
            await note(connection, "check")

        async def close(connection: Any) -> None:
            await note(connection, "close")
            raise OSError("mine")

        pool = driver.make(server, "hooks", max_size=1, reset=reset, check=check, close=close)
        async with opened(observer, pool):
            async with pool.connection():
                pass
            await pool.check()
        assert calls == ["reset", "check", "close"]
        assert pool.statistics().failed_closes == 1

    @each_driver
    async def test_a_check_of_the_caller_that_returns_false_replaces_the_connection(
        self, driver: Driver, server: PostgresServer
    ) -> None:
        async with driver.make(server, "false", min_size=1, check=lambda _: False) as pool:
            await pool.wait(DEADLINE)
            await pool.check()
            assert pool.get_stats()["connections_lost"] == 1

    @each_driver
    async def test_a_connection_that_the_server_has_ended_is_replaced(
        self, driver: Driver, server: PostgresServer, observer: Observer
    ) -> None:
        pool = driver.make(server, "ended", max_size=1, check_idle=None)
        async with opened(observer, pool):
            with pytest.raises(Exception, match=r"terminating|closed"):
                async with pool.connection() as connection:
                    await driver.ask(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
            async with pool.connection() as another:
                assert another is not connection
                assert await driver.ask(another, "SELECT 7") == 7

    async def test_an_idle_connection_that_asyncpg_knows_to_be_closed_is_not_lent(
        self, server: PostgresServer, observer: Observer
    ) -> None:
        need("asyncpg")
        async with make_asyncpg(server, "closed", max_size=1, check_idle=None) as pool:
            async with pool.connection() as first:
                pass
            observer.terminate("closed")
            await until_async(first.is_closed)
            async with pool.connection() as second:
                assert second is not first
                assert await second.fetchval("SELECT 7") == 7


class TestCredentials:
    @each_driver
    @pytest.mark.parametrize("where", ["dsn", "password", "kwargs"])
    async def test_a_password_that_changes_on_a_running_server(
        self, driver: Driver, server: PostgresServer, observer: Observer, where: str
    ) -> None:
        password = "old"
        calls: list[str] = []

        async def current_password() -> str:
            await anyio.lowlevel.checkpoint()
            calls.append(password)
            return password

        def plain_password() -> str:
            calls.append(password)
            return password

        async def conninfo() -> str:
            return f"{without} password={await current_password()}"

        async def dsn() -> str:
            return f"postgresql://guest:{await current_password()}@/postgres?host={server.host}"

        async def kwargs() -> dict[str, str]:
            return {**target, "password": await current_password()}

        without = f"host={server.host} user=guest dbname=postgres"
        database = "database" if driver.make is make_asyncpg else "dbname"
        target = {"host": server.host, "user": "guest", database: "postgres"}
        recipes: dict[Any, Callable[..., ConnectionPool[Any]]] = {
            make_asyncpg: asyncpg_pool,
            make_psycopg: psycopg_async_pool,
            make_threaded: psycopg_thread_pool,
        }
        make = recipes[driver.make]
        given: dict[str, Any]
        if where == "dsn":
            given = {"dsn": dsn} if driver.make is make_asyncpg else {"conninfo": conninfo}
        elif where == "password":
            given = {"kwargs": {**target, "password": plain_password}}
        else:
            given = {"kwargs": kwargs}

        with requiring_passwords(server):
            set_password(server, password)
            async with make(max_size=1, fail_fast=True, **given) as pool:
                async with pool.connection() as first:
                    assert await driver.ask(first, "SELECT current_user") == "guest"
                password = "new"
                set_password(server, password)
                await pool.drain()
                async with pool.connection() as second:
                    assert second is not first
                    assert await driver.ask(second, "SELECT current_user") == "guest"
                await pool.drain()
                password = "wrong"
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(DEADLINE)
                assert "password" in str(caught.value.__cause__)
        assert calls[:2] == ["old", "new"]
