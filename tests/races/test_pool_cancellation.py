"""ConnectionPool under cancellation: at every step of everything that waits, and at random.

A *victim* runs k steps of the event loop and is then cancelled, for every k until it has got as far
as it can. Afterwards the pool has to be whole: all slots can be borrowed at once, each connection
ever made is either borrowed, idle or closed once, and nobody has been overtaken.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
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

from aiosync import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from aiosync._pool import _closing
from aiosync._pool._entry import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.stress]
steps_count = pytest.fixture(count_steps, autouse=True)


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset that ignores that it was cancelled is given up at once."""
    monkeypatch.setattr(_closing, "GRACE", 0.0)


def ways() -> list[str]:
    """Return the ways to cancel something on the event loop that is running."""
    found = ["scope", "fail_after"]
    if under_asyncio():
        found += ["task", "wait_for"]
        found.append("asyncio.timeout")
    return found


class Victim:
    """A task that can be cancelled in one of the `ways`, and then has to end by that.

    Its work ends with an endless sleep. So there is always something left to cancel, and a victim
    that does not end has swallowed it.
    """

    def __init__(self, way: str, work: Callable[[], Awaitable[object]]) -> None:
        self.way = way
        self.work = work
        # How it ended: the error, or "cancelled".
        self.outcome: object = None
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[None] | None = None
        self.timer: Any = None
        self.patience = math.inf

    async def run(self) -> None:
        try:
            if self.way == "scope":
                with self.scope:
                    await self.work()
                if self.scope.cancelled_caught:
                    self.outcome = "cancelled"
            elif self.way == "fail_after":
                with anyio.fail_after(self.patience) as self.scope:
                    await self.work()
            elif self.way == "wait_for":
                await asyncio.wait_for(self.work(), 3600)
            elif self.way == "asyncio.timeout":
                async with asyncio.timeout(None) as self.timer:  # type: ignore[attr-defined,unused-ignore]
                    await self.work()
            else:
                await self.work()
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise
        except Exception as error:
            self.outcome = error

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        if self.way in {"task", "wait_for", "asyncio.timeout"}:
            self.task = asyncio.create_task(self.run())
        else:
            tasks.start_soon(self.run)

    def cancel(self) -> None:
        if self.way == "scope":
            self.scope.cancel()
        elif self.way == "fail_after":
            self.patience = self.scope.deadline = -math.inf
        elif self.way == "asyncio.timeout" and self.timer is not None:
            self.timer.reschedule(-math.inf)
        else:
            assert self.task is not None
            self.task.cancel()

    async def ended(self) -> object:
        if self.task is not None:
            await until(self.task.done)
            if self.task.cancelled():
                self.outcome = "cancelled"
        await until(lambda: self.outcome is not None)
        return self.outcome

    async def check_ended_by_cancel(self) -> None:
        outcome = await self.ended()
        if self.way == "fail_after":
            assert type(outcome) is TimeoutError
            assert self.scope.cancelled_caught
        elif self.timer is not None:
            assert isinstance(outcome, TimeoutError)
            assert self.timer.expired()
        else:
            assert outcome == "cancelled"
            assert self.scope.cancelled_caught is (self.way == "scope")


class Scenario:
    """What goes on around the victim."""

    hooks: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    # How many others come after the victim, a step each.
    followers = 2

    def __init__(self) -> None:
        self.backend = SteppingBackend()
        self.pool = self.backend.pool(*self.hooks, **self.settings)
        # Who was served, in that order.
        self.served: list[int] = []
        # The victim has got as far as it can.
        self.arrived = False

    async def prepare(self) -> None:
        """Do what comes before the victim."""

    async def victim(self) -> None:
        async with self.pool.connection(math.inf) as connection:
            await self.use(connection)
            await self.arrive()

    async def arrive(self) -> None:
        self.arrived = True
        await anyio.sleep_forever()

    async def use(self, connection: SteppingConnection) -> None:
        assert not connection.closed
        assert not connection.users
        connection.users += 1
        try:
            await steps(2)
        finally:
            connection.users -= 1

    async def meanwhile(self) -> None:
        """Do what goes on beside the victim."""

    async def follower(self, number: int) -> None:
        async with self.pool.connection(math.inf) as connection:
            self.served.append(number)
            await self.use(connection)

    def holds(self) -> None:
        """Check what else should be true at the end."""
        assert sorted(self.served) == list(range(self.followers))
        if self.pool.max_size == 1:
            assert self.served == sorted(self.served)


class AnIdleConnection(Scenario):
    settings = {"min_size": 1}

    async def prepare(self) -> None:
        await self.pool.wait()


class OneOfTwoIdleConnections(AnIdleConnection):
    settings = {"min_size": 2, "max_size": 2}


class AConnectionIsMade(Scenario):
    hooks = ("configure",)


class ConnectionsAreMadeForEverybody(Scenario):
    hooks = ("configure",)
    settings = {"max_size": 3}


class TheFirstConnectFails(Scenario):
    async def prepare(self) -> None:
        self.backend.fails["connect"] = 1


