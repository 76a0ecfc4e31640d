"""What the recipes share: hooks that run as one, credentials, call sites."""

from __future__ import annotations

import asyncio
import sys
import threading
from inspect import isawaitable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import anyio
import pytest
from anyio import create_task_group, fail_after, to_thread
from support.helpers import run_python

from aiosync import ConnectionPool, PoolMisuse, as_threading, recipes
from aiosync._callers import call_site
from aiosync.recipes import BlockingPool
from aiosync.recipes._arguments import copied, provide, provide_arguments, provide_text
from aiosync.recipes._hooks import combine, in_order
from aiosync.recipes._threads import Threads

pytestmark = pytest.mark.anyio

DEADLINE = 20.0


class Thing:
    """A connection to nowhere."""


async def finish(result: Any) -> Any:
    return await result if isawaitable(result) else result


class TestInOrder:
    async def test_a_chain_of_plain_hooks_is_plain(self) -> None:
        calls: list[str] = []
        hook = in_order(lambda _: calls.append("own"), lambda _: calls.append("users"))
        assert hook is not None
        assert hook(Thing()) is None
        assert calls == ["own", "users"]

    @pytest.mark.parametrize("asynchronous", ["own", "users", "own users"])
    async def test_a_hook_begins_when_the_one_before_has_ended(self, asynchronous: str) -> None:
        calls: list[str] = []

        def make(name: str) -> Any:
            async def later(_: Thing) -> None:
                await anyio.lowlevel.checkpoint()
                calls.append(name)

            return later if name in asynchronous.split() else lambda _: calls.append(name)

        hook = in_order(make("own"), None, make("users"), make("last"))
        assert hook is not None
        await finish(hook(Thing()))
        assert calls == ["own", "users", "last"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_after_false_no_other_hook_is_called(self, asynchronous: bool) -> None:
        async def later(_: Thing) -> bool:
            return False

        calls: list[object] = []
        hook = in_order(later if asynchronous else lambda _: False, calls.append)
        assert hook is not None
        assert await finish(hook(Thing())) is False
        assert calls == []

    async def test_no_hooks_are_none_and_one_stays_itself(self) -> None:
        assert in_order(None, None) is None
        assert in_order(None, bool) is bool

    async def test_a_chain_that_is_not_awaited_can_be_closed(self) -> None:
        async def later(_: Thing) -> None:
            raise AssertionError("never begun")

        hook = in_order(later, later)
        assert hook is not None
        rest: Any = hook(Thing())
        rest.close()  # otherwise Python warns of a coroutine that was never awaited


class TestCombine:
    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("failing", [False, True])
    async def test_the_own_close_is_always_called_and_last(
        self, asynchronous: bool, failing: bool
    ) -> None:
        calls: list[str] = []

        def users(_: Thing) -> None:
            calls.append("users")
            if failing:
                raise OSError("no")

        async def users_later(thing: Thing) -> None:
            users(thing)

        async def own(_: Thing) -> None:
            await anyio.lowlevel.checkpoint()
            calls.append("own")

        options: Any = {"close": users_later if asynchronous else users}
        combine(options, check=bool, reset=bool, close=own)
        async with ConnectionPool(Thing, **options) as pool, pool.connection():
            pass
        assert calls == ["users", "own"]
        assert pool.get_stats()["closed_shutdown"] == 1

    async def test_the_own_close_is_called_if_the_one_of_the_caller_takes_too_long(self) -> None:
        calls: list[str] = []

        async def users(_: Thing) -> None:
            await anyio.sleep_forever()

        async def own(_: Thing) -> None:
            await anyio.lowlevel.checkpoint()
            calls.append("own")

        options: Any = {"close": users, "close_timeout": 0.05}
        combine(options, check=bool, reset=bool, close=own)
        with fail_after(DEADLINE):
            async with ConnectionPool(Thing, **options) as pool, pool.connection():
                pass
        assert calls == ["own"]

    @pytest.mark.parametrize("name", ["is_closed", "is_fatal"])
    async def test_one_of_two_answers_is_enough(self, name: str) -> None:
        for own, users in [(False, False), (True, False), (False, True)]:
            options: Any = {name: lambda _, users=users: users}
            given: Any = {name: lambda _, own=own: own}
            combine(options, check=bool, reset=bool, close=bool, **given)
            assert options[name](Thing()) is (own or users)


class TestArguments:
    async def test_values_and_plain_and_async_functions(self) -> None:
        async def later() -> str:
            await anyio.lowlevel.checkpoint()
            return "later"

        assert [await provide(given) for given in ("now", lambda: "called", later)] == [
            "now",
            "called",
            "later",
        ]
        assert await provide_arguments(None) == {}
        assert await provide_arguments({"password": later, "user": "me"}) == {
            "password": "later",
            "user": "me",
        }
        assert await provide_arguments(lambda: {"password": lambda: "x"}) == {"password": "x"}
        assert await provide_text("dsn", later) == "later"
        assert await provide_text("dsn", None) is None

    @pytest.mark.parametrize("port", [5432, "5432", [5432, 5433], None])
    async def test_what_the_drivers_take_for_a_host_and_a_port_is_accepted(self, port: Any) -> None:
        for host in "localhost", Path("/tmp"), ["here", "there"], None:
            given = {"host": host, "port": port}
            assert copied(given) == given
            assert await provide_arguments(lambda given=given: given) == given

    @pytest.mark.parametrize("wrong", [{"port": 54.32}, {"host": 5}, {"host": b"here"}])
    async def test_other_types_are_refused(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="can't be of type"):
            copied(wrong)
        with pytest.raises(PoolMisuse, match="can't be of type"):
            await provide_arguments(lambda: wrong)
        for value in 5, b"postgresql://":
            with pytest.raises(PoolMisuse, match="dsn must be a str, not"):
                await provide_text("dsn", lambda value=value: value)

    async def test_an_error_of_a_function_of_the_caller_is_no_mistake_in_its_arguments(
        self,
    ) -> None:
        def broken() -> Any:
            raise TypeError("the answer of the vault was empty")

        for wait in provide_text("dsn", broken), provide_arguments(broken):
            with pytest.raises(TypeError) as caught:
                await wait
            assert type(caught.value) is TypeError


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellations_of_asyncio_wait_for_the_thread_too() -> None:
    begun, may_end = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        may_end.wait(DEADLINE)
        ended.append(True)

    task = asyncio.create_task(Threads().run_to_end(work))
    await asyncio.to_thread(begun.wait, DEADLINE)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


class TestBlockingPool:
    async def test_the_function_has_the_connection_and_its_result_is_returned(self) -> None:
        def add(thing: Thing, *numbers: int) -> tuple[Thing, int, int]:
            return thing, sum(numbers), threading.get_ident()

        async def connect() -> Thing:
            return Thing()

        async with BlockingPool(connect, max_size=1) as pool:
            thing, total, thread = await pool.run(add, 1, 2, timeout=DEADLINE)
            assert total == 3
            assert thread != threading.get_ident()
            async with pool.connection() as same:
                assert same is thing

    async def test_the_connection_comes_back_when_the_thread_has_ended(self) -> None:
        begun, may_end = threading.Event(), threading.Event()
        ended: list[bool] = []

        def work(_: Thing) -> None:
            begun.set()
            may_end.wait(DEADLINE)
            ended.append(True)

        async def connect() -> Thing:
            return Thing()

        with fail_after(DEADLINE):
            async with BlockingPool(connect, max_size=1) as pool, create_task_group() as tasks:
                tasks.start_soon(pool.run, work)
                await to_thread.run_sync(begun.wait, DEADLINE)
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
                    assert pool.get_stats()["in_use"] == 1
                    may_end.set()
                    async with pool.connection():
                        assert ended

    async def test_finish_is_called_in_the_thread_after_a_function_that_returned(self) -> None:
        finished: list[int] = []
        home = threading.get_ident()

        def fail(_: Thing) -> None:
            raise OSError("no")

        async def connect() -> Thing:
            return Thing()

        def finish(_: Thing) -> None:
            finished.append(threading.get_ident())

        async with BlockingPool(connect, finish=finish) as pool:
            await pool.run(bool)
            with pytest.raises(OSError, match="no"):
                await pool.run(fail)
        assert len(finished) == 1
        assert home not in finished


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sqlite_pool", ["file.db"]),
        ("asyncpg_pool", []),
        ("psycopg_async_pool", []),
        ("psycopg_thread_pool", []),
        ("tcp_pool", ["localhost", 80]),
    ],
)
async def test_a_double_of_what_a_recipe_returns_works_in_with(
    name: str, arguments: list[Any]
) -> None:
    if "tcp" not in name and "sqlite" not in name:
        pytest.importorskip(name.partition("_")[0], exc_type=ImportError)
    pool = getattr(recipes, name)(*arguments)
    double = create_autospec(pool)
    async with double, double.connection(timeout=1) as connection:
        assert connection is not None
    double.connection.assert_called_once_with(timeout=1)
    if isinstance(pool, BlockingPool):
        await double.run(len)
    view = create_autospec(as_threading(pool))
    with view, view.connection() as connection:
        assert connection is not None


