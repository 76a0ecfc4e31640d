"""Opening and closing a pool, the end of its event loop, and forked processes."""

from __future__ import annotations

import asyncio
import gc
import sys
import textwrap
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import CancelScope, WouldBlock, create_task_group
from support.forking import run_forking
from support.helpers import PATIENCE, InThread, run_python, settle, until
from support.pool_stubs import (
    Backend,
    Connection,
    give_back,
    is_borrowed,
    never,
    nothing,
    some,
    take,
    use,
)
from support.virtual_time import run_virtually

from aiosync import (
    ConnectionPool,
    PoolClosed,
    PoolEvent,
    PoolTimeout,
    as_threading,
)


@pytest.mark.anyio
class TestOpenAndClosed:
    async def test_a_pool_must_be_open(self, backend: Backend) -> None:
        pool = backend.pool(name="db")
        uses: list[Callable[[], Awaitable[object]]] = [
            pool.acquire, partial(pool.acquire, 0), pool.connection().__aenter__, pool.wait,
            partial(pool.resize, 1, 2), pool.drain, pool.check,
        ]  # fmt: skip
        for message in ("db is not open yet", "db is closed"):
            for call in uses:
                with pytest.raises(PoolClosed, match=message):
                    await call()
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

    async def test_an_open_pool_can_not_be_opened(self, backend: Backend) -> None:
        pool = backend.pool()
        async with pool as itself:
            assert itself is pool
            with pytest.raises(RuntimeError, match="is open already"):
                await pool.__aenter__()
            pool.release(await pool.acquire())

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

    @pytest.mark.stress
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

parent_pid = os.getpid()
calls = []

class Connection:
    def __init__(self):
        calls.append("connect")

    def __del__(self):
        if os.getpid() != parent_pid:
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

async def parent():
    await pool.__aexit__(None, None, None)
    assert "close" in calls, calls
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_child_process_that_runs_the_inherited_loop_leaves_them_alone_too(
    loop_name: str,
) -> None:
    done = run_forking(FORK_AND_GO_ON, loop_name)
    assert done.stdout == "the end\n", done.stderr
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_child_process_leaves_the_connections_to_its_parent(loop_name: str) -> None:
    done = run_python("-W", "error", "-c", textwrap.dedent(FORK), loop_name)
    assert done.stdout == "the end\n", done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


# Pairs of event loops, one after the other.
IN_TURN = [(a, b) for a in ("asyncio", "trio") for b in ("asyncio", "trio")]


