"""Everything at once, for as long as you like: threads, event loops, signals and the collector.

What must live here: workers that use shared objects as users do, each by its own chance; what must
be true all the time; and what must be true whenever all of them rest, a few times in each second,
and at the end. It is a program, too::

    python tools/soak.py --seconds 60 --seed 7

Each worker takes its decisions from a random generator of its own, made of the seed and the name of
the worker. So a seed brings the same workload again, but not the same timing of the threads: to see
a rare failure once more may take several runs, or longer ones. "Exception ignored when trying to
write to the signal wakeup fd" is trio's: it closes that too early.

- All the time: nobody holds a permit too many; a connection is used by one at a time, and not after
  it was closed; each index is given out once in a round, and no round trips for some of its parties
  and breaks for others; no cancellation is swallowed; no exception but those expected.
- At rest: all permits are back, nobody stands in line, no round has lost a party; each connection
  is idle, or was closed exactly once, or was dropped on purpose; and memory is flat, see `Census`.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import importlib.util
import itertools
import logging
import os
import platform
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from traceback import format_exc, format_exception, walk_tb
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import trio
from anyio import WouldBlock
from trio._core import _run as trio_run

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolEvent,
    PoolTimeout,
    Semaphore,
    TooManyRequests,
    as_threading,
)
from aiosync._barrier import _Round
from aiosync._park import run_in_thread
from aiosync._pool import _backoff
from aiosync._scopes import innermost_scope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType, TracebackType

# For ever, as far as the workers can tell: who still waits when all should rest is stuck.
LONG = 3600.0

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if importlib.util.find_spec("uvloop") is not None:
    BACKENDS["uvloop"] = ("asyncio", {"use_uvloop": True})
# Those that go on all the time, each with a pool; and what becomes of a connection that is given
# back to one of these.
LASTING = tuple(BACKENDS)
WAYS = "common", "reset", "check"
if sys.version_info >= (3, 12):

    def _eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    BACKENDS["eager"] = ("asyncio", {"loop_factory": _eager_loop})


def run_under(backend: str, work: Callable[..., Awaitable[None]], *args: Any) -> None:
    library, options = BACKENDS[backend]
    anyio.run(work, *args, backend=library, backend_options=options)


def new_loop(backend: str) -> asyncio.AbstractEventLoop:
    if backend != "uvloop":
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class Worker:
    """A thread or a task, its chance, and what it has done."""

    def __init__(self, seed: int, name: str, backend: str = "thread") -> None:
        self.seed = seed
        self.name = name
        self.backend = backend
        self.is_task = backend != "thread"
        self.rng = random.Random(f"{seed}/{name}")
        self.counts: Counter[str] = Counter()
        # It is a coroutine that is left to the collector.
        self.is_dropped = False
        # The number of the last rest that it has come to.
        self.rested = 0
        self._children = itertools.count()

    def child(self, backend: str) -> Worker:
        """Return one that lives for a moment, and counts for this one."""
        child = Worker(self.seed, f"{self.name}.{next(self._children)}", backend)
        child.counts = self.counts
        return child

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def moment(self) -> float:
        """Return a time in seconds, about as long as it takes here until one's turn comes."""
        return self.rng.choice((0.0, 0.0, self.rng.uniform(0, 0.001), self.rng.uniform(0, 0.01)))

    def timeout(self) -> float | None:
        return self.rng.choice((None, None, LONG, 0.0, -1.0, self.moment(), self.moment()))

    async def pause(self) -> None:
        if self.chance(0.7):
            await self.sleep(self.moment())

    async def sleep(self, seconds: float) -> None:
        if not self.is_task:
            time.sleep(seconds)
        elif seconds:
            await anyio.sleep(seconds)
        else:
            await anyio.lowlevel.checkpoint()


class Activity:
    """What somebody is doing; for the report on who is stuck."""

    def __init__(self, all: set[Activity], worker: Worker, what: str) -> None:
        self._all = all
        self._began = time.monotonic()
        self._text = f"{worker.name} ({worker.backend}): {what}"

    def __enter__(self) -> None:
        self._all.add(self)

    def __exit__(self, *_: object) -> None:
        self._all.discard(self)

    def __str__(self) -> str:
        return f"{self._text}, for {time.monotonic() - self._began:.1f} s"


class Limit:
    """A semaphore, and who holds its permits."""

    def __init__(self, semaphore: Semaphore, permits: int) -> None:
        self.semaphore = semaphore
        self.view = as_threading(semaphore)
        self.permits = permits
        # Entered after the acquire, left before the release, so never more than there are permits.
        # Each change is one atomic step, for signal handlers and finalizers hold permits as well.
        self.holders: list[str] = []

    def enter(self, name: str) -> None:
        self.holders.append(name)
        holders = self.holders.copy()
        assert len(holders) <= self.permits, f"{self.permits} permits are held by {holders}"

    def leave(self, name: str) -> None:
        self.holders.remove(name)

    def troubles(self) -> list[str]:
        """Return what is wrong, if nobody uses it."""
        queue = self.semaphore._queue
        if self.semaphore.value != self.permits or queue.waiters or queue.granted or self.holders:
            return [
                f"{self.semaphore!r} of {self.permits} permits, held by {self.holders}; stale are "
                f"{len(queue.waiters)} waiters and {len(queue.granted)} grants"
            ]
        taken = 0
        try:
            while taken <= self.permits:
                self.semaphore.acquire_nowait()
                taken += 1
        except WouldBlock:
            pass
        self.semaphore.release(taken)
        found = [] if taken == self.permits else [f"{taken} of {self.permits} permits were free"]
        if isinstance(self.semaphore, BoundedSemaphore):
            try:
                self.semaphore.release()
                found.append(f"{self.semaphore!r} could be released once too often")
            except ValueError:
                pass
        return found


