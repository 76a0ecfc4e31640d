"""ConnectionPool under cancellation: at every step of everything that waits, and at random.

A *victim* runs k steps of the event loop and is then cancelled, for every k until it has got as far
as it can. Afterwards the pool has to be whole: all slots can be borrowed at once, each connection
ever made is either borrowed, idle or closed once, and nobody has been overtaken.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import math
import random
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import sniffio
import trio
import trio.testing

from aiosync import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from aiosync._pool import _keeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.stress]

# How long something may take that happens at once unless it never happens.
PATIENCE = 15.0

# How long a storm lasts.
STORM = 0.9

checkpoint = anyio.lowlevel.checkpoint


async def steps(number: int) -> None:
    """Let the event loop go round `number` times."""
    for _ in range(number):
        await checkpoint()


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until `condition` is true, and fail if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await checkpoint()


def under_asyncio() -> bool:
    return sniffio.current_async_library() == "asyncio"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a failed connect the next one comes at once; here it is steps that count, not time."""
    caplog.set_level(logging.CRITICAL, "aiosync.pool")
    monkeypatch.setattr(_keeper, "_FIRST_DELAY", 0.0)


class Connection:
    def __init__(self) -> None:
        self.closed = 0
        self.users = 0


class Backend:
    """What the pool connects to. It takes steps over everything, counts, and fails on demand."""

    def __init__(self, pause: int = 2) -> None:
        self.pause = pause
        self.made: list[Connection] = []
        self.peak = 0
        self.calls: Counter[str] = Counter()
        # How often the next calls of each function fail.
        self.fails: Counter[str] = Counter()

    async def _step(self, name: str) -> None:
        self.calls[name] += 1
        fails = self.fails[name] > 0
        self.fails[name] -= fails
        await steps(self.pause)
        if fails:
            raise ConnectionError(name)

    @property
    def open(self) -> int:
        return sum(not connection.closed for connection in self.made)

    async def connect(self) -> Connection:
        connection = Connection()
        self.made.append(connection)
        self.peak = max(self.peak, self.open)
        try:
            await self._step("connect")
        except BaseException:
            connection.closed += 1  # as a driver does, that owns what it has not yet returned
            raise
        return connection

    async def configure(self, connection: Connection) -> None:
        await self._step("configure")

    async def check(self, connection: Connection) -> None:
        assert not connection.users
        assert not connection.closed
        await self._step("check")

    async def reset(self, connection: Connection) -> None:
        assert not connection.users
        assert not connection.closed
        await self._step("reset")

    async def close(self, connection: Connection) -> None:
        try:
            await self._step("close")
        finally:
            connection.closed += 1

    def pool(self, *hooks: str, **settings: Any) -> ConnectionPool[Connection]:
        for hook in hooks:
            settings[hook] = getattr(self, hook)
        settings.setdefault("max_size", 1)
        return ConnectionPool(self.connect, close=self.close, **settings)


async def verify(pool: ConnectionPool[Connection], backend: Backend) -> None:
    """Check that the pool is whole, now that nobody uses it."""
    backend.fails.clear()
    # After a resize there may be more for as long as it takes to close them.
    await until(lambda: pool.get_stats()["pool_size"] <= pool.max_size)
    with anyio.fail_after(PATIENCE):
        taken = [await pool.acquire(math.inf) for _ in range(pool.max_size)]
    assert len({id(connection) for connection in taken}) == pool.max_size
    with pytest.raises(anyio.WouldBlock):
        pool.acquire_nowait()
    for connection in backend.made:
        assert connection.closed == (connection not in taken)
    for connection in taken:
        pool.release(connection)
    # Resets and checks that are under way end with the connection idle.
    await until(lambda: pool.get_stats()["pool_available"] == pool.max_size)
    stats = pool.get_stats()
    assert stats["pool_size"] == backend.open == pool.max_size
    assert stats["in_use"] == stats["connecting"] == stats["requests_waiting"] == 0
    # A victim that never left would still stand in the line, and make everybody else do so too.
    with anyio.fail_after(PATIENCE):
        async with pool.connection(math.inf):
            pass
    await until(lambda: pool.get_stats()["pool_available"] == pool.max_size)


