"""ConnectionPool: the public API, and the hot path.

To borrow an idle connection and to give it back takes no lock, no task and no timer. The rest is
the work of `Maintenance`.
"""

from __future__ import annotations

import os
from inspect import Parameter, Signature
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload
from weakref import WeakSet

from anyio import WouldBlock

from .._callers import call_stack, caller_name
from .._created import created
from .._errors import NeedsAsyncWith, NotCopied, PoolClosed, TooManyRequests, check_timeout
from .._park import (
    checkpoint,
    current_token,
    ki_protected,
    loop_clock,
    task_waiter,
    thread_waiter,
    token_getter,
    wait_with_timeout,
)
from ._checkout import Checkout
from ._entry import FOREVER, PoolEntry, State
from ._maintenance import Maintenance
from ._options import Options, check_sizes, parameters
from ._statistics import BATCH, Statistics, info, log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Literal, Self, Unpack

    from ._events import ConnectionInfo, PoolStatistics
    from ._options import PoolOptions

T = TypeVar("T")

# Why a pool is not open, or will not be one day, in the words of the errors.
_NEW = "is not open yet: use it inside of 'async with pool:'"
_CLOSED = "is closed"
_FORKED = "was opened before a fork, and belongs to the parent process: open one here"

# Global names, because to look up a member of an enum takes time on some Pythons.
_IDLE, _IN_USE, _RETURNING = State.IDLE, State.IN_USE, State.RETURNING

_numbers = count(1)
_open_pools: WeakSet[ConnectionPool[Any]] = WeakSet()


