"""Ratios against the peers that every Python has: `python benchmarks/core.py`.

The implementations take turns, round by round, in one process, so that whatever else the machine is
doing slows all of them alike; what is printed is the ratio of the medians. Peers that are installed
(anyio always is) are compared as well.
"""

from __future__ import annotations

import asyncio
import gc
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

import aiosync

ROUNDS = 25


async def free_permit(semaphore: Any) -> float:
    """Seconds for one acquire and release of a semaphore that nobody else uses."""
    times = 4000
    begin = time.perf_counter()
    for _ in range(times):
        await semaphore.acquire()
        semaphore.release()
    return (time.perf_counter() - begin) / times


async def hand_off(semaphore: Any) -> float:
    """Seconds from one holder to the next, where 50 tasks want the one permit."""
    tasks, times = 50, 30

    async def work() -> None:
        for _ in range(times):
            await semaphore.acquire()
            semaphore.release()

    await semaphore.acquire()
    running = [asyncio.create_task(work()) for _ in range(tasks)]
    await asyncio.sleep(0)
    begin = time.perf_counter()
    semaphore.release()
    for task in running:
        await task
    return (time.perf_counter() - begin) / (tasks * times)


def barrier_rounds(parties: int) -> Callable[[Any], Awaitable[float]]:
    times = max(3, 2000 // parties)

    async def measure(barrier: Any) -> float:
        """Seconds for a round of a barrier."""

        async def work() -> None:
            for _ in range(times):
                await barrier.wait()

        running = [asyncio.create_task(work()) for _ in range(parties)]
        begin = time.perf_counter()
        for task in running:
            await task
        return (time.perf_counter() - begin) / times

    return measure


def compare(
    title: str, measure: Callable[[Any], Awaitable[float]], makers: dict[str, Callable[[], Any]]
) -> None:
    """Print how many times as long as the first of `makers` the others take."""

    async def run(make: Callable[[], Any]) -> float:
        return await measure(make())

    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for round in range(ROUNDS + 1):
        for name, make in makers.items():
            gc.collect()
            gc.disable()
            found = asyncio.run(run(make))
            gc.enable()
            if round:  # the first is to warm up
                seconds[name].append(found)
    ours, *peers = (statistics.median(found) for found in seconds.values())
    for name, peer in zip(list(makers)[1:], peers, strict=True):
        print(f"{title:42} {name:24} {peer / ours:6.2f}x", flush=True)


def main() -> None:
    print(f"{platform.python_implementation()} {platform.python_version()}, asyncio; ratio of")
    print(f"medians of {ROUNDS} interleaved rounds: how many times as fast aiosync is\n")
    compare(
        "acquire + release, free permit",
        free_permit,
        {
            "aiosync": lambda: aiosync.Semaphore(1, fast_acquire=True),
            "asyncio": lambda: asyncio.Semaphore(1),
            "anyio (fast_acquire)": lambda: anyio.Semaphore(1, fast_acquire=True),
        },
    )
    compare(
        "the same, with a bound",
        free_permit,
        {
            "aiosync": lambda: aiosync.BoundedSemaphore(1, fast_acquire=True),
            "asyncio": lambda: asyncio.BoundedSemaphore(1),
        },
    )
    compare(
        "the same, with a checkpoint",
        free_permit,
        {"aiosync": lambda: aiosync.Semaphore(1), "anyio": lambda: anyio.Semaphore(1)},
    )
    compare(
        "hand-off, 50 tasks, 1 permit",
        hand_off,
        {
            "aiosync": lambda: aiosync.Semaphore(1, fast_acquire=True),
            "asyncio": lambda: asyncio.Semaphore(1),
            "anyio (fast_acquire)": lambda: anyio.Semaphore(1, fast_acquire=True),
        },
    )
    if sys.version_info >= (3, 11):
        for parties in (2, 10, 100, 1000):
            compare(
                f"barrier round, {parties} parties",
                barrier_rounds(parties),
                {
                    "aiosync": partial(aiosync.Barrier, parties),
                    "asyncio": partial(asyncio.Barrier, parties),
                },
            )


if __name__ == "__main__":
    main()
