"""Whole sessions over links that lose, delay, repeat and reorder, in front of a real server.

Each schedule follows from its seed, under trio as far as trio's own order of tasks does.
AIOSYNC_SEEDS="first-last" runs those instead, for a long search or to see one again. If one fails,
AIOSYNC_TRACE=1 prints what the server was told.
"""

from __future__ import annotations

import logging
import os
import random
from contextlib import AsyncExitStack, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from support.fake_link import Faults, Network, ScriptClient, fake_links
from support.virtual_time import run_virtually

from aiosync import BrokenBarrierError
from aiosync.redis import BackendUnavailable, LeaseLost, Permit, Redis, _barrier_calls
from aiosync.redis._party import Party
from aiosync.redis._permits import Permits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


__all__ = ["fake_links"]

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60), pytest.mark.usefixtures("fake_links")]

LEASE = 3.0
DURATION = 2.5 * LEASE
SEEDS = os.environ.get("AIOSYNC_SEEDS", "")

# The parties that the running task has made.
made: ContextVar[list[Party]] = ContextVar("made")


def recorded_party(*arguments: Any, **options: Any) -> Party:
    party = Party(*arguments, **options)
    made.get().append(party)
    return party


@dataclass
class Semaphore:
    """What is known of one semaphore, over all processes."""

    limit: int
    inside: list[Permit] = field(default_factory=list)
    largest_fence: int = 0