def verify_closed(pool: ConnectionPool[Connection], backend: Backend) -> None:
    """Check that nothing is left of a pool that has been closed."""
    assert all(connection.closed == 1 for connection in backend.made)
    stats = pool.get_stats()
    assert stats["pool_size"] == stats["in_use"] == stats["connecting"] == 0
    assert stats["requests_waiting"] == 0
    with pytest.raises(PoolClosed):
        pool.acquire_nowait()
    if under_asyncio():
        assert not tasks_of(pool)


def tasks_of(pool: ConnectionPool[Any]) -> list[asyncio.Task[Any]]:
    """Return the tasks in the background of `pool`, under asyncio; the main one comes first."""
    name = pool.name
    found = [task for task in asyncio.all_tasks() if task.get_name().split(" ")[0] == name]
    return sorted(found, key=lambda task: task.get_name())


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
        self.backend = Backend()
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

    async def use(self, connection: Connection) -> None:
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
        self.pool._settings.max_lifetime = 3600.0


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


@asynccontextmanager
async def explained(*circumstances: object) -> AsyncIterator[None]:
    """Tell in which of the many rounds of a test it was that something failed."""
    try:
        yield
    except BaseException:
        print("failed:", *circumstances)
        raise


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


def has_begun(task: asyncio.Task[Any]) -> bool:
    return inspect.getcoroutinestate(task.get_coro()) != inspect.CORO_CREATED  # type: ignore[arg-type]


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
        backend = Backend()
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
        self.backend = Backend(pause=3)
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
        await until(lambda: closing.pool._keeper.finished)
        verify_closed(closing.pool, closing.backend)
    return arrived


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
    ) -> AsyncIterator[tuple[ConnectionPool[Connection], Connection, Victim, list[int]]]:
        backend = Backend()
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
        backend = Backend()
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
        backend = Backend()
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
            backend = Backend()
            pool = backend.pool()
            await pool.__aenter__()
            connection = await pool.acquire()
            async with anyio.create_task_group() as tasks:

                async def acquire(pool: ConnectionPool[Connection] = pool) -> None:
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
        backend = Backend()
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
        backend = Backend()
        async with backend.pool() as pool:
            connection = await pool.acquire()
            found: list[Connection] = []

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
                pool._keeper.drain()  # what drain() does before it lets others run
                victim.cancel()
                await victim.check_ended_by_cancel()
                await until(lambda: bool(found))
            await verify(pool, backend)
            assert found[0] is not connection  # unless the victim had it, and gave it back