class TheFirstConfigureFails(Scenario):
    hooks = ("configure",)

    async def prepare(self) -> None:
        self.backend.fails["configure"] = 1


class ABusyConnection(Scenario):
    settings = {"min_size": 1}
    delay = 4

    async def prepare(self) -> None:
        self.connection = await self.pool.acquire()

    async def meanwhile(self) -> None:
        await steps(self.delay)
        self.pool.release(self.connection)


class ABusyConnectionComesBackAtOnce(ABusyConnection):
    delay = 0


class ABusyConnectionIsReset(ABusyConnection):
    hooks = ("reset",)


class ABusyConnectionFailsItsReset(ABusyConnectionIsReset):
    async def prepare(self) -> None:
        await super().prepare()
        self.backend.fails["reset"] = 1


class ABusyConnectionIsDiscarded(ABusyConnection):
    async def meanwhile(self) -> None:
        await steps(self.delay)
        self.pool.discard(self.connection)


class ABusyConnectionIsReplacedByDrain(ABusyConnection):
    async def meanwhile(self) -> None:
        await self.pool.drain()
        await super().meanwhile()


class AConnectionIsChecked(AnIdleConnection):
    hooks = ("check", "reset")
    settings = {"min_size": 1, "check_idle": 0}


class AConnectionFailsItsCheck(AConnectionIsChecked):
    async def prepare(self) -> None:
        await super().prepare()
        self.backend.fails["check"] = 1


class AConnectionHasExpired(AnIdleConnection):
    settings = {"min_size": 1, "max_lifetime": 0.002}

    async def prepare(self) -> None:
        await super().prepare()
        time.sleep(0.003)
        self.pool._options.max_lifetime = 3600.0


class AnIdleConnectionIsDrained(AnIdleConnection):
    async def meanwhile(self) -> None:
        await self.pool.drain()


class ThePoolGrows(ABusyConnection):
    async def meanwhile(self) -> None:
        await steps(2)
        await self.pool.resize(1, 2)
        await super().meanwhile()


class ThePoolShrinks(ABusyConnection):
    settings = {"min_size": 2, "max_size": 2}

    async def prepare(self) -> None:
        await super().prepare()
        self.other = await self.pool.acquire()

    async def meanwhile(self) -> None:
        await self.pool.resize(0, 1)
        self.pool.release(self.other)
        await super().meanwhile()


class TheVictimTakesWithoutACheckpoint(ABusyConnection):
    settings = {"min_size": 1, "fast_acquire": True}


class TheVictimEndsItsBlock(AnIdleConnection):
    """Then the connection is reset in its task, shielded."""

    hooks: tuple[str, ...] = ("reset",)

    async def victim(self) -> None:
        async with self.pool.connection(math.inf) as connection:
            await self.use(connection)
        await self.arrive()


class TheVictimEndsItsBlockAndAPlainHookResets(TheVictimEndsItsBlock):
    hooks = ()
    settings = {"min_size": 1, "reset": SteppingConnection.reset}


class TheVictimEndsItsBlockAndTheResetFails(TheVictimEndsItsBlock):
    async def victim(self) -> None:
        async with self.pool.connection(math.inf) as connection:
            await self.use(connection)
            self.backend.fails["reset"] = 1
        await self.arrive()


class TheVictimEndsItsBlockAndTheResetTakesTooLong(TheVictimEndsItsBlock):
    # For ever, unless it is cancelled, which maintenance does at once.
    settings = {"min_size": 1, "check_timeout": 0}

    async def victim(self) -> None:
        async with self.pool.connection(math.inf) as connection:
            await self.use(connection)
            self.backend.hangs.add(connection)
        await self.arrive()


class TheVictimEndsItsBlockAndTheResetTakesTooLongToBeCancelled(
    TheVictimEndsItsBlockAndTheResetTakesTooLong
):
    async def prepare(self) -> None:
        await super().prepare()
        self.backend.cleanup = 6

    async def meanwhile(self) -> None:
        for _ in range(40):  # maintenance looks at it again and again
            await self.pool.resize(1, 1)


class TheVictimEndsItsBlockAsThePoolIsDrained(TheVictimEndsItsBlock):
    async def victim(self) -> None:
        async with self.pool.connection(math.inf) as connection:
            await self.use(connection)
            await self.pool.drain()
        await self.arrive()


class TheVictimEndsItsBlockAndThenThePoolIsDrained(TheVictimEndsItsBlock):
    async def reset(self, connection: SteppingConnection) -> None:
        await checkpoint()
        await self.pool.drain()

    def __init__(self) -> None:
        self.settings = {"min_size": 1, "reset": self.reset}
        self.hooks = ()
        super().__init__()


class TheVictimEndsItsBlockAndTheConnectionIsToBeChecked(TheVictimEndsItsBlock):
    hooks = ("check", "reset")
    settings = {"min_size": 1, "check_idle": 0}


class TheVictimEndsItsBlockWithConnectionsForAll(TheVictimEndsItsBlock):
    settings = {"min_size": 3, "max_size": 3}