class Index(int):
    """An index that knows its round."""

    round: int


class Places(list[int]):
    """What a barrier copies for each of its rounds: the indices to be given out."""

    def __init__(self, parties: int) -> None:
        super().__init__(range(parties - 1, -1, -1))
        self._numbers = itertools.count()

    def copy(self) -> list[int]:
        number = next(self._numbers)
        fresh: list[int] = []
        for place in self:
            index = Index(place)
            index.round = number
            fresh.append(index)
        return fresh


class ActionError(Exception):
    """What the action of a barrier raises, on purpose."""


class Meeting:
    """A barrier, and what has become of each party of each round."""

    def __init__(self, seed: int, parties: int, action: bool) -> None:
        self.barrier = Barrier(parties, self._act if action else None)
        self.view = as_threading(self.barrier)
        rounds = self.barrier._rounds
        rounds._indices = Places(parties)
        rounds.latest = _Round(rounds._indices.copy())
        # By the number of the round and the index: the outcome, and two ticks of a clock: when the
        # party was about to arrive, and when it had left.
        self._outcomes: dict[int, dict[int, tuple[str, int, int]]] = {}
        self._clock = itertools.count()
        self._rng = random.Random(f"{seed}/action")
        self.counts: Counter[str] = Counter()

    def _act(self) -> None:
        if self._rng.random() < 0.2:
            time.sleep(self._rng.uniform(0, 0.002))  # some run out of time meanwhile
        if self._rng.random() < 0.05:
            raise ActionError

    async def wait(self, is_task: bool, timeout: float | None) -> None:
        """Wait at the barrier, and take down the outcome."""
        began = next(self._clock)
        # Who gets an exception instead of its index has that in this frame, if it has arrived.
        frame = None
        try:
            if is_task:
                waiting: Any = self.barrier.wait(timeout)
                frame = waiting.cr_frame
                passed = await waiting
            else:
                passed = self.view.wait(timeout)
        except BaseException as error:
            arrived = _index_in(error.__traceback__, frame)
            if arrived is not None:
                is_broken = isinstance(error, (BrokenBarrierError, ActionError))
                self._record(arrived, "broken" if is_broken else "cancelled", began)
            raise
        assert isinstance(passed, Index)
        self._record(passed, "passed", began)

    def _record(self, index: Index, what: str, began: int) -> None:
        # Atomic steps again: the collector may do the same in the middle of it.
        outcomes = self._outcomes.setdefault(index.round, {})
        outcome = what, began, next(self._clock)
        known = outcomes.setdefault(int(index), outcome)
        assert known is outcome, f"index {int(index)} of a round twice: {known} and {outcome}"
        if len(outcomes) == self.barrier.parties and self._outcomes.pop(index.round, {}):
            self._judge(outcomes)

    def _judge(self, outcomes: dict[int, tuple[str, int, int]]) -> None:
        found, began, ended = zip(*outcomes.values(), strict=True)
        tripped = "passed" in found
        self.counts["rounds" if tripped else "broken rounds"] += 1
        if tripped:
            assert "broken" not in found, f"a round was split: {outcomes}"
            assert max(began) < min(ended), f"some did not wait for the others: {outcomes}"

    def troubles(self) -> list[str]:
        """Return what is wrong, if nobody uses it; or else begin anew."""
        found = [
            f"round {number} of {self.barrier!r} has lost a party: {outcomes}"
            for number, outcomes in self._outcomes.items()
            if "passed" in {what for what, *_ in outcomes.values()}
        ]
        current = self.barrier._rounds.current()
        if self.barrier.broken or self.barrier.n_waiting or current.waiters or current.threads:
            found.append(f"{self.barrier!r} has stale parties")
        if not found:
            self.counts["broken rounds"] += len(self._outcomes)
            self._outcomes.clear()
        return found


def _index_in(traceback: TracebackType | None, frame: FrameType | None) -> Index | None:
    frames = [frame, *(frame for frame, _ in walk_tb(traceback))]
    indices = [frame.f_locals.get("index") for frame in frames if frame]
    return next((index for index in indices if isinstance(index, Index)), None)


