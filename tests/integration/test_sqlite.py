"""The recipe for SQLite, with real databases: tasks, threads, and threads that are left behind."""

from __future__ import annotations

import math
import sqlite3
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group, fail_after, move_on_after, to_thread
from support.helpers import until_async

from aiosync import ConnectionPool, PoolTimeout, as_threading
from aiosync._park import FREE_THREADED
from aiosync.recipes import sqlite_pool
from aiosync.recipes._threads import Threads as RecipeThreads

if TYPE_CHECKING:
    from collections.abc import Callable

collected_late = pytest.mark.skipif(
    FREE_THREADED,
    reason="without the GIL what a worker thread made is freed only when that thread runs",
)

pytestmark = pytest.mark.anyio

DEADLINE = 20.0


def run(connection: sqlite3.Connection, statement: str, *values: object) -> Any:
    """Execute one statement, here; return the first column of the first row."""
    with closing(connection.execute(statement, values)) as cursor:
        row = cursor.fetchone()
    return None if row is None else row[0]


async def ask(connection: sqlite3.Connection, statement: str, *values: object) -> Any:
    """Do what `run` does in a worker thread."""
    return await to_thread.run_sync(partial(run, connection, statement, *values))


def add_one(connection: sqlite3.Connection, who: str) -> None:
    with connection:
        run(connection, "INSERT INTO visits VALUES (?)", who)


def is_closed(connection: sqlite3.Connection) -> bool:
    try:
        connection.total_changes  # noqa: B018
    except sqlite3.ProgrammingError:
        return True
    return False


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "visits.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE visits (who TEXT)")
    return path


