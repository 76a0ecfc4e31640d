"""Semaphores that tasks share: free permits, and one permit that many tasks want.

What must live here: adapters of semaphores, and the work of one to 50 tasks. Thousands of waiters
are in `scale`, threads in `threads`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import anyio

import aiosync

from ..loops import checkpoint, crowd, run, settle, under_trio
from ..model import US, Contender, Effort, Row

TASKS = 50
PATIENCE = 10  # seconds; never reached


class Subject(NamedTuple):
    name: str
    make: Callable[[], Any]  # returns an object with an async acquire() and a plain release()
    needs: str = ""


class Null:
    """The floor of every semaphore: a coroutine that does nothing, and a call."""

    async def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Checkpoint:
    """The floor of a semaphore that makes a checkpoint."""

    def __init__(self) -> None:
        self.acquire = checkpoint()

    def release(self) -> None:
        pass


def _aiologic(name: str, *arguments: int) -> Any:
    import aiologic

    class Renamed(getattr(aiologic, name)):  # type: ignore[misc]
        acquire = getattr(aiologic, name).async_acquire

    return Renamed(*arguments)


def _trio() -> Any:
    import trio

    return trio.Semaphore(1)


ASYNCIO = Subject("asyncio.Semaphore", lambda: asyncio.Semaphore(1))
ANYIO = Subject("anyio.Semaphore", lambda: anyio.Semaphore(1))
ANYIO_FAST = Subject("anyio, fast_acquire", lambda: anyio.Semaphore(1, fast_acquire=True))
AIOLOGIC = Subject("aiologic.Semaphore", lambda: _aiologic("Semaphore", 1), "aiologic")
TRIO = Subject("trio.Semaphore", _trio, "trio")
OURS = Subject(US, lambda: aiosync.Semaphore(1))
OURS_FAST = Subject(US, lambda: aiosync.Semaphore(1, fast_acquire=True))
BOUNDED = (
    Subject(US, lambda: aiosync.BoundedSemaphore(1, fast_acquire=True)),
    Subject("anyio, fast_acquire", lambda: anyio.Semaphore(1, max_value=1, fast_acquire=True)),
)
FLOOR = Subject("floor: null coroutine", Null)
FLOOR_CHECKPOINT = Subject("floor: bare checkpoint", Checkpoint)

# aiologic makes a checkpoint under trio by default, and none under asyncio.
SUBJECTS: dict[str, dict[str, tuple[Subject, ...]]] = {
    "asyncio": {
        "free permit, fast_acquire": (OURS_FAST, ASYNCIO, ANYIO_FAST, AIOLOGIC, FLOOR),
        "free permit, async with": (OURS_FAST, ASYNCIO, ANYIO_FAST, AIOLOGIC),
        "free permit": (OURS, ANYIO, FLOOR_CHECKPOINT),
        "free permit, bounded": (
            *BOUNDED,
            Subject("asyncio.BoundedSemaphore", lambda: asyncio.BoundedSemaphore(1)),
            Subject(
                "aiologic.BoundedSemaphore", lambda: _aiologic("BoundedSemaphore", 1), "aiologic"
            ),
        ),
        "free permit, timeout": (OURS_FAST, ASYNCIO, ANYIO_FAST, AIOLOGIC),
        "hand-off": (OURS_FAST, ASYNCIO, ANYIO_FAST, AIOLOGIC),
        "hand-off, timeout": (OURS_FAST, ASYNCIO, ANYIO_FAST, AIOLOGIC),
    },
    "trio": {
        "free permit, fast_acquire": (OURS_FAST, ANYIO_FAST, FLOOR),
        "free permit, async with": (OURS_FAST, ANYIO_FAST),
        "free permit": (OURS, TRIO, ANYIO, AIOLOGIC, FLOOR_CHECKPOINT),
        "free permit, bounded": BOUNDED,
        "free permit, timeout": (OURS, TRIO, ANYIO, AIOLOGIC),
        "hand-off": (OURS_FAST, TRIO, ANYIO_FAST, AIOLOGIC),
        "hand-off, timeout": (OURS_FAST, TRIO, ANYIO_FAST, AIOLOGIC),
    },
}


async def free_permit(semaphore: Any, effort: Effort, times: int = 10_000) -> float:
    """Seconds for one acquire and release of a semaphore that no other task uses."""
    times = effort.times(times)
    begin = time.perf_counter()
    for _ in range(times):
        await semaphore.acquire()
        semaphore.release()
    return (time.perf_counter() - begin) / times


async def free_permit_async_with(semaphore: Any, effort: Effort) -> float:
    """Seconds for one ``async with`` block of a semaphore that no other task uses."""
    times = effort.times(10_000)
    begin = time.perf_counter()
    for _ in range(times):
        async with semaphore:
            pass
    return (time.perf_counter() - begin) / times


async def hand_off(semaphore: Any, effort: Effort) -> float:
    """Seconds from one holder to the next, where 50 tasks want the one permit."""
    times = effort.times(20)

    async def work() -> None:
        for _ in range(times):
            await semaphore.acquire()
            semaphore.release()

    await semaphore.acquire()
    async with crowd() as spawn:
        for _ in range(TASKS):
            spawn(work)
        await settle()
        begin = time.perf_counter()
        semaphore.release()
    return (time.perf_counter() - begin) / (TASKS * times)


class WithTimeout:
    """A semaphore whose `acquire` has a timeout, by the means of its own library."""

    def __init__(self, semaphore: Any) -> None:
        self.semaphore = semaphore
        self.release = semaphore.release
        self.acquire: Callable[[], Awaitable[Any]]
        if isinstance(semaphore, aiosync.Semaphore):
            self.acquire = partial(semaphore.acquire, timeout=PATIENCE)
        elif isinstance(semaphore, anyio.Semaphore):
            self.acquire = self.by_anyio
        else:
            self.acquire = self.by_trio if under_trio() else self.by_asyncio

    async def by_anyio(self) -> None:
        with anyio.fail_after(PATIENCE):
            await self.semaphore.acquire()

    async def by_trio(self) -> None:
        import trio

        with trio.fail_after(PATIENCE):
            await self.semaphore.acquire()

    async def by_asyncio(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.semaphore.acquire()


async def free_permit_with_timeout(semaphore: Any, effort: Effort) -> float:
    return await free_permit(WithTimeout(semaphore), effort, 4000)


async def hand_off_with_timeout(semaphore: Any, effort: Effort) -> float:
    return await hand_off(WithTimeout(semaphore), effort)


MEASURES = {
    "free permit, async with": free_permit_async_with,
    "free permit, timeout": free_permit_with_timeout,
    "hand-off": hand_off,
    "hand-off, timeout": hand_off_with_timeout,
}


def measure(backend: str, work: str, subject: Subject, effort: Effort) -> float:
    async def main() -> float:
        return await MEASURES.get(work, free_permit)(subject.make(), effort)

    return run(backend, main)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    for work, subjects in SUBJECTS.get(backend.replace("uvloop", "asyncio"), {}).items():
        contenders = [
            Contender(subject.name, partial(measure, backend, work, subject, effort), subject.needs)
            for subject in subjects
        ]
        yield Row("semaphore", backend, work, contenders)
