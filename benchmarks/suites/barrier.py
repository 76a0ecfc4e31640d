"""Barriers that tasks share: rounds of 2 to 1,000 parties.

What must live here: adapters of barriers, and rounds of tasks. Threads are in `threads`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import aiosync

from ..loops import crowd, run
from ..model import US, Contender, Effort, Row

NOTE = "Others have no action: there the party with index 0 runs it, and all wait a second time."

PARTIES = (2, 10, 100, 1000)

Arrive = Callable[[], Awaitable[Any]]


class Subject(NamedTuple):
    name: str
    make: Callable[[int], Arrive]  # takes the number of parties; each awaits the result's call
    needs: str = ""


def _action() -> None:
    pass


def _asyncio(parties: int) -> Arrive:
    import asyncio

    return asyncio.Barrier(parties).wait  # type: ignore[attr-defined,unused-ignore]


def _aiologic(parties: int) -> Arrive:
    import aiologic

    barrier = aiologic.Barrier(parties)
    return lambda: barrier


def _twice(make: Callable[[int], Arrive], parties: int) -> Arrive:
    arrive = make(parties)

    async def arrive_twice() -> None:
        if await arrive() == 0:
            _action()
        await arrive()

    return arrive_twice


OURS = Subject(US, lambda parties: aiosync.Barrier(parties).wait)
ASYNCIO = Subject("asyncio.Barrier", _asyncio, "asyncio.Barrier")
AIOLOGIC = Subject("aiologic.Barrier", _aiologic, "aiologic")
OURS_ACTING = Subject(US, lambda parties: aiosync.Barrier(parties, _action).wait)
ASYNCIO_ACTING = ASYNCIO._replace(make=partial(_twice, _asyncio))
AIOLOGIC_ACTING = AIOLOGIC._replace(make=partial(_twice, _aiologic))
IDLE = OURS._replace(name="floor: no action")

SUBJECTS: dict[str, dict[str, tuple[Subject, ...]]] = {
    "asyncio": {
        "{} parties": (OURS, ASYNCIO, AIOLOGIC),
        "{} parties, action": (OURS_ACTING, ASYNCIO_ACTING, AIOLOGIC_ACTING, IDLE),
    },
    "trio": {
        "{} parties": (OURS, AIOLOGIC),
        "{} parties, action": (OURS_ACTING, AIOLOGIC_ACTING, IDLE),
    },
}


async def rounds(arrive: Arrive, parties: int, effort: Effort) -> float:
    """Seconds for one round of `parties` tasks."""
    times = max(3, effort.times(2000) // parties)

    async def work() -> None:
        for _ in range(times):
            await arrive()

    async with crowd() as spawn:
        for _ in range(parties):
            spawn(work)
        begin = time.perf_counter()
    return (time.perf_counter() - begin) / times


def measure(backend: str, subject: Subject, parties: int, effort: Effort) -> float:
    async def main() -> float:
        return await rounds(subject.make(parties), parties, effort)

    return run(backend, main)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    for work, subjects in SUBJECTS.get(backend.replace("uvloop", "asyncio"), {}).items():
        for parties in PARTIES:
            contenders = [
                Contender(
                    subject.name, partial(measure, backend, subject, parties, effort), subject.needs
                )
                for subject in subjects
            ]
            yield Row("barrier", backend, work.format(parties), contenders)
