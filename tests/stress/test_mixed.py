"""Storms on one object, of tasks of several event loops, of both kinds, and of OS threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import trio
from support.helpers import PATIENCE, assert_free

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore
from aiosync._park import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# How long a storm lasts.
STORM = 1.2


def run_all(workers: Sequence[Callable[[], None]], driver: Callable[[], None]) -> None:
    """Run `workers`, each in a thread of its own, and `driver` here. Raise what one has raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work], daemon=True) for work in workers]
    for thread in threads:
        thread.start()
    driver()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for error in errors:
        raise error
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"


class SemaphoreStorm:
    """Threads and tasks that all take and return permits of one semaphore, in every way."""

    def __init__(self, semaphore: Semaphore, seed: int) -> None:
        self.semaphore = semaphore
        self.seed = seed
        self.value = semaphore.value
        # One entry for each permit that somebody holds.
        self.held: deque[str] = deque()
        self.passes: Counter[str] = Counter()
        self.end = time.monotonic() + STORM

    def going(self) -> bool:
        return time.monotonic() < self.end

    def rng(self, *name: object) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def enter(self, kind: str) -> None:
        self.held.append(kind)
        # Others may come and go, but each leaves before it releases, so this is never too many.
        assert len(self.held) <= self.value, "more holders than permits"
        self.passes[kind] += 1

    def take_more(self, kind: str, rng: random.Random) -> int:
        """Take more permits, as long as the dice say so and there are any."""
        taken = 0
        while rng.random() < 0.3:
            try:
                self.semaphore.acquire_nowait()
            except anyio.WouldBlock:
                break
            self.enter(kind)
            taken += 1
        return taken

    def give_back(self, taken: int, rng: random.Random) -> None:
        for _ in range(taken):
            self.held.pop()
        if rng.random() < 0.5:
            self.semaphore.release(taken)
        else:
            for _ in range(taken):
                self.semaphore.release()

    @staticmethod
    def patience(rng: random.Random) -> float | None:
        return rng.choice([None, None, 0.005, 0.0005, 0.0001, 1e-6, 0, -1])

    async def attempt(self, semaphore: Semaphore, kind: str, rng: random.Random) -> None:
        """Take a permit if there is one in time, hold it for a moment, and give it back."""
        if rng.random() < 0.1:
            acquired = await semaphore.acquire(blocking=False)
        else:
            acquired = await semaphore.acquire(timeout=self.patience(rng))
        if not acquired:
            return
        self.enter(kind)
        taken = 1
        try:
            taken += self.take_more(kind, rng)
            if kind != "thread" and rng.random() < 0.5:
                await anyio.lowlevel.checkpoint()
        finally:
            self.give_back(taken, rng)

    def thread(self, number: int) -> None:
        rng = self.rng("thread", number)
        twin = self.semaphore._for_threads()
        while self.going():
            run_in_thread(self.attempt(twin, "thread", rng))

    async def asyncio_task(self, loop_number: int, number: int) -> None:
        rng = self.rng("asyncio", loop_number, number)
        loop = asyncio.get_running_loop()
        while self.going():
            attempt = self.attempt(self.semaphore, "asyncio", rng)
            how = rng.random()
            if how < 0.3:
                task = loop.create_task(attempt)
                timer = loop.call_later(rng.choice([0, 0, 0.0003, 0.002]), task.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                timer.cancel()
            elif how < 0.6:
                with anyio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    await attempt
            else:
                await attempt
            await anyio.lowlevel.checkpoint()

    def asyncio_loop(self, number: int) -> None:
        async def main() -> None:
            await asyncio.gather(*(self.asyncio_task(number, task) for task in range(4)))

        asyncio.run(main())

    async def trio_task(self, number: int) -> None:
        rng = self.rng("trio", number)
        while self.going():
            how = rng.random()
            if how < 0.3:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.attempt, self.semaphore, "trio", rng)
                    for _ in range(rng.randrange(4)):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            elif how < 0.6:
                with trio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    await self.attempt(self.semaphore, "trio", rng)
            else:
                await self.attempt(self.semaphore, "trio", rng)
            await trio.lowlevel.checkpoint()

    def trio_loop(self) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(self.trio_task, number)

        trio.run(main)

    def run(self) -> None:
        workers: list[Callable[[], None]] = [
            lambda: self.thread(0),
            lambda: self.thread(1),
            lambda: self.thread(2),
            lambda: self.asyncio_loop(0),
            lambda: self.asyncio_loop(1),
            self.trio_loop,
        ]
        run_all(workers, lambda: None)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_semaphore_conserves_its_permits_in_a_storm_of_all_kinds(seed: int) -> None:
    value = 1 + seed % 3
    semaphore = Semaphore(value, fast_acquire=seed % 2 == 0)
    storm = SemaphoreStorm(semaphore, seed)
    storm.run()
    assert not storm.held
    assert all(storm.passes[kind] > 10 for kind in ["thread", "asyncio", "trio"]), storm.passes
    assert_free(semaphore, value)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [4, 5])
