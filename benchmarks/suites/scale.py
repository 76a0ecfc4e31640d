"""A line of 1,000 to 64,000 tasks: what each of them costs.

What must live here: adapters of semaphores without a permit, the floor beneath them, and what is
done to a whole line.
"""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import anyio

import aiosync

from ..loops import crowd, run, settle
from ..model import US, Contender, Effort, Row

NOTE = """\
Cost of each waiter. Who searches the line at every cancellation is measured with 16,000 waiters at
most, who searches it at every release with 4,000: four times as many take 16 times as long."""

GRANT, CANCEL, MEMORY = "grant all, in order", "cancel all, random order", "memory of a waiter"
MANY = 16_000
# With how many waiters those are measured at most that search the line.
LIMITS = {GRANT: 4000, CANCEL: 16_000}


class Subject(NamedTuple):
    name: str
    make: Callable[[], Any]  # with no permit: what has acquire() and release()
    needs: str = ""
    searches: tuple[str, ...] = ()  # in what works it looks through the line again and again


class Futures:
    """The floor under asyncio: tasks that wait for nothing but a future."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.line: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        future = self.loop.create_future()
        self.line.append(future)
        await future

    def release(self) -> None:
        self.line.popleft().set_result(None)


class Parked:
    """The floor under trio: tasks that have nothing but gone to sleep."""

    def __init__(self) -> None:
        import trio

        self.trio = trio.lowlevel
        self.line: deque[Any] = deque()

    def abort(self, _: Any) -> Any:
        return self.trio.Abort.SUCCEEDED

    async def acquire(self) -> None:
        self.line.append(self.trio.current_task())
        await self.trio.wait_task_rescheduled(self.abort)

    def release(self) -> None:
        self.trio.reschedule(self.line.popleft())


def _trio() -> Any:
    import trio

    return trio.Semaphore(0)


def _aiologic() -> Any:
    import aiologic

    class Renamed(aiologic.Semaphore):  # type: ignore[misc,unused-ignore]
        acquire = aiologic.Semaphore.async_acquire

    return Renamed(0)


SUBJECTS = {
    "asyncio": (
        Subject(US, lambda: aiosync.Semaphore(0)),
        Subject("asyncio.Semaphore", lambda: asyncio.Semaphore(0), searches=(GRANT, CANCEL)),
        Subject("anyio.Semaphore", lambda: anyio.Semaphore(0), searches=(CANCEL,)),
        Subject("aiologic.Semaphore", _aiologic, "aiologic", searches=(CANCEL,)),
        Subject("floor: bare futures", Futures),
    ),
    "trio": (
        Subject(US, lambda: aiosync.Semaphore(0)),
        Subject("trio.Semaphore", _trio),
        Subject("anyio.Semaphore", lambda: anyio.Semaphore(0), searches=(CANCEL,)),
        Subject("aiologic.Semaphore", _aiologic, "aiologic", searches=(CANCEL,)),
        Subject("floor: sleeping tasks", Parked),
    ),
}


async def grant_all(semaphore: Any, waiters: int) -> float:
    """Seconds for each waiter, from the first release until all have gone on."""
    async with crowd() as spawn:
        for _ in range(waiters):
            spawn(semaphore.acquire)
        await settle()
        begin = time.perf_counter()
        for _ in range(waiters):
            semaphore.release()
    return (time.perf_counter() - begin) / waiters


async def cancel_all(semaphore: Any, waiters: int) -> float:
    """Seconds for each waiter, from the first cancellation until all have ended."""
    async with crowd() as spawn:
        cancels = [spawn(semaphore.acquire) for _ in range(waiters)]
        random.Random(waiters).shuffle(cancels)
        await settle()
        begin = time.perf_counter()
        for cancel in cancels:
            cancel()
    return (time.perf_counter() - begin) / waiters


async def memory(semaphore: Any, waiters: int) -> float:
    """Bytes for each waiter, with its task."""
    tracemalloc.start()
    try:
        async with crowd() as spawn:
            cancels = [spawn(semaphore.acquire) for _ in range(waiters)]
            await settle()
            used, _ = tracemalloc.get_traced_memory()
            for cancel in cancels:
                cancel()
    finally:
        tracemalloc.stop()
    return used / waiters


MEASURES = {GRANT: grant_all, CANCEL: cancel_all, MEMORY: memory}


def measure(backend: str, work: str, subject: Subject, waiters: int) -> float:
    async def main() -> float:
        return await MEASURES[work](subject.make(), waiters)

    return run(backend, main)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    subjects = SUBJECTS.get(backend.replace("uvloop", "asyncio"), ())
    for work in MEASURES:
        for waiters in effort.sizes:
            if work is MEMORY and waiters > MANY:
                continue
            contenders = [
                Contender(
                    subject.name, partial(measure, backend, work, subject, waiters), subject.needs
                )
                for subject in subjects
                if work not in subject.searches or waiters <= LIMITS[work]
            ]
            if contenders:
                exact = work is MEMORY
                unit = "B" if exact else "s"
                yield Row("scale", backend, work, contenders, unit, waiters, exact)