class TheVictimGivesBackBeforeTheEndOfItsBlock(TheVictimEndsItsBlock):
    async def victim(self) -> None:
        checkout = self.pool.connection(math.inf)
        async with checkout as connection:
            await self.use(connection)
            checkout.release()
            await steps(3)
        await self.arrive()


class TheVictimDiscardsBeforeTheEndOfItsBlock(TheVictimEndsItsBlock):
    async def victim(self) -> None:
        checkout = self.pool.connection(math.inf)
        async with checkout as connection:
            await self.use(connection)
            checkout.discard()
            await steps(3)
        await self.arrive()


class AConnectionIsReplacedBeforeItHasToGo(AnIdleConnection):
    """The replacement is in excess of `max_size`, until the victim and all others let go."""

    async def meanwhile(self) -> None:
        (old,) = self.pool._inventory.entries.values()
        old.expires = self.pool._clock() + 0.5
        old.created = old.expires - 3600
        self.pool._maintenance.core.wake()
        await until(lambda: old.state is State.CLOSED)
        assert self.backend.peak == 2

    def holds(self) -> None:
        super().holds()
        assert self.pool.get_stats()["closed_lifetime"] == 1


class TheVictimHasATimeoutOfItsOwn(ABusyConnection):
    async def victim(self) -> None:
        async with self.pool.connection(3600) as connection:
            await self.use(connection)
            await self.arrive()


class TheVictimWaitsForAllConnections(Scenario):
    settings = {"min_size": 2, "max_size": 2}
    hooks = ("configure",)

    async def victim(self) -> None:
        await self.pool.wait(math.inf)
        await self.arrive()


class TheVictimChecksAllConnections(Scenario):
    settings = {"min_size": 2, "max_size": 2, "check_idle": None}
    hooks = ("check",)

    async def prepare(self) -> None:
        await self.pool.wait()
        self.backend.fails["check"] = 1

    async def victim(self) -> None:
        await self.pool.check()
        await self.arrive()


class AllConnectionsAreChecked(AnIdleConnection):
    settings = {"min_size": 4, "max_size": 4, "check_idle": None}
    hooks = ("check",)

    async def meanwhile(self) -> None:
        self.backend.fails["check"] = 1
        await self.pool.check()


class TheVictimDrainsThePool(AnIdleConnection):
    async def victim(self) -> None:
        await self.pool.drain()
        await self.arrive()


class TheVictimResizesThePool(AnIdleConnection):
    async def victim(self) -> None:
        await self.pool.resize(0, 2)
        await self.arrive()

    def holds(self) -> None:
        assert sorted(self.served) == list(range(self.followers))


class TheVictimDiscardsWhatItGot(AnIdleConnection):
    async def victim(self) -> None:
        async with self.pool.connection() as connection:
            try:
                await self.use(connection)
                await self.arrive()
            finally:
                self.pool.discard(connection)


def all_scenarios(base: type[Scenario] = Scenario) -> list[type[Scenario]]:
    found = []
    for scenario in base.__subclasses__():
        found += [scenario, *all_scenarios(scenario)]
    return found


@pytest.fixture
def only_asyncio(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no native cancel")


def named(scenario: type[Scenario]) -> str:
    return scenario.__name__


async def play(scenario: Scenario, way: str, k: int) -> bool:
    """Cancel the victim after `k` steps; tell whether it had got as far as it can before."""
    pool = scenario.pool
    async with pool:
        await scenario.prepare()
        async with anyio.create_task_group() as tasks:
            victim = Victim(way, scenario.victim)
            victim.start(tasks)
            tasks.start_soon(scenario.meanwhile)
            # Followers come one step after another, or else trio might let the second pass first.
            coming = list(range(scenario.followers))
            for _ in range(k):
                await checkpoint()
                if coming:
                    tasks.start_soon(scenario.follower, coming.pop(0))
            arrived = scenario.arrived
            victim.cancel()
            await victim.check_ended_by_cancel()
            for number in coming:
                await checkpoint()
                tasks.start_soon(scenario.follower, number)
            with anyio.fail_after(PATIENCE):
                while len(scenario.served) < scenario.followers:
                    await checkpoint()
        scenario.holds()
        await verify(pool, scenario.backend)
    verify_closed(pool, scenario.backend)
    return arrived


@pytest.mark.parametrize("scenario", all_scenarios(), ids=named)
async def test_a_cancel_at_any_step_costs_no_slot_no_connection_and_nobody_its_place(
    scenario: type[Scenario],
) -> None:
    for way in ways():
        arrived, k = False, 0
        while not arrived:
            async with explained(way, "after", k, "steps"):
                arrived = await play(scenario(), way, k)
                k += 1
                assert k < 100, "the victim never gets anywhere"
        assert k > 1, "it was never cancelled on its way"


@pytest.mark.parametrize(
    "scenario",
    [
        AConnectionIsMade,
        ConnectionsAreMadeForEverybody,
        TheFirstConnectFails,
        TheFirstConfigureFails,
        ABusyConnectionIsReset,
        ABusyConnectionFailsItsReset,
        ABusyConnectionIsDiscarded,
        ABusyConnectionIsReplacedByDrain,
        AConnectionIsChecked,
        AConnectionFailsItsCheck,
        AConnectionHasExpired,
        AnIdleConnectionIsDrained,
        ThePoolGrows,
        ThePoolShrinks,
        AllConnectionsAreChecked,
    ],
    ids=named,
)
@pytest.mark.usefixtures("only_asyncio")
async def test_a_background_task_may_be_cancelled_at_any_step(scenario: type[Scenario]) -> None:
    """Not the main one: that closes the pool."""
    hit, k = 0, 0
    while k < 40:
        async with explained("after", k, "steps"):
            hit += await play_in_background(scenario(), k)
        k += 1
    assert hit, "there was never one to cancel"


async def play_in_background(scenario: Scenario, k: int) -> bool:
    pool = scenario.pool
    async with pool:
        await scenario.prepare()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scenario.meanwhile)
            tasks.start_soon(scenario.follower, 0)
            await checkpoint()
            tasks.start_soon(scenario.follower, 1)
            await steps(k)
            victims = [task for task in tasks_of(pool)[1:] if has_begun(task)]
            for task in victims:
                task.cancel()
            with anyio.fail_after(PATIENCE):
                while len(scenario.served) < 2:
                    await checkpoint()
        scenario.holds()
        await verify(pool, scenario.backend)
    verify_closed(pool, scenario.backend)
    return bool(victims)


