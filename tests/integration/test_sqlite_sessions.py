"""The recipe for SQLite: nothing of one borrower reaches the next, and nothing is lost silently."""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import anyio
import pytest
from anyio import create_task_group, fail_after, to_thread

from aiosync import PoolMisuse, as_threading
from aiosync.recipes import sqlite_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

DEADLINE = 20.0
# What `sqlite3.connect` may be told about transactions.
MODES: list[dict[str, Any]] = [{}, {"isolation_level": None}, {"isolation_level": "IMMEDIATE"}]
if sys.version_info >= (3, 12):
    MODES += [{"autocommit": False}, {"autocommit": True}]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "visits.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # no test needs it to survive a crash
        connection.execute("CREATE TABLE visits (who TEXT)")
        connection.executemany("INSERT INTO visits VALUES (?)", [[str(n)] for n in range(10)])
        connection.commit()
    return path


@pytest.fixture(params=MODES, ids=str)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def ask(connection: sqlite3.Connection, statement: str, *values: object) -> Any:
    with closing(connection.execute(statement, values)) as cursor:
        row = cursor.fetchone()
    return None if row is None else row[0]


def visits(connection: sqlite3.Connection) -> int:
    number: int = ask(connection, "SELECT count(*) FROM visits")
    return number


def add(connection: sqlite3.Connection) -> None:
    if getattr(connection, "autocommit", None) is True or connection.isolation_level is None:
        connection.execute("BEGIN")
    connection.execute("INSERT INTO visits VALUES ('new')")


def add_and_commit(connection: sqlite3.Connection) -> None:
    add(connection)
    if getattr(connection, "autocommit", None) is True:
        connection.execute("COMMIT")  # commit() does nothing
    else:
        connection.commit()


@contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "aiosync.pool"):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == "aiosync.pool"]


