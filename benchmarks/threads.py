"""The bridge against what it replaces: `python benchmarks/threads.py`.

Interleaved rounds in one process; the ratio of the medians says how many times as fast the view of
`as_threading` is (or, for the last, how many times as long it takes as the floor).
"""

from __future__ import annotations

import asyncio
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread

import aiosync

ROUNDS = 15


def uncontended(semaphore: Any) -> float:
    times = 5000
    begin = time.perf_counter()
    for _ in range(times):
        semaphore.acquire()
        semaphore.release()
    return (time.perf_counter() - begin) / times


def barrier_rounds(barrier: Any) -> float:
    times = max(20, 400 // barrier.parties)

    def work() -> None:
        for _ in range(times):
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(barrier.parties)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken: float = (time.perf_counter() - begin) / times
    return taken


def by_view(parties: int) -> float:
    return barrier_rounds(aiosync.as_threading(aiosync.Barrier(parties)))


def by_threading(parties: int) -> float:
    return barrier_rounds(threading.Barrier(parties))


def from_a_worker(work: Callable[[], float]) -> float:
    """Run `work` in a worker thread of an asyncio loop that is otherwise idle."""

    async def main() -> float:
        return await anyio.to_thread.run_sync(work)

    return anyio.run(main)


def shared_by_view() -> float:
    view = aiosync.as_threading(aiosync.Semaphore(1))

    def work() -> float:
        return uncontended(view)

    return from_a_worker(work)


def shared_by_portal() -> float:
    times = 100

    def work() -> float:
        semaphore: anyio.Semaphore = anyio.from_thread.run_sync(anyio.Semaphore, 1)
        begin = time.perf_counter()
        for _ in range(times):
            anyio.from_thread.run(semaphore.acquire)
            anyio.from_thread.run_sync(semaphore.release)
        return (time.perf_counter() - begin) / times

    return from_a_worker(work)


def hand_off(make: Callable[[], tuple[Callable[[], Any], Callable[[], None]]]) -> float:
    """Seconds from a thread that rings to a task that has heard, and back by a raw lock."""
    times = 500

    async def main() -> float:
        wait, ring = make()
        heard = threading.Lock()
        heard.acquire()

        def ringer() -> None:
            for _ in range(times):
                ring()
                heard.acquire()

        thread = threading.Thread(target=ringer)
        begin = time.perf_counter()
        thread.start()
        for _ in range(times):
            await wait()
            heard.release()
        thread.join()
        return (time.perf_counter() - begin) / times

    return asyncio.run(main())


def by_semaphore() -> tuple[Callable[[], Any], Callable[[], None]]:
    semaphore = aiosync.Semaphore(0, fast_acquire=True)
    return semaphore.acquire, aiosync.as_threading(semaphore).release


def by_future() -> tuple[Callable[[], Any], Callable[[], None]]:
    """The floor: what nobody can do without; a queue of futures, so that none is missed."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(2)]
    given = iter(range(10**9))
    taken = iter(range(10**9))

    def ring() -> None:
        loop.call_soon_threadsafe(futures[next(given) % 2].set_result, None)

    async def wait() -> None:
        number = next(taken)
        await futures[number % 2]
        futures[number % 2] = loop.create_future()

    return wait, ring


def compare(title: str, peer: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    seconds: tuple[list[float], list[float]] = ([], [])
    for round in range(ROUNDS + 1):
        for measure, found in zip((ours, theirs), seconds, strict=True):
            gc.collect()
            gc.disable()
            took = measure()
            gc.enable()
            if round:  # the first is to warm up
                found.append(took)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
    print(f"{title:44} {peer:40} {ratio:7.2f}x", flush=True)


def main() -> None:
    print(f"{platform.python_implementation()} {platform.python_version()}; ratio of medians of")
    print(f"{ROUNDS} interleaved rounds: how many times as fast aiosync is\n")
    compare(
        "thread view, uncontended semaphore",
        "threading.Semaphore",
        lambda: uncontended(aiosync.as_threading(aiosync.Semaphore(1))),
        lambda: uncontended(threading.Semaphore(1)),
    )
    for parties in (2, 8, 64):
        compare(
            f"thread view, barrier of {parties} threads",
            "threading.Barrier",
            partial(by_view, parties),
            partial(by_threading, parties),
        )
    compare(
        "a thread takes a permit shared with tasks",
        "anyio.from_thread.run(sem.acquire)",
        shared_by_view,
        shared_by_portal,
    )
    compare(
        "thread-to-task hand-off",
        "bare call_soon_threadsafe + future",
        lambda: hand_off(by_semaphore),
        lambda: hand_off(by_future),
    )


if __name__ == "__main__":
    main()
