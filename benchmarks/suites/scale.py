"""1,000 to 64,000 tasks that wait for one semaphore: the cost of each waiter.

What must live here: adapters of semaphores without a permit, their floor, and the work that is done
with all waiters.
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
Cost of each waiter. A semaphore that searches all waiters at each cancellation is measured with at
most 16,000 of them, one that searches them at each release with at most 4,000: four times as many
waiters take 16 times as long."""

GRANT, CANCEL, MEMORY = "grant all, in order", "cancel all, random order", "memory of a waiter"
MANY = 16_000
# The largest number of waiters for semaphores that search all of them.
LIMITS = {GRANT: 4000, CANCEL: 16_000}


class Subject(NamedTuple):
    name: str
    make: Callable[[], Any]  # without a permit; has acquire() and release()
    needs: str = ""
    searches: tuple[str, ...] = ()  # the works in which it searches all waiters


class Futures:
    """The floor under asyncio: tasks that only wait for a future."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        future = self.loop.create_future()
        self.waiting.append(future)
        await future

    def release(self) -> None:
        self.waiting.popleft().set_result(None)


class Parked:
    """The floor under trio: tasks that only sleep."""

    def __init__(self) -> None:
        import trio

        self.trio = trio.lowlevel
        self.waiting: deque[Any] = deque()

    def abort(self, _: Any) -> Any:
        return self.trio.Abort.SUCCEEDED

    async def acquire(self) -> None:
        self.waiting.append(self.trio.current_task())
        await self.trio.wait_task_rescheduled(self.abort)

    def release(self) -> None:
        self.trio.reschedule(self.waiting.popleft())


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
    """Seconds for each waiter, from the first release until all have resumed."""
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
    """Bytes for each waiter, its task included."""
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
