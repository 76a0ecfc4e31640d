"""Blocks that borrow a connection."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import create_task_group
from support.helpers import PATIENCE, InThread, settle
from support.pool_stubs import (
    Backend,
    ClosableConnection,
    Connection,
    give_back,
    is_borrowed,
    nothing,
    take,
    use,
)

from aiosync import (
    Checkout,
    ConnectionPool,
    PoolTimeout,
    as_threading,
)


class TestBlocks:
    @pytest.mark.anyio
    async def test_a_block_that_has_given_back_early_leaves_the_next_borrower_alone(self) -> None:
        pool = ConnectionPool(ClosableConnection, max_size=1, close_timeout=0.01)
        async with pool:
            async with pool.connection() as connection:
                pool.release(connection)
                assert await pool.acquire() is connection
                await pool.__aexit__(None, None, None)  # by force
            pool.release(connection)  # as is allowed once after that
            with pytest.raises(ValueError, match="given back before"):
                pool.release(connection)

    @pytest.mark.anyio
    async def test_one_that_is_entered_twice_at_once_is_refused(self) -> None:
        async with ConnectionPool(ClosableConnection, max_size=1) as pool:
            checkout = pool.connection()
            other = await pool.acquire()
            outcomes: list[object] = []

            async def enter() -> None:
                try:
                    outcomes.append(await checkout.__aenter__())
                except RuntimeError as error:
                    outcomes.append(str(error))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(enter)
                tasks.start_soon(enter)
                await settle()
                assert outcomes == [
                    "this has borrowed a connection already; call connection() again"
                ]
                pool.release(other)
            assert outcomes[1:] == [other]
            await checkout.__aexit__(None, None, None)
            assert pool.get_stats()["in_use"] == 0
            # It may be entered again, also after it was cancelled.
            with anyio.CancelScope() as scope:
                scope.cancel()
                await checkout.__aenter__()
            async with checkout as connection:
                assert connection is other


@pytest.mark.anyio
async def test_a_task_needs_async_with() -> None:
    pool = ConnectionPool(ClosableConnection)
    with pytest.raises(TypeError, match="async with"):
        pool.__enter__()
    async with pool:
        with pytest.raises(TypeError, match="async with"):
            pool.connection().__enter__()


@pytest.mark.anyio
async def test_a_checkout_that_another_thread_is_giving_back_is_not_borrowed() -> None:
    async with ConnectionPool(ClosableConnection) as pool:
        checkout = pool.connection()
        async with checkout as connection:
            del checkout._connection
            assert not checkout.borrowed
            checkout._connection = connection
            assert checkout.borrowed


@pytest.mark.anyio
async def test_a_block_whose_connection_was_given_back_at_its_end_has_nothing_to_reset() -> None:
    async with ConnectionPool(ClosableConnection, reset=nothing) as pool:
        connection = await pool.acquire()
        pool.release(connection)
        assert pool._reset_and_release(connection) is None


@pytest.mark.anyio
class TestCheckout:
    @pytest.mark.parametrize("how", ["release", "discard"])
    async def test_it_may_be_given_back_before_the_end_of_the_block(
        self, backend: Backend, how: str
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            checkout = pool.connection()
            assert not is_borrowed(checkout)
            async with checkout:
                assert is_borrowed(checkout)
                getattr(checkout, how)()
                assert not is_borrowed(checkout)
                assert await use(pool) == (1 if how == "release" else 2)
            await settle()
            assert pool.statistics().loans == 2
            assert pool.statistics().closed["discard"] == (how == "discard")

    @pytest.mark.parametrize("second", ["release", "discard"])
    @pytest.mark.parametrize("first", ["release", "discard"])
    async def test_to_give_it_back_twice_does_nothing(
        self, backend: Backend, first: str, second: str
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            checkout = pool.connection()
            async with checkout:
                getattr(checkout, first)()
                getattr(checkout, second)()
            getattr(checkout, second)()
            assert await use(pool) == (1 if first == "release" else 2)
            await settle()
            assert pool.statistics().closed["discard"] == (first == "discard")

    @pytest.mark.parametrize("how", ["release", "discard", "end"])
    async def test_what_somebody_else_has_borrowed_since_is_not_taken_away(
        self, backend: Backend, how: str
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            checkout = pool.connection()
            first = await checkout.__aenter__()
            checkout.release()
            async with pool.connection() as second:
                assert second is first
                if how == "end":
                    await checkout.__aexit__(None, None, None)
                else:
                    getattr(checkout, how)()
                assert not is_borrowed(checkout)
                assert pool.statistics().in_use == 1
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0)
            assert await use(pool) == 1

    @pytest.mark.parametrize("how", ["release", "discard", "end"])
    async def test_nor_is_what_was_given_back_behind_its_back(
        self, backend: Backend, how: str
    ) -> None:
        async with backend.pool(max_size=1) as pool:
            checkout = pool.connection()
            pool.release(await checkout.__aenter__())
            assert not is_borrowed(checkout)
            async with pool.connection():
                assert not is_borrowed(checkout)
                if how == "end":
                    await checkout.__aexit__(None, None, None)
                else:
                    getattr(checkout, how)()
                assert pool.statistics().in_use == 1
            assert await use(pool) == 1

    async def test_one_that_never_borrowed_has_nothing_to_give_back(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            checkout = pool.connection()
            checkout.release()
            checkout.discard()
            assert not is_borrowed(checkout)
            async with checkout:
                assert is_borrowed(checkout)

    async def test_nor_has_one_that_failed_to_borrow(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool, pool.connection():
            checkout = pool.connection(0)
            with pytest.raises(PoolTimeout):
                await checkout.__aenter__()
            checkout.release()
            assert not is_borrowed(checkout)
            assert pool.statistics().in_use == 1

    @pytest.mark.parametrize("how", ["release", "discard"])
    async def test_nor_has_one_that_still_waits(self, backend: Backend, how: str) -> None:
        checkouts: list[Checkout[Connection]] = []

        async def borrow() -> None:
            async with checkouts[0]:
                assert is_borrowed(checkouts[0])

        async with backend.pool(max_size=1) as pool:
            connection = await pool.acquire()
            checkouts.append(pool.connection())
            async with create_task_group() as tg:
                tg.start_soon(borrow)
                await settle()
                getattr(checkouts[0], how)()
                assert not is_borrowed(checkouts[0])
                assert pool.statistics().in_use == 1
                pool.release(connection)
            assert pool.statistics().in_use == 0
            assert await use(pool) == 1

    @pytest.mark.slow
    def test_of_many_threads_one_gives_it_back(self, backend: Backend) -> None:
        with as_threading(backend.pool(max_size=1)) as view:
            for _ in range(100):
                checkout = view.connection(PATIENCE)
                checkout.__enter__()
                start = threading.Barrier(4)

                def give_back_together(start: threading.Barrier, release: Any) -> None:
                    start.wait(PATIENCE)
                    release()

                threads = [
                    InThread(partial(give_back_together, start, checkout.release)) for _ in range(4)
                ]
                assert [thread.result() for thread in threads] == [None] * 4
                assert view.statistics().in_use == 0

    async def test_one_borrows_once_at_a_time(self, backend: Backend) -> None:
        async with backend.pool(max_size=2) as pool:
            checkout = pool.connection()
            async with checkout:
                with pytest.raises(RuntimeError, match="borrowed a connection already"):
                    await checkout.__aenter__()
                assert is_borrowed(checkout)
            async with checkout:
                assert is_borrowed(checkout)
            assert not is_borrowed(checkout)

    async def test_one_whose_pool_was_closed_has_nothing_to_give_back(
        self, backend: Backend
    ) -> None:
        pool = backend.pool(close_timeout=0)
        checkouts: list[Checkout[Connection]] = [pool.connection() for _ in range(3)]
        async with pool:
            for checkout in checkouts:
                await checkout.__aenter__()
        assert sorted(backend.closings) == [1, 2, 3]
        assert not any(map(is_borrowed, checkouts))
        checkouts[0].release()
        checkouts[1].discard()
        await checkouts[2].__aexit__(None, None, None)
        assert pool.statistics().in_use == 0

    async def test_a_waiter_gets_what_is_released_in_a_block(self, backend: Backend) -> None:
        taken: list[Connection] = []
        async with backend.pool(max_size=1) as pool, create_task_group() as tg:
            checkout = pool.connection()
            async with checkout as connection:
                tg.start_soon(take, pool, taken)
                await settle()
                checkout.release()
                await settle()
                assert taken == [connection]
            assert pool.statistics().in_use == 1
            give_back(pool, taken)

    def test_a_thread_does_the_same(self, backend: Backend) -> None:
        with as_threading(backend.pool(max_size=1)) as view:
            for how in ("release", "discard"):
                checkout = view.connection()
                with checkout as connection:
                    assert is_borrowed(checkout)
                    getattr(checkout, how)()
                    assert not is_borrowed(checkout)
                    with view.connection(PATIENCE) as other:
                        assert (other is connection) is (how == "release")
                        checkout.release()
                        checkout.discard()
                        assert view.statistics().in_use == 1
            assert view.statistics().loans == 4