class TestTransactions:
    async def test_pragmas_and_wal_are_set_whatever_the_mode(
        self, database: Path, mode: dict[str, Any]
    ) -> None:
        pragmas: dict[str, str | int] = {"foreign_keys": 1, "synchronous": 1}
        async with sqlite_pool(database, pragmas=pragmas, kwargs=mode, max_size=1) as pool:
            for _ in range(2):
                assert await pool.run(ask, "PRAGMA foreign_keys") == 1
                assert await pool.run(ask, "PRAGMA synchronous") == 1
                assert await pool.run(ask, "PRAGMA journal_mode") == "wal"
            assert pool.get_stats()["connections_num"] == 1

    async def test_what_is_committed_stays_and_what_is_not_is_rolled_back(
        self, database: Path, mode: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, kwargs=mode, max_size=1, name="mine") as pool:
                await pool.run(add_and_commit)
                assert await pool.run(visits) == 11
                assert warnings() == []
                await pool.run(add)
                here = sys._getframe().f_lineno - 1
                assert await pool.run(visits) == 11
                assert pool.get_stats()["connections_num"] == 1
        [warning] = warnings()
        assert warning.startswith("mine: rolled back what was not committed")
        assert warning.endswith(f"borrowed at {__file__}:{here}")

    async def test_what_changed_no_row_is_not_reported(
        self, database: Path, mode: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, kwargs=mode, max_size=1) as pool:
                await pool.run(visits)
                await pool.run(ask, "DELETE FROM visits WHERE who = 'nobody'")
                assert await pool.run(visits) == 10
        assert warnings() == []

    async def test_a_table_that_was_not_committed_is_reported_too(
        self, database: Path, mode: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        def create(connection: sqlite3.Connection) -> None:
            if not connection.in_transaction:
                connection.execute("BEGIN")
            connection.execute("CREATE TABLE forgotten (x)")

        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, kwargs=mode, max_size=1) as pool:
                await pool.run(create)
                count = "SELECT count(*) FROM sqlite_master WHERE name = 'forgotten'"
                assert await pool.run(ask, count) == 0
        assert len(warnings()) == 1

    async def test_what_a_cursor_made_by_hand_has_written_is_rolled_back_and_reported(
        self, database: Path, mode: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        def write(connection: sqlite3.Connection) -> None:
            cursor = sqlite3.Cursor(connection)
            if not connection.in_transaction:
                cursor.execute("BEGIN")
            cursor.execute("INSERT INTO visits VALUES ('new')")

        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, kwargs=mode, max_size=1) as pool:
                await pool.run(write)
                assert await pool.run(visits) == 10
        assert len(warnings()) == 1

    async def test_each_call_site_is_reported_once(
        self, database: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def forget() -> None:
            async with pool.connection() as connection:
                await to_thread.run_sync(add, connection)

        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, max_size=1) as pool:
                for _ in range(3):
                    await forget()
                connection = await pool.acquire()
                add(connection)
                pool.release(connection)
                here = sys._getframe().f_lineno - 1
                assert await pool.run(visits) == 10
        first, second = warnings()
        assert f"{__file__}:{forget.__code__.co_firstlineno + 1}" in first
        assert second.endswith(f"borrowed at {__file__}:{here}")

    async def test_a_thread_is_reported_by_the_line_that_borrowed(
        self, database: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def work() -> None:
            with as_threading(pool).connection() as connection:
                add(connection)

        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, max_size=1) as pool:
                for _ in range(2):
                    await to_thread.run_sync(work)
                assert await pool.run(visits) == 10
        [warning] = warnings()
        assert warning.endswith(f"borrowed at {__file__}:{work.__code__.co_firstlineno + 1}")

    @pytest.mark.parametrize("how", ["release", "raise"])
    async def test_where_no_block_of_a_thread_ends_its_last_statement_is_reported(
        self, database: Path, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        def work() -> None:
            view = as_threading(pool)
            if how == "release":
                connection = view.acquire()
                add(connection)
                view.release(connection)
            else:
                with pytest.raises(LookupError), view.connection() as connection:
                    add(connection)
                    raise LookupError

        with warnings_of(caplog) as warnings:
            async with sqlite_pool(database, max_size=1) as pool:
                await to_thread.run_sync(work)
                assert await pool.run(visits) == 10
        [warning] = warnings()
        assert f"its last statement was at {__file__}:{add.__code__.co_firstlineno + 3}" in warning

    async def test_a_commit_of_the_caller_runs_before(
        self, database: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def work() -> None:
            with as_threading(pool).connection() as connection:
                add(connection)

        with warnings_of(caplog) as warnings:
            options: Any = {"max_size": 1, "commit": lambda connection: connection.commit()}
            async with sqlite_pool(database, **options) as pool:
                await to_thread.run_sync(work)
                assert await pool.run(visits) == 11
        assert warnings() == []

    async def test_a_block_of_a_thread_that_closes_its_connection_ends_quietly(
        self, database: Path
    ) -> None:
        def work() -> None:
            with as_threading(pool).connection() as connection:
                connection.close()

        async with sqlite_pool(database, max_size=1) as pool:
            await to_thread.run_sync(work)
            assert await pool.run(visits) == 10

    async def test_an_error_of_the_function_is_raised_and_its_work_rolled_back(
        self, database: Path, mode: dict[str, Any]
    ) -> None:
        def fail(connection: sqlite3.Connection) -> None:
            add(connection)
            raise LookupError("mine")

        async with sqlite_pool(database, kwargs=mode, max_size=1) as pool:
            with pytest.raises(LookupError, match="mine"):
                await pool.run(fail)
            assert await pool.run(visits) == 10

    async def test_a_configure_that_leaves_a_transaction_open_is_refused(
        self, database: Path, mode: dict[str, Any]
    ) -> None:
        pool = sqlite_pool(database, configure=add, kwargs=mode, timeout=None, min_size=1)
        async with pool:
            for wait in partial(pool.run, visits), partial(pool.wait, None):
                with pytest.raises(PoolMisuse, match=r"configure\(\) has left a transaction open"):
                    await wait()

    async def test_a_configure_that_commits_is_accepted(
        self, database: Path, mode: dict[str, Any]
    ) -> None:
        pool = sqlite_pool(database, configure=add_and_commit, kwargs=mode, max_size=1)
        async with pool:
            assert await pool.run(visits) == 11
            assert await pool.run(visits) == 11


class TestSession:
    async def test_attributes_are_restored_to_what_configure_has_set(
        self, database: Path, mode: dict[str, Any]
    ) -> None:
        def configure(connection: sqlite3.Connection) -> None:
            connection.row_factory = sqlite3.Row
            connection.text_factory = bytes

        def change(connection: sqlite3.Connection) -> None:
            assert connection.row_factory is sqlite3.Row
            assert connection.text_factory is bytes
            assert connection.isolation_level == expected
            connection.row_factory = None
            connection.text_factory = str
            connection.isolation_level = "EXCLUSIVE"
            if sys.version_info >= (3, 12):
                assert connection.autocommit == mode.get(
                    "autocommit", sqlite3.LEGACY_TRANSACTION_CONTROL
                )
                connection.autocommit = not mode.get("autocommit", True)

        with closing(sqlite3.connect(database, **mode)) as connection:
            expected = connection.isolation_level
        async with sqlite_pool(database, configure=configure, kwargs=mode, max_size=1) as pool:
            for _ in range(3):
                await pool.run(change)
            assert pool.get_stats()["connections_num"] == 1

    async def test_configure_runs_in_a_thread_if_it_is_plain(self, database: Path) -> None:
        threads: list[int] = []

        def configure(_: sqlite3.Connection) -> None:
            threads.append(threading.get_ident())

        async def configure_here(_: sqlite3.Connection) -> None:
            await anyio.lowlevel.checkpoint()
            threads.append(threading.get_ident())

        for hook in (configure, configure_here):
            async with sqlite_pool(database, configure=hook) as pool:
                await pool.run(visits)
        assert threads[0] != threading.get_ident()
        assert threads[1] == threading.get_ident()

    async def test_all_ways_to_execute_statements_work(self, database: Path) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.executescript("CREATE TABLE more (x); INSERT INTO more VALUES (1)")
            with connection:
                connection.executemany("INSERT INTO more VALUES (?)", [[2], [3]])

        async with sqlite_pool(database, max_size=1) as pool:
            await pool.run(work)
            assert await pool.run(ask, "SELECT count(*) FROM more") == 3
            assert pool.get_stats()["connections_num"] == 1

    @pytest.mark.parametrize("by", ["execute", "cursor", "subclass", "blob"])
    async def test_what_keeps_a_snapshot_is_closed(self, database: Path, by: str) -> None:
        class Cursor(sqlite3.Cursor):
            pass

        def begin_to_read(connection: sqlite3.Connection) -> Any:
            select = "SELECT who FROM visits"
            if by == "blob":
                return connection.blobopen("visits", "who", 1)
            if by == "execute":
                cursor = connection.execute(select)
            else:
                cursor = connection.cursor(Cursor) if by == "subclass" else connection.cursor()
                cursor.execute(select)
            assert cursor.fetchone() is not None
            return cursor

        async with sqlite_pool(database, max_size=1) as pool:
            kept = await pool.run(begin_to_read)
            with closing(sqlite3.connect(database)) as other:
                add_and_commit(other)
            assert await pool.run(visits) == 11
            assert pool.get_stats()["connections_num"] == 1
            with pytest.raises(sqlite3.ProgrammingError):
                kept.read() if by == "blob" else kept.fetchone()

    async def test_a_borrower_may_execute_any_number_of_statements(self, database: Path) -> None:
        def work(connection: sqlite3.Connection) -> int:
            kept = [connection.execute("SELECT 1") for _ in range(100)]
            for _ in range(1000):
                connection.execute("SELECT 1")
            return len(kept) + len(connection.aiosync_session.cursors)  # type: ignore[attr-defined]

        async with sqlite_pool(database, max_size=1) as pool:
            assert await pool.run(work) < 600

    @pytest.mark.parametrize(
        "statement",
        [
            "PRAGMA foreign_keys = 1",
            "PRAGMA main.cache_size(77)",
            "PRAGMA query_only = 1",
            "ATTACH ':memory:' AS other",
            "CREATE TEMP TABLE mine (x)",
            "CREATE TEMP VIEW mine AS SELECT 1",
            "CREATE TEMP TRIGGER mine AFTER INSERT ON visits BEGIN SELECT 1; END",
        ],
    )
    @pytest.mark.parametrize("by_hand", [False, True])
    async def test_a_connection_whose_session_was_changed_is_replaced(
        self, database: Path, statement: str, by_hand: bool
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            async with pool.connection() as first:
                execute = sqlite3.Cursor(first).execute if by_hand else first.execute
                await to_thread.run_sync(execute, statement)
            async with pool.connection() as second:
                assert second is not first

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.create_function("f", 0, lambda: 1),
            lambda c: c.create_collation("c", lambda a, b: (a > b) - (a < b)),
            lambda c: c.set_authorizer(lambda *_: sqlite3.SQLITE_OK),
            lambda c: c.set_trace_callback(print),
            lambda c: c.set_progress_handler(bool, 1000),
            lambda c: c.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 10),
        ],
    )
    async def test_so_is_one_with_functions_or_callbacks_of_the_borrower(
        self, database: Path, change: Any
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            async with pool.connection() as first:
                change(first)
            async with pool.connection() as second:
                assert second is not first

    @pytest.mark.parametrize(
        "statement",
        [
            "PRAGMA foreign_keys",
            "PRAGMA table_info(visits)",
            "SELECT * FROM pragma_table_info('visits')",
            "PRAGMA integrity_check(1)",
            "PRAGMA wal_checkpoint(PASSIVE)",
            "PRAGMA user_version = 3",
            "CREATE TABLE another (x)",
            "CREATE INDEX by_who ON visits (who)",
            "ALTER TABLE visits ADD COLUMN y",
            "DROP TABLE visits",
            "SELECT who FROM visits ORDER BY random()",
            "WITH some AS MATERIALIZED (SELECT who FROM visits) SELECT * FROM some",
        ],
    )
    async def test_what_leaves_the_session_alone_leaves_the_connection_alone(
        self, database: Path, statement: str
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            async with pool.connection() as first:
                await to_thread.run_sync(ask, first, statement)
            async with pool.connection() as second:
                assert second is first

    async def test_what_configure_does_to_the_session_is_there_for_all(
        self, database: Path
    ) -> None:
        def configure(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA cache_size = 77")
            connection.execute("ATTACH ':memory:' AS other")
            connection.create_function("seven", 0, lambda: 7)
            connection.set_authorizer(authorize)

        def authorize(action: int, *_: object) -> int:
            actions.add(action)
            return sqlite3.SQLITE_OK

        actions: set[int] = set()
        async with sqlite_pool(database, configure=configure, max_size=1) as pool:
            for _ in range(2):
                assert await pool.run(ask, "PRAGMA cache_size") == 77
                assert await pool.run(ask, "SELECT seven()") == 7
                assert await pool.run(ask, "SELECT count(*) FROM other.sqlite_master") == 0
            assert pool.get_stats()["connections_num"] == 1
        assert sqlite3.SQLITE_SELECT in actions


class TestArguments:
    async def test_check_same_thread_may_be_false_but_not_true(self, database: Path) -> None:
        async with sqlite_pool(database, kwargs={"check_same_thread": False}) as pool:
            assert await pool.run(visits) == 10
        with pytest.raises(TypeError, match="used by many threads"):
            sqlite_pool(database, kwargs={"check_same_thread": True})

    async def test_a_factory_of_the_caller_is_used(self, database: Path) -> None:
        class Mine(sqlite3.Connection):
            def visits(self) -> int:
                return visits(self)

        async with sqlite_pool(database, kwargs={"factory": Mine}, max_size=1) as pool:
            assert await pool.run(Mine.visits) == 10  # type: ignore[arg-type]

    async def test_a_factory_that_is_no_class_is_refused(self, database: Path) -> None:
        def factory(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            return sqlite3.Connection(*args, **kwargs)

        async with sqlite_pool(database, kwargs={"factory": factory}, timeout=None) as pool:
            with pytest.raises(PoolMisuse, match="factory must be a subclass"):
                await pool.run(visits)

    @pytest.mark.parametrize(
        "kwargs",
        [{"unknown": 1}, {"isolation_level": "none"}, lambda: {"check_same_thread": True}],
        ids=["name", "value", "function"],
    )
    async def test_wrong_arguments_of_connect_are_told_at_once(
        self, database: Path, kwargs: Any
    ) -> None:
        async with sqlite_pool(database, kwargs=kwargs, timeout=None) as pool:
            with pytest.raises(PoolMisuse, match="wrong arguments of connect: "):
                await pool.run(visits)

    async def test_a_uri_may_be_read_only(self, database: Path) -> None:
        uri = f"{database.as_uri()}?mode=ro"
        async with sqlite_pool(uri, uri=True, wal=False, max_size=1) as pool:
            assert await pool.run(visits) == 10
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                await pool.run(add)

    async def test_kwargs_may_be_a_function(self, database: Path) -> None:
        calls: list[bool] = []

        async def kwargs() -> dict[str, Any]:
            await anyio.lowlevel.checkpoint()
            calls.append(True)
            return {"isolation_level": None}

        async with sqlite_pool(database, kwargs=kwargs, max_size=1) as pool:
            await pool.run(visits)
            await pool.drain()
            await pool.run(ask, "INSERT INTO visits VALUES ('at once')")
            assert await pool.run(visits) == 11
        assert len(calls) == 2

    @pytest.mark.skipif(sys.version_info >= (3, 12), reason="it is known since Python 3.12")
    async def test_autocommit_is_refused_where_it_is_unknown(self, database: Path) -> None:
        with pytest.raises(TypeError, match=r"Python 3\.12"):
            sqlite_pool(database, kwargs={"autocommit": True})


class TestHooks:
    async def test_the_hooks_of_the_caller_run_too(self, database: Path) -> None:
        calls: list[str] = []

        async def close(connection: sqlite3.Connection) -> None:
            await anyio.lowlevel.checkpoint()
            assert connection.total_changes == 1  # not closed yet
            calls.append("close")

        def reset(connection: sqlite3.Connection) -> None:
            assert not connection.in_transaction
            calls.append("reset")

        def check(_: sqlite3.Connection) -> None:
            calls.append("check")

        pool = sqlite_pool(database, max_size=1, reset=reset, check=check, close=close)
        async with pool:
            await pool.run(add)
            await pool.check()
            async with pool.connection() as connection:
                pass
        assert calls == ["reset", "check", "reset", "close"]
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")

    @pytest.mark.parametrize("outcome", [False, OSError("no")], ids=str)
    async def test_a_check_of_the_caller_that_fails_replaces_the_connection(
        self, database: Path, outcome: object
    ) -> None:
        def check(_: sqlite3.Connection) -> object:
            if isinstance(outcome, OSError):
                raise outcome
            return outcome

        async with sqlite_pool(database, max_size=1, check=check) as pool:
            await pool.run(visits)
            await pool.check()
            assert pool.get_stats()["connections_lost"] == 1

    async def test_a_connection_is_replaced_after_an_error_that_is_fatal(
        self, database: Path
    ) -> None:
        class CorruptError(sqlite3.DatabaseError):
            sqlite_errorname = "SQLITE_CORRUPT_INDEX"

        async with sqlite_pool(database, max_size=1) as pool:
            for error, closed in [(LookupError(), 0), (CorruptError(), 1)]:
                with pytest.raises(type(error)):
                    async with pool.connection():
                        raise error
                assert await pool.run(visits) == 10
                assert pool.get_stats()["closed_discard"] == closed


class TestRun:
    async def test_more_tasks_and_threads_than_worker_threads_share_two_connections(
        self, database: Path
    ) -> None:
        limiter = to_thread.current_default_thread_limiter()
        before, limiter.total_tokens = limiter.total_tokens, 2

        def work() -> None:
            with as_threading(pool).connection(DEADLINE) as connection:
                add_and_commit(connection)

        try:
            async with sqlite_pool(database, max_size=2, timeout=DEADLINE) as pool:
                async with create_task_group() as tasks:
                    for _ in range(12):
                        tasks.start_soon(pool.run, add_and_commit)
                        tasks.start_soon(to_thread.run_sync, work)
                assert await pool.run(visits) == 34
        finally:
            limiter.total_tokens = before

    async def test_a_cancelled_call_interrupts_its_statement(self, database: Path) -> None:
        forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        begun = threading.Event()
        errors: list[BaseException] = []

        def configure(connection: sqlite3.Connection) -> None:
            connection.create_function("begin_now", 0, begun.set)

        def count(connection: sqlite3.Connection) -> None:
            add(connection)
            try:
                ask(connection, forever + "SELECT max(i) FROM n WHERE begin_now() IS NULL")
            except sqlite3.OperationalError as error:
                errors.append(error)
                raise

        with fail_after(DEADLINE):
            async with sqlite_pool(database, max_size=1, configure=configure) as pool:
                async with create_task_group() as tasks:
                    tasks.start_soon(pool.run, count)
                    await to_thread.run_sync(begun.wait, DEADLINE)
                    tasks.cancel_scope.cancel()
                assert [str(error) for error in errors] == ["interrupted"]
                assert await pool.run(visits) == 10
                assert pool.get_stats()["connections_num"] == 1

    @pytest.mark.slow
    async def test_a_pool_that_is_closed_interrupts_a_call_that_takes_too_long(
        self, database: Path
    ) -> None:
        forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        begun = threading.Event()
        errors: list[BaseException] = []

        def configure(connection: sqlite3.Connection) -> None:
            connection.create_function("begin_now", 0, begun.set)

        async def run() -> None:
            try:
                await pool.run(ask, forever + "SELECT max(i) FROM n WHERE begin_now() IS NULL")
            except sqlite3.OperationalError as error:
                errors.append(error)

        pool = sqlite_pool(database, max_size=1, configure=configure, close_timeout=0.5)
        with fail_after(DEADLINE):
            async with create_task_group() as tasks, pool:
                tasks.start_soon(run)
                await to_thread.run_sync(begun.wait, DEADLINE)
        assert [str(error) for error in errors] == ["interrupted"]
        assert pool.get_stats()["closed_forced"] == 1


async def test_a_mock_of_a_pool_can_be_used_like_one(database: Path) -> None:
    mock = create_autospec(sqlite_pool(database))
    mock.run.return_value = 7
    async with mock:
        assert await mock.run(visits) == 7
    mock.run.assert_awaited_once_with(visits)
    with pytest.raises(TypeError):
        await mock.run()