async def outcome_of(work: Awaitable[object]) -> object:
    try:
        return await work
    except Exception as error:
        return type(error)


class TestTheMainTaskOfThePoolIsCancelled:
    @pytest.mark.usefixtures("only_asyncio")
    async def test_at_any_step_this_closes_the_pool_in_good_order(self) -> None:
        for k in range(25):
            async with explained("after", k, "steps"):
                await self.cancel_after(k)

    async def cancel_after(self, k: int) -> None:
        backend = SteppingBackend()
        pool = backend.pool("configure", "reset", "check", max_size=2, check_idle=0, min_size=1)
        outcomes: list[object] = []

        async def use() -> None:
            try:
                async with pool.connection(math.inf) as connection:
                    await steps(2)
                    assert not connection.closed
                outcomes.append("served")
            except PoolClosed:
                outcomes.append("closed")

        async with pool:
            await checkpoint()  # now it has begun
            main = tasks_of(pool)[0]
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(use)
                await steps(k)
                main.cancel()
                await until(main.done)
            assert main.cancelled()
            assert len(outcomes) == 5
            assert await outcome_of(pool.acquire()) is PoolClosed
            assert await outcome_of(pool.wait()) is PoolClosed
            verify_closed(pool, backend)
        verify_closed(pool, backend)


class Closing:
    """A pool that is closed by the victim, while all sorts of things go on."""

    def __init__(self) -> None:
        self.backend = SteppingBackend(pause=3)
        self.arrived = False
        self.pool = self.backend.pool("reset", "check", "configure", max_size=6, check_idle=0)

    async def prepare(self, tasks: anyio.abc.TaskGroup, before: int) -> None:
        pool = self.pool
        await pool.__aenter__()
        first, second, third, fourth, fifth = [await pool.acquire() for _ in range(5)]
        pool.release(first)
        pool.release(second)
        await until(lambda: pool.get_stats()["pool_available"] == 2)
        self.borrowed = third
        pool.discard(fourth)  # is being closed
        pool.release(fifth)  # is being reset
        for _ in range(4):
            tasks.start_soon(self.use)  # for these some are being checked, and others made
        await steps(before)

    async def use(self) -> None:
        try:
            async with self.pool.connection(math.inf) as connection:
                assert not connection.closed
        except PoolClosed:
            pass

    async def give_back(self) -> None:
        await steps(6)
        self.pool.release(self.borrowed)

    async def close(self) -> None:
        await self.pool.__aexit__(None, None, None)
        self.arrived = True
        await anyio.sleep_forever()


async def test_closing_the_pool_may_be_cancelled_at_any_step_and_ends_all_the_same() -> None:
    for way in ways():
        for before, again in [(0, 0), (2, 1), (4, 2), (7, 0), (9, 1), (14, 0)]:
            arrived, k = False, 0
            while not arrived:
                async with explained(way, "after", before, k, "steps, and", again, "times more"):
                    arrived = await close_and_cancel(way, before, k, again)
                    k += 1
                    assert k < 100, "closing never ends"
            assert k > 3, "it was never cancelled on its way"


async def close_and_cancel(way: str, before: int, k: int, again: int) -> bool:
    closing = Closing()
    async with anyio.create_task_group() as tasks:
        await closing.prepare(tasks, before)
        victim = Victim(way, closing.close)
        victim.start(tasks)
        await checkpoint()  # it has begun to close
        tasks.start_soon(closing.give_back)
        await steps(k)
        arrived = closing.arrived
        victim.cancel()
        for _ in range(again):
            await checkpoint()
            if way == "task" and victim.task is not None:
                victim.cancel()
        await victim.check_ended_by_cancel()
        # A scope need not raise before the next checkpoint, which is the sleep after the closing;
        # and what wraps a task takes a step to pass on a cancel.
        assert closing.arrived is arrived or way != "task"
        await until(lambda: closing.pool._maintenance.finished)
        verify_closed(closing.pool, closing.backend)
    return arrived


