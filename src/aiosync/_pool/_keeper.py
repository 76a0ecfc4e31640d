"""The background of a pool: it opens, checks, resets and closes connections, and keeps the size.

What must live here: all that awaits foreign code. It runs in tasks of the event loop that opened
the pool, so nobody who wants a connection can cancel it half way, and the sums below need no care.
Others ask for things by `post`, from any thread.

Each step that runs foreign code has a deadline, is shielded from the end of a trio run, and ends by
putting its connection somewhere, synchronously: into the queue, or into the hands of `discard`. So
a slot always comes back.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from weakref import ref

from anyio import (
    CancelScope,
    fail_after,
    get_cancelled_exc_class,
    get_current_task,
)

from .._handoff import HandoffQueue
from .._park import ki_protected, start_background_task, task_waiter, wake_all
from ._idle import IdleQueue
from ._ledger import Ledger, describe, log
from ._records import (
    ALWAYS,
    NEVER,
    Failure,
    Reason,
    Record,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter
    from ._face import ConnectionPool
    from ._settings import Settings

T = TypeVar("T")

_chance = random.Random()  # noqa: S311  (nothing secret)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_chance.seed)  # or else all children come at once

# While the backend is down one connect at a time is tried: so long after the first failure, and
# then twice as long each time, in seconds. Multiplied by a number from 0.5 to 1, by chance, so that
# the pools of many processes do not all come at once.
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
# How often we look for idle connections and leaks at most, in seconds, however short their times.
_GRAIN = 0.05

# Each connection lives up to this much shorter than `max_lifetime`, for the same reason.
_LIFETIME_JITTER = 0.05

# For how long, in seconds, whoever waits may rely on a connection that is being reset or checked.
# Then it may hang; another one is checked, or made.
_SOON = 0.1


# What a child process must not use, nor even let Python collect as long as it runs: a driver's
# finalizer might say good-bye to the server on a socket that the parent still uses.
_inherited: list[object] = []


class Keeper(Generic[T]):
    """What goes on in the background of one pool; on its loop, but for what is marked."""

    def __init__(
        self, settings: Settings[T], pool: ConnectionPool[T], closed: Callable[[], Exception]
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.ledger: Ledger[T] = Ledger(settings, self)
        self.outage = Failure(lambda: self.ledger.too_late("while connecting fails"))
        self.closed = Failure(closed)
        self.min_size, self.max_size = settings.min_size, settings.max_size
        self.clock: Callable[[], float]
        self.mailbox: HandoffQueue[Callable[[], object]] = HandoffQueue()
        self.idle: IdleQueue[T] = IdleQueue(
            settings.lifo, settings.max_idle, self.closed, self.call, self.hand_over
        )
        # Those who are borrowed, by the id of the connection. To remove one is to claim the right
        # to say where it goes: back, lost or, when the pool is closed, by force.
        self.lent: dict[int, Record[T]] = {}
        # All there are; one is in here until it has been closed. Together with those being opened
        # never more than `max_size`, except after `resize`.
        self.records: dict[int, Record[T]] = {}
        # An entry for each task that is opening one: how many attempts had failed when it began,
        # see `failures`. And how many of those tasks are about to configure it, so that it is among
        # the records already.
        self._attempts: list[int] = []
        self.configuring = 0
        # Those whose `reset` or `check` is running, and since when; and those whose `close` is.
        self.serving: dict[int, float] = {}
        self.leaving: set[int] = set()
        # Those on their way to us; see `hand_over`.
        self.coming: list[Record[T]] = []
        # Somebody did not wait, but would have liked a connection.
        self.wish = False
        # Increased by `drain`: connections that were begun before are not wanted.
        self.generation = 0
        # How often connecting has failed since it last succeeded; more than 0 is an outage.
        self.failures = 0
        self.last_error: BaseException | None = None
        # When a connection has to be looked at, in whose hands it may be then. NEVER, which is long
        # ago: at once, because one came, went or was retired, or the sizes have changed.
        self._due = NEVER
        self._next_attempt = NEVER
        self._complain_at = NEVER
        # Not later than that of any task that waits, with the `timeout` of the pool.
        self.next_deadline = ALWAYS
        self._connects: set[CancelScope] = set()
        self._serves: set[CancelScope] = set()
        # Those that were closed while borrowed, until their borrowers give them back.
        self.forced: dict[int, T] = {}
        # Those who wait until there are `min_size` connections, and until all is over.
        self.expectant: list[Waiter] = []
        self.leavers: list[Waiter] = []
        # One entry for each task that has not ended, the main one included.
        self.children: set[object] = set()
        # Those that are running, by their ids.
        self.tasks: set[int] = set()
        self.stopping = False
        self.finished = False
        # Whether this is a child process; see `leave_to_parent`.
        self.is_orphan = False
        self.crash: Exception | None = None

    # -- From any thread, but for `watch`.

    @ki_protected
    def post(self, job: Callable[[], object]) -> None:
        """Have `job` called, and then those seen to who wait, on the loop of the pool."""
        self.mailbox.items.appendleft(job)
        if self.mailbox.waiters:
            self.mailbox.dispatch()

    @ki_protected
    def call(self) -> None:
        """See to who waits."""
        self.post(_nothing)

    @ki_protected
    def hand_over(self, record: Record[T], step: Literal["check", "reset"]) -> None:
        """See to a connection that nobody has, and that can't simply go to the next."""
        self.coming.append(record)
        self.post(partial(self._take_over, record, step))

    @ki_protected
    def collected(self, record: Record[T], _: object) -> None:
        """Take note that nobody has the connection any more. Called by Python."""
        self.lent.pop(record.key, None)
        self.post(partial(self._lost, record))

    def watch(self, deadline: float) -> None:
        """See to it that a task that waits until then is woken. On the loop of the pool only."""
        if deadline < self.next_deadline:  # or else those who came before see to it
            self.next_deadline = deadline
            self.call()

    def leave_to_parent(self) -> None:
        """In a child process: let go of all that belongs to the parent, without touching it.

        Our tasks are the parent's as well; but here, too, somebody may go on running them.
        """
        idle, mailbox = self.idle, self.mailbox
        _inherited.append(
            (self.records.copy(), mailbox.items.copy(), mailbox.waiters, idle.waiters)
        )
        for record in self.records.values():
            _inherited.append(record.alive())
            record.ref = None
            record.retire("shutdown")
        idle.call_keeper = bool
        idle.hand_over = lambda *args: _inherited.append(args)
        idle.shut = self.closed
        self.is_orphan = True
        self.min_size = self.max_size = 0
        for pile in idle.items, idle.dormant, mailbox.items, self.coming, self.lent, self.records:
            pile.clear()

    # -- The main task.

    def begin(self) -> None:
        """Start the main task. It may be cancelled before it has begun."""
        self.start(self._run, stillborn=self._finish)

    async def _run(self) -> None:
        try:
            try:
                while not self.stopping:
                    await self._turn(self._review())
            except GeneratorExit:
                raise  # nobody runs us any more, so there is nothing that we can do
            except BaseException:
                await self._shut_down()
                raise
            await self._shut_down()
        finally:
            self._finish()

    def _finish(self) -> None:
        self.finished = True
        self.idle.close(self.closed)
        wake_all(self.expectant)
        wake_all(self.leavers.copy())

    async def _turn(self, due: float) -> None:
        """Wait for a job, or until `due`; then do all jobs there are."""
        timeout = None if due == ALWAYS else max(0.0, due - self.clock())
        job = await self.mailbox.wait(task_waiter(), timeout, None)
        while job is not None:
            job()
            job = self.mailbox.get_nowait(None)

    def look(self) -> None:
        """Have each connection looked at, when the jobs are done."""
        self._due = NEVER

    def _review(self) -> float:
        """Bring the pool into the state that it should have; return when to look again."""
        now = self.clock()
        idle = self.idle
        if now >= self.next_deadline:
            self.next_deadline = idle.expire(now)
        # Only then, because it takes as long as there are many.
        if now >= self._due:
            self._look_at_all(now)
        # In this order; see IdleQueue.room.
        idle.room = self.size < self.max_size
        self._wake_dormant(now)
        self._grow(now)
        idle.room = self.size < self.max_size
        if self.is_ready():
            wake_all(self.expectant)
        due = min(self._due, self.next_deadline)
        if self.failures and idle.room and self._may_try():
            due = min(due, self._next_attempt)
        if idle.waiters:
            # Then they need another one, unless they have found one by then.
            due = min([due, *(since + _SOON for since in self._soon(now))])
        return due

    def _look_at_all(self, now: float) -> None:
        idle = self.idle
        for record in idle.take_out(lambda record: idle.spoils_at(record) <= now):
            self._discard_spoiled(record, now)
        self._report_leaks()
        self._shrink()
        self._due = self._next_due(now)

    @property
    def opening(self) -> int:
        return len(self._attempts)

    @property
    def size(self) -> int:
        return len(self.records) + self.opening - self.configuring

    def _next_due(self, now: float) -> float:
        due = ALWAYS
        idle = self.idle.snapshot()
        for record in idle:
            due = min(due, self.idle.spoils_at(record))
        for record in self._in_use(idle):
            # It may become idle at any moment, without a word to us.
            due = min(due, record.expires, now + max(self.settings.max_idle, _GRAIN))
        for record in self._borrowed():
            if not record.reported:
                due = min(due, record.taken + self.settings.leak_timeout)
        # An idle one may be borrowed at any moment.
        return min(due, now + max(self.settings.leak_timeout, _GRAIN)) if self.records else due

    def _borrowed(self) -> list[Record[T]]:
        return list(self.lent.copy().values())

    def _in_use(self, idle: list[Record[T]]) -> list[Record[T]]:
        """Return those that may be idle again: borrowed, on their way to a waiter, or served."""
        now = self.clock()
        unused = self.leaving.union(record.key for record in idle)
        return [
            record
            for record in self.records.values()
            if record.key not in unused and record.expires > now
        ]

    def _shrink(self) -> None:
        idle = self.idle.snapshot()
        in_use = self._in_use(idle)
        surplus = len(idle) + len(in_use) + self.opening - self.configuring - self.max_size
        if surplus <= 0:
            return
        for record in idle:
            if surplus and self.idle.take(record):
                self.discard(record, "resize")
                surplus -= 1
        for record in in_use[:surplus]:
            record.retire("resize")

    def _soon(self, now: float) -> list[float]:
        """Return since when those are being served that may be expected to be ready soon."""
        return [since for since in self.serving.values() if now < since + _SOON]

    def _wake_dormant(self, now: float) -> None:
        dormant = self.idle.dormant
        while dormant and len(self.idle.waiters) > len(self._soon(now)):
            try:
                record = self.idle.pop_dormant()
            except IndexError:
                break  # somebody who does not wait took it
            self.serve(record, "check")

    def _may_try(self) -> bool:
        """Tell whether nobody tries to connect who has begun after the last failure."""
        begun = self.failures in self._attempts
        return not begun and self.opening < self.settings.max_connecting

    def _grow(self, now: float) -> None:
        room = self.max_size - self.size
        waiting = max(len(self.idle.waiters), self.wish)
        self.wish = False
        if self.failures:
            # Somebody has to find out when it is over, even if nobody waits.
            number = 1 if now >= self._next_attempt and self._may_try() else 0
        else:
            missing = waiting - self.opening - len(self._soon(now))
            number = max(self.min_size - self.size, missing)
            number = min(number, self.settings.max_connecting - self.opening)
        for _ in range(min(number, room)):
            failures = self.failures
            self._attempts.append(failures)
            nothing = partial(self._attempts.remove, failures)
            self.start(self._open, now, self.generation, failures, stillborn=nothing)

    def start(
        self, work: Callable[..., Any], *args: object, stillborn: Callable[[], object]
    ) -> None:
        """Start a task.

        :param stillborn: called if it is cancelled natively before it has begun; then not even its
            ``finally`` is run
        """
        begun: list[bool] = []

        async def run() -> None:
            begun.append(True)
            task = get_current_task().id
            self.tasks.add(task)
            try:
                await work(*args)
            except Exception as error:
                # A defect of ours. On trio it must not end the program; `close` raises it.
                self.crash = error
                self.stopping = True
            finally:
                self.tasks.discard(task)

        def end() -> None:
            self.children.discard(key)
            if not begun:
                stillborn()
            if not begun or self.stopping:
                self.call()

        key = object()
        name = self.settings.name + (f" {work.__name__}" if self.children else "")
        self.children.add(key)
        start_background_task(run, name, end)

    async def _call(self, hook: Callable[..., Any], *args: object) -> Any:
        if self.is_orphan:
            _inherited.append(args)
            raise self.closed.error()
        result = hook(*args)
        return await result if isawaitable(result) else result

    # -- Opening.

    async def _open(self, began: float, generation: int, failures: int) -> None:
        record: Record[T] | None = None
        error: BaseException | None = None
        ready = False
        try:
            with fail_after(self.settings.connect_timeout, shield=True) as scope:
                self._connects.add(scope)
                try:
                    if self.stopping:
                        return
                    connection = await self._call(self.settings.connect)
                    if self.is_orphan:  # it was begun by the parent
                        _inherited.append(connection)
                        raise self.closed.error()
                    record = self._adopt(connection)
                    self.configuring += 1
                    if self.settings.configure is not None:
                        await self._call(self.settings.configure, connection)
                    ready = True
                finally:
                    self._connects.discard(scope)
        except Exception as caught:
            error = caught
        except BaseException as caught:
            error = ConnectionError(f"connect() or configure() was ended by {caught!r}")
            raise
        finally:
            # First what must not be left out whatever a hook that is told raises.
            self._attempts.remove(failures)
            self.post(self.look)
            self.ledger.count("connections_num")
            if record is not None:
                self.configuring -= 1
                self.ledger.count("connections_ms", 1000 * (self.clock() - began))
            if record is not None and ready:
                if generation != self.generation:
                    record.retire("drain")
                self.give(record, "open")
                self._succeeded()
                self.ledger.emit("connected", record)
            elif record is not None:
                self.discard(record, "configure", error)
            if error is not None:
                self._failed(error, failures)
            del error  # or else it would keep itself, by its traceback

    def _adopt(self, connection: T) -> Record[T]:
        if connection is None:
            raise TypeError("connect() of the pool returned None; it must return a connection")
        known = self.records.get(id(connection))
        if known is not None:
            if known.alive() is connection:
                raise TypeError(
                    "connect() of the pool returned a connection that the pool has already; "
                    "it must make a new one each time"
                )
            self._lost(known)  # it has died, and left its address to this one
        now = self.clock()
        lifetime = self.settings.max_lifetime * (1 - _LIFETIME_JITTER * _chance.random())
        record = Record(connection, now, now + lifetime)
        with suppress(TypeError):  # it can't be weakly referenced
            record.ref = ref(connection, partial(self.collected, record))
            record.kept = None
        self.records[record.key] = record
        return record

    def _succeeded(self) -> None:
        if self.failures:
            self.failures = 0
            self.last_error = None
            self.ledger.emit("recovered")

    def _failed(self, error: BaseException, failures: int) -> None:
        """Take note of a failed attempt, and of how many had failed when it began."""
        if self.is_orphan:
            return
        self.ledger.count("connections_errors")
        self.last_error = error
        now = self.clock()
        is_first = not self.failures
        # Of those that were under way together only one counts.
        if self.failures in (0, failures):
            delay = min(_FIRST_DELAY * 2**self.failures, _LONGEST_DELAY)
            self.failures = min(self.failures + 1, 30)
            self._next_attempt = now + delay * _chance.uniform(0.5, 1)
        if is_first:
            self._complain_at = now + self.settings.reconnect_timeout
        complains = now >= self._complain_at
        if complains:
            self._complain_at = now + self.settings.reconnect_timeout
        if self.settings.fail_fast and not self.has_hope():
            self.idle.fail(self.outage)
        self.ledger.emit("connect_failed", error=error)
        if is_first:
            log.warning("%s: cannot connect: %s", self.settings.name, describe(error))
            self.ledger.emit("outage", error=error)
        if complains and self.settings.reconnect_failed is not None:
            self.ledger.tell(self.settings.reconnect_failed, self.pool)

    def has_hope(self) -> bool:
        """Tell whether those who wait may get a connection that need not, or may not, be made."""
        on_hand = self.idle.dormant or self.serving or self.coming
        return bool(on_hand) or self.size >= self.max_size

    # -- Serving, closing.

    def give(self, record: Record[T], step: Literal["open", "check", "reset"]) -> None:
        """Let somebody have it, after that step; unless nobody may."""
        now = self.clock()
        if step != "check":  # that uses nothing
            record.idle_since = now
        spoils = self.idle.spoils_at(record)
        if spoils <= now:
            self._discard_spoiled(record, now)
            return
        # Who looked at it while it was in our hands may have thought that it would be used.
        self._due = min(self._due, spoils)
        if step != "reset" or self.settings.check_idle > 0:
            record.good_until = min(spoils, now + self.settings.fresh)
            self.idle.put(record, first=step == "check")
        else:
            self.idle.dormant.append(record)

    def _discard_spoiled(self, record: Record[T], now: float) -> None:
        self.discard(record, record.retired if record.expires <= now else "idle")

    def _take_over(self, record: Record[T], step: Literal["check", "reset"]) -> None:
        """Do what `hand_over` was called for."""
        self.coming.remove(record)
        now = self.clock()
        if (record.expires if step == "reset" else self.idle.spoils_at(record)) <= now:
            self._discard_spoiled(record, now)
        elif self.idle.shut is not None:
            self.discard(record, "shutdown")
        else:
            self.serve(record, step)

    def serve(self, record: Record[T], step: Literal["check", "reset"]) -> None:
        """Reset or check a connection; then let somebody have it."""
        if getattr(self.settings, step) is None:
            self.give(record, step)
            return
        self.serving[record.key] = self.clock()
        self.start(self._serve, record, step, stillborn=partial(self._serve_again, record, step))

    async def _serve(self, record: Record[T], step: Literal["check", "reset"]) -> None:
        good = False
        error: BaseException | None = None
        try:
            with fail_after(self.settings.check_timeout, shield=True) as scope:
                self._serves.add(scope)
                try:
                    result = await self._call(getattr(self.settings, step), record.connection)
                finally:
                    self._serves.discard(scope)
                if step == "check" and result is False:
                    raise ConnectionError("check() returned False")
                good = True
        except Exception as caught:
            error = caught
        finally:
            del self.serving[record.key]
            if good:
                self.give(record, step)
            else:
                self.discard(record, step, error)
            self.call()
            del error  # or else it would keep itself, by its traceback

    def _serve_again(self, record: Record[T], step: Literal["check", "reset"]) -> None:
        del self.serving[record.key]
        self.serve(record, step)

    def begin_check(self, done: list[bool]) -> None:
        """Check those that are idle now."""
        end = partial(self._end_check, done)
        idle = self.idle.snapshot()
        # Who is checked last is handed out first.
        self.start(self._check_all, idle if self.settings.lifo else idle[::-1], end, stillborn=end)

    def _end_check(self, done: list[bool]) -> None:
        done.append(True)
        wake_all(self.expectant)

    async def _check_all(self, idle: list[Record[T]], done: Callable[[], None]) -> None:
        """Check idle connections, one after the other, so that the others can be had."""
        try:
            for record in idle:
                if self.settings.check is not None and self.idle.take(record):
                    self.serving[record.key] = self.clock()
                    await self._serve(record, "check")
        finally:
            done()

    def discard(
        self, record: Record[T], reason: Reason, error: BaseException | None = None
    ) -> None:
        """Close a connection that nobody has."""
        self.leaving.add(record.key)
        if reason in {"reset", "discard"}:
            self.ledger.count("returns_bad")
        elif reason == "check":
            self.ledger.count("connections_lost")
        self._begin_to_close(record, reason, error)

    def _begin_to_close(
        self, record: Record[T], reason: Reason, error: BaseException | None
    ) -> None:
        again = partial(self._begin_to_close, record, reason, error)
        self.start(self._close, record, reason, error, stillborn=again)

    async def _close(self, record: Record[T], reason: Reason, error: BaseException | None) -> None:
        connection = record.alive()
        try:
            with fail_after(self.settings.time_to_close, shield=True):
                await self._call(self.settings.close, connection)
        except Exception as caught:
            self.ledger.emit("close_failed", record, error=caught)
        finally:
            self._forget(record, reason, error)

    def _forget(self, record: Record[T], reason: Reason, error: BaseException | None) -> None:
        self.leaving.discard(record.key)
        self.records.pop(record.key, None)
        record.ref = None  # nobody is to be told when it is collected
        self.ledger.past.add(record)
        self.ledger.count(f"closed_{reason}")
        self.post(self.look)
        self.ledger.emit("closed", record, reason, error)

    def _lost(self, record: Record[T]) -> None:
        if self.records.get(record.key) is record:
            record.usage += self.clock() - record.taken
            self.ledger.count("leaks")
            try:
                self.ledger.emit("leaked", record, "it was garbage collected\n" + record.trace())
            finally:
                self._forget(record, "collected", None)

    def _report_leaks(self) -> None:
        now = self.clock()
        for record in self._borrowed():
            if not record.reported and now >= record.taken + self.settings.leak_timeout:
                record.reported = True
                self.ledger.count("leaks")
                stack = record.trace()
                log.warning(
                    "%s: a connection is borrowed for more than %g s by\n%s",
                    self.settings.name,
                    self.settings.leak_timeout,
                    stack,
                )
                self.ledger.emit("leaked", record, stack)

    # -- The end.

    def stop(self) -> None:
        self.stopping = True

    def want(self) -> None:
        self.wish = True

    def resize(self, min_size: int, max_size: int) -> None:
        self.min_size, self.max_size = min_size, max_size
        self.post(self.look)

    def drain(self) -> None:
        self.generation += 1
        for record in self.records.values():
            record.retire("drain")
        self.post(self.look)

    def is_ready(self) -> bool:
        """Tell whether there are as many connections as there should be."""
        return len(self.records) - self.configuring - len(self.leaving) >= self.min_size

    async def _shut_down(self) -> None:
        """Close all connections: the idle ones, those that come back, and the others by force."""
        self.stopping = True
        self.max_size = self.min_size = 0
        self.idle.close(self.closed)
        wake_all(self.expectant)
        for scope in self._connects:
            scope.cancel()
        deadline = self.clock() + self.settings.close_timeout
        cancellation: BaseException | None = None
        with CancelScope(shield=True):
            while self.size or len(self.children) > 1:
                for record in self.idle.take_out(lambda _: True):
                    self.discard(record, "shutdown")
                for record in self.records.values():
                    record.retire("shutdown")
                due = deadline
                if self.clock() >= deadline:
                    # Again and again: some may be on their way to those who waited.
                    self._force()
                    due = ALWAYS
                try:
                    await self._turn(due)
                except get_cancelled_exc_class() as error:  # a native one
                    cancellation = error
        if cancellation is not None:
            try:
                raise cancellation
            finally:
                del cancellation  # or else it would keep itself, by its traceback

    def _force(self) -> None:
        for scope in self._serves:
            scope.cancel()
        for record in self._borrowed():
            connection = record.alive()
            if connection is not None and self.lent.pop(record.key, None) is record:
                record.usage += self.clock() - record.taken
                # Its borrower may let go of it before it is closed.
                record.connection = self.forced[record.key] = connection
                self.discard(record, "forced")


def _nothing() -> None:
    """Do nothing; a job that only wants somebody to look."""
