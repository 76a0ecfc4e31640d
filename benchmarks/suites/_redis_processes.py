"""Processes that take and give back one lock on a server.

What must live here: both ends of the pipes between such a process and the benchmark. A process ends
when the benchmark closes its standard input, so also when the benchmark is killed.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from ..loops import run
from ._redis_locks import LEASE, SUBJECTS

ROOT = Path(__file__).resolve().parent.parent.parent
# Seconds in which the holder of the lock works, so that the other process waits by then.
WORK = 0.002


# -- In the process of the benchmark.


class Process:
    """A process with one lock."""

    def __init__(self, role: str, lock: str, backend: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as it; it.main()", role, lock, backend, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        atexit.register(self.kill)

    def tell(self, *message: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process has ended with {self._process.wait()}")
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process as by ``kill -9``."""
        atexit.unregister(self.kill)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@functools.cache
def pair(lock: str, backend: str, url: str) -> tuple[Process, Process]:
    """Return two processes for `gaps`, which live as long as the benchmark."""
    return Process("visit", lock, backend, url), Process("visit", lock, backend, url)


def gaps(lock: str, backend: str, url: str, name: str, times: int) -> list[float]:
    """Return the seconds from a release in one of two processes until the other has the lock."""
    found: list[float] = []
    for _ in range(5):
        found += _gaps(pair(lock, backend, url), name, times)
        # On a busy machine, one of the two may be through before the other begins.
        if len(found) > times // 2:
            break
    return found


def _gaps(processes: tuple[Process, Process], name: str, times: int) -> list[float]:
    for process in processes:
        process.tell(name, times)
    for process in processes:
        process.hear()  # it is connected
    for process in processes:
        process.tell("go")
    visits = sorted(
        (entered, left, number)
        for number, process in enumerate(processes)
        for entered, left in process.hear()
    )
    found = [
        after[0] - before[1]
        for before, after in itertools.pairwise(visits)
        if before[2] != after[2]
    ]
    return found[1:]  # where both waited before


# -- In the other process.


async def _visit(lock: str, url: str, name: str, times: int) -> list[tuple[float, float]]:
    """Take the lock `times` times, and return when it was taken and given back."""
    found = []
    async with _make(lock)(url, name, LEASE) as (acquire, release):
        print('"ready"', flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
        for _ in range(times):
            await acquire()
            entered = time.perf_counter()  # one clock for all processes
            await anyio.sleep(WORK)
            left = time.perf_counter()
            released = release()
            if released is not None:
                await released
            found.append((entered, left))
    return found


async def _hold(lock: str, url: str, name: str, lease: float) -> None:
    """Take the lock, say so, and keep it until the process is killed."""
    async with _make(lock)(url, name, lease) as (acquire, _):
        await acquire()
        print('"held"', flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)


def _make(lock: str) -> Any:
    return next(subject.make for subject in SUBJECTS if subject.name == lock)


def main() -> None:
    role, lock, backend, url = sys.argv[1:]
    if role == "hold":
        name, lease = json.loads(sys.stdin.readline())
        run(backend, partial(_hold, lock, url, name, lease))
        return
    while line := sys.stdin.readline():
        name, times = json.loads(line)
        print(json.dumps(run(backend, partial(_visit, lock, url, name, times))), flush=True)


if __name__ == "__main__":
    main()
