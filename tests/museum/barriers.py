"""The hall of barriers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import aiosync
from museum.exhibits import PYTHON, Control, exhibit
from museum.stage import Fate, Stage, expect


class BarrierLike(Protocol):
    async def wait(self) -> int: ...

    async def reset(self) -> None: ...

    @property
    def broken(self) -> bool: ...


Maker = Callable[[int], BarrierLike]


class Ours:
    def __init__(self, parties: int) -> None:
        self.barrier = aiosync.Barrier(parties)

    async def wait(self) -> int:
        return await self.barrier.wait()

    async def reset(self) -> None:
        self.barrier.reset()

    @property
    def broken(self) -> bool:
        return self.barrier.broken


def of_asyncio(parties: int) -> BarrierLike:
    return asyncio.Barrier(parties)


class OfAiologic:
    def __init__(self, parties: int) -> None:
        import aiologic

        self.barrier: Any = aiologic.RBarrier(parties)

    async def wait(self) -> int:
        index: int = await self.barrier
        return index

    async def reset(self) -> None:
        self.barrier.reset()

    @property
    def broken(self) -> bool:
        return bool(self.barrier.broken)


ASYNCIO = Control("asyncio.Barrier", of_asyncio, PYTHON)
AIOLOGIC = Control("aiologic.RBarrier", OfAiologic, "aiologic")


def passed(outcomes: list[Any]) -> list[int]:
    return [outcome for outcome in outcomes if isinstance(outcome, int)]


@exhibit(
    "asyncio.Barrier",
    "after one party is cancelled, two others get the same index",
    reports="python/cpython#155233",
    seen="CPython 3.11 to 3.13",
    ours=Ours,
    controls=[ASYNCIO],
)
async def index_repeats(stage: Stage, make: Maker) -> None:
    barrier = make(3)
    a = await stage.start(barrier.wait)
    b = await stage.start(barrier.wait)
    a.cancel()
    await stage.settle()
    c = await stage.start(barrier.wait)
    d = await stage.start(barrier.wait)
    indices = passed([await actor.outcome() for actor in (b, c, d)])
    expect(len(set(indices)) == len(indices), f"the indices of a round are {indices}")
    # However the barrier took it: after a reset it is as new.
    await barrier.reset()
    actors = [await stage.start(barrier.wait) for _ in range(3)]
    indices = passed([await actor.outcome() for actor in actors])
    expect(sorted(indices) == [0, 1, 2], f"after a reset the indices are {indices}")


@exhibit(
    "asyncio.Barrier",
    "`reset()` just after the last party arrives: some pass, some get BrokenBarrierError",
    seen="CPython 3.11 to 3.13",
    ours=Ours,
    controls=[ASYNCIO],
)
async def reset_splits_the_round(stage: Stage, make: Maker) -> None:
    barrier = make(3)
    early = [await stage.start(barrier.wait) for _ in range(2)]
    last = await stage.try_it(barrier.wait())
    await barrier.reset()
    outcomes = [last, *[await actor.outcome() for actor in early]]
    expect(len(passed(outcomes)) in {0, 3}, f"of one round come {outcomes}")


@exhibit(
    "asyncio.Barrier",
    "a party is cancelled, and the others wait forever",
    seen="CPython 3.11 to 3.13",
    ours=Ours,
    controls=[ASYNCIO],
)
async def survivors_hang(stage: Stage, make: Maker) -> None:
    barrier = make(3)
    cancelled = await stage.start(barrier.wait)
    survivor = await stage.start(barrier.wait)
    cancelled.cancel()
    outcome = await survivor.outcome()
    expect(outcome is not Fate.HANGS, "nobody tells the survivor")


@exhibit(
    "asyncio.Barrier",
    "a party times out just before the last one arrives: the others pass without it",
    seen="CPython 3.11 to 3.13",
    ours=Ours,
    controls=[ASYNCIO],
)
async def timeout_splits_the_round(stage: Stage, make: Maker) -> None:
    barrier = make(3)
    early = [await stage.start(barrier.wait) for _ in range(2)]
    # What a timeout does when the time is over.
    early[0].cancel()
    try:
        last = await stage.try_it(barrier.wait())
    except RuntimeError as error:
        last = error
    outcomes = [last, *[await actor.outcome() for actor in early]]
    expect(len(passed(outcomes)) in {0, 3}, f"of one round come {outcomes}")


@exhibit(
    "aiologic.RBarrier",
    "a party is cancelled after all have arrived: the next round is broken",
    seen="aiologic 0.17.1",
    ours=Ours,
    controls=[AIOLOGIC],
)
async def next_round_is_broken(stage: Stage, make: Maker) -> None:
    for moment in range(9):
        barrier = make(2)
        early = await stage.start(barrier.wait)
        arrived: list[bool] = []

        async def come(barrier: BarrierLike = barrier, arrived: list[bool] = arrived) -> int:
            arrived.append(True)
            return await barrier.wait()

        last = stage.begin(come)
        while not arrived:
            await stage.step()
        for _ in range(moment):
            await stage.step()
        early.cancel()
        outcomes = [await early.outcome(), await last.outcome()]
        expect(not barrier.broken, f"of the round come {outcomes}, and the barrier is broken")
        actors = [await stage.start(barrier.wait) for _ in range(2)]
        indices = [await actor.outcome() for actor in actors]
        expect(indices == [0, 1], f"of the next round come {indices}")