def count(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        number: int = run(connection, "SELECT count(*) FROM visits")
        return number


class TestSharing:
    async def test_many_tasks_on_few_connections_each_leave_their_rows(
        self, database: Path
    ) -> None:
        seen: set[int] = set()

        async def work(name: str) -> None:
            for _ in range(4):
                async with pool.connection() as connection:
                    seen.add(id(connection))
                    await to_thread.run_sync(add_one, connection, name)

        async with sqlite_pool(database, max_size=3, timeout=DEADLINE) as pool:
            async with create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(work, f"task {number}")
            await until_async(
                lambda: pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"]
            )
            stats = pool.get_stats()
            assert 1 <= stats["pool_size"] <= 3
            assert stats["requests_num"] == 40
            assert stats["requests_errors"] == stats["returns_bad"] == 0
        assert count(database) == 40
        assert 1 <= len(seen) <= 3
        assert pool.get_stats()["pool_size"] == 0

    async def test_threads_and_tasks_share_the_connections(self, database: Path) -> None:
        def work_in_thread(name: str) -> None:
            for _ in range(4):
                with view.connection(timeout=DEADLINE) as connection:
                    add_one(connection, name)

        async def work(name: str) -> None:
            for _ in range(4):
                async with pool.connection(timeout=DEADLINE) as connection:
                    await to_thread.run_sync(add_one, connection, name)

        async with sqlite_pool(database, max_size=2) as pool:
            view = as_threading(pool)
            threads = [
                threading.Thread(target=work_in_thread, args=[f"thread {number}"])
                for number in range(4)
            ]
            for thread in threads:
                thread.start()
            async with create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(work, f"task {number}")
            for thread in threads:
                await to_thread.run_sync(thread.join)
            stats = pool.get_stats()
        assert stats["requests_num"] == 32
        assert stats["pool_size"] <= 2
        assert stats["in_use"] == stats["requests_waiting"] == 0
        assert count(database) == 32

    async def test_the_pool_serves_even_if_all_worker_threads_of_anyio_wait_for_it(
        self, database: Path
    ) -> None:
        limiter = to_thread.current_default_thread_limiter()
        before, limiter.total_tokens = limiter.total_tokens, 3

        def work() -> None:
            with view.connection(timeout=DEADLINE) as connection:
                add_one(connection, "thread")

        try:
            async with sqlite_pool(database, max_size=1) as pool:
                view = as_threading(pool)
                async with create_task_group() as tasks:
                    for _ in range(9):
                        tasks.start_soon(to_thread.run_sync, work)
        finally:
            limiter.total_tokens = before
        assert count(database) == 9


class TestReset:
    async def test_a_transaction_left_open_is_rolled_back_before_the_next_one_comes(
        self, database: Path
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            async with pool.connection() as first:
                await ask(first, "INSERT INTO visits VALUES ('forgotten')")
                assert first.in_transaction
            async with pool.connection() as second:
                assert second is first
                assert not second.in_transaction
                assert await ask(second, "SELECT count(*) FROM visits") == 0
            assert pool.get_stats()["returns_bad"] == 0

    async def test_a_connection_that_its_borrower_has_closed_is_replaced(
        self, database: Path
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            async with pool.connection() as first:
                await to_thread.run_sync(first.close)
            async with pool.connection() as second:
                assert second is not first
                assert await ask(second, "SELECT 1") == 1
            assert pool.get_stats()["closed_reset"] == 1

    async def test_an_idle_connection_that_was_closed_is_not_lent_however_fresh(
        self, database: Path
    ) -> None:
        async with sqlite_pool(database, max_size=1, check_idle=None) as pool:
            async with pool.connection() as first:
                pass
            await until_async(lambda: pool.get_stats()["pool_available"])
            first.close()
            async with pool.connection() as second:
                assert second is not first
            assert pool.get_stats()["connections_lost"] == 1

    async def test_a_sound_connection_passes_the_check(self, database: Path) -> None:
        async with sqlite_pool(database, min_size=1) as pool:
            await pool.wait()
            await pool.check()
            assert pool.get_stats()["connections_lost"] == 0

    @collected_late
    async def test_a_connection_that_its_borrower_has_lost_is_replaced(
        self, database: Path
    ) -> None:
        async with sqlite_pool(database, max_size=1) as pool:
            connection = await pool.acquire()
            connection.close()
            del connection
            async with pool.connection() as another:
                assert await ask(another, "SELECT 1") == 1
            assert pool.get_stats()["leaks"] == 1


class TestOptions:
    async def test_the_database_is_in_wal_mode_and_the_pragmas_are_set(
        self, database: Path
    ) -> None:
        pragmas: dict[str, str | int] = {"foreign_keys": 1, "main.synchronous": "NORMAL"}
        pool = sqlite_pool(str(database), busy_timeout=1.5, pragmas=pragmas, min_size=3)
        async with pool, pool.connection() as connection:
            assert await ask(connection, "PRAGMA journal_mode") == "wal"
            assert await ask(connection, "PRAGMA busy_timeout") == 1500
            assert await ask(connection, "PRAGMA foreign_keys") == 1
            assert await ask(connection, "PRAGMA synchronous") == 1
            await pool.wait()
            assert pool.get_stats()["connections_errors"] == 0

    async def test_without_wal_the_file_stays_as_it_is(self, database: Path) -> None:
        pool = sqlite_pool(database, wal=False, kwargs={"isolation_level": None})
        async with pool, pool.connection() as connection:
            assert await ask(connection, "PRAGMA journal_mode") == "delete"
            await ask(connection, "INSERT INTO visits VALUES ('at once')")
            assert not connection.in_transaction
        assert count(database) == 1

    @collected_late
    async def test_connections_to_a_shared_database_in_memory_see_each_other(self) -> None:
        uri = "file:pool_of_visits?mode=memory&cache=shared"
        pool = sqlite_pool(uri, uri=True, min_size=2, max_size=2)
        async with pool, pool.connection() as first, pool.connection() as second:
            assert first is not second
            await ask(first, "CREATE TABLE visits (who TEXT)")
            await to_thread.run_sync(add_one, first, "me")
            assert await ask(second, "SELECT who FROM visits") == "me"

    async def test_what_fails_while_a_connection_is_prepared_is_the_cause_of_the_timeout(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "no database"
        path.write_text("this is not a database, but long enough to be taken for one" * 20)
        async with sqlite_pool(path, fail_fast=True) as pool:
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(DEADLINE)
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)


@pytest.mark.parametrize(
    ("database", "uri"),
    [
        (":memory:", False),
        (":memory:", True),
        ("", False),
        ("file::memory:", True),
        ("file:", True),
        ("file:name?mode=memory", True),
        ("file:name?mode=memory&cache=private#end", True),
    ],
)
async def test_a_database_of_each_connections_own_is_refused(
    anyio_backend_name: str, database: str, uri: bool
) -> None:
    with pytest.raises(ValueError, match="cache=shared"):
        sqlite_pool(database, uri=uri)


@pytest.mark.parametrize(
    ("database", "uri"),
    [
        ("some.db", True),
        ("file:some.db", False),
        ("file:some.db?mode=ro", True),
        ("file::memory:?cache=shared", True),
    ],
)
async def test_a_database_that_connections_can_share_is_accepted(
    anyio_backend_name: str, database: str, uri: bool
) -> None:
    assert isinstance(sqlite_pool(database, uri=uri), ConnectionPool)


@pytest.mark.parametrize("name", ["a b", "", "x = 1; DROP TABLE visits; --", "a.b.c"])
async def test_what_is_no_name_of_a_pragma_is_refused(anyio_backend_name: str, name: str) -> None:
    with pytest.raises(ValueError, match="pragma"):
        sqlite_pool("some.db", pragmas={name: 1})


@pytest.mark.parametrize("name", ["timeout", "uri", "check_same_thread"])
async def test_an_argument_that_the_recipe_sets_is_refused(
    anyio_backend_name: str, name: str
) -> None:
    with pytest.raises(TypeError, match=name):
        sqlite_pool("some.db", kwargs={name: 1})


class TestCancellation:
    async def test_a_cancelled_task_keeps_its_connection_until_the_thread_is_done(
        self, database: Path
    ) -> None:
        begun, may_end = threading.Event(), threading.Event()

        def work(connection: sqlite3.Connection) -> None:
            run(connection, "INSERT INTO visits VALUES ('cancelled')")
            begun.set()
            may_end.wait(DEADLINE)

        async def borrow() -> None:
            async with pool.connection() as connection:
                await to_thread.run_sync(work, connection)

        async with sqlite_pool(database, max_size=1) as pool:
            async with create_task_group() as tasks:
                tasks.start_soon(borrow)
                await to_thread.run_sync(begun.wait, DEADLINE)
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    with pytest.raises(PoolTimeout):
                        await pool.acquire(0.05)
                    may_end.set()
            async with pool.connection() as connection:
                assert await ask(connection, "SELECT count(*) FROM visits") == 0


class TestThreadsLeftBehind:
    async def test_a_connection_made_too_late_is_closed_by_its_thread(
        self, database: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[sqlite3.Connection] = []
        may_connect = threading.Event()
        connect = sqlite3.connect

        def connect_late(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            may_connect.wait(DEADLINE)
            made.append(connect(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(sqlite3, "connect", connect_late)
        pool = sqlite_pool(database, max_size=1, connect_timeout=0.05, fail_fast=True)
        with fail_after(DEADLINE):  # although the thread hangs
            async with pool:
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(DEADLINE)
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert not made
        may_connect.set()
        await until_async(lambda: made and is_closed(made[0]))

    async def test_a_connection_made_just_when_nobody_wants_it_any_more_is_closed(self) -> None:
        made: list[sqlite3.Connection] = []
        finished = anyio.Event()

        class Threads(RecipeThreads):
            async def run(self, work: Callable[..., Any], *args: Any) -> Any:
                """Let the cancellation come when the thread is done, but nobody knows of it yet."""
                result = await super().run(work, *args)
                if not finished.is_set():
                    finished.set()
                    await anyio.sleep_forever()
                # The thread might have noticed as well: then both of them close it.
                await super().run(work, *args)
                return result

        def connect() -> sqlite3.Connection:
            made.append(sqlite3.connect(":memory:", check_same_thread=False))
            return made[-1]

        async with create_task_group() as tasks:
            tasks.start_soon(Threads().make, connect, sqlite3.Connection.close)
            await finished.wait()
            assert not is_closed(made[0])
            tasks.cancel_scope.cancel()
        assert is_closed(made[0])

    @pytest.mark.timing
    async def test_a_rollback_that_hangs_delays_neither_the_next_borrower_nor_the_end(
        self, database: Path
    ) -> None:
        hanging, may_end = threading.Event(), threading.Event()
        stuck: list[sqlite3.Connection] = []

        class Connection(sqlite3.Connection):
            def rollback(self) -> None:
                stuck.append(self)
                hanging.set()
                may_end.wait(DEADLINE)
                super().rollback()

        pool = sqlite_pool(
            database,
            max_size=1,
            check_timeout=0.05,
            close_timeout=0.05,
            kwargs={"factory": Connection},
        )
        with fail_after(DEADLINE):
            async with pool:
                async with pool.connection() as first:
                    await ask(first, "INSERT INTO visits VALUES ('forgotten')")
                async with pool.connection() as second:
                    assert second is not first
                stats = pool.get_stats()
        assert stats["returns_bad"] == stats["closed_reset"] == 1
        assert hanging.is_set()
        assert not is_closed(stuck[0])  # not under the thread that uses it
        may_end.set()
        await until_async(lambda: is_closed(stuck[0]))

    @pytest.mark.slow
    async def test_a_pool_closed_by_force_interrupts_what_its_borrower_is_doing(
        self, database: Path
    ) -> None:
        # Forever, but that it can be interrupted.
        forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        errors: list[sqlite3.OperationalError] = []
        begun = threading.Event()

        async def borrow() -> None:
            connection = await pool.acquire()
            await to_thread.run_sync(connection.create_function, "begin_now", 0, begun.set)
            try:
                await ask(connection, forever + "SELECT max(i) FROM n WHERE begin_now() IS NULL")
            except sqlite3.OperationalError as error:
                errors.append(error)
            borrowed.append(connection)
            pool.release(connection)

        borrowed: list[sqlite3.Connection] = []
        with fail_after(DEADLINE):
            async with (
                create_task_group() as tasks,
                sqlite_pool(database, close_timeout=1) as pool,
            ):
                tasks.start_soon(borrow)
                await to_thread.run_sync(begun.wait, DEADLINE)
        assert [str(error) for error in errors] == ["interrupted"]
        assert pool.get_stats()["closed_forced"] == 1
        await until_async(lambda: is_closed(borrowed[0]))

    async def test_a_caller_who_gives_up_neither_spoils_nor_loses_a_connection(
        self, database: Path
    ) -> None:
        async with sqlite_pool(database, max_size=2) as pool:
            for _ in range(20):
                with move_on_after(0.0):
                    async with pool.connection(timeout=math.inf):
                        pass
            async with pool.connection() as connection:
                assert await ask(connection, "SELECT 1") == 1
            stats = pool.get_stats()
            assert stats["connections_errors"] == stats["in_use"] == 0
