"""A storm on a pool: cancellations, failures and changes of its size, at random."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from support.pool_cancellation import (
    PATIENCE,
    checkpoint,
    count_steps,
    explained,
    has_begun,
    tasks_of,
    under_asyncio,
    until,
    verify,
    verify_closed,
)
from support.pool_stubs import SteppingBackend, SteppingConnection, steps

from aiosync import PoolTimeout, TooManyRequests

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.anyio, pytest.mark.stress]
steps_count = pytest.fixture(count_steps, autouse=True)


# How long a storm lasts.
STORM = 0.9


class PoolStorm:
    """Many tasks that use one pool, all at once and at random, while everything fails."""

    def __init__(self, seed: int, resizing: bool, overlap: bool) -> None:
        self.chance = random.Random(seed)
        self.resizing = resizing
        self.backend = SteppingBackend(pause=1)
        self.largest = 4
        self.overlap = overlap
        # How many were borrowed at the same time, at most.
        self.lent = 0
        self.pool = self.backend.pool(
            "configure",
            "check",
            "reset",
            min_size=1,
            max_size=self.largest,
            overlap=overlap,
            check_idle=0.0005 if resizing else 0,
            max_idle=0.02,
            max_lifetime=0.05,
            max_waiting=80,
            close_timeout=PATIENCE,
        )
        # How to cancel what is going on.
        self.cancels: dict[int, Callable[[], object]] = {}
        self.outcomes: Counter[str] = Counter()
        self.over = False
        # Only a few go on, so that connections are idle for a while.
        self.calm = False

    async def run(self) -> None:
        async with self.pool:
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(self.work, number)
                tasks.start_soon(self.rage)
                tasks.start_soon(self.disturb)
                await anyio.sleep(STORM)
                with anyio.fail_after(PATIENCE):  # on a slow machine it takes longer
                    await until(lambda: all(self.outcomes[kind] for kind in self.expected()))
                self.over = True
                with anyio.fail_after(PATIENCE):
                    await until(lambda: not self.cancels)
            await self.calm_down()
            await verify(self.pool, self.backend)
        verify_closed(self.pool, self.backend)
        assert self.backend.peak <= self.largest + self.overlap
        assert self.lent <= self.largest
        assert all(self.backend.calls[kind] for kind in ("configure", "reset", "close"))
        assert self.backend.calls["check"] or self.resizing  # where it is a matter of luck

    async def calm_down(self) -> None:
        """Let all connections be replaced by those that last."""
        core = self.pool._maintenance.core
        core.options.max_lifetime = 3600
        core.options.max_idle = core.inventory.max_idle = 3600
        await self.pool.resize(1, 4)
        await self.pool.drain()

    def expected(self) -> list[str]:
        found = [
            "served",
            "served in a block",
            "cancelled by scope",
            "timeout",
            "nothing",
            "discarded",
        ]
        return [*found, "cancelled by task"] if under_asyncio() else found

    async def work(self, number: int) -> None:
        while not self.over:
            await checkpoint()
            if self.calm:
                await anyio.sleep(0.002)
                if number > 2:
                    continue
            way = self.chance.choice(["scope", "task"] if under_asyncio() else ["scope"])
            self.outcomes[await self.one(number, way)] += 1

    async def one(self, number: int, way: str) -> str:
        """Borrow a connection, or not; unless this is cancelled."""
        outcome = ""
        cancelled = False

        async def act() -> None:
            nonlocal outcome
            outcome = await self.act()
            await checkpoint()  # where a cancel that was late is noticed
            if cancelled:
                await anyio.sleep_forever()

        def cancel() -> None:
            nonlocal cancelled
            if way == "scope":
                scope.cancel()
                cancelled = True
            else:
                cancelled = task.cancel() or cancelled

        self.cancels[number] = cancel
        if way == "scope":
            with anyio.CancelScope() as scope:
                await act()
            ended = scope.cancelled_caught
        else:
            task = asyncio.create_task(act())
            await asyncio.wait([task])
            ended = task.cancelled()
            if not ended:
                task.result()
        del self.cancels[number]
        assert ended is cancelled, "a cancel was swallowed"
        return f"cancelled by {way}" if ended else outcome

    async def act(self) -> str:
        pool, chance = self.pool, self.chance
        timeout = chance.choice([None, math.inf, 0.05, 0.005, 0.001, 0])
        try:
            if chance.random() < 0.4:
                async with pool.connection(timeout) as connection:
                    await self.use(connection)
                return "served in a block"
            if chance.random() < 0.1:
                connection = pool.acquire_nowait()
            else:
                connection = await pool.acquire(timeout)
        except PoolTimeout:
            return "timeout"
        except anyio.WouldBlock:
            return "nothing"
        except TooManyRequests:
            return "too many"
        kind = "served"
        try:
            await self.use(connection)
            if chance.random() < 0.1:
                kind = "discarded"
        finally:
            (pool.discard if kind == "discarded" else pool.release)(connection)
        return kind

    async def use(self, connection: SteppingConnection) -> None:
        chance = self.chance
        assert not connection.closed
        assert not connection.users
        connection.users += 1
        self.lent = max(self.lent, sum(one.users for one in self.backend.made))
        try:
            await (steps(chance.randrange(3)) if chance.random() < 0.7 else anyio.sleep(0.0005))
        finally:
            connection.users -= 1

    async def rage(self) -> None:
        """Cancel whom you can."""
        while not self.over:
            await steps(self.chance.randrange(3))
            await anyio.sleep(0)
            for number in self.chance.sample(sorted(self.cancels), min(3, len(self.cancels))):
                self.cancels[number]()
            if under_asyncio() and self.chance.random() < 0.1:
                for task in tasks_of(self.pool)[1:]:
                    if has_begun(task) and not task.done():
                        task.cancel()

    async def disturb(self) -> None:
        """Let all sorts of things fail, and ask the pool for all sorts of things."""
        pool, chance = self.pool, self.chance
        while not self.over:
            await anyio.sleep(0.003 * chance.random())
            self.backend.fails[chance.choice(["connect", "configure", "check", "reset"])] += 1
            self.calm = time.monotonic() % 0.06 < 0.03
            match = chance.randrange(12)
            if match == 0:
                await pool.drain()
            elif match == 1:
                with anyio.move_on_after(0.002):
                    await pool.check()
            elif match == 2:
                with anyio.move_on_after(0.002):
                    await pool.wait()
            elif match < 6 and self.resizing:
                size = chance.randint(1, 7)
                self.largest = max(self.largest, size)
                await pool.resize(chance.randint(0, min(size, 2)), size)


STORMS = {
    "of fixed size": (False, False),
    "of fixed size, and one more": (False, True),
    "of changing size": (True, True),
}


@pytest.mark.parametrize(("resizing", "overlap"), STORMS.values(), ids=STORMS)
async def test_a_pool_survives_a_storm(resizing: bool, overlap: bool) -> None:
    seed = random.randrange(2**32)
    async with explained("seed", seed):
        await PoolStorm(seed, resizing, overlap).run()
