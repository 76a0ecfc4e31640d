"""The inventory of a pool, and the order in which callers get what is in it."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import CancelScope, WouldBlock, create_task_group
from support.helpers import PATIENCE, settle
from support.pool_stubs import (
    Backend,
    ClosableConnection,
    Connection,
    Emptied,
    give_back,
    nothing,
    take,
)

from aiosync import (
    PoolClosed,
)
from aiosync._handoff import HandoffQueue
from aiosync._park import ThreadWaiter
from aiosync._pool._entry import FOREVER, Failure, PoolEntry, State
from aiosync._pool._inventory import Disposition, Inventory, _nothing


def failure() -> Failure:
    return Failure(lambda: PoolClosed("closed"))


def open_inventory(lifo: bool = True, max_idle: float = FOREVER) -> Inventory[ClosableConnection]:
    options: Any = SimpleNamespace(max_idle=max_idle, fresh=FOREVER, lifo=lifo, is_closed=None)
    inventory: Inventory[ClosableConnection] = Inventory(options, failure())
    inventory.closed = None
    return inventory


def told(inventory: Inventory[Any]) -> list[object]:
    """Return what maintenance was told: "wake", "want", or the entries that it is to decide on."""
    words: dict[object, str] = {_nothing: "wake", inventory._want: "want"}
    return [words.get(job, job) for job in reversed(inventory.jobs.items)]


def idle_entry(
    fresh_until: float = FOREVER, expires: float = FOREVER
) -> PoolEntry[ClosableConnection]:
    made: PoolEntry[ClosableConnection] = PoolEntry(0)
    made.connection = made.kept = ClosableConnection()
    made.key = id(made.connection)
    made.state = State.IDLE
    made.fresh_until = fresh_until
    made.expires = expires
    return made


class Changed(deque[Any]):
    """Another thread changes it during the first attempt to copy it."""

    tries = 0

    def copy(self) -> Any:
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("deque mutated during iteration")
        return super().copy()


class TestTheInventory:
    def test_a_failure_that_nobody_took_is_dropped(self) -> None:
        inventory = open_inventory()
        good = idle_entry()
        inventory.items.extend([good, failure()])
        assert inventory.pick(0, True) is good
        inventory.put(failure())
        inventory.put_back(failure())
        assert not inventory.items

    def test_an_entry_that_was_retired_on_its_way_goes_to_maintenance(self) -> None:
        inventory = open_inventory()
        old = idle_entry()
        old.retire("drain")
        inventory.put(old)
        assert inventory.idle() == 0
        assert told(inventory) == [old]

    def test_another_thread_takes_the_last_stale_entry(self) -> None:
        inventory = open_inventory()
        inventory.stale = Emptied([idle_entry()])
        assert inventory.pick(0, False) is None

    def test_a_stale_entry_that_is_too_old_is_left_to_maintenance(self) -> None:
        inventory = open_inventory(max_idle=10)
        stale = idle_entry(fresh_until=1)
        inventory.stale.append(stale)
        assert inventory.pick(10, False) is None
        assert told(inventory) == ["wake"]
        assert inventory.pick(9, False) is stale

    @pytest.mark.parametrize("lifo", [True, False])
    def test_a_caller_that_does_not_wait_takes_the_stale_entry_that_is_next(
        self, lifo: bool
    ) -> None:
        inventory = open_inventory(lifo=lifo)
        entries = [idle_entry(fresh_until=0) for _ in range(3)]
        for since, entry in zip((2, 3, 1), entries, strict=True):
            entry.idle_since = since
            inventory.lay_aside(entry)
        taken = [inventory.pick(5, False) for _ in range(3)]
        in_order = [entries[2], entries[0], entries[1]]
        assert taken == (in_order[::-1] if lifo else in_order)

    @pytest.mark.parametrize("lifo", [True, False])
    def test_without_lifo_stale_entries_are_asked_for_although_others_are_fresh(
        self, lifo: bool
    ) -> None:
        inventory = open_inventory(lifo=lifo)
        inventory.stale.append(idle_entry(fresh_until=0))
        inventory.items.append(good := idle_entry())
        assert inventory.pick(1, True) is good
        assert told(inventory) == ([] if lifo else ["want"])

    def test_a_copy_that_another_thread_interrupts_is_made_again(self) -> None:
        inventory = open_inventory()
        waiting = idle_entry()
        inventory.items = Changed([waiting])
        assert inventory.available() == [waiting]

    @pytest.mark.parametrize(
        ("expires", "is_reset", "fresh_until", "todo"),
        [
            (FOREVER, True, FOREVER, Disposition.HAND_OUT),
            (FOREVER, True, 5, Disposition.CHECK),
            (FOREVER, True, 6, Disposition.HAND_OUT),
            (FOREVER, False, FOREVER, Disposition.RESET),
            (FOREVER, False, 5, Disposition.RESET),
            (5, True, FOREVER, Disposition.CLOSE),
            (5, False, FOREVER, Disposition.CLOSE),
        ],
    )
    def test_what_is_to_be_done_with_an_entry_at_the_time_5(
        self, expires: float, is_reset: bool, fresh_until: float, todo: Disposition
    ) -> None:
        entry = idle_entry(fresh_until, expires)
        entry.is_reset = is_reset
        assert open_inventory().disposition(entry, 5) is todo
        assert open_inventory(max_idle=5).disposition(entry, 5) is Disposition.CLOSE

    def test_those_whose_time_is_over_are_woken_and_the_next_one_is_known(self) -> None:
        queue: HandoffQueue[int] = HandoffQueue()
        waiters = [ThreadWaiter() for _ in range(4)]
        for waiter, deadline in zip(waiters, (1.0, None, 2.0, 3.0), strict=True):
            queue.join(waiter, deadline)
        assert queue.expire(2.0) == 3.0
        assert [waiter._lock.acquire(False) for waiter in waiters] == [True, False, True, False]

    def test_to_look_for_those_is_tried_again_if_another_thread_comes_between(self) -> None:
        class ChangedItems(OrderedDict[Any, Any]):
            tries = 0

            def items(self) -> Any:
                self.tries += 1
                if self.tries == 1:
                    raise RuntimeError("OrderedDict mutated during iteration")
                return super().items()

        queue: HandoffQueue[int] = HandoffQueue()
        queue.waiters = ChangedItems()
        assert queue.expire(0) == FOREVER


def test_a_waiter_that_joins_while_a_stale_connection_is_laid_aside_is_noticed() -> None:
    inventory = open_inventory()
    stale = idle_entry(fresh_until=0)
    inventory.items.append(stale)

    class Slow(deque[Any]):
        """Somebody begins to wait just before it is there."""

        def append(self, item: Any) -> None:
            inventory.join(ThreadWaiter())
            assert not told(inventory)
            super().append(item)

    inventory.stale = Slow()
    assert inventory.pick(1, True) is None  # and the caller does not wait after all
    assert list(inventory.stale) == [stale]
    assert told(inventory) == ["wake"]


def closed() -> Failure:
    return Failure(lambda: PoolClosed("closed"))


def test_an_entry_that_is_put_back_into_a_closed_inventory_is_told() -> None:
    inventory = open_inventory()
    inventory.closed = closed()
    inventory.put_back(closed())
    assert told(inventory) == []
    inventory.put_back(PoolEntry(0.0))
    assert told(inventory) == ["wake"]


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