def test_a_call_site_is_the_line_outside_of_the_package() -> None:
    site, here = call_site(), sys._getframe().f_lineno
    assert str(site) == f"{__file__}:{here}"


def test_without_a_caller_there_is_no_call_site() -> None:
    # The thread runs nothing but functions of the package and of `threading`.
    namespace: dict[str, Any] = {"__name__": "aiosync.recipes", "call_site": call_site}
    exec("sites = []\ndef append():\n    sites.append(call_site())\n", namespace)
    thread = threading.Thread(target=namespace["append"])
    thread.start()
    thread.join(DEADLINE)
    assert namespace["sites"] == [None]


def test_public_names_are_documented_and_show_no_private_module() -> None:
    assert sorted(recipes.__all__) == recipes.__all__
    for name in recipes.__all__:
        found = getattr(recipes, name)
        assert found.__doc__
        assert not any(part.startswith("_") for part in found.__module__.split("."))
    assert BlockingPool.run.__doc__


def test_drivers_are_imported_when_they_are_needed() -> None:
    program = (
        "import sys, aiosync.recipes; "
        "sys.exit(bool({'asyncpg', 'psycopg', 'sqlite3'} & sys.modules.keys()))"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_call_without_a_caller_has_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "_getframe", lambda _: None)
        site = call_site()
    assert site is None
