"""The slow path of `acquire`, and connections that a borrower has lost."""

from __future__ import annotations

import gc
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    BareConnection,
    Connection,
    give_back,
    kinds,
    lose_one,
    take,
)

from aiosync import (
    ConnectionPool,
    PoolEvent,
)
from aiosync._pool._inventory import Inventory

pytestmark = pytest.mark.anyio


async def test_an_item_that_comes_between_the_look_and_the_wait_is_taken_with_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ConnectionPool(BareConnection, max_size=1) as pool:
        async with pool.connection() as connection:
            pass
        entry = pool._items.pop()
        join = Inventory.join

        def join_late(inventory: Any, waiter: Any, deadline: float | None = None) -> None:
            inventory.items.append(entry)
            join(inventory, waiter, deadline)

        monkeypatch.setattr(Inventory, "join", join_late)
        others: list[int] = []

        async def note() -> None:
            others.append(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note)
            assert await pool.acquire() is connection
            assert others == [1]
            pool.release(connection)


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