class ConnectionPool(NeedsAsyncWith, NotCopied, Generic[T]):
    """Connections, or other objects that are expensive to make, each borrowed by one caller.

    ``async with pool:`` opens it, under asyncio or trio; ``async with pool.connection() as
    connection:`` borrows. Callers that find no idle connection wait in FIFO order. Connections are
    made, checked and closed in the background, so a caller that is cancelled or times out never
    spoils one. OS threads share the pool by `as_threading`.

    All hooks may be plain or async, and are called on the event loop that opened the pool. A plain
    hook that blocks, blocks that loop: let an async one call it by `anyio.to_thread.run_sync`, with
    a limiter of its own (otherwise the threads that wait for a connection may occupy all of
    anyio's) and ``abandon_on_cancel=True`` (otherwise the pool can't be closed before it returns).
    `aiosync.recipes` does that for some drivers.

    The names are those of ``psycopg_pool``. All times are in seconds. The logger ``aiosync.pool``
    reports the begin of an outage, a failed `reset` or `close`, a connection closed by force, and a
    leak as warnings; the end of an outage and a failed `check` as information.

    :param connect: returns a new connection: any object but None
    :param context: whether `connect` returns an async context manager, which is entered to open a
        connection, and left to close it, in one task of the connection's own. For resources that
        enter a task group or a cancel scope.
    :param close: closes a connection. By default its ``aclose()`` or else its ``close()`` is
        called, if it has one.
    :param check: raises, or returns False, if a connection is of no use any more. It is then
        replaced.
    :param configure: prepares a new connection
    :param reset: called with each connection that is given back, before the next caller gets it. If
        it raises, the connection is replaced. At the end of an ``async with`` block that raised
        nothing it runs in the task of the block, shielded. Otherwise it is called by `release`, or
        in a task of the pool if `release` is called from elsewhere than a task of its event loop;
        what an async one returns is awaited in a task of the pool.
    :param commit: called with the connection at the end of a block (``async with`` or ``with``)
        that raised nothing, before `reset`, in the task or thread of the block. What it raises, the
        block raises. It must not be async if threads use the pool.
    :param is_closed: returns whether the driver already calls a connection closed; plain, and must
        not block. It is asked before each loan, in any task or thread, and such a connection is
        replaced.
    :param is_fatal: called with the exception that a block raised (not a cancellation); returns
        whether the connection is of no use any more. Otherwise, it is checked before anybody gets
        it, whatever `check_idle` says. Plain, and called in the task or thread of the block. If it
        raises, the connection is replaced.
    :param min_size: how many connections to keep, even if nobody wants them
    :param max_size: how many there may be; 1 or more
    :param name: for messages; by default "pool-1" and so on
    :param timeout: how long to wait for a connection, unless the call says otherwise
    :param max_waiting: how many callers may wait at the same time; 0: any number. Threads that come
        at the very same moment may be some more.
    :param max_lifetime: how old a connection may get before it is replaced; more than 0. Each is
        given up to 5% less, so that not all are replaced at once. The replacement is opened early
        enough to be there when the old connection goes.
    :param max_idle: how long a connection may be idle before it is closed; more than 0. If there
        are no more than `min_size`, its replacement is opened before.
    :param keepalive: an idle connection is checked whenever it has not been used nor checked for so
        long; more than 0. None: never.
    :param overlap: whether, for the moment that it takes to replace an old connection, there may be
        one more than `max_size`. It is not lent before the old one is gone. If connecting then
        fails, or with False, the old one is closed first, and callers may have to wait meanwhile.
    :param limit: a semaphore of `aiosync.redis` whose permits count the connections of all pools
        that use it, in all processes. One is taken before each `connect`, and given back when the
        connection is closed. If one is lost, so that another pool may have it, its connection is
        closed as soon as nobody has it. A pool that has idle connections while others wait closes
        one now and then, even if `min_size` are left then.
    :param lifo: whether the connection that was used last is used next; False: the one that has
        been idle for longest, or the one after that while that one is checked
    :param check_idle: a connection that was idle for longer than this is checked before anybody
        gets it. 0: always. None: never.
    :param check_timeout: how long `check` or `reset` may take. Waiters rely on each
        for 0.1 seconds; then another connection is checked or made, if there may be.
    :param connect_timeout: how long `connect` and `configure` may take together; by default as
        `timeout`, or 30 if that is 0 or None
    :param close_timeout: how long `close` may take (5 if this is 0); and how long the pool, when it
        is closed, waits for connections that are still borrowed, checked or reset
    :param max_connecting: how many connections may be made at the same time; None: as many as are
        needed. After a failure fewer are tried, and during an outage one.
    :param fail_fast: if True, callers that find no idle connection during an outage get the
        PoolTimeout at once. An outage begins when connecting has failed 3 times in a row, or for a
        second.
    :param leak_timeout: a connection that is borrowed for longer is reported, once, with the stack
        of its borrower: in the log, and to `on_event`. A PoolTimeout names the lines that have
        borrowed connections, too. More than 0. Recording the stacks costs some microseconds each
        time.
    :param on_event: called with a `PoolEvent` for everything that happens in the background
    :param loan_events: whether `on_event` is called for each loan too: "acquired", "released"
    :param fast_acquire: if True, borrowing an idle connection does not yield to the event loop. The
        same as in `Semaphore`.
    :raises TypeError: if an argument is unknown, or of the wrong type
    :raises ValueError: if a number is negative or NaN, or `min_size` exceeds `max_size`
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_commit",
        "_fast_acquire",
        "_fresh",
        "_guards",
        "_home",
        "_in_use",
        "_inventory",
        "_is_plain",
        "_items",
        "_lifo",
        "_maintenance",
        "_options",
        "_record",
        "_resets",
        "_statistics",
        "_tracks_loans",
        "_validates",
        "_waiters",
        "_waits",
        "_where",
        "_why_closed",
    )

    # The type of the pool follows from what `connect` returns, or awaits to.
    @overload
    def __init__(
        self, connect: Callable[[], Awaitable[T]], **options: Unpack[PoolOptions[T]]
    ) -> None: ...
    @overload
    def __init__(self, connect: Callable[[], T], **options: Unpack[PoolOptions[T]]) -> None: ...
    @overload
    def __init__(
        self,
        connect: Callable[
            [], AbstractAsyncContextManager[T] | Awaitable[AbstractAsyncContextManager[T]]
        ],
        *,
        context: Literal[True],
        **options: Unpack[PoolOptions[T]],
    ) -> None: ...

    def __init__(
        self, connect: Callable[[], object], *, context: bool = False, **options: Any
    ) -> None:
        checked = self._options = Options(connect, context, options)
        if checked.name is None:
            checked.name = f"pool-{next(_numbers)}"
        self._why_closed = _NEW
        self._statistics = Statistics()
        self._waits = self._statistics.waits
        self._fast_acquire: bool = checked.fast_acquire
        # Whether to do something for each loan.
        self._tracks_loans: bool = checked.leak_timeout != FOREVER or checked.loan_events
        # Whether `acquire` may simply take an idle connection, if nobody waits.
        self._is_plain: bool = (
            checked.fast_acquire
            and checked.lifo
            and checked.is_closed is None
            and not self._tracks_loans
        )
        self._fresh = checked.fresh
        self._lifo: bool = checked.lifo
        # Whether a caller may have to be refused.
        self._guards: bool = checked.fail_fast or checked.max_waiting > 0
        self._commit: Callable[[T], object] | None = checked.commit
        self._resets: bool = checked.reset is not None
        # Whether a connection that is given back can never be handed out as it is.
        self._validates: bool = (
            self._resets
            or checked.check_idle == 0
            or checked.is_closed is not None
            or self._tracks_loans
        )
        # Tells whether `_home` is running on this thread; see `token_getter`.
        self._where: Callable[[], object] = current_token
        self._home: object = None
        self._clock: Callable[[], float] = monotonic
        self._install()
        created(self)

    def _install(self) -> None:
        """Begin with an empty inventory."""
        self._maintenance: Maintenance[T] = Maintenance(
            self._options, self._statistics, self._not_open
        )
        # Those of the inventory, for the hot path.
        inventory = self._inventory = self._maintenance.inventory
        self._items = inventory.items
        self._waiters = inventory.waiters
        self._in_use = inventory.in_use

    # -- Open and closed.

    async def open(self) -> None:
        """Open the pool. It does not wait for connections; see `wait`.

        To be called by a task; the event loop of that task becomes the loop of the pool. A pool
        that was closed may be opened again, on another event loop too.

        :raises RuntimeError: if it is open already
        :raises PoolClosed: if it is still being closed, or was opened before a fork
        :raises anyio.NoEventLoopError: if not called under asyncio or trio
        """
        where = token_getter()
        if self._why_closed is _FORKED:
            raise self._not_open()
        if not self.closed:
            raise RuntimeError(f"{self.name} is open already")
        if self._why_closed is not _NEW:
            self._begin_again()
        self._clock, self._home, self._where = loop_clock(), current_token(), where
        self._why_closed = _CLOSED
        _open_pools.add(self)
        # Last: with an eager task factory, it calls hooks, which may use the pool.
        self._maintenance.begin()

    def _begin_again(self) -> None:
        """Leave behind what remains of the time before the pool was closed, or its loop ended."""
        before, inventory = self._maintenance, self._inventory
        if not (before.finished or before.lost_loop):
            raise PoolClosed(f"{self.name} is still being closed")
        inventory.close(before.closed)
        for entry in inventory.entries.values():  # nobody will close it
            self._statistics.forget(entry)
        self._install()
        self._inventory.reclaimed = inventory.reclaimed

    async def close(self) -> None:
        """Close the pool, and all of its connections. Does nothing if it is not open.

        Waiters get PoolClosed at once. Borrowers have `close_timeout` to give their connection
        back; then it is closed all the same. The call can't be cancelled: a cancellation is raised
        when it is done, or at the next checkpoint.

        :raises RuntimeError: if the event loop of the pool has ended before
        """
        if self._why_closed is _NEW or self._why_closed is _FORKED:
            return
        maintenance = self._maintenance
        maintenance.stop()
        if maintenance.lost_loop:
            raise RuntimeError(
                f"the event loop of {self.name} has ended without closing the pool; "
                f"it is too late to close its connections"
            )
        await maintenance.join()

    async def __aenter__(self) -> Self:
        """Do what `open` does."""
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `close` does."""
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether the pool is not open: not yet, or not any more. May be read anywhere."""
        return self._inventory.closed is not None or self._maintenance.lost_loop

    @property
    def healthy(self) -> bool:
        """Whether the pool is open, and connecting did not fail lately. May be read anywhere."""
        return not self.closed and not self._maintenance.core.backoff.is_outage

    def _not_open(self) -> PoolClosed:
        return PoolClosed(f"{self.name} {self._why_closed}")

    def _check_open(self) -> None:
        """Raise an error if the pool is closed, or belongs to another event loop."""
        if self._inventory.closed is not None:
            raise self._not_open()
        if self._where() is not self._home:
            raise self._elsewhere()

    def _elsewhere(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} was opened on another event loop, to which its connections belong: "
            f"open a pool for each event loop; from a thread use as_threading(pool)"
        )

    def _leave_to_parent(self) -> None:
        if self._maintenance.finished:
            return  # it has been closed, so nothing of it is the parent's
        self._why_closed = _FORKED
        self._maintenance.leave_to_parent()
        self._install()

    # -- Borrowing.

    @ki_protected
    async def acquire(self, timeout: float | None = None) -> T:
        """Borrow a connection, waiting in FIFO order if need be. Give it back by `release`.

        To be called by a task on the event loop that opened the pool; threads use `as_threading`.
        If it is cancelled, nothing has been borrowed: a connection that it had been handed goes to
        the next waiter.

        :param timeout: how long to wait, in seconds. 0 or less: take an idle connection, or none;
            one that would have to be checked before is taken as it is. None: the `timeout` of the
            pool. For ever: ``math.inf``.
        :raises PoolTimeout: if there was none in time, or (`fail_fast`) connecting fails
        :raises PoolMisuse: if `connect` or `configure` is wrong, and no connection is idle
        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises TooManyRequests: if `max_waiting` others wait already
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        """
        if (
            timeout is None
            and self._is_plain
            and not self._waiters
            and self._inventory.closed is None
            and self._where() is self._home
        ):
            # Inlined: `HandoffQueue.get_nowait`, `Inventory.disposition` and `_lend`.
            try:
                entry: Any = self._items.pop()
            except IndexError:
                return await self._take(None, True)
            now = self._clock()
            if entry.fresh_until > now:
                entry.state = _IN_USE
                entry.taken = now
                entry.uses += 1
                connection: T = entry.connection
                self._in_use[entry.key] = entry
                entry.connection = entry.kept
                return connection
            if isinstance(entry, PoolEntry):  # not a `Failure` that nobody took
                self._inventory.lay_aside(entry)
        return await self._take(timeout, True)

    @ki_protected
    def acquire_nowait(self) -> T:
        """Borrow an idle connection. The same as ``acquire(0)``, without a checkpoint.

        May be called from anywhere but another event loop. Never blocks.

        :raises anyio.WouldBlock: if no connection is idle. One is then made in the background, if
            there may be one more.
        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        if current_token() is not None:
            self._check_open()
        return self._grab()

    @ki_protected
    def _grab(self) -> T:
        if self._inventory.closed is not None:
            raise self._not_open()
        now = self._clock()
        entry = self._inventory.pick(now, False)
        if entry is None:
            if current_token() is None:
                self._check_loop()
            self._inventory.want()
            raise WouldBlock
        return self._lend(entry, now)

    def connection(self, timeout: float | None = None) -> Checkout[T]:
        """Return an async context manager that borrows a connection and gives it back.

        :param timeout: as that of `acquire`; so are the exceptions
        """
        return Checkout(self, timeout)

    @ki_protected
    async def _take(self, timeout: float | None, is_task: bool) -> T:
        # One function: each coroutine that a waiter sleeps through costs, see docs/performance.md.
        inventory = self._inventory
        if inventory.closed is not None:
            raise self._not_open()
        if is_task and self._where() is not self._home:
            raise self._elsewhere()
        began = self._clock()
        deadline = None
        if timeout is not None:
            timeout = check_timeout(timeout)
        else:
            timeout = self._options.timeout
            if is_task and timeout is not None:
                deadline = began + timeout
        may_wait = timeout is None or timeout > 0
        entry = inventory.pick(began, may_wait) if self._items or inventory.stale else None
        if entry is None and may_wait:
            # A task ends with its event loop; a thread has to look whether the loop still runs.
            waiter = task_waiter() if is_task else thread_waiter(self._check_loop)
            if self._guards or not is_task or self._maintenance.core.last_error is not None:
                self._admit(is_task)
            try:
                # Inlined: `HandoffQueue.wait`.
                inventory.join(waiter, deadline)
                if waiter.done():
                    await checkpoint()
                if deadline is None:
                    found = await (
                        waiter if timeout is None else wait_with_timeout(waiter, timeout)
                    )
                else:
                    # Maintenance has one timer for all waiters.
                    if deadline < inventory.next_deadline:
                        inventory.watch(deadline)
                    found = await waiter
                if found is None:
                    found = inventory.leave(waiter)
            except BaseException as error:
                found = inventory.leave(waiter)
                if found is not None:
                    inventory.put(found)
                is_closed = isinstance(error, PoolClosed)  # see `_check_loop`
                self._count_wait("requests_errors" if is_closed else "cancelled", began)
                raise
            if isinstance(found, PoolEntry):
                if self._options.limit is not None:
                    inventory.wake()  # an attempt may wait for a permit that is not needed now
                now = self._clock()
                self._waits.append(now - began)
                if not found.uses & BATCH:
                    self._statistics.fold_waits()
                return self._lend(found, now)
            self._count_wait("requests_errors", began)
            if found is None:
                raise self._maintenance.core.timed_out(timeout)
            self._statistics.count("errors")
            raise found.error()
        if is_task and not self._fast_acquire:
            try:
                await checkpoint()
            except BaseException:
                if entry is not None:
                    self._undo(entry)
                raise
        if entry is not None:
            return self._lend(entry, self._clock())
        if not is_task:
            self._check_loop()
        self._statistics.count("requests_errors")
        inventory.want()
        raise self._maintenance.core.timed_out(timeout)

    @ki_protected
    def _admit(self, is_task: bool) -> None:
        """Let a caller begin to wait.

        :raises PoolTimeout: if that would be in vain; or another exception, see `acquire`
        """
        core, most = self._maintenance.core, self._options.max_waiting
        if not is_task:
            self._check_loop()
        if core.cannot_connect():
            error = core.connect_error()
        elif 0 < most <= len(self._waiters):
            error = TooManyRequests(f"{most} wait for a connection of {self.name} already")
        else:
            return
        self._statistics.count("requests_errors")
        self._statistics.count("refusals")
        raise error

    def _check_loop(self) -> None:
        """Check that the event loop of the pool can still serve a thread.

        :raises PoolClosed: if the event loop of the pool has ended
        """
        if self._maintenance.lost_loop:
            raise PoolClosed(f"the event loop of {self.name} has ended, without closing the pool")

    def _count_wait(self, outcome: str, began: float) -> None:
        """Count a request that has waited in vain."""
        self._statistics.count(outcome)
        self._waits.append(self._clock() - began)
        self._statistics.fold_waits()
        if self._options.limit is not None:
            self._inventory.wake()  # as in `_take`

    @ki_protected
    def _undo(self, entry: PoolEntry[T]) -> None:
        """Put back an idle entry that was taken, but not lent."""
        if entry.fresh_until > self._clock():
            self._inventory.put(entry, first=True)
        else:
            self._inventory.hand_over(entry)

    @ki_protected
    def _lend(self, entry: PoolEntry[T], now: float) -> T:
        connection: Any = entry.connection
        if self._inventory.closed is not None:
            if self._why_closed is _FORKED:  # it was granted by the parent
                raise self._not_open()
            self._inventory.wake()  # the pool is being closed, and looks for it
        entry.state = _IN_USE
        entry.taken = now
        entry.uses += 1
        if self._tracks_loans:
            self._begin_loan(entry)
        self._in_use[entry.key] = entry
        entry.connection = entry.kept
        return connection  # type: ignore[no-any-return]

    def _begin_loan(self, entry: PoolEntry[T]) -> None:
        """Take note of the borrower."""
        if self._options.leak_timeout != FOREVER:
            entry.stack = call_stack()
            entry.borrower = caller_name()
            entry.reported = False
        if self._options.loan_events:
            core = self._maintenance.core
            core.post(lambda: core.emit("acquired", entry))

    @ki_protected
    def release(self, connection: T) -> None:
        """Give back a connection: the first waiter gets it, or it is idle.

        May be called from anywhere: any task, any thread, a signal handler, a finalizer. Never
        blocks, and can't be cancelled; an async `reset` runs later, in the background. After the
        pool has closed this connection by force it does nothing. If the caller has given it back
        before, and another one has borrowed it since, it is taken from the latter; use
        `Checkout.release`, which does nothing then.

        :raises ValueError: if it is not borrowed: from another pool, or given back before
        :raises PoolClosed: if it was borrowed before a fork, by the parent process
        """
        try:
            entry = self._in_use.pop(id(connection))
        except KeyError:
            self._refuse(connection)
            return
        now = self._clock()
        entry.samples.append(now - entry.taken)
        entry.connection = connection
        if self._validates or entry.expires <= now or not entry.uses & BATCH:
            self._return(entry, now)
            return
        # Inlined: `Inventory.freshen`, `Inventory.check_in` and `Inventory.put`.
        entry.state = _IDLE
        entry.idle_since = now
        entry.fresh_until = now + self._fresh
        if entry.fresh_until > entry.expires:
            # It expires soon, or another thread has just retired it: `put` looks once more.
            self._inventory.freshen(entry, now)
            self._inventory.put(entry)
        elif self._waiters and self._inventory.closed is None:
            self._inventory.give(entry)
        elif self._lifo:
            self._items.append(entry)
            if self._waiters or self._inventory.closed is not None:
                self._inventory.dispatch()
        else:
            self._inventory.put(entry)

    @ki_protected
    def _return(self, entry: PoolEntry[T], now: float) -> None:
        """Do what `release` does with an entry that may need more than to be made available."""
        entry.is_reset = not self._resets
        entry.idle_since = now
        if self._tracks_loans or not entry.uses & BATCH:
            self._end_loan(entry)
        if self._resets or entry.expires <= now:
            entry.state = _RETURNING
            entry.since = now
            if entry.expires > now and current_token() is self._home:
                self._maintenance.validation.reset_in_background(entry)
            else:
                self._inventory.hand_over(entry)
        else:
            entry.state = _IDLE
            self._inventory.freshen(entry, now)
            self._inventory.check_in(entry, now)

    def _end_loan(self, entry: PoolEntry[T]) -> None:
        """Take note of the end of a loan."""
        self._statistics.flush(entry)
        entry.stack = []  # an idle connection needs no memory for it
        if self._options.loan_events:
            core = self._maintenance.core
            core.post(lambda: core.emit("released", entry))

    @ki_protected
    def _release_after(self, error: BaseException | None, connection: T) -> None:
        """Give back the connection of a block that has raised `error`.

        If that is no cancellation, the connection may be broken.
        """
        entry = self._in_use.get(id(connection))
        if entry is None or not isinstance(error, Exception):
            self.release(connection)
            return
        if self._is_fatal(error):
            entry.retire("discard")
        entry.is_suspect = self._options.check is not None
        if self._in_use.pop(id(connection), None) is entry:
            now = self._clock()
            entry.samples.append(now - entry.taken)
            entry.connection = connection
            self._return(entry, now)

    def _is_fatal(self, error: Exception) -> bool:
        is_fatal = self._options.is_fatal
        try:
            return is_fatal is not None and bool(is_fatal(error))
        except Exception:
            log.exception("%s: %r failed", self.name, is_fatal)
            return True

    @ki_protected
    def _reset_and_release(self, connection: T) -> Any:
        """Give back a connection at the end of a block.

        :return: what is left to await, or None
        """
        if not self._resets:
            self.release(connection)
            return None
        entry = self._in_use.pop(id(connection), None)
        if entry is None:
            return None
        now = self._clock()
        entry.samples.append(now - entry.taken)
        entry.connection = connection
        entry.is_reset = False
        entry.state = _RETURNING
        entry.since = entry.idle_since = now
        if self._tracks_loans or not entry.uses & BATCH:
            self._end_loan(entry)
        if entry.expires <= now or self._inventory.closed is not None:
            self._inventory.hand_over(entry)
            return None
        return self._maintenance.validation.reset_here(entry)

    @ki_protected
    def discard(self, connection: T) -> None:
        """Give back a connection that is of no use any more. It is closed, and replaced.

        Like `release` in all else. It may be called inside of ``async with pool.connection()``.
        """
        entry = self._in_use.get(id(connection))
        if entry is not None:
            entry.retire("discard")
        self.release(connection)

    def _refuse(self, connection: T) -> None:
        """Raise an error because `connection` is not borrowed, unless it was closed by force."""
        if self._why_closed is _FORKED:
            raise self._not_open()
        if self._inventory.reclaimed.pop(id(connection), None) is None:
            raise ValueError(
                f"this {type(connection).__name__} is not borrowed from {self.name}: "
                f"it is from elsewhere, or has been given back before"
            )

    # -- Keeping.

    async def wait(self, timeout: float | None = 30.0) -> None:
        """Wait until the pool has `min_size` connections. May be cancelled.

        To be called by a task on the event loop that opened the pool, as all that follow.

        :param timeout: how many seconds to wait; None: no limit
        :raises PoolTimeout: if it takes longer, or (`fail_fast`) connecting fails; the last connect
            error is its ``__cause__``
        :raises PoolMisuse: if `connect` or `configure` is wrong
        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        timeout = check_timeout(timeout)
        await checkpoint()
        began = self._clock()
        maintenance = self._maintenance
        while not maintenance.is_ready():
            if maintenance.core.cannot_connect():
                raise maintenance.core.connect_error()
            left = None if timeout is None else timeout - (self._clock() - began)
            if left is not None and left <= 0:
                raise maintenance.core.timed_out(timeout)
            await maintenance.wait_for_change(left)
            self._check_open()

    async def resize(self, min_size: int, max_size: int) -> None:
        """Set `min_size` and `max_size`. Returns at once; surplus connections go when idle.

        A pool that is opened again keeps them.

        :raises ValueError: if `min_size` is negative, `max_size` smaller than 1, or than `min_size`
        :raises TypeError: if one is not an integer
        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        min_size, max_size = check_sizes(min_size, max_size)
        self._check_open()
        self._options.min_size, self._options.max_size = min_size, max_size
        self._inventory.wake()
        await checkpoint()

    async def drain(self) -> None:
        """Replace all connections: the idle ones at once, the others when they come back.

        For instance, after a change of the password. Returns at once.

        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        self._maintenance.drain()
        await checkpoint()

    async def check(self) -> None:
        """Check all idle connections, one at a time, and replace those that fail.

        Returns when each has been checked. If it is cancelled, the check goes on. Without a `check`
        hook it does nothing.

        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        done: list[bool] = []
        self._maintenance.check_all(done)
        await checkpoint()
        while not done:
            await self._maintenance.wait_for_change(None)
            self._check_open()

    # -- Looking.

    @property
    def name(self) -> str:
        """The name of the pool in messages."""
        name: str = self._options.name
        return name

    @property
    def min_size(self) -> int:
        """How many connections are kept."""
        return self._maintenance.core.options.min_size

    @property
    def max_size(self) -> int:
        """How many connections there may be."""
        return self._maintenance.core.options.max_size

    def info(self, connection: T) -> ConnectionInfo:
        """Return age and use of a connection of this pool. May be called from anywhere.

        :raises ValueError: if it is not one
        """
        entry = self._inventory.entries.get(id(connection))
        if entry is None or entry.alive() is not connection:
            raise ValueError(f"this {type(connection).__name__} does not belong to {self.name}")
        return info(self._inventory, entry, self._clock())

    def statistics(self) -> PoolStatistics:
        """Return typed figures, with histograms. May be called from anywhere."""
        return self._maintenance.core.snapshot()

    def get_stats(self) -> dict[str, int]:
        """Return the figures of `statistics` by the names of ``psycopg_pool``, and some more.

        May be called from anywhere. At present: ``pool_min``, ``pool_max``, ``pool_size``,
        ``pool_available`` (idle), ``in_use``, ``connecting``, ``requests_waiting``. Since the pool
        was made: ``requests_num``, ``requests_queued`` (had to wait), ``requests_wait_ms``,
        ``requests_errors`` (got none), ``timeouts``, ``cancelled``, ``usage_ms``, ``returns_bad``
        (failed `reset`, or were discarded), ``connections_num`` (attempts to connect),
        ``connections_ms``, ``connections_errors``, ``connections_lost`` (failed `check`),
        ``leaks``, and ``closed_...`` for each reason.
        """
        return self._statistics.as_psycopg(self.statistics())

    def __repr__(self) -> str:
        state = "open" if self._inventory.closed is None else self._why_closed
        return (
            f"<aiosync.ConnectionPool {self.name!r} {state}: "
            f"{self._maintenance.core.size} of {self.max_size} connections, "
            f"{self._inventory.idle()} idle, {len(self._waiters)} waiting at {id(self):#x}>"
        )

    # -- For `Checkout`.

    def _entry_of(self, connection: T) -> PoolEntry[T] | None:
        """Return the entry of a borrowed connection."""
        return self._in_use.get(id(connection))

    def _forget(self, connection: T) -> None:
        """Let go of a connection that was closed by force."""
        self._inventory.reclaimed.pop(id(connection), None)


# For help(), `inspect.signature` and `unittest.mock.create_autospec`.
_connect = Parameter("connect", Parameter.POSITIONAL_OR_KEYWORD)
_self = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
vars(ConnectionPool.__init__)["__signature__"] = Signature([_self, _connect, *parameters()])


def open_pools() -> list[ConnectionPool[Any]]:
    """Return the pools that are open. May be called from any thread."""
    while True:
        try:
            return [pool for pool in _open_pools if not pool.closed]
        except RuntimeError:
            pass  # another thread has just opened one


def _after_fork() -> None:
    for pool in list(_open_pools):
        pool._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