class Connection:
    """A connection to nowhere. It has no weak references, so no pool can see that it is dropped."""

    __slots__ = ("closed", "dropped", "host", "number", "spoiled", "users")

    def __init__(self, host: Host) -> None:
        self.host = host
        self.number = next(host.numbers)
        self.users: list[str] = []
        self.closed = 0
        self.dropped = False
        # Nothing may be done with it any more, but to close it.
        self.spoiled = False
        host.open[self.number] = self.number

    def enter(self, name: str) -> None:
        self.users.append(name)
        users = self.users.copy()
        assert users == [name], f"one connection is borrowed by {users}"
        assert not self.spoiled, f"{name} has borrowed a connection that is of no use any more"
        assert not self.closed, f"{name} has borrowed a connection that is closed"

    def leave(self, name: str) -> None:
        users = self.users.copy()
        self.users.remove(name)
        assert users == [name], f"one connection is borrowed by {users}"
        assert not self.closed, f"a connection was closed while {name} had borrowed it"

    def __del__(self) -> None:
        self.host.open.pop(self.number, None)
        if not self.closed and not self.dropped:
            self.host.soak.fail(f"{self.host.pool!r} has lost a connection, and never closed it")


class DroppableConnection(Connection):
    __slots__ = ("__weakref__",)


class Host:
    """An event loop that goes on all the time, with a pool, and tasks that live there."""

    def __init__(self, soak: Soak, backend: str, way: str) -> None:
        self.soak = soak
        self.backend = backend
        self.workers = [Worker(soak.seed, f"{backend} {number}", backend) for number in range(5)]
        # What the functions of the pool do.
        self.server = Worker(soak.seed, f"server of {backend}", backend)
        rng = self.server.rng
        self.kind = rng.choice((Connection, DroppableConnection))
        self.numbers = itertools.count()
        # The numbers of those that were neither closed nor dropped.
        self.open: dict[int, int] = {}
        self.pool: ConnectionPool[Connection] = ConnectionPool(
            self._connect,
            check=self._check,
            reset=self._reset if way == "reset" else None,
            close=self._close,
            min_size=rng.randint(0, 1),
            max_size=2,
            name=f"pool of {backend}",
            timeout=rng.choice((None, LONG, 0.05)),
            max_waiting=rng.choice((0, 5)),
            max_lifetime=rng.choice((None, 0.3)),
            max_idle=rng.choice((None, 0.2)),
            keepalive=rng.choice((None, 0.1)),
            overlap=rng.choice((True, False)),
            lifo=way == "common" or rng.choice((True, False)),
            check_idle=0 if way == "check" else rng.choice((0.002, None)),
            check_timeout=None,
            connect_timeout=LONG,
            close_timeout=LONG,
            fail_fast=rng.choice((True, False)),
            leak_timeout=None if way == "common" else rng.choice((None, LONG)),
            on_event=self._hear,
            loan_events=way != "common" and rng.choice((True, False)),
            fast_acquire=way == "common" or rng.choice((True, False)),
        )
        self.view = as_threading(self.pool)
        self.is_open = threading.Event()
        self._beds: list[anyio.Event] = []

    def run(self) -> None:
        try:
            run_under(self.backend, self._live)
        except BaseException:
            self.soak.fail(format_exc())

    async def _live(self) -> None:
        self._call_soon: Callable[[Callable[[], None]], object]
        if self.backend == "trio":
            self._call_soon = trio.lowlevel.current_trio_token().run_sync_soon
        else:
            asyncio.get_running_loop().set_exception_handler(self.soak.hear_loop)
            self._call_soon = asyncio.get_running_loop().call_soon_threadsafe
        async with self.pool, anyio.create_task_group() as group:
            self.is_open.set()
            for worker in self.workers:
                group.start_soon(self.soak.live, worker, self)

    async def rest(self) -> None:
        # No timer: it would wake the event loop again and again, and so those to whom another
        # thread has handed something, without telling their event loop.
        bed = anyio.Event()
        self._beds.append(bed)
        await bed.wait()

    def wake(self) -> None:
        """End the rest of all, from any thread."""
        self._call_soon(self._wake)

    def _wake(self) -> None:
        while self._beds:
            self._beds.pop().set()

    async def _connect(self) -> Connection:
        await self.server.pause()
        if self.server.chance(0.05):
            raise ConnectionError
        self.server.counts["connections"] += 1
        return self.kind(self)

    def _hear(self, event: PoolEvent) -> None:
        self.server.counts[event.kind] += 1

    async def _check(self, connection: Connection) -> bool:
        await self._serve(connection)
        connection.spoiled = self.server.chance(0.05)
        return not connection.spoiled

    async def _reset(self, connection: Connection) -> None:
        await self._serve(connection)
        connection.spoiled = self.server.chance(0.02)
        if connection.spoiled:
            raise ConnectionError

    async def _close(self, connection: Connection) -> None:
        connection.spoiled = False
        await self._serve(connection)
        connection.closed += 1
        self.open.pop(connection.number)
        if self.server.chance(0.05):
            raise ConnectionError

    async def _serve(self, connection: Connection) -> None:
        # The pool would take an exception for a defect of the connection.
        try:
            connection.enter("the pool")
            try:
                await self.server.pause()
            finally:
                connection.leave("the pool")
        except AssertionError as error:
            self.soak.fail(str(error))

    def troubles(self) -> list[str]:
        """Return what is wrong, when nobody uses it."""
        stats = self.pool.get_stats()
        stale = {
            **{name: stats[name] for name in ("in_use", "connecting", "requests_waiting")},
            "not idle": stats["pool_size"] - stats["pool_available"],
            "not closed": len(self.open) - stats["pool_size"],
            "granted": len(self.pool._inventory.granted),
        }
        return [f"{self.pool!r} is not at rest: {stale}"] if any(stale.values()) else []

    def troubles_at_the_end(self) -> list[str]:
        stats = self.pool.get_stats()
        made = self.server.counts["connections"]
        closed = sum(number for name, number in stats.items() if name.startswith("closed_"))
        if not self.open and made == closed:
            return []
        return [f"{self.pool!r}: {made} made, {closed} closed; still open: {list(self.open)}"]