@pytest.mark.anyio
class TestOpenAndClose:
    async def test_closed_and_healthy(self, backend: Backend) -> None:
        pool = backend.pool()
        assert (pool.closed, pool.healthy) == (True, False)
        await pool.open()
        assert (pool.closed, pool.healthy) == (False, True)
        await use(pool)
        await pool.close()
        assert (pool.closed, pool.healthy) == (True, False)
        assert backend.closings == [1]

    async def test_to_close_a_pool_that_is_not_open_does_nothing(self, backend: Backend) -> None:
        pool = backend.pool()
        await pool.close()
        await pool.open()
        await use(pool)
        await pool.close()
        await pool.close()
        assert backend.closings == [1]

    async def test_a_block_may_end_after_the_pool_was_closed(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            await use(pool)
            await pool.close()
            assert backend.closings == [1]
        assert pool.closed

    async def test_an_open_pool_is_not_opened_again(self, backend: Backend) -> None:
        pool = backend.pool(name="db")
        async with pool:
            with pytest.raises(RuntimeError, match=r"^db is open already$"):
                await pool.open()
            assert await use(pool) == 1

    async def test_a_closed_pool_may_be_opened_again(self, backend: Backend) -> None:
        pool = backend.pool(max_size=2)
        for number in range(1, 4):
            async with pool:
                assert not pool.closed
                assert await use(pool) == number
            with pytest.raises(PoolClosed, match="is closed"):
                await pool.acquire()
        assert pool.get_stats()["requests_num"] == pool.statistics().loans == 3
        assert pool.get_stats()["closed_shutdown"] == 3

    async def test_a_pool_that_is_opened_again_keeps_its_sizes(self, backend: Backend) -> None:
        pool = backend.pool(min_size=0, max_size=1)
        async with pool:
            pass
        for _ in range(2):
            async with pool:
                if pool.max_size == 1:
                    await pool.resize(2, 3)
                assert (pool.min_size, pool.max_size) == (2, 3)
                await pool.wait(PATIENCE)
                assert pool.statistics().idle == 2
        assert backend.opened == 4

    async def test_a_pool_that_is_still_being_closed_is_not_opened(self, backend: Backend) -> None:
        pool = backend.pool(name="db", close_timeout=PATIENCE)
        await pool.open()
        connection = await pool.acquire()
        async with create_task_group() as tg:
            tg.start_soon(pool.close)
            await settle()
            assert pool.closed
            with pytest.raises(PoolClosed, match=r"^db is still being closed$"):
                await pool.open()
            pool.release(connection)
        async with pool:
            assert await use(pool) == 2

    async def test_a_connection_of_before_is_not_lent_and_may_be_given_back(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(close_timeout=0, max_size=1)
        checkout = pool.connection()
        async with pool:
            old = await checkout.__aenter__()
            assert old.number == 1
        assert backend.closings == [1]
        async with pool:
            assert not is_borrowed(checkout)
            assert await use(pool) == 2
            await checkout.__aexit__(None, None, None)
            with pytest.raises(ValueError, match="not borrowed"):
                pool.release(old)
            assert await use(pool) == 2

    async def test_a_connection_that_was_closed_by_force_may_be_given_back_later(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(close_timeout=0)
        async with pool:
            old = await pool.acquire()
        async with pool:
            pool.release(old)
            with pytest.raises(ValueError, match="not borrowed"):
                pool.release(old)

    async def test_an_outage_is_not_healthy_and_ends_with_the_pool(self, backend: Backend) -> None:
        pool = backend.pool(min_size=1, fail_fast=True)
        backend.refuses = True
        async with pool:
            with pytest.raises(PoolTimeout):
                await pool.wait(PATIENCE)
            assert (pool.closed, pool.healthy) == (False, False)
        backend.refuses = False
        async with pool:
            assert (pool.closed, pool.healthy) == (False, True)
            await pool.wait(PATIENCE)


class TestTwoEventLoops:
    """A pool that lives for longer than the event loop that opened it."""

    @pytest.mark.parametrize(("first", "second"), IN_TURN)
    def test_a_closed_pool_may_be_opened_on_another_loop(
        self, backend: Backend, first: str, second: str
    ) -> None:
        pool = backend.pool(min_size=1, check=nothing, reset=nothing)

        async def main() -> None:
            async with pool:
                await pool.wait(PATIENCE)
                await use(pool)

        anyio.run(main, backend=first)
        anyio.run(main, backend=second)
        assert backend.closings == [1, 2]
        assert pool.statistics().loans == 2

    @pytest.mark.parametrize(("first", "second"), IN_TURN)
    def test_so_may_one_whose_loop_has_ended_without_closing_it(
        self, backend: Backend, first: str, second: str
    ) -> None:
        pool = backend.pool(min_size=1, name="db", close_timeout=0)
        kept: list[Connection] = []

        async def leave() -> None:
            await pool.open()
            await pool.wait(PATIENCE)
            await take(pool, kept)

        async def main() -> None:
            async with pool:
                assert not pool.closed
                give_back(pool, kept)
                assert await use(pool) == 2

        anyio.run(leave, backend=first)
        assert pool.closed
        assert not pool.healthy
        assert "'db' is closed" in repr(pool)
        anyio.run(main, backend=second)
        assert pool.statistics().loans == 2

    def test_so_may_one_whose_loop_was_closed_without_a_word(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        kept: list[Connection] = []

        async def leave() -> None:
            await pool.open()
            await use(pool)
            await take(pool, kept)

        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # the task of the pool is destroyed
        loop.run_until_complete(leave())
        before = pool.get_stats()["requests_num"]
        waiter = InThread(as_threading(pool).acquire)
        until(lambda: pool.get_stats()["requests_waiting"])
        loop.close()
        assert pool.closed

        async def main() -> None:
            async with pool:
                assert await use(pool) == 2

        backend.lost.add(1)  # nobody can close it any more
        asyncio.run(main())
        assert isinstance(waiter.result(), PoolClosed)
        assert pool.get_stats()["requests_num"] == before + 2  # and the thread

    @pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
    def test_a_pool_that_was_closed_before_a_fork_may_be_opened_in_both(self) -> None:
        script = """
            import asyncio, os
            from aiosync import ConnectionPool

            pool = ConnectionPool(object)

            async def main():
                async with pool, pool.connection():
                    pass

            asyncio.run(main())
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == 0
            asyncio.run(main())
            print(pool.statistics().loans, flush=True)
            os._exit(0)
        """
        ended = run_python("-W", "ignore", "-c", textwrap.dedent(script))
        assert ended.stdout.split() == ["2", "2"], ended.stderr


class TestOpenedByAThread:
    def test_it_is_opened_used_and_closed(self, backend: Backend) -> None:
        pool = backend.pool(max_size=1)
        view = as_threading(pool)
        assert view.closed
        with view as same:
            assert same is view
            assert (view.closed, view.healthy) == (False, True)
            with view.connection() as connection:
                assert connection.number == 1
            assert view.statistics().loans == 1
        assert (view.closed, view.healthy) == (True, False)
        assert backend.closings == [1]

    def test_again_and_again_and_by_a_task_too(self, backend: Backend) -> None:
        pool = backend.pool()

        async def main() -> None:
            async with pool:
                await use(pool)

        for _ in range(2):
            with as_threading(pool) as view, view.connection():
                pass
            asyncio.run(main())
        assert backend.closings == [1, 2, 3, 4]

    def test_connect_runs_on_a_loop_in_another_thread(self) -> None:
        threads: list[object] = []

        def connect() -> object:
            threads.append(anyio.get_current_task().name)
            return object()

        with as_threading(ConnectionPool(connect, name="db")) as view, view.connection():
            pass
        assert threads == ["db connect"]

    def test_a_connect_that_fails_is_told_to_the_thread(self, backend: Backend) -> None:
        backend.refuses = True
        with as_threading(backend.pool(fail_fast=True)) as view:
            with pytest.raises(PoolTimeout, match="connecting fails") as caught:
                view.acquire(PATIENCE)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            assert not view.healthy
        assert view.closed

    def test_a_thread_that_waits_is_told_that_it_is_closed(self, backend: Backend) -> None:
        with as_threading(backend.pool(max_size=1)) as view:
            connection = view.acquire()
            waiter = InThread(view.acquire)
            until(lambda: view.statistics().threads_waiting)
            view.release(connection)
            view.release(waiter.result())  # type: ignore[arg-type]
            connection = view.acquire()
            waiter = InThread(view.acquire)
            until(lambda: view.statistics().threads_waiting)
            closer = InThread(lambda: view.__exit__(None, None, None))
            assert isinstance(waiter.result(), PoolClosed)
            view.release(connection)
            assert closer.result() is None

    def test_what_the_block_raises_is_raised(self, backend: Backend) -> None:
        with pytest.raises(KeyError, match="mine"), as_threading(backend.pool()) as view:
            view.release(view.acquire())
            raise KeyError("mine")
        assert backend.closings == [1]

    def test_an_open_pool_is_not_opened_again(self, backend: Backend) -> None:
        pool = backend.pool(name="db")
        with as_threading(pool) as view:
            for other in (view, as_threading(pool)):
                with pytest.raises(RuntimeError, match=r"^db is open already$"):
                    other.__enter__()
            view.release(view.acquire())
        assert view.closed

    @pytest.mark.anyio
    async def test_a_task_does_not_open_it_by_with(self, backend: Backend) -> None:
        pool = backend.pool()
        with pytest.raises(TypeError, match="async with"):
            as_threading(pool).__enter__()
        assert pool.closed
