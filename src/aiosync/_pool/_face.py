"""ConnectionPool, as its users see it.

What must live here: arguments, results, errors, and the common path: to borrow an idle connection
and to give it back, which takes no lock, no task and no timer. The rest is the keeper's work.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload
from weakref import WeakSet

from anyio import WouldBlock, get_current_task

from .._errors import (
    NotCopied,
    PoolClosed,
    TooManyRequests,
    check_timeout,
)
from .._park import (
    checkpoint,
    current_token,
    ki_protected,
    loop_clock,
    loop_ended,
    task_waiter,
    thread_waiter,
    token_getter,
    wait_shielded,
    wait_with_timeout,
)
from ._borrowing import Checkout
from ._keeper import Keeper
from ._records import ALWAYS, Record, call_stack
from ._settings import Settings, check_sizes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self, Unpack

    from ._records import ConnectionInfo, PoolEvent
    from ._settings import PoolOptions

T = TypeVar("T")

# The states of a pool, in the words of the errors.
_NEW = "is not open yet: use it inside of 'async with pool:'"
_OPEN = "is open"
_CLOSED = "is closed"
_FORKED = "was opened before a fork, and belongs to the parent process: open one here"

_numbers = count(1)
_open_pools: WeakSet[ConnectionPool[Any]] = WeakSet()


class ConnectionPool(NotCopied, Generic[T]):
    """Connections, or anything else that is costly to make, borrowed by one at a time.

    ``async with pool:`` opens it, under asyncio or trio; ``async with pool.connection() as
    connection:`` borrows. Who finds no idle connection waits in line: strictly first come, first
    served. Connections are made, checked, reset and closed in the background, so no caller that is
    cancelled or runs out of time ever spoils one. OS threads share the pool by `as_threading`.

    All functions given to it may be plain or async, and are called on the event loop that opened
    the pool. A plain one that blocks, blocks that loop: let an async one call it by
    `anyio.to_thread.run_sync`, with a limiter of its own (or else the threads that wait for a
    connection may occupy all there are), and ``abandon_on_cancel=True`` (or else the pool can't be
    closed before it returns). `aiosync.recipes` does that for some drivers.

    The names are those of ``psycopg_pool``. All times are in seconds.

    :param connect: makes a connection; whatever it returns, but None
    :param close: closes the one it is given. By default its ``aclose()`` or else its ``close()`` is
        called, if it has one.
    :param check: raises, or returns False, if the connection it is given is of no use any more. It
        is then replaced, and nobody sees it.
    :param configure: prepares a new connection
    :param reset: called with each connection that comes back, before the next one gets it. If it
        raises, the connection is replaced.
    :param min_size: how many connections to keep, even if nobody wants them
    :param max_size: how many there may be at most; 1 or more
    :param name: for messages; by default "pool-1" and so on
    :param timeout: how long to wait for a connection at most, unless the call says otherwise
    :param max_waiting: how many may wait for a connection at the same time; 0: any number. Threads
        that come at the very same moment may be some more.
    :param max_lifetime: how old a connection may get before it is replaced; more than 0. Each is
        given up to 5% less, so that not all are replaced at once.
    :param max_idle: how long a connection may be idle before it is closed; more than 0. It is
        replaced if there are fewer than `min_size` left.
    :param lifo: whether the connection that was used last is used next; False: the one that has
        been idle for longest, or the one after that while that one is checked
    :param check_idle: a connection that was idle for longer than this is checked before anybody
        gets it. 0: each one is, always. None: never.
    :param check_timeout: how long `check` or `reset` may take. Who waits relies on them, and on a
        `connect`, for 0.1 seconds; then another connection is checked, or made, if there may be.
    :param connect_timeout: how long `connect` and `configure` may take together; by default as
        `timeout`, or 30 if that is 0 or None
    :param close_timeout: how long `close` may take (5 if this is 0); and how long the pool, when it
        is closed, waits for connections that are still borrowed, checked or reset
    :param max_connecting: how many connections are being made at the same time, at most
    :param reconnect_timeout: for how long connecting has to fail until `reconnect_failed` is called
    :param reconnect_failed: called with the pool, every `reconnect_timeout` while connecting fails.
        The pool goes on trying.
    :param fail_fast: if True, who finds no idle connection while connecting fails gets the
        PoolTimeout at once
    :param leak_timeout: a connection that is borrowed for longer is reported, once, with the stack
        of who took it: in the log, and to `on_event`. More than 0. To take note of stacks costs
        some microseconds each time.
    :param on_event: called with a `PoolEvent` for everything that happens in the background
    :param fast_acquire: if True, to borrow an idle connection does not yield to the event loop. The
        same as in `Semaphore`.
    :raises TypeError: if an argument is of the wrong type
    :raises ValueError: if a number is negative or NaN, or `min_size` exceeds `max_size`
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_fast_acquire",
        "_fresh",
        "_home",
        "_idle",
        "_is_plain",
        "_items",
        "_keeper",
        "_lent",
        "_lifo",
        "_popped",
        "_service",
        "_settings",
        "_state",
        "_waiters",
        "_watch",
        "_where",
    )

    # What `connect` returns, or awaits to, is what the pool is of.
    @overload
    def __init__(
        self, connect: Callable[[], Awaitable[T]], **options: Unpack[PoolOptions[T]]
    ) -> None: ...
    @overload
    def __init__(self, connect: Callable[[], T], **options: Unpack[PoolOptions[T]]) -> None: ...

    def __init__(
        self,
        connect: Callable[[], object],
        *,
        close: Callable[[T], object] | None = None,
        check: Callable[[T], object] | None = None,
        configure: Callable[[T], object] | None = None,
        reset: Callable[[T], object] | None = None,
        min_size: int = 0,
        max_size: int = 10,
        name: str | None = None,
        timeout: float | None = 30.0,
        max_waiting: int = 0,
        max_lifetime: float | None = 3600.0,
        max_idle: float | None = 600.0,
        lifo: bool = True,
        check_idle: float | None = 0.5,
        check_timeout: float | None = 5.0,
        connect_timeout: float | None = None,
        close_timeout: float | None = 5.0,
        max_connecting: int = 3,
        reconnect_timeout: float | None = 300.0,
        reconnect_failed: Callable[[ConnectionPool[T]], object] | None = None,
        fail_fast: bool = False,
        leak_timeout: float | None = None,
        on_event: Callable[[PoolEvent], object] | None = None,
        fast_acquire: bool = False,
    ) -> None:
        settings: Settings[T] = Settings(
            connect=connect,
            close=close,
            check=check,
            configure=configure,
            reset=reset,
            min_size=min_size,
            max_size=max_size,
            name=f"pool-{next(_numbers)}" if name is None else name,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            lifo=lifo,
            check_idle=check_idle,
            check_timeout=check_timeout,
            connect_timeout=connect_timeout,
            close_timeout=close_timeout,
            max_connecting=max_connecting,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            fail_fast=fail_fast,
            leak_timeout=leak_timeout,
            on_event=on_event,
        )
        self._settings = settings
        self._state = _NEW
        self._keeper: Keeper[T] = Keeper(settings, self, self._not_open)
        # The keeper's own, for the common path.
        self._idle = self._keeper.idle
        self._items = self._idle.items
        self._waiters = self._idle.waiters
        self._lent = self._keeper.lent
        self._fast_acquire = fast_acquire
        # Whether `acquire` may simply take an idle connection, if nobody waits.
        self._is_plain = fast_acquire and lifo and settings.leak_timeout == ALWAYS
        self._fresh = settings.fresh
        # Whether to note who borrows.
        self._watch = settings.leak_timeout != ALWAYS
        # Whether each connection that comes back goes to the keeper first.
        self._service = settings.reset is not None or settings.check_idle == 0
        # What `pop_stats` subtracts.
        self._popped: dict[str, int] = {}
        self._lifo = lifo
        # What tells whether `_home` is running on this thread; see `token_getter`.
        self._where: Callable[[], object] = current_token
        self._home: object = None
        self._clock: Callable[[], float] = monotonic

    # -- Open and closed.

    async def __aenter__(self) -> Self:
        """Open the pool, once. It does not wait for connections; see `wait`.

        :raises PoolClosed: if it has been opened before
        :raises anyio.NoEventLoopError: if not run by asyncio or trio
        """
        if self._state is not _NEW:
            raise PoolClosed(f"{self.name} can be opened only once; make a new pool")
        self._clock = self._keeper.clock = loop_clock()
        self._home = current_token()
        self._where = token_getter()
        self._state = _OPEN
        _open_pools.add(self)
        self._idle.open()
        self._keeper.begin()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool, and all of its connections.

        Who waits gets PoolClosed at once. Those who have borrowed a connection have `close_timeout`
        to give it back; then it is closed all the same. It can't be cancelled: a cancellation is
        raised when it is done, or at the next checkpoint.
        """
        if self._state is _FORKED:
            return
        self._state = _CLOSED
        self._idle.close(self._keeper.closed)
        self._keeper.post(self._keeper.stop)
        if not self._keeper.finished and loop_ended(self._home):
            raise RuntimeError(
                f"the event loop of {self.name} has ended without closing the pool; "
                f"it is too late to close its connections"
            )
        if get_current_task().id in self._keeper.tasks:
            return  # called by a function of ours, whose end the keeper waits for
        await wait_shielded(lambda: self._keeper.finished, self._keeper.leavers)
        if self._keeper.crash is not None:
            raise self._keeper.crash

    def _not_open(self) -> PoolClosed:
        return PoolClosed(f"{self.name} {self._state if self._state is not _OPEN else _CLOSED}")

    def _check_open(self) -> None:
        """Complain if nobody may use the pool, or nobody on this event loop."""
        if self._idle.shut is not None:
            raise self._not_open()
        if self._where() is not self._home:
            raise self._elsewhere()

    def _elsewhere(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} was opened on another event loop, to which its connections belong: "
            f"open a pool for each event loop; from a thread use as_threading(pool)"
        )

    def _leave_to_parent(self) -> None:
        self._state = _FORKED
        self._keeper.leave_to_parent()

    # -- Borrowing.

    @ki_protected
    async def acquire(self, timeout: float | None = None) -> T:
        """Borrow a connection, waiting in line for one if need be. It has to be given to `release`.

        May be called from any task on the event loop that opened the pool; from threads use
        `as_threading`. If it is cancelled nothing has been borrowed, and nothing is lost: what it
        had been handed already goes to the next in line.

        :param timeout: how long to wait at most, in seconds. 0 or less: take an idle connection, or
            none; one that would have to be checked before is taken as it is. None: the `timeout`
            of the pool. For ever: ``math.inf``.
        :raises PoolTimeout: if there was none in time, or (`fail_fast`) connecting fails
        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises TooManyRequests: if `max_waiting` others wait already
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        :raises TypeError: if `timeout` is no number
        :raises ValueError: if `timeout` is NaN
        """
        if (
            timeout is None
            and self._is_plain
            and not self._waiters
            and self._idle.shut is None
            and self._where() is self._home
        ):
            # Inlined: `HandoffQueue.get_nowait`.
            try:
                record: Any = self._items.pop()
            except IndexError:
                return await self._take(None, True)
            now = self._clock()
            if record.good_until > now:
                # The same as `_lend`, without the call.
                record.taken = now
                record.uses += 1
                connection: T = record.connection
                self._lent[record.key] = record
                record.connection = record.kept
                return connection
            if isinstance(record, Record):  # not a `Failure` that nobody took
                self._idle.lay_aside(record)
        return await self._take(timeout, True)

    @ki_protected
    def acquire_nowait(self) -> T:
        """Borrow a connection that is idle. The same as ``acquire(0)``, without a checkpoint.

        May be called from anywhere but another event loop; never blocks.

        :raises anyio.WouldBlock: if there is none. One is then made in the background, if there is
            room for it.
        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        if current_token() is not None:
            self._check_open()
        return self._grab()

    @ki_protected
    def _grab(self) -> T:
        if self._idle.shut is not None:
            raise self._not_open()
        now = self._clock()
        record = self._idle.pick(now, False)
        if record is None:
            if current_token() is None:
                self._check_loop()
            self._keeper.post(self._keeper.want)
            raise WouldBlock
        return self._lend(record, now)

    def connection(self, timeout: float | None = None) -> Checkout[T]:
        """Return what borrows a connection with ``async with``, and gives it back at the end.

        :param timeout: as that of `acquire`; so are the exceptions
        """
        return Checkout(self, timeout)

    @ki_protected
    async def _take(self, timeout: float | None, is_task: bool) -> T:
        # All in one, because each coroutine that a waiter sleeps through costs it 3%.
        idle = self._idle
        if idle.shut is not None:
            raise self._not_open()
        if is_task and self._where() is not self._home:
            raise self._elsewhere()
        began = self._clock()
        deadline = None
        if timeout is not None:
            timeout = check_timeout(timeout)
        else:
            timeout = self._settings.timeout
            if is_task and timeout is not None:
                deadline = began + timeout
        patient = timeout is None or timeout > 0
        record = idle.pick(began, patient) if self._items or idle.dormant else None
        if record is None and patient:
            # Tasks end with their event loop, but nobody would tell a thread.
            waiter = task_waiter() if is_task else thread_waiter(self._check_loop)
            self._admit(is_task)
            try:
                if deadline is None:
                    found = await idle.wait(waiter, timeout, None)
                else:
                    # Without a timer of our own, which is half of what it costs to wait.
                    self._keeper.watch(deadline)
                    found = await idle.wait(waiter, None, None, deadline)
            except BaseException as error:
                is_closed = isinstance(error, PoolClosed)  # see `_check_loop`
                self._count_wait("requests_errors" if is_closed else "cancelled", began)
                raise
            if isinstance(found, Record):
                now = self._clock()
                found.queued += 1
                found.waited += now - began
                return self._lend(found, now)
            self._count_wait("requests_errors", began)
            if found is None and self._state is not _FORKED:
                raise self._keeper.ledger.too_late(timeout)
            raise self._not_open() if found is None else found.error()
        if is_task and not self._fast_acquire:
            try:
                await checkpoint()
            except BaseException:
                if record is not None:
                    self._undo(record)
                raise
        if record is not None:
            return self._lend(record, self._clock())
        if not is_task:
            self._check_loop()
        self._keeper.ledger.count("requests_errors")
        self._keeper.post(self._keeper.want)
        raise self._keeper.ledger.too_late(timeout)

    @ki_protected
    def _admit(self, is_task: bool) -> None:
        """Let somebody begin to wait.

        :raises PoolTimeout: if that would be in vain; or another exception, see `acquire`
        """
        keeper = self._keeper
        if keeper.failures and self._settings.fail_fast and not keeper.has_hope():
            keeper.ledger.count("requests_errors")
            raise keeper.outage.error()
        if not is_task:
            self._check_loop()
        if 0 < self._settings.max_waiting <= len(self._idle.waiters):
            keeper.ledger.count("requests_errors")
            raise TooManyRequests(
                f"{self._settings.max_waiting} wait for a connection of {self.name} already"
            )

    def _check_loop(self) -> None:
        """Check that there is still somebody who might serve a thread.

        :raises PoolClosed: if not
        """
        if loop_ended(self._home):
            raise PoolClosed(f"the event loop of {self.name} has ended, without closing the pool")

    def _count_wait(self, outcome: str, began: float) -> None:
        """Count somebody who waited in vain."""
        count = self._keeper.ledger.count
        count(outcome)
        count("requests_queued")
        count("requests_wait_ms", 1000 * (self._clock() - began))

    @ki_protected
    def _undo(self, record: Record[T]) -> None:
        """Put back an idle connection that was taken, but not lent."""
        now = self._clock()
        if record.good_until > now:
            self._idle.put(record, first=True)
        elif record.expires <= now:
            self._idle.hand_over(record, "reset")
        else:
            self._idle.dormant.append(record)
            self._idle.call_keeper()

    @ki_protected
    def _lend(self, record: Record[T], now: float) -> T:
        connection: Any = record.connection
        if self._state is _FORKED:  # it was granted by the parent
            self._idle.hand_over(record, "reset")
            raise self._not_open()
        record.taken = now
        record.uses += 1
        if self._watch:
            record.stack = call_stack()
            record.reported = False
        self._lent[record.key] = record
        record.connection = record.kept
        if self._idle.shut is not None:
            self._idle.call_keeper()  # the pool is being closed, and looks for it
        return connection  # type: ignore[no-any-return]

    @ki_protected
    def release(self, connection: T) -> None:
        """Give back a connection: the first in line gets it, or it is idle.

        May be called from anywhere: any task, any thread, a signal handler, a finalizer. Never
        blocks, and can't be cancelled; `reset` is called later, in the background. After the pool
        was closed by force over this connection it does nothing.

        :raises ValueError: if it is not borrowed: from another pool, or given back before
        :raises PoolClosed: if it was borrowed before a fork, by the parent process
        """
        try:
            record = self._lent.pop(id(connection))
        except KeyError:
            self._refuse(connection)
            return
        now = self._clock()
        record.usage += now - record.taken
        record.idle_since = now
        record.connection = connection
        good_until = now + self._fresh
        record.good_until = good_until if good_until < record.expires else record.expires
        if self._service or record.expires <= now:
            self._keeper.hand_over(record, "reset")
        elif self._lifo:
            # The same as `IdleQueue.put`, without the call.
            self._items.append(record)
            if self._waiters or self._idle.shut is not None:
                self._idle.dispatch()
        else:
            self._idle.put(record)

    @ki_protected
    def discard(self, connection: T) -> None:
        """Give back a connection that is of no use any more. It is closed, and replaced.

        Like `release` in all else. Inside of ``async with pool.connection()`` it may be called too.
        """
        record = self._lent.get(id(connection))
        if record is not None:
            record.retire("discard")
        self.release(connection)

    def _refuse(self, connection: T) -> None:
        """Complain that `connection` is not borrowed, or tell that this does not matter."""
        if self._state is _FORKED:
            raise self._not_open()
        if self._keeper.forced.pop(id(connection), None) is None:
            raise ValueError(
                f"this {type(connection).__name__} is not borrowed from {self.name}: "
                f"it is from elsewhere, or has been given back before"
            )

    # -- Keeping.

    async def wait(self, timeout: float | None = 30.0) -> None:
        """Wait until the pool has `min_size` connections. May be cancelled.

        To be called by a task on the event loop that opened the pool, as all that follow.

        :param timeout: how many seconds at most; None: no limit
        :raises PoolTimeout: if it takes longer; the last connect error is its ``__cause__``
        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        timeout = check_timeout(timeout)
        await checkpoint()
        began = self._clock()
        keeper = self._keeper
        while not keeper.is_ready():
            left = None if timeout is None else timeout - (self._clock() - began)
            if left is not None and left <= 0:
                raise keeper.ledger.too_late(timeout)
            await self._hear(left)
            self._check_open()

    async def resize(self, min_size: int, max_size: int) -> None:
        """Set `min_size` and `max_size`. Returns at once; what is too much goes when it is idle.

        :raises ValueError: if `min_size` is negative, `max_size` smaller than 1, or than `min_size`
        :raises TypeError: if one is no int
        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        check_sizes(min_size, max_size)
        self._check_open()
        self._keeper.resize(min_size, max_size)
        await checkpoint()

    async def drain(self) -> None:
        """Replace all connections: the idle ones at once, the others when they come back.

        For instance, after a change of the password. Returns at once.

        :raises PoolClosed: if the pool is not open
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        self._keeper.drain()
        await checkpoint()

    async def check(self) -> None:
        """Check all idle connections, one at a time, and replace those that fail.

        Returns when each has been checked. If it is cancelled the check goes on. Without a `check`
        it does nothing.

        :raises PoolClosed: if the pool is not open, or is closed meanwhile
        :raises RuntimeError: if called on another event loop than the one that opened the pool
        """
        self._check_open()
        keeper = self._keeper
        done: list[bool] = []
        keeper.post(partial(keeper.begin_check, done))
        await checkpoint()
        while not done:
            await self._hear(None)
            self._check_open()

    async def _hear(self, timeout: float | None) -> None:
        """Sleep until the keeper has something to tell; or it may not be so."""
        keeper = self._keeper
        waiter = task_waiter()
        keeper.expectant.append(waiter)
        try:
            await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
        finally:
            keeper.expectant.remove(waiter)

    # -- Telling.

    @property
    def name(self) -> str:
        """What the pool is called in messages."""
        return self._settings.name

    @property
    def min_size(self) -> int:
        """How many connections are kept."""
        return self._keeper.min_size

    @property
    def max_size(self) -> int:
        """How many connections there may be."""
        return self._keeper.max_size

    def info(self, connection: T) -> ConnectionInfo:
        """Tell age and use of a connection of this pool. May be called from anywhere.

        :raises ValueError: if it is not one
        """
        record = self._keeper.records.get(id(connection))
        if record is None or record.alive() is not connection:
            raise ValueError(f"this {type(connection).__name__} does not belong to {self.name}")
        return self._keeper.ledger.info(record)

    def get_stats(self) -> dict[str, int]:
        """Return figures, by the names of ``psycopg_pool`` and some more.

        May be called from anywhere. At present: ``pool_min``, ``pool_max``, ``pool_size``,
        ``pool_available`` (idle), ``in_use``, ``connecting``, ``requests_waiting``. Since the pool
        was made: ``requests_num``, ``requests_queued`` (had to wait), ``requests_wait_ms``,
        ``requests_errors`` (got none), ``timeouts``, ``cancelled``, ``usage_ms``, ``returns_bad``
        (failed `reset`, or were discarded), ``connections_num`` (attempts to connect),
        ``connections_ms``, ``connections_errors``, ``connections_lost`` (failed `check`),
        ``leaks``, and ``closed_...`` for each reason.
        """
        return self._stats(self._keeper.ledger.counts(), self._popped)

    def pop_stats(self) -> dict[str, int]:
        """Do what `get_stats` does, and let what is counted begin at 0 again."""
        counts = self._keeper.ledger.counts()
        popped, self._popped = self._popped, counts
        return self._stats(counts, popped)

    def _stats(self, counts: dict[str, int], popped: dict[str, int]) -> dict[str, int]:
        return {
            **self._keeper.ledger.gauges(),
            **{name: count - popped.get(name, 0) for name, count in counts.items()},
        }

    def __repr__(self) -> str:
        keeper = self._keeper
        state = "open" if self._idle.shut is None else self._state
        return (
            f"<aiosync.ConnectionPool {self.name!r} {state}: {keeper.size} of {self.max_size} "
            f"connections, {self._idle.idle()} idle, {len(self._idle.waiters)} waiting "
            f"at {id(self):#x}>"
        )


def _after_fork() -> None:
    for pool in list(_open_pools):
        pool._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
