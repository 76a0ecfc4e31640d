"""Threads: among themselves by way of `as_threading`, and together with tasks.

What must live here: the work of threads with semaphores and barriers, and adapters of the
alternatives. Only the public API of aiosync is used.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import anyio.to_thread

import aiosync

from ..loops import run, under_trio
from ..model import US, Contender, Effort, Row

THREADS = (2, 8, 64)


class Subject(NamedTuple):
    name: str
    make: Callable[..., Any]
    needs: str = ""


def _view(kind: Callable[[int], Any], count: int) -> Any:
    return aiosync.as_threading(kind(count))


def _aiologic_semaphore(value: int) -> Any:
    import aiologic

    class Renamed(aiologic.Semaphore):  # type: ignore[misc,unused-ignore]
        acquire = aiologic.Semaphore.green_acquire

    return Renamed(value)


def _aiologic_barrier(parties: int) -> Any:
    import aiologic

    return aiologic.Barrier(parties)


SEMAPHORES = (
    Subject(US, partial(_view, aiosync.Semaphore)),
    Subject("threading.Semaphore", threading.Semaphore),
    Subject("aiologic.Semaphore", _aiologic_semaphore, "aiologic"),
)
BARRIERS = (
    Subject(US, partial(_view, aiosync.Barrier)),
    Subject("threading.Barrier", threading.Barrier),
    Subject("aiologic.Barrier", _aiologic_barrier, "aiologic"),
)


def free_permit(make: Callable[[int], Any], effort: Effort) -> float:
    """Seconds for one acquire and release, of a semaphore that no other thread uses."""
    semaphore = make(1)
    times = effort.times(5000)
    begin = time.perf_counter()
    for _ in range(times):
        semaphore.acquire()
        semaphore.release()
    return (time.perf_counter() - begin) / times


def free_permit_timeout(make: Callable[[int], Any], effort: Effort) -> float:
    """Do what `free_permit` does, with a timeout."""
    semaphore = make(1)
    times = effort.times(5000)
    begin = time.perf_counter()
    for _ in range(times):
        semaphore.acquire(timeout=10)
        semaphore.release()
    return (time.perf_counter() - begin) / times


def free_permit_with(make: Callable[[int], Any], effort: Effort) -> float:
    """Do what `free_permit` does, by ``with``."""
    semaphore = make(1)
    times = effort.times(5000)
    begin = time.perf_counter()
    for _ in range(times):
        with semaphore:
            pass
    return (time.perf_counter() - begin) / times


def _in_threads(count: int, work: Callable[[], object]) -> float:
    """Return the seconds until `count` threads have run `work` once each."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def contended(make: Callable[[int], Any], threads: int, effort: Effort) -> float:
    """Seconds for one acquire and release, where all threads want the one permit."""
    semaphore = make(1)
    times = effort.times(max(20, 2000 // threads))

    def work() -> None:
        for _ in range(times):
            semaphore.acquire()
            semaphore.release()

    return _in_threads(threads, work) / (times * threads)


def barrier_rounds(make: Callable[[int], Any], threads: int, effort: Effort) -> float:
    """Seconds for one round."""
    barrier = make(threads)
    times = effort.times(max(20, 400 // threads))

    def work() -> None:
        for _ in range(times):
            barrier.wait()

    return _in_threads(threads, work) / times


def shared_by_view(backend: str, effort: Effort) -> float:
    """Seconds for one acquire and release by a thread, of a semaphore that tasks may use too."""
    view = aiosync.as_threading(aiosync.Semaphore(1))
    return _in_a_worker(backend, lambda: free_permit(lambda _: view, effort))


def shared_by_portal(backend: str, effort: Effort) -> float:
    times = effort.times(100)

    def work() -> float:
        semaphore = anyio.from_thread.run_sync(anyio.Semaphore, 1)
        begin = time.perf_counter()
        for _ in range(times):
            anyio.from_thread.run(semaphore.acquire)
            anyio.from_thread.run_sync(semaphore.release)
        return (time.perf_counter() - begin) / times

    return _in_a_worker(backend, work)


def _in_a_worker(backend: str, work: Callable[[], float]) -> float:
    return run(backend, partial(anyio.to_thread.run_sync, work))


Signal = tuple[Callable[[], Awaitable[Any]], Callable[[], None]]


def hand_off(backend: str, make: Callable[[], Signal], effort: Effort) -> float:
    """Seconds from a thread to a task that it wakes, and back by a raw lock."""
    times = effort.times(500)

    async def main() -> float:
        wait, wake = make()
        awake = threading.Lock()
        awake.acquire()

        def work() -> None:
            for _ in range(times):
                wake()
                awake.acquire()

        thread = threading.Thread(target=work)
        begin = time.perf_counter()
        thread.start()
        for _ in range(times):
            await wait()
            awake.release()
        thread.join()
        return (time.perf_counter() - begin) / times

    return run(backend, main)


def by_semaphore() -> Signal:
    semaphore = aiosync.Semaphore(0, fast_acquire=True)
    return semaphore.acquire, aiosync.as_threading(semaphore).release


def by_loop() -> Signal:
    """Return the floor: two futures in turn, so that no wake is missed."""
    call, make = _primitives()
    futures = [make(), make()]
    wakes = iter(range(10**9))
    waits = iter(range(10**9))

    def wake() -> None:
        call(futures[next(wakes) % 2][1])

    async def wait() -> None:
        number = next(waits) % 2
        await futures[number][0]()
        futures[number] = make()

    return wait, wake


def _primitives() -> tuple[Callable[[Callable[[], object]], object], Callable[[], Any]]:
    """Return the loop's thread-safe call, and a function that makes a future: its wait and set."""
    if under_trio():
        import trio

        def make_event() -> Any:
            event = trio.Event()
            return event.wait, event.set

        return trio.lowlevel.current_trio_token().run_sync_soon, make_event
    loop = asyncio.get_running_loop()

    def make_future() -> Any:
        future = loop.create_future()
        return lambda: future, partial(future.set_result, None)

    return loop.call_soon_threadsafe, make_future


def _among_threads(effort: Effort) -> Iterator[Row]:
    def row(work: str, subjects: tuple[Subject, ...], measure: Callable[..., float]) -> Row:
        contenders = [
            Contender(subject.name, partial(measure, subject.make, effort=effort), subject.needs)
            for subject in subjects
        ]
        return Row("threads", "", work, contenders)

    yield row("free permit", SEMAPHORES, free_permit)
    yield row("free permit, with", SEMAPHORES, free_permit_with)
    yield row("free permit, timeout", SEMAPHORES, free_permit_timeout)
    for threads in THREADS:
        title = f"1 permit, {threads} threads"
        yield row(title, SEMAPHORES, partial(contended, threads=threads))
    for threads in THREADS:
        title = f"barrier of {threads} threads"
        yield row(title, BARRIERS, partial(barrier_rounds, threads=threads))


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    if not backend:
        yield from _among_threads(effort)
        return
    floor = "run_sync_soon" if backend == "trio" else "call_soon_threadsafe"
    shared = [
        Contender(US, partial(shared_by_view, backend, effort)),
        Contender("anyio.from_thread", partial(shared_by_portal, backend, effort)),
    ]
    yield Row("threads", backend, "permit shared with tasks", shared)
    woken = [
        Contender(US, partial(hand_off, backend, by_semaphore, effort)),
        Contender(f"floor: {floor}", partial(hand_off, backend, by_loop, effort)),
    ]
    yield Row("threads", backend, "hand-off to a task", woken)
