"""Tasks and threads that share a semaphore, a barrier and a connection pool.

Each worker has its share of the files. In the first phase it reads them; a `Semaphore` limits how
many workers read at once. In the second phase it counts their words, and adds its counts to those
in a database; the few connections come from a `ConnectionPool`. A `Barrier` ends both phases: no
worker counts before all have read, and none leaves before the result is complete.

Threads use the same three objects, by `as_threading`.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint

from .. import Barrier, BrokenBarrierError, Semaphore, as_threading
from ._database import add_counts, batches, sum_up
from ._files import read_text, why_unreadable
from ._text import NotTextError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from .. import ConnectionPool

_WORD = re.compile(r"\b[^\W\d]\w*")


class Crew:
    """The workers of one run, and what they share."""

    def __init__(
        self,
        parts: Sequence[Sequence[Path]],
        threads: int,
        limit: int,
        pool: ConnectionPool[sqlite3.Connection],
    ) -> None:
        self.permits: Semaphore = Semaphore(limit, name="permits")
        self.barrier: Barrier = Barrier(len(parts), self.begin_phase, name="barrier")
        self.pool: ConnectionPool[sqlite3.Connection] = pool
        tasks = len(parts) - threads
        self.tasks: dict[str, Sequence[Path]] = {
            f"task-{number}": part for number, part in enumerate(parts[:tasks], 1)
        }
        self.threads: dict[str, Sequence[Path]] = {
            f"thread-{number}": part for number, part in enumerate(parts[tasks:], tasks + 1)
        }
        self.busy: int = len(parts)
        self.rounds: int = 0
        # Both kinds of workers append to these lists, which is atomic.
        self.reading: list[Path] = []
        self.crowds: list[int] = []  # for each file, how many workers were reading
        self.loans: list[int] = []  # for each batch, how many connections were in use
        self.unread: list[str] = []  # for each file that can't be read, why
        self.words: int = 0
        self.frequent: list[tuple[str, int]] = []

    def begin_phase(self) -> None:
        """Run by the barrier when all workers have arrived, before it lets them go on."""
        self.rounds += 1

    # -- A task.

    async def work(self, files: Sequence[Path]) -> None:
        """Read the files, and count their words."""
        texts: list[str] = []
        for path in files:
            async with self.permits:
                texts.append(await to_thread.run_sync(self.read, path))
        await self.barrier.wait()
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_WORD.findall(text))
            await checkpoint()  # lets the other tasks run, and Ctrl-C be noticed
        for batch in batches(counts):
            async with self.pool.connection() as connection:
                # A cancelled worker waits here until its thread has ended, and no longer uses the
                # connection.
                await to_thread.run_sync(self.store, connection, batch)
        await self.barrier.wait()

    # -- A thread: the same without ``await``.

    def work_in_thread(self, name: str, files: Sequence[Path]) -> None:
        """Do what `work` does."""
        threading.current_thread().name = name
        texts: list[str] = []
        for path in files:
            self.check_running()
            with as_threading(self.permits):
                texts.append(self.read(path))
        as_threading(self.barrier).wait()
        counts: Counter[str] = Counter()
        for text in texts:
            self.check_running()
            counts.update(_WORD.findall(text))
        for batch in batches(counts):
            with as_threading(self.pool).connection() as connection:
                self.check_running()
                self.store(connection, batch)
        as_threading(self.barrier).wait()

    def check_running(self) -> None:
        """End a thread if the run is over. Tasks are cancelled instead."""
        if self.barrier.broken:
            raise BrokenBarrierError

    # -- What both kinds of workers call. These block, so a task calls them in a thread.

    def read(self, path: Path) -> str:
        """Return the text of a file, or "" if it can't be read."""
        self.reading.append(path)
        self.crowds.append(len(self.reading))
        try:
            return read_text(path)
        except (OSError, NotTextError) as error:
            self.unread.append(why_unreadable(error, path))
            return ""
        finally:
            self.reading.pop()

    def store(self, connection: sqlite3.Connection, batch: list[tuple[str, int]]) -> None:
        """Add to the common counts."""
        self.loans.append(self.pool.statistics().in_use)
        add_counts(connection, batch)

    # -- All workers.

    async def run(self) -> None:
        """Run all workers, and read the result."""
        async with self.pool:
            async with anyio.create_task_group() as group:
                group.start_soon(self.guard)
                scope = group.cancel_scope
                for name, files in self.tasks.items():
                    group.start_soon(self.run_task, files, scope, name=name)
                limiter = anyio.CapacityLimiter(max(1, len(self.threads)))
                for name, files in self.threads.items():
                    group.start_soon(self.run_thread, name, files, limiter, scope)
            async with self.pool.connection() as connection:
                self.words, self.frequent = await to_thread.run_sync(sum_up, connection)

    async def run_task(self, files: Sequence[Path], scope: anyio.CancelScope) -> None:
        """Run a worker that is a task."""
        with suppress(BrokenBarrierError):  # the worker that broke it raises the reason
            await self.work(files)
        self.count_out(scope)

    async def run_thread(
        self,
        name: str,
        files: Sequence[Path],
        limiter: anyio.CapacityLimiter,
        scope: anyio.CancelScope,
    ) -> None:
        """Run a worker that is a thread."""
        with suppress(BrokenBarrierError):
            await to_thread.run_sync(self.work_in_thread, name, files, limiter=limiter)
        self.count_out(scope)

    def count_out(self, scope: anyio.CancelScope) -> None:
        """Take note that a worker has ended. The last one ends the guard."""
        self.busy -= 1
        if not self.busy:
            scope.cancel()

    async def guard(self) -> None:
        """When the run ends, for whatever reason, end the threads that wait at the barrier.

        A task that is cancelled at the barrier breaks it, but all workers may be threads.
        """
        try:
            await anyio.sleep_forever()
        finally:
            self.barrier.abort()