def test_bounded_semaphore_refuses_nobody_and_loses_nothing_in_a_storm(seed: int) -> None:
    value = 1 + seed % 3
    semaphore = BoundedSemaphore(value, fast_acquire=seed % 2 == 0)
    storm = SemaphoreStorm(semaphore, seed)
    storm.run()  # a release that is refused raises ValueError here
    assert not storm.held
    assert all(storm.passes[kind] > 10 for kind in ["thread", "asyncio", "trio"]), storm.passes
    assert_free(semaphore, value)
    with pytest.raises(ValueError, match="released too often"):
        semaphore.release()


class Visit(NamedTuple):
    """What became of one call of `wait`."""

    outcome: str  # "passed", "broken" or "cancelled"
    place: int
    # How often the action had been run before and after the call.
    before: int
    after: int


class BarrierStorm:
    """Threads and tasks that all meet at one barrier, again and again."""

    def __init__(self, barrier: Barrier, seed: int, *, cancels: bool) -> None:
        self.barrier = barrier
        self.seed = seed
        self.cancels = cancels
        self.over = False
        # Only one party at a time runs the action.
        self.actions = 0
        self.visits: defaultdict[str, list[Visit]] = defaultdict(list)

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    @staticmethod
    def timeout(rng: random.Random) -> float | None:
        return rng.choices([None, 1, 0.003, 0.0003, 1e-6, 0], [40, 40, 4, 1, 1, 1])[0]

    def going(self, name: str, visit: Visit) -> bool:
        """Note `visit`, and tell whether to come again."""
        self.visits[name].append(visit)
        return not self.over

    async def wait(self, barrier: Barrier, timeout: float | None) -> tuple[str, int]:
        try:
            return "passed", await barrier.wait(timeout)
        except BrokenBarrierError:
            return "broken", -1

    def thread(self, name: str) -> None:
        rng = self.rng(name)
        twin = self.barrier._for_threads()
        going = True
        while going:
            before = self.actions
            outcome, index = run_in_thread(self.wait(twin, self.timeout(rng)))
            going = self.going(name, Visit(outcome, index, before, self.actions))
            if outcome != "passed":
                time.sleep(0.0001)

    async def asyncio_task(self, name: str) -> None:
        rng = self.rng(name)
        loop = asyncio.get_running_loop()
        going = True
        while going:
            outcome, index = "cancelled", -1
            before = self.actions
            wait = self.wait(self.barrier, self.timeout(rng))
            how = rng.random() if self.cancels else 1
            if how < 0.05:
                task = loop.create_task(wait)
                timer = loop.call_later(rng.choice([0, 0.0003, 0.002]), task.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    outcome, index = await task
                timer.cancel()
            elif how < 0.1:
                with anyio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    outcome, index = await wait
            else:
                outcome, index = await wait
            going = self.going(name, Visit(outcome, index, before, self.actions))
            await asyncio.sleep(0 if outcome == "passed" else 0.0001)

    async def trio_task(self, name: str) -> None:
        rng = self.rng(name)
        going = True
        while going:
            outcome, index = "cancelled", -1
            before = self.actions
            patience = rng.choice([0, 0.0003, 0.002])
            if not self.cancels or rng.random() < 0.9:
                patience = float("inf")
            with trio.move_on_after(patience):
                outcome, index = await self.wait(self.barrier, self.timeout(rng))
            going = self.going(name, Visit(outcome, index, before, self.actions))
            await trio.sleep(0 if outcome == "passed" else 0.0001)

    def run(self, participants: int, driver: Callable[[random.Random], None]) -> None:
        """Let that many take part, while `driver` is called again and again."""
        kinds: dict[str, list[str]] = defaultdict(list)
        first = self.seed % 3
        for number in range(first, first + participants):
            kind = ("asyncio", "trio", "thread")[number % 3]
            kinds[kind].append(f"{kind} {number}")

        async def asyncio_main(names: Sequence[str]) -> None:
            await asyncio.gather(*map(self.asyncio_task, names))

        async def trio_main() -> None:
            async with trio.open_nursery() as nursery:
                for name in kinds["trio"]:
                    nursery.start_soon(self.trio_task, name)

        def thread_main(name: str) -> Callable[[], None]:
            return lambda: self.thread(name)

        def drive() -> None:
            rng = self.rng("driver")
            end = time.monotonic() + STORM
            while time.monotonic() < end:
                driver(rng)
                time.sleep(rng.random() * 0.002)
            self.over = True
            self.barrier.abort()

        # Two loops of asyncio, as soon as there is something to do for both.
        run_all(
            [
                lambda: asyncio.run(asyncio_main(kinds["asyncio"][::2])),
                lambda: asyncio.run(asyncio_main(kinds["asyncio"][1::2])),
                lambda: trio.run(trio_main),
                *map(thread_main, kinds["thread"]),
            ],
            drive,
        )
        assert self.barrier.broken
        self.barrier.reset()
        assert (self.barrier.n_waiting, self.barrier.broken) == (0, False)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [1, 2])