class Schedule:
    """What one seed stands for."""

    def __init__(self, client: ScriptClient, seed: int, faults: Faults) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.faults = faults
        self.replaces_server = seed % 2 == 1
        self.semaphores = {"a": Semaphore(self.random.randint(1, 3))}
        self.uses_barrier = self.random.random() < 0.5
        self.parties = self.random.randint(2, 4)
        self.processes: list[Redis] = []
        self.stopping = False
        self.let_go = anyio.Event()
        self.rounds: dict[str, list[object]] = {}
        self.exceeded = False
        self.entered = self.passed = 0

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            self.network = Network(
                self.client, tasks, self.random, LEASE, self.faults, self.check_limits
            )
            with anyio.fail_after(DURATION + 40 * LEASE):
                await self._run()

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            ports = self.ports = [self.network.new_port() for _ in range(self.random.randint(2, 3))]
            self.network.is_faulty = False
            for port in ports:
                redis = Redis(connect=port, lease=LEASE, prefix="fake")
                self.processes.append(await stack.enter_async_context(redis))
            self.network.is_faulty = True
            async with anyio.create_task_group() as tasks:
                for redis in self.processes:
                    for name in self.semaphores:
                        for _ in range(self.random.randint(1, 3)):
                            tasks.start_soon(self.use_semaphore, redis, name)
                for _ in range(self.uses_barrier * (self.parties + 1)):
                    tasks.start_soon(self.use_barrier, self.random.choice(self.processes))
                await self._do_harm()
                self.stopping = True
                await self._settle()
                self.check_agreement()
                self.let_go.set()
            for redis in self.processes:
                for name, semaphore in self.semaphores.items():
                    if self.may_have_forgotten:
                        # Waiters that have left are served first.
                        async with redis.semaphore(name, semaphore.limit).hold(LEASE):
                            pass
                await redis.flush()
            for name, semaphore in self.semaphores.items():
                assert not semaphore.inside
                assert not self.server_holders(name)
                assert not self.server_waiters(name)
        assert not self.exceeded
        self.check_rounds()

    async def _do_harm(self) -> None:
        network, harm = self.network, self.random
        end = anyio.current_time() + DURATION
        while anyio.current_time() < end:
            await anyio.sleep(harm.expovariate(3) * LEASE)
            match harm.randrange(8 if self.replaces_server else 5):
                case 0 | 1 if network.links:
                    harm.choice(network.links).end()
                case 2 if network.links:
                    port = harm.choice(network.links).port
                    port.cut(harm.choice([0.2, 0.5, 0.9, 2.5]) * LEASE)
                    network.note("cut until", port.cut_until)
                case 5:
                    network.restart()
                case 6:
                    network.take_snapshot()
                case 7:
                    network.fail_over()

    async def _settle(self) -> None:
        """End all faults, and wait for as long as it may take until all agree."""
        network = self.network
        network.is_faulty = False
        for port in self.ports:
            port.cut(0)
        while (
            not network.settled
            or anyio.current_time() < max(network.last_replaced, network.last_revived) + LEASE
        ):
            await anyio.sleep(LEASE / 10)
        # The last call that was lost fails after a third of a lease, then a link may wait for
        # half a second before it connects again; and then, within a third of a lease:
        await anyio.sleep(LEASE / 3 + 0.5 + LEASE / 3 + 8 * network.longest_delay)

    # -- What the processes do.

    async def use_semaphore(self, redis: Redis, name: str) -> None:
        choose, known = self.random, self.semaphores[name]
        semaphore = redis.semaphore(name, known.limit)
        while not self.stopping:
            await anyio.sleep(choose.choice([0, 0, 0.1, 0.5]) * choose.random() * LEASE)
            patience = choose.choice([None, None, 0, choose.random() * LEASE])
            gives_up = anyio.move_on_after(choose.random() * LEASE)
            errors = suppress(TimeoutError, LeaseLost, BackendUnavailable)
            with gives_up if choose.random() < 0.2 else nullcontext(), errors:
                if choose.random() < 0.8:
                    async with semaphore.hold(patience) as permit:
                        await self.be_inside(known, permit)
                elif await semaphore.acquire(timeout=patience):
                    try:
                        await self.stay()
                    finally:
                        semaphore.release()

    async def be_inside(self, semaphore: Semaphore, permit: Permit) -> None:
        self.entered += 1
        semaphore.inside.append(permit)
        try:
            assert len(semaphore.inside) <= semaphore.limit
            if semaphore.limit == 1:
                assert permit.fence > semaphore.largest_fence
                semaphore.largest_fence = permit.fence
            await self.stay()
        finally:
            semaphore.inside.remove(permit)

    async def stay(self) -> None:
        await anyio.sleep(self.random.choice([0, 0, 0.1, 0.5, 2]) * self.random.random() * LEASE)
        if self.stopping:
            await self.let_go.wait()

    async def use_barrier(self, redis: Redis) -> None:
        choose = self.random
        barrier = redis.barrier("c", self.parties, self.act)
        while not self.stopping:
            made.set([])
            await anyio.sleep(choose.choice([0, 0.1, 0.5]) * choose.random() * LEASE)
            gives_up = anyio.move_on_after(choose.random() * 3 * LEASE)
            with gives_up if choose.random() < 0.1 else nullcontext():
                try:
                    outcome: object = await barrier.wait(choose.uniform(0.1, 3) * LEASE)
                    self.passed += 1
                except BrokenBarrierError as error:
                    outcome = error
                except (BackendUnavailable, ArithmeticError):
                    outcome = None
                (party,) = made.get()
                if outcome is not None and party.round != "0":
                    self.rounds.setdefault(party.round, []).append(outcome)
                if isinstance(outcome, BrokenBarrierError) or choose.random() < 0.02:
                    choose.choice([barrier.reset, barrier.reset, barrier.abort])()

    async def act(self) -> None:
        await anyio.sleep(self.random.random() * LEASE)
        if self.random.random() < 0.05:
            raise ArithmeticError

    # -- What is checked.

    def conductors(self, name: str) -> list[Permits]:
        sessions = [redis._current.session for redis in self.processes]
        return [
            conductor
            for session in sessions
            if session
            for conductor in session._conductors.values()
            if isinstance(conductor, Permits) and conductor.name == name
        ]

    def held(self, name: str) -> set[str]:
        return {
            f"{conductor.member}:{ticket.number}:{ticket.fence}"
            for conductor in self.conductors(name)
            for ticket in conductor._held.values()
        }

    def waiting(self, name: str) -> set[str]:
        return {
            f"{conductor.member}:{number}"
            for conductor in self.conductors(name)
            for number in conductor._waiting
        }

    def server_holders(self, name: str) -> set[str]:
        key = f"fake:{{{name}}}:semaphore:holders"
        return {permit.decode() for permit in self.client.command("ZRANGE", key, 0, -1)}

    def server_waiters(self, name: str) -> set[str]:
        key = f"fake:{{{name}}}:semaphore:waiters"
        return {waiter.decode() for waiter in self.client.command("ZRANGE", key, 0, -1)}

    def check_limits(self) -> None:
        for name, semaphore in self.semaphores.items():
            held = sum(len(conductor._held) for conductor in self.conductors(name))
            self.exceeded = self.exceeded or held > semaphore.limit

    @property
    def may_have_forgotten(self) -> bool:
        """Whether the server may have waiters that have left."""
        return self.network.last_revived > 0

    def check_agreement(self) -> None:
        for name in self.semaphores:
            assert self.server_holders(name) == self.held(name)
            unknown = self.server_waiters(name) - self.waiting(name)
            assert self.may_have_forgotten or not unknown
            assert self.waiting(name) <= self.server_waiters(name)

    def check_rounds(self) -> None:
        """Check that no round was passed by some and broken for others."""
        if self.replaces_server:
            return  # round numbers may come again
        for outcomes in self.rounds.values():
            passed = [outcome for outcome in outcomes if isinstance(outcome, int)]
            assert len(set(passed)) == len(passed)
            assert set(passed) <= set(range(self.parties))
            assert not passed or len(passed) == len(outcomes)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep the faults out of the log."""
    caplog.set_level(logging.CRITICAL, "aiosync.redis")


def run_schedule(client: ScriptClient, backend: str, seed: int, faults: Faults) -> Schedule:
    random.seed(seed)  # of delays between connections
    if backend == "trio":
        import trio

        trio._core._run._r.seed(seed)
    schedule = Schedule(client, seed, faults)
    try:
        run_virtually(backend, schedule.run)
    except BaseException as error:
        error.add_note(f"seed {seed}, {backend}")
        if os.environ.get("AIOSYNC_TRACE"):
            print(*schedule.network.events, sep="\n")
        raise
    return schedule


class Quiet:
    """One process, and links without faults."""

    def __init__(self, client: ScriptClient) -> None:
        self.client = client

    async def run(self, body: Callable[[Redis, Network], Awaitable[None]]) -> None:
        async with anyio.create_task_group() as tasks:
            self.network = Network(
                self.client, tasks, random.Random(0), LEASE, Faults(), lambda: None
            )
            self.network.is_faulty = False
            redis = Redis(connect=self.network.new_port(), lease=LEASE, prefix="fake")
            with anyio.fail_after(100 * LEASE):
                async with redis:
                    await body(redis, self.network)


def run_quietly(
    client: ScriptClient, backend: str, body: Callable[[Redis, Network], Awaitable[None]]
) -> None:
    run_virtually(backend, partial(Quiet(client).run, body))


def seeds(number: int, backend: str) -> range:
    if SEEDS:
        first, _, last = SEEDS.partition("-")
        return range(int(first), int(last or first) + 1)
    first_seed = 0 if backend == "asyncio" else number
    return range(first_seed, first_seed + number)


def run_schedules(backend: str, client: ScriptClient, number: int) -> tuple[int, int]:
    """Run some schedules. Return how often a semaphore was entered, and a barrier passed."""
    entered = passed = 0
    for seed in seeds(number, backend):
        schedule = run_schedule(client, backend, seed, Faults())
        entered += schedule.entered
        passed += schedule.passed
    return entered, passed


@pytest.mark.slow
@pytest.mark.timeout(0 if SEEDS else 300)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_schedules_of_faults(
    backend: str, scripts: ScriptClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_barrier_calls, "Party", recorded_party)
    entered, passed = run_schedules(backend, scripts, 15)
    if not SEEDS:
        assert entered > 75
        assert passed > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_many_schedules_of_faults(
    backend: str, scripts: ScriptClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_barrier_calls, "Party", recorded_party)
    run_schedules(backend, scripts, 100)


both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@both
def test_flush_waits_for_a_name_that_nobody_uses_any_more(
    backend: str, scripts: ScriptClient
) -> None:
    async def body(redis: Redis, network: Network) -> None:
        for _ in range(5):
            async with redis.semaphore("a"):
                pass
            await redis.flush()
            assert scripts.command("ZCARD", "fake:{a}:semaphore:holders") == 0

    run_quietly(scripts, backend, body)


@both
def test_a_name_that_is_used_again_before_its_last_use_has_ended(
    backend: str, scripts: ScriptClient
) -> None:
    async def body(redis: Redis, network: Network) -> None:
        for _ in range(20):
            async with redis.semaphore("a"), redis.semaphore("b", 2):
                pass
        await anyio.sleep(10 * LEASE)
        session = redis._current.session
        assert session is not None
        assert not session._conductors
        (link,) = network.links
        assert not link.channels
        async with redis.semaphore("a"):
            await anyio.sleep(2 * LEASE)
        assert network.links == [link]

    run_quietly(scripts, backend, body)


@both
def test_a_name_that_is_retired_while_there_is_no_link(backend: str, scripts: ScriptClient) -> None:
    async def body(redis: Redis, network: Network) -> None:
        semaphore = redis.semaphore("a")
        assert await semaphore.acquire()
        (link,) = network.links
        link.port.cut(0.8 * LEASE)
        while network.links:
            await anyio.sleep(0.01)
        semaphore.release()
        del semaphore
        await redis.flush()
        assert scripts.command("ZCARD", "fake:{a}:semaphore:holders") == 0

    run_quietly(scripts, backend, body)


@both
def test_a_link_that_is_taken_for_an_old_one_is_replaced(
    backend: str, scripts: ScriptClient
) -> None:
    async def body(redis: Redis, network: Network) -> None:
        async with redis.semaphore("a"):
            session = redis._current.session
            assert session is not None
            member = f"epoch:{session.settings.member}"
            scripts.command("HINCRBY", "fake:{a}:semaphore", member, 1)
            (link,) = network.links
            await anyio.sleep(2 * LEASE)
            assert network.links != [link]
        await redis.flush()
        assert scripts.command("ZCARD", "fake:{a}:semaphore:holders") == 0

    run_quietly(scripts, backend, body)


@both
def test_a_permit_is_lost_in_time_though_the_last_call_hangs(
    backend: str, scripts: ScriptClient
) -> None:
    """The call may not take longer than the permit is safe."""

    async def body(redis: Redis, network: Network) -> None:
        (link,) = network.links
        with pytest.raises(LeaseLost):
            async with redis.semaphore("a").hold():
                start = anyio.current_time()
                link.port.is_mute = True
                await anyio.sleep_forever()
        assert anyio.current_time() - start <= 0.9 * LEASE + 1e-6
        link.port.is_mute = False

    run_quietly(scripts, backend, body)