class StubbornReset:
    """A reset in the task of the victim that ignores every cancel until it is allowed to end."""

    def __init__(self, **settings: Any) -> None:
        self.backend = SteppingBackend()
        self.may_end = False
        self.ended = False
        self.arrived = False
        self.pool = self.backend.pool(min_size=1, reset=self.reset, **settings)

    async def reset(self, _: SteppingConnection) -> None:
        while not self.may_end:
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await checkpoint()
        self.ended = True

    async def victim(self) -> None:
        with suppress(PoolClosed):
            async with self.pool.connection():
                await steps(2)
        self.arrived = True
        await anyio.sleep_forever()

    async def end(self, victim: Victim) -> None:
        self.may_end = True
        await until(lambda: self.arrived)
        victim.cancel()
        await victim.check_ended_by_cancel()


class TestAResetInTheTaskOfTheBorrower:
    """Other ways in which it ends than a cancel of its task; see `TheVictimEndsItsBlock`."""

    async def test_that_goes_on_is_cancelled_if_the_pool_is_closed_by_force(self) -> None:
        for way in ways():
            for k in range(12):
                async with explained(way, "after", k, "steps"):
                    await self.close_by_force(way, k)

    async def close_by_force(self, way: str, k: int) -> None:
        scenario = TheVictimEndsItsBlock()
        backend = scenario.backend
        backend.cleanup = 3
        pool = scenario.pool = backend.pool("reset", min_size=1, close_timeout=0)
        async with anyio.create_task_group() as tasks:

            async def work() -> None:
                try:
                    async with pool.connection() as connection:
                        await steps(2)
                        backend.hangs.add(connection)
                except PoolClosed:
                    pass
                await scenario.arrive()

            async with pool:
                await pool.wait()
                victim = Victim(way, work)
                victim.start(tasks)
                await steps(k)
            verify_closed(pool, backend)
            assert not backend.wrong
            await until(lambda: scenario.arrived)
            victim.cancel()
            await victim.check_ended_by_cancel()

    @pytest.mark.usefixtures("no_grace")
    async def test_that_ignores_this_does_not_keep_the_pool_from_closing(self) -> None:
        for way in ways():
            for k in range(8):
                async with explained(way, "after", k, "steps"):
                    stubborn = StubbornReset(close_timeout=0)
                    async with anyio.create_task_group() as tasks:
                        async with stubborn.pool:
                            await stubborn.pool.wait()
                            victim = Victim(way, stubborn.victim)
                            victim.start(tasks)
                            await steps(k)
                        assert not stubborn.ended
                        verify_closed(stubborn.pool, stubborn.backend)
                        await stubborn.end(victim)
                    verify_closed(stubborn.pool, stubborn.backend)

    @pytest.mark.usefixtures("no_grace")
    async def test_that_ignores_its_deadline_costs_no_slot(self) -> None:
        for way in ways():
            async with explained(way):
                stubborn = StubbornReset(check_timeout=0)
                pool = stubborn.pool
                async with pool:
                    await pool.wait()
                    async with anyio.create_task_group() as tasks:
                        victim = Victim(way, stubborn.victim)
                        victim.start(tasks)
                        await until(lambda: len(stubborn.backend.made) == 2)  # noqa: B023
                        assert not stubborn.ended
                        assert stubborn.backend.open == 1
                        await stubborn.end(victim)
                    await verify(pool, stubborn.backend)
                verify_closed(pool, stubborn.backend)

    @pytest.mark.usefixtures("only_asyncio")
    async def test_costs_no_slot_if_its_coroutine_is_closed(self) -> None:
        closed_in_reset = 0
        for k in range(10):
            async with explained("after", k, "steps"):
                backend = SteppingBackend()
                async with backend.pool("reset", min_size=1) as pool:
                    await pool.wait()

                    async def block(pool: ConnectionPool[SteppingConnection] = pool) -> None:
                        async with pool.connection():
                            await steps(2)

                    coroutine = block()
                    with suppress(StopIteration):
                        for _ in range(k):
                            coroutine.send(None)
                    closed_in_reset += any(connection.busy for connection in backend.made)
                    coroutine.close()
                    await verify(pool, backend)
                verify_closed(pool, backend)
        assert closed_in_reset

    @pytest.mark.parametrize("k", range(8))
    def test_is_ended_by_the_end_of_the_loop(self, k: int) -> None:
        backend = SteppingBackend()

        async def main() -> None:
            pool = backend.pool("reset", min_size=1, close_timeout=0.1)
            await pool.open()
            await pool.wait()

            async def block() -> None:
                async with pool.connection():
                    await steps(2)

            tasks.append(asyncio.ensure_future(block()))
            await steps(k)

        tasks: list[asyncio.Future[None]] = []
        assert ends(lambda: asyncio.run(main()))
        assert backend.open == 0
        assert not backend.wrong
        assert tasks[0].done()