def test_barrier_round_is_passed_by_all_or_none_in_a_storm_of_cancels_and_timeouts(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1
        if storm.actions % 4 == 0:
            time.sleep(0.001)  # long enough for some to run out of time, which must not matter

    def mend(rng: random.Random) -> None:
        # Nothing else ends the broken state, and nothing but a cancel or a timeout begins it: so no
        # round is broken once its action runs, and each run of the action is the one of a round.
        if barrier.broken:
            barrier.reset()

    parties = 3 + seed % 3
    barrier = Barrier(parties, action)
    storm = BarrierStorm(barrier, seed, cancels=True)
    storm.run(parties, mend)
    rounds: defaultdict[int, list[Visit]] = defaultdict(list)
    outcomes: Counter[str] = Counter()
    for visits in storm.visits.values():
        for visit, previous in zip(visits, [None, *visits], strict=False):
            outcomes[visit.outcome] += 1
            # Whether it may have left the round before just as the action of that was about to run,
            # which then does so during this visit.
            has_left = previous is not None and (
                (previous.outcome, previous.after) == ("cancelled", visit.before)
            )
            # No further round can trip while one party is still on its way through this one.
            actions = visit.after - visit.before
            assert 0 <= actions <= 1 + has_left
            if not actions:
                assert visit.outcome != "passed", "passed a round that has not tripped"
            elif actions == 2 or visit.outcome != "broken" or not has_left:
                rounds[visit.after].append(visit)
    assert max(rounds) == storm.actions
    for number, visits in rounds.items():
        passed = [visit.place for visit in visits if visit.outcome == "passed"]
        broken = [visit for visit in visits if visit.outcome == "broken"]
        if number == storm.actions and not passed:
            continue  # the abort at the end may have come while the action was running
        assert not broken, "some have passed and others were told that it is broken"
        # Who was cancelled while the action was running may have left before it counted.
        early = [
            visit
            for visit in itertools.chain.from_iterable(storm.visits.values())
            if visit.outcome == "cancelled" and visit.after == number - 1
        ]
        assert parties - len(early) <= len(visits) <= parties
        assert len(set(passed)) == len(passed)
        assert set(passed) <= set(range(parties))
    assert outcomes["passed"] > 10 * parties, outcomes
    assert outcomes["cancelled"], outcomes
    assert outcomes["broken"], outcomes


def abort_and_reset(barrier: Barrier, rng: random.Random) -> None:
    """Break `barrier` now and then, and mend it."""
    if rng.random() < 0.2:
        barrier.abort()
    if rng.random() < 0.2 or barrier.broken:
        barrier.reset()


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [4, 5])
def test_barrier_round_is_passed_by_all_or_none_in_a_storm_of_aborts_and_resets(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1
        if storm.actions % 8 == 0:
            time.sleep(0)

    parties = 3 + seed % 3
    barrier = Barrier(parties, action if seed % 2 else None)
    storm = BarrierStorm(barrier, seed, cancels=False)
    storm.run(parties, lambda rng: abort_and_reset(barrier, rng))
    # Nobody can be left out of a round, so the first that one has passed is the first for all.
    passed = [
        [visit for visit in visits if visit.outcome == "passed"] for visits in storm.visits.values()
    ]
    assert len({len(visits) for visits in passed}) == 1
    assert len(passed[0]) > 10
    assert any(visit.outcome == "broken" for visits in storm.visits.values() for visit in visits)
    for number, visits in enumerate(zip(*passed, strict=True), 1):
        assert sorted(visit.place for visit in visits) == list(range(parties))
        if seed % 2:
            assert all(visit.after >= number for visit in visits), "passed before the action"


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [6, 7])
def test_barrier_gives_each_index_equally_often_to_a_crowd_larger_than_its_parties(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1

    barrier = Barrier(3, action)
    storm = BarrierStorm(barrier, seed, cancels=False)
    storm.run(10, lambda rng: abort_and_reset(barrier, rng))
    indices = Counter(
        visit.place
        for visits in storm.visits.values()
        for visit in visits
        if visit.outcome == "passed"
    )
    assert set(indices) == {0, 1, 2}
    assert len(set(indices.values())) == 1, indices
    # One more for each round that was aborted while its action was running.
    assert 10 < indices[0] <= storm.actions