class TestAConnectionThatComesAsTheTimeIsUp:
    """The time is up before the event loop runs again; then, after k steps, a connection comes."""

    TIMEOUT = 0.005

    def acquires(self, pool: ConnectionPool[Connection]) -> dict[str, Callable[[], Any]]:
        timeout = self.TIMEOUT

        async def by_fail_after() -> Connection:
            with anyio.fail_after(timeout):
                return await pool.acquire()

        async def by_asyncio_timeout() -> Connection:
            async with asyncio.timeout(timeout):  # type: ignore[attr-defined,unused-ignore]
                return await pool.acquire()

        async def by_wait_for() -> Connection:
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
        for name in self.acquires(Backend().pool()):
            for k in range(10):
                async with explained(name, "after", k, "steps"):
                    backend = Backend()
                    pool = backend.pool(*hooks, check_idle=0 if step == "check" else None)
                    async with pool:
                        outcomes[await self.race(pool, name, step, k)] += 1
                        await verify(pool, backend)
                    verify_closed(pool, backend)
        assert outcomes[False], "nobody ever ran out of time"
        if step == "release":
            assert outcomes[True], "nobody was ever served as the time was up"

    async def race(self, pool: ConnectionPool[Connection], name: str, step: str, k: int) -> bool:
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
                backend = Backend()
                backend.fails["connect"] = 100
                async with backend.pool(fail_fast=True, fast_acquire=True) as pool:
                    async with anyio.create_task_group() as tasks:

                        async def acquire(pool: ConnectionPool[Connection] = pool) -> None:
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
                    keeper = pool._keeper
                    await until(lambda keeper=keeper: not keeper.opening and not keeper.failures)  # type: ignore[misc]
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
        backend = Backend()

        async def main() -> None:
            await backend.pool(min_size=1, close_timeout=0.1).__aenter__()
            await steps(k)

        assert ends(lambda: asyncio.run(main()))
        assert backend.open == 0

    @pytest.mark.parametrize("work", ["_open", "_serve", "_close", "_check_all"])
    def test_a_child_costs_no_slot(self, work: str) -> None:
        backend = Backend()

        async def main() -> None:
            async with backend.pool("check", "reset", min_size=1, check_idle=None) as pool:
                if work != "_open":
                    connection = await pool.acquire()
                    if work == "_serve":
                        pool.release(connection)
                    elif work == "_close":
                        pool.discard(connection)
                    else:
                        pool.release(connection)
                        await until(lambda: pool.get_stats()["pool_available"] == 1)
                        checking = asyncio.ensure_future(pool.check())
                victims: list[asyncio.Task[Any]] = []
                while not victims:
                    await checkpoint()
                    victims = [t for t in tasks_of(pool) if t.get_name().endswith(work)]
                assert not has_begun(victims[0])
                victims[0].cancel()
                if work == "_check_all":
                    await asyncio.wait_for(checking, 1)
                async with pool.connection(1):
                    pass
                await verify(pool, backend)

        assert ends(lambda: asyncio.run(main()))
        assert all(connection.closed == 1 for connection in backend.made)

    def test_the_main_task_closes_the_pool(self) -> None:
        async def main() -> None:
            pool = Backend().pool()
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
        async def connect() -> Connection:
            await anyio.sleep(0.3)
            return Connection()

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
            backend = Backend()
            pool = backend.pool(min_size=1, close_timeout=0)
            closed = anyio.Event()

            async def use(
                pool: ConnectionPool[Connection] = pool, closed: anyio.Event = closed
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
    backend = Backend()
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


class Storm:
    """Many tasks that use one pool, all at once and at random, while everything fails."""

    def __init__(self, seed: int, resizing: bool) -> None:
        self.chance = random.Random(seed)
        self.resizing = resizing
        self.backend = Backend(pause=1)
        self.largest = 4
        self.pool = self.backend.pool(
            "configure",
            "check",
            "reset",
            min_size=1,
            max_size=self.largest,
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
                self.over = True
                with anyio.fail_after(PATIENCE):
                    await until(lambda: not self.cancels)
            await self.calm_down()
            await verify(self.pool, self.backend)
        verify_closed(self.pool, self.backend)
        assert self.backend.peak <= self.largest
        assert all(self.outcomes[kind] for kind in self.expected())
        assert all(self.backend.calls[kind] for kind in ("configure", "reset", "close"))
        assert self.backend.calls["check"] or self.resizing  # where it is a matter of luck

    async def calm_down(self) -> None:
        """Let all connections be replaced by those that last."""
        self.pool._settings.max_lifetime = 3600
        self.pool._idle.max_idle = self.pool._settings.max_idle = 3600
        await self.pool.resize(1, 4)
        await self.pool.drain()

    def expected(self) -> list[str]:
        found = ["served", "cancelled by scope", "timeout", "nothing", "discarded"]
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
        assert not connection.closed
        assert not connection.users
        connection.users += 1
        kind = "served"
        try:
            await (steps(chance.randrange(3)) if chance.random() < 0.7 else anyio.sleep(0.0005))
            if chance.random() < 0.1:
                kind = "discarded"
        finally:
            connection.users -= 1
            (pool.discard if kind == "discarded" else pool.release)(connection)
        return kind

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


@pytest.mark.parametrize("resizing", [False, True], ids=["of fixed size", "of changing size"])
async def test_a_pool_survives_a_storm(resizing: bool) -> None:
    seed = random.randrange(2**32)
    async with explained("seed", seed):
        await Storm(seed, resizing).run()
