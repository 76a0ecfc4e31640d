"""The targets: the least ratio that some comparisons have to reach, as data, and their check.

What must live here: figures. They hold for CPython 3.11 to 3.13 on a machine with 2 cores. Where
the versions differ, the target is that of the version which runs this file; with ``--replay`` that
may be another one than was measured. "Within 1.3x of" a floor is a ratio of at least 1/1.3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .model import Key, Outcome, work_title


class Target(NamedTuple):
    key: Key
    least: float


def _each(
    suite: str, backend: str, work: str, peers: dict[str, float], size: int = 0
) -> Iterator[Target]:
    for peer, least in peers.items():
        yield Target(Key(suite, backend, work, size, peer), least)


_HAND_OFF_ASYNCIO = 0.95 if sys.version_info >= (3, 12) else 0.9
_HAND_OFF = {
    "asyncio.Semaphore": _HAND_OFF_ASYNCIO,
    "anyio, fast_acquire": 0.8,
    "aiologic.Semaphore": 1.3,
}
_FAST = {"asyncio.Semaphore": 2.15, "anyio, fast_acquire": 2.8, "aiologic.Semaphore": 3.5}
_CHECKPOINT = {"floor: bare checkpoint": 1 / 1.15}
_SEMAPHORES = ("asyncio.Semaphore", "anyio.Semaphore", "aiologic.Semaphore")
_CANCEL = "cancel all, random order"
_POOL_ALONE = {"psycopg_pool": 4.5, "SQLAlchemy async": 30, "redis-py": 18, "coredis": 25}
_POOL_CROWDED = {"psycopg_pool": 3.5, "SQLAlchemy async": 6, "redis-py": 3.5, "coredis": 3.5}
_REDIS: dict[str, dict[str, float]] = {
    "pair: commands": {"bar: 1 commands": 1},
    "50 tasks, limit 50": {"coredis, 50 tasks PING": 1.7},
    "50 tasks, limit 50: commands a pair": {"bar: 0.05 commands": 1},
    "barrier of 2: commands a round": {"bar: 2 commands": 1},
    "barrier of 100: commands a round": {"bar: 6 commands": 1},
    "takeover after kill -9, the longest": {"bar: lease + 0.1 s": 1},
    "1,000 waiters: subscriptions": {"bar: 1 channels": 1},
    "1,000 waiters: server memory of each": {"bar: 200 B": 1},
    "1,000 waiters: commands a lease": {"bar: 4 commands": 1},
}
_REDIS_PAIR = {"redis.asyncio Lock": 1, "redis-fifo-lock": 1.3, "py-redis-semaphore": 1.5}


def _redis(backend: str) -> Iterator[Target]:
    for work, peers in _REDIS.items():
        yield from _each("redis", backend, work, peers)
    yield from _each("redis", backend, "pair", {"coredis, PING": 0.6})
    if backend == "asyncio":  # the peers run there only, where a PING takes less time than on trio
        yield from _each("redis", backend, "pair", _REDIS_PAIR)
        gap = {"redis-fifo-lock": 1 / 0.9, "py-redis-semaphore": 1 / 0.9}
        yield from _each("redis", backend, "hand-off of 2 processes, median", gap)


TARGETS = (
    *_each("semaphore", "asyncio", "free permit, fast_acquire", _FAST),
    *_each("semaphore", "trio", "free permit, fast_acquire", {"anyio, fast_acquire": 3.4}),
    *_each("semaphore", "asyncio", "free permit", {"anyio.Semaphore": 2, **_CHECKPOINT}),
    *_each("semaphore", "trio", "free permit", {"trio.Semaphore": 1, **_CHECKPOINT}),
    *_each("semaphore", "asyncio", "hand-off", _HAND_OFF),
    *_each("semaphore", "trio", "hand-off", {"trio.Semaphore": 1}),
    *_each("barrier", "asyncio", "2 parties", {"asyncio.Barrier": 2.4}),
    *_each("barrier", "asyncio", "10 parties", {"asyncio.Barrier": 2.9}),
    *_each("barrier", "asyncio", "100 parties", {"asyncio.Barrier": 2.8}),
    *_each("barrier", "asyncio", "1000 parties", {"asyncio.Barrier": 2.5}),
    *_each("barrier", "trio", "10 parties", {"aiologic.Barrier": 1.4}),
    *_each("barrier", "trio", "100 parties", {"aiologic.Barrier": 1.25}),
    *_each("scale", "asyncio", _CANCEL, dict.fromkeys(_SEMAPHORES, 5), 16_000),
    *_each("scale", "asyncio", _CANCEL, {"floor: bare futures": 0.6}, 64_000),
    *_each("threads", "", "free permit", {"threading.Semaphore": 6}),
    *_each("threads", "", "barrier of 2 threads", {"threading.Barrier": 1.35}),
    *_each("threads", "", "barrier of 8 threads", {"threading.Barrier": 1.7}),
    *_each("threads", "", "barrier of 64 threads", {"threading.Barrier": 1.2}),
    *_each("threads", "asyncio", "permit shared with tasks", {"anyio.from_thread": 300}),
    *_each(
        "threads",
        "asyncio",
        "hand-off to a task",
        {"floor: call_soon_threadsafe": 1 / 1.3},
    ),
    *_each("pool", "asyncio", "alone", _POOL_ALONE),
    *_each("pool", "asyncio", "100 tasks, 10 connections", _POOL_CROWDED),
    *_each("pool", "asyncio", "most served / least served", {"floor: all alike": 1 / 1.05}),
    *_each("pool", "asyncio", "replacement under load", {"connpool": 1.5}),
    *_each("pool", "asyncio", "replacement: most / least served", {"floor: all alike": 1 / 1.05}),
    *_each("drivers", "asyncio", "asyncpg, SELECT 1", {"asyncpg.Pool": 1.2}),
    *_each("drivers", "asyncio", "asyncpg, SELECT 1: 99% wait", {"asyncpg.Pool": 1}),
    *_each("drivers", "asyncio", "asyncpg, 2 ms", {"asyncpg.Pool": 1}),
    *_each("drivers", "asyncio", "psycopg, SELECT 1", {"psycopg_pool": 1.15}),
    *_each("drivers", "asyncio", "psycopg, SELECT 1: 99% wait", {"psycopg_pool": 1}),
    *_each("drivers", "asyncio", "psycopg, 2 ms", {"psycopg_pool": 1}),
    *_each("drivers", "asyncio", "SQLite, read", {"aiosqlitepool": 2}),
    *_each("drivers", "asyncio", "SQLite, write", {"aiosqlitepool": 1.3}),
    *_redis("asyncio"),
    *_redis("trio"),
    *_each("size", "", "import after asyncio and anyio", {"bar: 15 ms": 1}),
)


def target_of(key: Key) -> float | None:
    for target in TARGETS:
        if target.key == key:
            return target.least
    return None


def check(outcomes: Sequence[Outcome]) -> tuple[list[str], bool]:
    """Return a line for each target of a row that was run, and whether no target is missed.

    A peer that could not be measured has no influence on that.
    """
    run = {(outcome.suite, outcome.backend, outcome.work, outcome.size) for outcome in outcomes}
    found = {
        comparison.key: comparison for outcome in outcomes for comparison in outcome.comparisons()
    }
    lines, all_met = [], True
    for key, least in TARGETS:
        if key[:4] not in run:
            continue
        title = " ".join(filter(None, (key.suite, key.backend)))
        start = f"{title:18} {work_title(key.work, key.size):41} {key.peer:27} {least:7.2f}"
        comparison = found.get(key)
        if comparison is None:
            lines.append(f"{start}        -  not measured")
            continue
        verdict = "met"
        if comparison.ratio < least:
            all_met = False
            verdict = f"SHORT by {1 - comparison.ratio / least:.0%}"
            if comparison.high >= least:
                verdict += ", within the noise"
        lines.append(f"{start} {comparison.ratio:8.2f}  {verdict}")
    return lines, all_met