# The ways in which something is cancelled without a task around the victim's own.
DIRECT_WAYS = ["scope", "task"]


class TestAReleaseAndACancelInTheSameStep:
    """The victim waits for a connection that is borrowed."""

    @pytest.fixture(params=DIRECT_WAYS)
    def way(self, request: pytest.FixtureRequest, anyio_backend_name: str) -> str:
        if request.param == "task" and anyio_backend_name != "asyncio":
            pytest.skip("trio has no native cancel")
        way: str = request.param
        return way

    @asynccontextmanager
    async def waiting(
        self, way: str, followers: int, timeout: float
    ) -> AsyncIterator[
        tuple[ConnectionPool[SteppingConnection], SteppingConnection, Victim, list[int]]
    ]:
        backend = SteppingBackend()
        async with backend.pool() as pool:
            connection = await pool.acquire()
            served: list[int] = []

            async def acquire() -> None:
                await pool.acquire(timeout)
                raise AssertionError("it was cancelled before")

            async def follow(number: int) -> None:
                async with pool.connection(timeout):
                    served.append(number)
                    await steps(2)

            async with anyio.create_task_group() as tasks:
                victim = Victim(way, acquire)
                victim.start(tasks)
                await until(lambda: pool.get_stats()["requests_waiting"] == 1)
                for number in range(followers):
                    tasks.start_soon(follow, number)
                    await until(lambda: pool.get_stats()["requests_waiting"] == number + 2)  # noqa: B023
                yield pool, connection, victim, served
                await victim.check_ended_by_cancel()
            await verify(pool, backend)

    @pytest.mark.parametrize("timeout", [math.inf, 3600.0])
    async def test_a_waiter_cancelled_just_before_is_passed_over(
        self, way: str, timeout: float
    ) -> None:
        async with self.waiting(way, 0, timeout) as (pool, connection, victim, _):
            victim.cancel()
            pool.release(connection)
            assert pool.acquire_nowait() is connection
            pool.release(connection)

    @pytest.mark.parametrize("timeout", [math.inf, 3600.0])
    async def test_then_the_next_waiter_gets_it_at_once(self, way: str, timeout: float) -> None:
        async with self.waiting(way, 2, timeout) as (pool, connection, victim, served):
            victim.cancel()
            pool.release(connection)
            with pytest.raises(anyio.WouldBlock):
                pool.acquire_nowait()
            await until(lambda: len(served) == 2)
            assert served == [0, 1]

    @pytest.mark.parametrize("timeout", [math.inf, 3600.0])
    async def test_a_waiter_cancelled_just_after_passes_it_on(
        self, way: str, timeout: float
    ) -> None:
        backend = SteppingBackend()
        async with backend.pool() as pool:
            connection = await pool.acquire()
            served: list[int] = []

            async def acquire() -> None:
                async with pool.connection(timeout):
                    await anyio.sleep_forever()

            async def follow() -> None:
                async with pool.connection(timeout) as found:
                    assert found is connection
                    served.append(1)

            async with anyio.create_task_group() as tasks:
                victim = Victim(way, acquire)
                victim.start(tasks)
                await until(lambda: pool.get_stats()["requests_waiting"] == 1)
                tasks.start_soon(follow)
                await until(lambda: pool.get_stats()["requests_waiting"] == 2)
                pool.release(connection)
                victim.cancel()
                with pytest.raises(anyio.WouldBlock):
                    pool.acquire_nowait()  # others are in line
                await victim.check_ended_by_cancel()
                await until(lambda: bool(served))
            await verify(pool, backend)

    async def test_with_nobody_else_in_line_it_is_idle_afterwards(self, way: str) -> None:
        backend = SteppingBackend()
        async with backend.pool() as pool:
            connection = await pool.acquire()

            async def acquire() -> None:
                async with pool.connection():
                    await anyio.sleep_forever()

            async with anyio.create_task_group() as tasks:
                victim = Victim(way, acquire)
                victim.start(tasks)
                await until(lambda: pool.get_stats()["requests_waiting"] == 1)
                pool.release(connection)
                victim.cancel()
                await victim.check_ended_by_cancel()
                assert pool.acquire_nowait() is connection
                pool.release(connection)
            await verify(pool, backend)

    async def test_a_close_and_a_cancel_end_a_waiter_by_the_cancel(self, way: str) -> None:
        for cancel_first in (True, False):
            backend = SteppingBackend()
            pool = backend.pool()
            await pool.__aenter__()
            connection = await pool.acquire()
            async with anyio.create_task_group() as tasks:

                async def acquire(pool: ConnectionPool[SteppingConnection] = pool) -> None:
                    try:
                        await pool.acquire()
                    except PoolClosed:
                        await anyio.sleep_forever()  # also well; now it has to end by the cancel

                victim = Victim(way, acquire)
                victim.start(tasks)
                await until(lambda pool=pool: pool.get_stats()["requests_waiting"] == 1)  # type: ignore[misc]
                if cancel_first:
                    victim.cancel()
                tasks.start_soon(pool.__aexit__, None, None, None)
                await checkpoint()
                if not cancel_first:
                    victim.cancel()
                await victim.check_ended_by_cancel()
                pool.release(connection)
            verify_closed(pool, backend)

    async def test_a_cancelled_waiter_gives_back_its_place_in_the_line(self, way: str) -> None:
        backend = SteppingBackend()
        async with backend.pool(max_waiting=1) as pool:
            connection = await pool.acquire()
            for _ in range(3):
                async with anyio.create_task_group() as tasks:
                    victim = Victim(way, pool.acquire)
                    victim.start(tasks)
                    await until(lambda: pool.get_stats()["requests_waiting"] == 1)
                    with pytest.raises(TooManyRequests):
                        await pool.acquire()
                    victim.cancel()
                    await victim.check_ended_by_cancel()
            pool.release(connection)
            await verify(pool, backend)

    async def test_a_connection_that_was_drained_in_the_hands_of_a_cancelled_one_is_not_handed_on(
        self, way: str
    ) -> None:
        backend = SteppingBackend()
        async with backend.pool() as pool:
            connection = await pool.acquire()
            found: list[SteppingConnection] = []

            async def acquire() -> None:
                async with pool.connection():
                    await anyio.sleep_forever()

            async def follow() -> None:
                async with pool.connection() as late:
                    found.append(late)

            async with anyio.create_task_group() as tasks:
                victim = Victim(way, acquire)
                victim.start(tasks)
                await until(lambda: pool.get_stats()["requests_waiting"] == 1)
                tasks.start_soon(follow)
                await until(lambda: pool.get_stats()["requests_waiting"] == 2)
                pool.release(connection)
                pool._maintenance.drain()  # what drain() does before it lets others run
                victim.cancel()
                await victim.check_ended_by_cancel()
                await until(lambda: bool(found))
            await verify(pool, backend)
            assert found[0] is not connection  # unless the victim had it, and gave it back