class Alarm:
    """A signal handler that uses the shared objects, in the middle of what the main thread does."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self.worker = Worker(soak.seed, "signal handler")
        self._on = False
        self._ringing = False
        self._let_go: list[Callable[[], None]] = []

    def start(self) -> None:
        if hasattr(signal, "setitimer"):
            self._on = True
            signal.signal(signal.SIGALRM, self._ring)
            self._wind()

    def stop(self) -> None:
        self._on = False
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        while self._let_go:
            self._let_go.pop()()

    def _wind(self) -> None:
        # Once, so that it does not come in the middle of itself. But if a signal comes just before
        # the main thread falls asleep, Python hears it when the next one comes.
        signal.setitimer(signal.ITIMER_REAL, self.worker.rng.uniform(0.0001, 0.003), 0.5)

    def _ring(self, *_: object) -> None:
        if not self._on or self._ringing:
            return
        self._ringing = True
        self.worker.counts["signals"] += 1
        try:
            self._act()
        except BaseException:
            self._soak.fail(format_exc())
        self._ringing = False
        self._wind()

    def _act(self) -> None:
        me = self.worker
        if self._let_go and me.chance(0.5):
            self._let_go.pop()()
        elif me.chance(0.1):
            self._soak.peek()
        elif me.chance(0.02):
            self._soak.disturb(me)
        elif me.chance(0.8):
            self._hold(me.rng.choice(self._soak.limits))
        else:
            self._borrow(me.rng.choice(self._soak.hosts))

    def _hold(self, limit: Limit) -> None:
        name = self.worker.name

        def let_go() -> None:
            limit.leave(name)
            limit.semaphore.release()

        try:
            limit.semaphore.acquire_nowait()
        except WouldBlock:
            return
        limit.enter(name)
        self._let_go.append(let_go)

    def _borrow(self, host: Host) -> None:
        name = self.worker.name
        try:
            connection = host.view.acquire_nowait()
        except WouldBlock:
            return

        def let_go() -> None:
            connection.leave(name)
            host.view.release(connection)

        connection.enter(name)
        self._let_go.append(let_go)


class Census:
    """How much memory is in use, after the collector has run.

    Flat means: since the end of the warm-up, the first quarter, the number of memory blocks has
    grown by `BLOCKS` at most, and that of the objects of each type of aiosync by `OBJECTS`. What
    comes and goes even at rest (the tasks that look whether it is over, idle connections) takes a
    fraction of that; one small object lost in each operation is noticed after as many operations.
    """

    BLOCKS = 2_000
    OBJECTS = 50

    def __init__(self) -> None:
        for _ in range(3):  # what is freed by a finalizer is collected the next time
            gc.collect()
        self.types: Counter[str] = Counter()
        for thing in gc.get_objects():
            self.types[f"{type(thing).__module__}.{type(thing).__qualname__}"] += 1
        del thing
        self.blocks = sys.getallocatedblocks()

    def leaks(self, before: Census) -> list[str]:
        grown = self.types - before.types
        found = [
            f"memory is not flat: {number} more {name}"
            for name, number in grown.most_common()
            if name.startswith("aiosync.") and number > self.OBJECTS
        ]
        if self.blocks - before.blocks > self.BLOCKS:
            types = ", ".join(f"{number} {name}" for name, number in grown.most_common(5))
            found.append(
                f"memory is not flat: {self.blocks - before.blocks} more blocks, and {types}"
            )
        return found


class Soak:
    """Who takes part, what they share, and the one who supervises them."""

    def __init__(self, seconds: float, seed: int, grace: float, defect: str = "") -> None:
        self.seconds, self.seed, self.grace = seconds, seed, grace
        # What is done wrong, to show that it is noticed: a "permit" is not released, a small
        # "object" is kept in each operation, or threads are "stuck".
        self.defect = defect
        self._kept: list[object] = []
        self.limits = [
            Limit(Semaphore(1), 1),
            Limit(Semaphore(5, fast_acquire=True), 5),
            Limit(BoundedSemaphore(2), 2),
            Limit(BoundedSemaphore(6, fast_acquire=True), 6),
        ]
        self.meetings = [Meeting(seed, 3, action=False), Meeting(seed, 4, action=True)]
        self._rng = random.Random(f"{seed}/supervisor")
        ways = dict(zip(self._rng.sample(LASTING, len(LASTING)), WAYS, strict=False))
        self.hosts = [Host(self, backend, way) for backend, way in ways.items()]
        self.alarm = Alarm(self)
        self.main = Worker(seed, "main thread")
        nomad = Worker(seed, "nomad")
        threads = [Worker(seed, f"thread {number}") for number in range(4)]
        residents = [worker for host in self.hosts for worker in host.workers]
        self.workers = [self.main, nomad, *threads, *residents]
        homes: list[Any] = [(host.backend, host.run, ()) for host in self.hosts]
        roads = [(worker.name, run_in_thread, (self.live(worker),)) for worker in threads]
        self._threads = [
            threading.Thread(name=name, target=work, args=args)
            for name, work, args in (
                *homes,
                *roads,
                (nomad.name, self.wander, (nomad,)),
                ("collector", self._collect, ()),
                ("supervisor", self._supervise, ()),
            )
        ]
        self.activities: set[Activity] = set()
        self._failures: list[str] = []
        # The number of the last rest that was asked for, and of the last one that is over.
        self.rest_asked = self.rest_over = 0
        self.ended = False
        self.peak = 0
        self.growth = 0

    # -- What the workers do.

    async def live(self, me: Worker, host: Host | None = None) -> None:
        try:
            while not self.ended:
                if self.rest_asked > me.rested:
                    me.rested = self.rest_asked
                    while self.rest_over < me.rested:
                        await (host.rest() if host else me.sleep(0.01))
                else:
                    await self.operate(me, host)
        except BaseException:
            self.fail(format_exc())

    async def operate(self, me: Worker, host: Host | None = None) -> None:
        me.counts["operations"] += 1
        if self.defect == "object":
            self._kept.append(object())
        if self.defect == "stuck" and not me.is_task:
            with self.doing(me, "waiting for Godot"):
                threading.Event().wait()
        way = me.rng.random()
        if not me.is_task or way < 0.5:
            await self.visit(me, host)
        elif way < 0.7:
            await self.visit_until_scope_is_cancelled(me, host)
        elif way < 0.8:
            await self.crowd(me, host)
        elif way < 0.85:
            self.drop(me, host)
        elif me.backend != "trio":
            await self.visit_until_cancelled(me, host)

    async def visit(self, me: Worker, host: Host | None = None) -> None:
        where = me.rng.random()
        if where < 0.4 or (me.is_task and host is None and where < 0.75):
            await self.visit_limit(me, me.rng.choice(self.limits))
        elif where < 0.75:
            await self.visit_pool(me, host or me.rng.choice(self.hosts))
        elif where < 0.95:
            await self.visit_meeting(me, me.rng.choice(self.meetings))
        elif where < 0.98:
            self.peek()
        elif host is None or me.chance(0.5):
            self.disturb(me)
        else:
            await self.look_after(me, host.pool)

    async def visit_limit(self, me: Worker, limit: Limit) -> None:
        acquired = True
        timeout = me.timeout()
        with self.doing(me, f"acquire({timeout=}) of {limit.semaphore!r}"):
            if me.chance(0.1):
                try:
                    limit.semaphore.acquire_nowait()
                except WouldBlock:
                    return
            elif me.is_task:
                acquired = await limit.semaphore.acquire(timeout=timeout)
            else:
                acquired = limit.view.acquire(timeout=timeout)
        if not acquired:
            me.counts["timeouts"] += 1
            return
        try:
            limit.enter(me.name)
            try:
                await me.pause()
            finally:
                limit.leave(me.name)
        finally:
            if self.defect == "permit" and limit.permits > 2:
                self.defect = ""
            else:
                limit.semaphore.release()

    async def visit_meeting(self, me: Worker, meeting: Meeting) -> None:
        timeout = me.timeout() if me.chance(0.2) else None
        try:
            with self.doing(me, f"wait({timeout=}) of {meeting.barrier!r}"):
                await meeting.wait(me.is_task, timeout)
        except ActionError:
            pass
        except BrokenBarrierError:
            if meeting.barrier.broken and me.chance(0.8):
                meeting.barrier.reset()

    async def visit_pool(self, me: Worker, host: Host) -> None:
        pool, view = host.pool, host.view
        timeout = me.timeout()
        way = me.rng.random()
        try:
            with self.doing(me, f"acquire({timeout=}) of {pool!r}"):
                if way < 0.3 and me.is_task:
                    async with pool.connection(timeout) as connection:
                        await self.use(me, pool, connection)
                    return
                if way < 0.35:
                    await self.give_back_early(me, host, timeout)
                    return
                if way < 0.3:
                    with view.connection(timeout) as connection:
                        await self.use(me, pool, connection)
                    return
                if way < 0.4:
                    connection = view.acquire_nowait()
                elif me.is_task:
                    connection = await pool.acquire(timeout)
                else:
                    connection = view.acquire(timeout)
        except (PoolTimeout, TooManyRequests, WouldBlock):
            me.counts["timeouts"] += 1
            return
        if isinstance(connection, DroppableConnection) and me.chance(0.02):
            connection.dropped = True
            return
        try:
            await self.use(me, pool, connection)
        finally:
            try:
                pool.release(connection)
            except ValueError:
                if not connection.dropped:  # see below
                    raise

    async def give_back_early(self, me: Worker, host: Host, timeout: float | None) -> None:
        """Give a connection back, or drop it, before the end of the block that has borrowed it."""
        loan: Any = (host.pool if me.is_task else host.view).connection(timeout)
        give_back = loan.discard if me.chance(0.1) else loan.release
        if me.is_task:
            async with loan as connection:
                await self.use(me, host.pool, connection)
                give_back()
                await me.pause()
        else:
            with loan as connection:
                await self.use(me, host.pool, connection)
                give_back()
                await me.pause()
        assert not loan.borrowed

    async def use(self, me: Worker, pool: ConnectionPool[Connection], borrowed: Connection) -> None:
        me.counts["checkouts"] += 1
        # The collector may take the connection before it ends the coroutine that has borrowed it.
        borrowed.dropped = me.is_dropped
        borrowed.enter(me.name)
        try:
            await me.pause()
        finally:
            borrowed.leave(me.name)
        if me.chance(0.02):
            borrowed.spoiled = True
            borrowed.dropped = True  # to be given back once more
            pool.discard(borrowed)

    def peek(self) -> None:
        """Ask everything how it is."""
        for limit in self.limits:
            assert repr(limit.semaphore)
            assert limit.semaphore.statistics().waiting >= 0
            assert 0 <= limit.semaphore.value <= limit.permits
            limit.semaphore.locked()
        for meeting in self.meetings:
            assert repr(meeting.view)
            assert 0 <= meeting.barrier.n_waiting <= meeting.barrier.parties
        for host in self.hosts:
            assert repr(host.pool)
            assert host.pool.get_stats()["requests_waiting"] >= 0
            figures = host.pool.statistics()
            assert figures.loans >= 0
            assert repr(figures.as_dict())

    def disturb(self, me: Worker) -> None:
        barrier = me.rng.choice(self.meetings).barrier
        if me.chance(0.5):
            barrier.abort()
        else:
            barrier.reset()

    async def look_after(self, me: Worker, pool: ConnectionPool[Connection]) -> None:
        what = me.rng.choice(("resize", "drain", "check"))
        with self.doing(me, f"{what}() of {pool!r}"):
            if what == "resize":
                await pool.resize(me.rng.randint(0, 1), me.rng.randint(1, 3))
            elif what == "drain":
                await pool.drain()
            else:
                await pool.check()

    async def visit_until_scope_is_cancelled(self, me: Worker, host: Host | None) -> None:
        with anyio.move_on_after(me.moment()) as scope:
            await self.visit(me, host)
        me.counts["cancels"] += scope.cancelled_caught

    async def visit_until_cancelled(self, me: Worker, host: Host | None) -> None:
        task: Any = asyncio.current_task()
        cancelled: list[bool] = []

        def cancel() -> None:
            cancelled.append(True)
            task.cancel()

        timer = asyncio.get_running_loop().call_later(me.moment(), cancel)
        try:
            await self.visit(me, host)
            assert not cancelled, "a cancellation was swallowed"
        except asyncio.CancelledError:
            if not cancelled:
                raise
            task.uncancel()
            me.counts["cancels"] += 1
        finally:
            timer.cancel()

    async def crowd(self, me: Worker, host: Host | None) -> None:
        """Visit, many at once, and have some of them cancelled."""
        number = me.rng.randint(2, 10)
        if me.backend == "trio" or me.chance(0.3):
            async with anyio.create_task_group() as group:
                for _ in range(number):
                    group.start_soon(self.visit, me, host)
                await me.pause()
                group.cancel_scope.cancel()
            me.counts["cancels"] += 1
            return
        tasks = [asyncio.ensure_future(self.visit(me, host)) for _ in range(number)]
        await me.pause()
        for task in me.rng.sample(tasks, number // 2):
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                me.counts["cancels"] += 1
            elif outcome is not None:
                raise outcome

    def drop(self, me: Worker, host: Host | None) -> None:
        """Begin a visit, and leave the rest to the collector, on whichever thread that runs."""
        child = me.child(me.backend)
        child.is_dropped = True
        coroutine = self.visit(child, host)
        outside = innermost_scope()
        try:
            coroutine.send(None)
        except StopIteration:
            return
        me.counts["dropped"] += 1
        # A coroutine that is in a cancel scope has to leave it in this task, whose scope it is.
        if me.backend == "asyncio" and innermost_scope() is outside:
            cycle: list[Any] = [coroutine]
            cycle.append(cycle)
        else:
            # A task of trio can't sleep twice. The timers of uvloop may not be touched by other
            # threads.
            coroutine.close()

    # -- Those who wander from one event loop to another.

    def wander(self, me: Worker) -> None:
        try:
            while not self.ended:
                if self.rest_asked > me.rested:
                    self._pause(me)
                else:
                    self._stay(me)
        except BaseException:
            self.fail(format_exc())

    def _pause(self, me: Worker) -> None:
        if me is self.main:
            self.alarm.stop()
        me.rested = self.rest_asked
        while self.rest_over < me.rested:
            time.sleep(0.01)
        if me is self.main:
            self.alarm.start()

    def _stay(self, me: Worker) -> None:
        backend = me.rng.choice(("thread", "doomed", *BACKENDS))
        until = time.monotonic() + me.rng.uniform(0, 0.2)
        if backend == "thread":
            while time.monotonic() < until and self.rest_asked == me.rested:
                run_in_thread(self.operate(me))
        elif backend == "doomed":
            for _ in range(me.rng.randint(1, 10)):
                self._close_loop_early(me)
        else:
            run_under(backend, self._stay_in_loop, me, backend, until)
            me.counts["loops closed"] += 1

    async def _stay_in_loop(self, me: Worker, backend: str, until: float) -> None:
        if backend != "trio":
            asyncio.get_running_loop().set_exception_handler(self.hear_loop)

        async def live(child: Worker) -> None:
            while self.rest_asked == me.rested:
                await self.operate(child)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(live, me.child("asyncio" if backend == "eager" else backend))
            while time.monotonic() < until and self.rest_asked == me.rested:
                await anyio.sleep(0.005)
            group.cancel_scope.cancel()

    def _close_loop_early(self, me: Worker) -> None:
        """Close an event loop, with tasks of which nobody will ever hear again."""
        backend = me.rng.choice([name for name in LASTING if name != "trio"])
        loop = new_loop(backend)
        loop.set_exception_handler(self.hear_loop)
        child = me.child(backend)
        tasks = [loop.create_task(self.visit(child)) for _ in range(me.rng.randint(1, 5))]
        loop.run_until_complete(asyncio.sleep(me.moment()))
        loop.close()
        me.counts["loops closed"] += 1
        me.counts["doomed tasks"] += sum(not task.done() for task in tasks)

    # -- Supervision.

    def doing(self, me: Worker, what: str) -> Activity:
        return Activity(self.activities, me, what)

    def fail(self, why: str) -> None:
        self._failures.append(why)

    def hear_loop(self, _: object, context: dict[str, Any]) -> None:
        """Hear what an event loop complains of."""
        if context["message"].startswith("Task was destroyed"):
            return  # on purpose
        timer = context.get("handle")
        if isinstance(timer, asyncio.TimerHandle) and timer.cancelled():
            return  # the collector, on another thread, has ended a coroutine that slept
        self.fail(f"an event loop complains: {context}")

    def hear_unraisable(self, problem: sys.UnraisableHookArgs) -> None:
        if problem.object is None and isinstance(problem.exc_value, OSError):
            return  # trio has closed the socket by which signals wake it a little too early
        lines = format_exception(problem.exc_value) if problem.exc_value else []
        self.fail(f"{problem.err_msg} {problem.object!r}: {''.join(lines)}")

    def hear_thread(self, problem: threading.ExceptHookArgs) -> None:
        lines = format_exception(problem.exc_value) if problem.exc_value else []
        self.fail(f"{problem.thread}: {''.join(lines)}")

    def _collect(self) -> None:
        rng = random.Random(f"{self.seed}/collector")
        while not self.ended:
            time.sleep(rng.uniform(0, 0.05))
            gc.collect(rng.choice((0, 1, 2)))

    def _supervise(self) -> None:
        try:
            # In the first quarter caches are filled, and the like.
            first = self._alternate(self.seconds / 4, 1_000)
            self._alternate(self.seconds * 3 / 4, 2 * Census.BLOCKS, first)
            self.ended = True
            self._end_rest()
        except BaseException:
            self.fail(format_exc())
            self._look()

    def _alternate(self, seconds: float, operations: int, first: Census | None = None) -> Census:
        """Let them work and rest by turns; and on a slow machine longer, until they did enough."""
        end = time.monotonic() + seconds
        operations += self._operations()
        while True:
            self._end_rest()
            # In case that not even this thread can run any more.
            faulthandler.dump_traceback_later(3 * self.grace + 10, exit=True)
            pause = time.monotonic() + self._rng.uniform(0, 0.5)
            while time.monotonic() < pause:
                sys.setswitchinterval(self._rng.choice((1e-6, 1e-5, 1e-4, 5e-3)))
                self._look()
            self._have_rest()
            census = Census()
            if first is not None:
                self.growth = census.blocks - first.blocks
                self._failures += census.leaks(first)
            self._look()
            late = time.monotonic() - end
            if late > self.grace or (late > 0 and self._operations() >= operations):
                return census

    def _operations(self) -> int:
        return sum(worker.counts["operations"] for worker in self.workers)

    def _look(self) -> None:
        """See who waits, and whether anybody has failed."""
        time.sleep(0.005)
        waiting = [
            *(limit.semaphore.statistics().waiting for limit in self.limits),
            *(meeting.barrier.n_waiting for meeting in self.meetings),
            *(host.pool.get_stats()["requests_waiting"] for host in self.hosts),
        ]
        self.peak = max(self.peak, sum(waiting))
        if self._failures:
            self._give_up()

    def _have_rest(self) -> None:
        """Have all workers rest, and look whether everything is as if nothing had happened."""
        self.rest_asked += 1
        deadline = time.monotonic() + self.grace
        while any(worker.rested < self.rest_asked for worker in self.workers):
            for meeting in self.meetings:
                meeting.barrier.abort()
            gc.collect()
            self._look()
            self._check_grace(deadline)
        for meeting in self.meetings:
            meeting.barrier.reset()  # a broken round keeps the tasks of closed loops alive
        # A permit may be held by a task whose event loop is closed, until it is collected; then it
        # goes to the next, who may be of that kind as well.
        for attempt in itertools.count():
            gc.collect()
            troubles = self._troubles()
            pools = [trouble for host in self.hosts for trouble in host.troubles()]
            if not troubles and not pools:
                break
            if attempt > 20:
                self._failures += troubles
            self._look()
            self._check_grace(deadline, *pools)

    def _end_rest(self) -> None:
        self.rest_over = self.rest_asked
        for host in self.hosts:
            host.wake()

    def _troubles(self) -> list[str]:
        shared: list[Limit | Meeting] = [*self.limits, *self.meetings]
        return [trouble for one in shared for trouble in one.troubles()]

    def _check_grace(self, deadline: float, *troubles: str) -> None:
        if time.monotonic() < deadline:
            return
        stuck = [worker.name for worker in self.workers if worker.rested < self.rest_asked]
        stuck += [thread.name for thread in self._threads if self.ended and thread.is_alive()]
        self.fail(f"not at rest within {self.grace} s: {', '.join(stuck) or 'the pools'}")
        self._failures += [*troubles, *self._troubles(), *sorted(map(str, self.activities.copy()))]
        faulthandler.dump_traceback(all_threads=True)
        self._give_up()

    def _give_up(self) -> None:
        # Threads may be anywhere, so nothing but this ends the process for certain.
        try:
            print(*self.report(), sep="\n", flush=True)
        finally:
            os._exit(1)

    def run(self) -> bool:
        """Do it all; True if nothing was wrong."""
        for thread in self._threads[: len(self.hosts)]:
            thread.start()
        for host in self.hosts:
            if not host.is_open.wait(self.grace):
                self.fail(f"{host.pool!r} was not opened")
                self._give_up()
        for thread in self._threads[len(self.hosts) :]:
            thread.start()
        self.alarm.start()
        self.wander(self.main)
        self.alarm.stop()
        deadline = time.monotonic() + self.grace
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._check_grace(deadline)
        gc.collect()
        self._failures += [what for host in self.hosts for what in host.troubles_at_the_end()]
        print(*self.report(), sep="\n", flush=True)
        return not self._failures

    def report(self) -> list[str]:
        counts: Counter[str] = Counter()
        for counted in (
            *(worker.counts for worker in self.workers),
            *(meeting.counts for meeting in self.meetings),
            *(host.server.counts for host in self.hosts),
            self.alarm.worker.counts,
        ):
            counts += counted
        counts["peak of waiters"] = self.peak
        lines = [f"{name:<16} {counts[name]:>9}" for name in COUNTS]
        if not self._failures:
            growth = f"{self.growth:+} blocks, of {Census.BLOCKS} at most"
            return [*lines, "leaks: none", f"memory: flat ({growth})"]
        again = f"python tools/soak.py --seconds {self.seconds:g} --seed {self.seed}"
        return [
            *lines,
            *self._failures,
            f"FAILED; once more, though threads are never timed alike: {again}",
        ]


COUNTS = (
    "operations", "cancels", "timeouts", "signals", "dropped", "loops closed", "doomed tasks",
    "rounds", "broken rounds", "checkouts", "connections", "peak of waiters",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything at once, for as long as you like.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="by default another each time")
    parser.add_argument("--grace", type=float, default=60.0, help="how long it may take to rest")
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    implementation = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{given.seconds:g} s, seed {seed}, {implementation}, {', '.join(BACKENDS)}", flush=True)
    faulthandler.enable()
    # How many timers that are of no use any more a run of trio may keep: by default 1,000.
    vars(trio_run)["DEADLINE_HEAP_MIN_PRUNE_THRESHOLD"] = 10
    # It is hard for a pool to serve anybody if it does not try again for a tenth of a second.
    vars(_backoff)["FIRST_DELAY"] = 0.002
    logging.getLogger("aiosync.pool").setLevel(logging.CRITICAL)
    warnings.simplefilter("error")
    # What is closed before it has begun, along with its event loop.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    gc.collect()
    gc.freeze()  # what was imported; or else the collector would hardly let others run
    soak = Soak(given.seconds, seed, given.grace, os.environ.get("AIOSYNC_SOAK_DEFECT", ""))
    sys.unraisablehook = soak.hear_unraisable
    threading.excepthook = soak.hear_thread
    return 0 if soak.run() else 1


if __name__ == "__main__":
    sys.exit(main())