class TestAConnectionThatComesAsTheTimeIsUp:
    """The time is up before the event loop runs again; then, after k steps, a connection comes."""

    TIMEOUT = 0.005

    def acquires(self, pool: ConnectionPool[SteppingConnection]) -> dict[str, Callable[[], Any]]:
        timeout = self.TIMEOUT

        async def by_fail_after() -> SteppingConnection:
            with anyio.fail_after(timeout):
                return await pool.acquire()

        async def by_asyncio_timeout() -> SteppingConnection:
            async with asyncio.timeout(timeout):  # type: ignore[attr-defined,unused-ignore]
                return await pool.acquire()

        async def by_wait_for() -> SteppingConnection:
            return await asyncio.wait_for(pool.acquire(), timeout)

        found: dict[str, Callable[[], Any]] = {
            "its own": lambda: pool.acquire(timeout),
            "fail_after": by_fail_after,
        }
        if under_asyncio():
            found["wait_for"] = by_wait_for
            found["asyncio.timeout"] = by_asyncio_timeout
        return found

    @pytest.mark.parametrize("step", ["release", "discard", "reset", "check"])
    async def test_is_either_taken_or_goes_to_the_next(self, step: str) -> None:
        outcomes: Counter[bool] = Counter()
        hooks = [step] if step in {"reset", "check"} else []
        for name in self.acquires(SteppingBackend().pool()):
            for k in range(10):
                async with explained(name, "after", k, "steps"):
                    backend = SteppingBackend()
                    pool = backend.pool(*hooks, check_idle=0 if step == "check" else None)
                    async with pool:
                        outcomes[await self.race(pool, name, step, k)] += 1
                        await verify(pool, backend)
                    verify_closed(pool, backend)
        assert outcomes[False], "nobody ever ran out of time"
        if step == "release":
            assert outcomes[True], "nobody was ever served as the time was up"

    async def race(
        self, pool: ConnectionPool[SteppingConnection], name: str, step: str, k: int
    ) -> bool:
        outcomes: list[bool] = []
        connection = await pool.acquire()

        async def acquire() -> None:
            try:
                found = await self.acquires(pool)[name]()
            except TimeoutError:
                outcomes.append(False)
            else:
                outcomes.append(True)
                await steps(2)
                pool.release(found)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(acquire)
            # On a busy machine its time may be up before we have seen it wait.
            await until(lambda: pool.get_stats()["requests_waiting"] == 1 or outcomes != [])
            time.sleep(2 * self.TIMEOUT)
            await steps(k)
            (pool.discard if step == "discard" else pool.release)(connection)
        assert len(outcomes) == 1
        return outcomes[0]


async def test_a_waiter_that_is_cancelled_as_connecting_fails_leaves_nothing_behind() -> None:
    for way in ways():
        for k in range(15):
            async with explained(way, "after", k, "steps"):
                backend = SteppingBackend()
                backend.fails["connect"] = 100
                async with backend.pool(fail_fast=True, fast_acquire=True) as pool:
                    async with anyio.create_task_group() as tasks:

                        async def acquire(pool: ConnectionPool[SteppingConnection] = pool) -> None:
                            try:
                                await pool.acquire()
                            except PoolTimeout:
                                await anyio.sleep_forever()

                        victim = Victim(way, acquire)
                        victim.start(tasks)
                        await steps(k)
                        victim.cancel()
                        await victim.check_ended_by_cancel()
                    assert pool.get_stats()["pool_available"] == 0
                    backend.fails.clear()
                    core = pool._maintenance.core
                    await until(lambda core=core: not core.attempts and not core.backoff.failures)  # type: ignore[misc]
                    await verify(pool, backend)
                verify_closed(pool, backend)


def ends(work: Callable[[], object]) -> bool:
    """Run `work` on a thread of its own; tell whether it ends, and pass on what it raises.

    For what could not be stopped if it went wrong.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    gc.collect()  # a coroutine that nobody has awaited would complain later, in another test
    if errors:
        raise errors[0]
    return not thread.is_alive()


class TestABackgroundTaskThatIsCancelledBeforeItHasBegun:
    """As `asyncio.run` does it, when the loop ends, to all tasks that there are."""

    @pytest.mark.parametrize("k", range(6))
    def test_the_end_of_the_loop_closes_a_pool_that_nobody_did(self, k: int) -> None:
        backend = SteppingBackend()

        async def main() -> None:
            await backend.pool(min_size=1, close_timeout=0.1).__aenter__()
            await steps(k)

        assert ends(lambda: asyncio.run(main()))
        assert backend.open == 0

    @pytest.mark.parametrize("work", ["connect", "reset", "close", "check_all"])
    def test_a_child_costs_no_slot(self, work: str) -> None:
        backend = SteppingBackend()

        async def main() -> None:
            async with backend.pool("check", "reset", min_size=1, check_idle=None) as pool:
                if work != "connect":
                    connection = await pool.acquire()
                    if work == "reset":
                        pool.release(connection)
                    elif work == "close":
                        pool.discard(connection)
                    else:
                        pool.release(connection)
                        await until(lambda: pool.get_stats()["pool_available"] == 1)
                        checking = asyncio.ensure_future(pool.check())
                victims: list[asyncio.Task[Any]] = []
                while not victims:
                    await checkpoint()
                    victims = [t for t in tasks_of(pool) if t.get_name().endswith(f" {work}")]
                assert not has_begun(victims[0])
                victims[0].cancel()
                if work == "check_all":
                    await asyncio.wait_for(checking, 1)
                async with pool.connection(1):
                    pass
                await verify(pool, backend)

        assert ends(lambda: asyncio.run(main()))
        assert all(connection.closed == 1 for connection in backend.made)

    def test_the_main_task_closes_the_pool(self) -> None:
        async def main() -> None:
            pool = SteppingBackend().pool()
            async with pool:
                tasks_of(pool)[0].cancel()
                await steps(3)
                assert await outcome_of(pool.acquire(1)) is PoolClosed

        assert ends(lambda: asyncio.run(main()))


class TestClosingAPoolOfTrio:
    """There the order of the tasks in one round of the loop is a matter of chance."""

    @pytest.fixture
    def anyio_backend(self) -> Any:
        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}

    async def test_a_connect_that_has_not_begun_does_not_delay_it(self) -> None:
        async def connect() -> SteppingConnection:
            await anyio.sleep(0.3)
            return SteppingConnection()

        for number in range(200):
            pool = ConnectionPool(connect, max_size=1)
            async with pool:
                await steps(2)
                with pytest.raises(anyio.WouldBlock):
                    pool.acquire_nowait()
                await checkpoint()
                began = trio.current_time()
            assert trio.current_time() - began < 0.3, number

    async def test_by_force_even_if_a_connection_is_on_its_way_to_a_borrower(self) -> None:
        for _ in range(100):
            backend = SteppingBackend()
            pool = backend.pool(min_size=1, close_timeout=0)
            closed = anyio.Event()

            async def use(
                pool: ConnectionPool[SteppingConnection] = pool, closed: anyio.Event = closed
            ) -> None:
                try:
                    async with pool.connection():
                        with anyio.move_on_after(0.5) as scope:
                            await closed.wait()
                        assert not scope.cancelled_caught
                except PoolClosed:
                    pass

            async with anyio.create_task_group() as tasks:
                async with pool:
                    await pool.wait()
                    tasks.start_soon(use)
                    await checkpoint()
                closed.set()
            verify_closed(pool, backend)


async def test_what_is_too_much_after_a_resize_goes_when_it_comes_back() -> None:
    backend = SteppingBackend()
    async with backend.pool(max_size=3) as pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        for size in (2, 1):
            await pool.resize(0, size)
            await steps(5)
        # One of the three was told to go at the first resize; it need not be one of these two.
        pool.release(second)
        pool.release(third)
        await steps(20)
        size = pool.get_stats()["pool_size"]
        pool.release(first)
        assert size <= 2
        await verify(pool, backend)
