"""The task that keeps a pool in order: it carries plans out, and closes everything at the end."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from anyio import CancelScope, get_cancelled_exc_class, get_current_task

from .._park import (
    current_token,
    loop_clock,
    loop_ended,
    task_waiter,
    wait_shielded,
    wait_with_timeout,
    wake_all,
)
from ._closing import Closing
from ._connecting import Connecting
from ._core import Core
from ._entry import FOREVER, Failure, PoolEntry, State
from ._policy import Plan, plan
from ._validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter
    from ._options import Options
    from ._statistics import Statistics

T = TypeVar("T")

# What belongs to the parent of this process.
_inherited: list[object] = []


class Maintenance(Generic[T]):
    """The background of a pool, from when it is opened until it is closed.

    :param closed: returns the error for callers that come when the pool is closed
    """

    def __init__(
        self, options: Options, statistics: Statistics, closed: Callable[[], Exception]
    ) -> None:
        self.closed = Failure(closed)
        self.core: Core[T] = Core(options, statistics, self.closed)
        self.inventory = self.core.inventory
        self.closing = Closing(self.core)
        self.validation = Validation(self.core, self.closing)
        self.connecting = Connecting(self.core, self.closing, self.validation)
        self.home: object = None
        # Callers that wait for `is_ready` or for a check of all, and for the end.
        self._ready_waiters: list[Waiter] = []
        self._close_waiters: list[Waiter] = []
        self.finished = False

    # -- From any thread.

    def stop(self) -> None:
        """Begin to close everything."""
        self.inventory.close(self.closed)
        self.core.stopping = True
        self.core.wake()

    def leave_to_parent(self) -> None:
        """In a forked process: call no hook any more, and let Python collect no connection.

        A driver's finalizer might say good-bye to the server on a socket of the parent.
        """
        self.core.tasks.forked = self.core.stopping = True
        entries = self.inventory.entries.values()
        _inherited.append((self, [entry.alive() for entry in entries]))

    # -- For tasks of users, on the event loop of the pool.

    def begin(self) -> None:
        """Start the task."""
        self.core.clock = loop_clock()
        self.home = current_token()
        self.inventory.closed = None
        self.core.tasks.start(self._maintain, never_started=self._finish)
        self.connecting.admission.begin()

    async def join(self) -> None:
        """Wait until everything is closed. A cancellation is raised afterwards."""
        if get_current_task().id in self.core.tasks.ids:
            return  # a hook closes the pool; maintenance waits for the end of the hook
        await wait_shielded(lambda: self.finished, self._close_waiters)
        if self.core.tasks.crash is not None:
            raise self.core.tasks.crash

    @property
    def lost_loop(self) -> bool:
        """Whether the event loop has ended before the pool was closed."""
        return not self.finished and loop_ended(self.home)

    def is_ready(self) -> bool:
        """Return whether there are as many connections as there should be."""
        unready = self.inventory.count(State.CONFIGURING, State.STANDBY, State.CLOSING)
        return len(self.inventory.entries) - unready >= self.core.options.min_size

    async def wait_for_change(self, timeout: float | None) -> None:
        """Sleep until something may have changed."""
        waiter = task_waiter()
        self._ready_waiters.append(waiter)
        try:
            await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
        finally:
            self._ready_waiters.remove(waiter)

    def drain(self) -> None:
        """Have all connections replaced."""
        for entry in (*self.core.attempts, *self.inventory.entries.values()):
            entry.retire("drain")
        self.core.wake()

    def check_all(self, done: list[bool]) -> None:
        """Check all connections that are idle now, and then append to `done`."""
        self.core.post(partial(self.core.tasks.start, self._check_all, done))

    async def _check_all(self, done: list[bool]) -> None:
        try:
            if self.core.options.check is not None:
                await self.validation.check_all()
        finally:
            done.append(True)
            wake_all(self._ready_waiters)

    # -- The task.

    async def _maintain(self) -> None:
        try:
            try:
                while not self.core.stopping:
                    await self._turn(self._carry_out())
            except GeneratorExit:
                raise  # nobody runs this task any more, so nothing can be done
            except BaseException:
                await self._shut_down()
                raise
            await self._shut_down()
        finally:
            self._finish()

    async def _turn(self, look_at: float) -> None:
        """Wait for a job, or until `look_at`; then do all jobs there are."""
        timeout = None if look_at == FOREVER else max(0.0, look_at - self.core.clock())
        jobs = self.inventory.jobs
        job = await jobs.wait(task_waiter(), timeout, None)
        while job is not None:
            if isinstance(job, PoolEntry):
                self.validation.settle(job)
            else:
                job()
            job = jobs.get_nowait(None)

    def _carry_out(self) -> float:
        """Plan what is to be done, and do it. Return when to look again."""
        now = self.core.clock()
        inventory = self.inventory
        if now >= inventory.next_deadline:
            inventory.next_deadline = inventory.expire(now)
        # In this order; see `Inventory.has_capacity`.
        inventory.has_capacity = self.core.size < self.core.options.max_size
        self.connecting.admission.stop_needless()
        todo = plan(self.core.situation(), now)
        for entry, reason in todo.close:
            self.closing.close(entry, reason)
        for entry in todo.check:
            if inventory.take(entry):
                self.validation.check(entry)
        for entry in todo.overdue:
            self.closing.end_reset(entry, now)
        for entry in todo.leaked:
            self.closing.report_leak(entry)
        self._open(todo)
        if not self.connecting.admission.is_waiting:
            inventory.wanted = False
        if todo.check or todo.admit or todo.close:
            self.core.wake()  # the plan does not know what comes of that
        inventory.has_capacity = todo.has_capacity
        if self.is_ready() or self.core.cannot_connect():
            wake_all(self._ready_waiters)
        return min(todo.look_at, inventory.next_deadline)

    def _open(self, todo: Plan) -> None:
        for entry in todo.admit:
            entry.replaces = None
            self.validation.make_available(entry, is_new=True)
        for _ in range(todo.open):
            self.connecting.connect()
        for entry in todo.replace:
            entry.renewed = True
            self.connecting.connect(entry)

    # -- The end.

    async def _shut_down(self) -> None:
        """Close the idle connections, those that come back, and in the end all others."""
        core = self.core
        core.stopping = True
        options = core.options = copy(core.options)
        options.min_size = options.max_size = 0  # so all are to be closed
        self.inventory.close(self.closed)
        self.closing.cancel(State.CONNECTING, State.CONFIGURING)
        deadline = core.clock() + options.close_timeout
        cancellation: BaseException | None = None
        with CancelScope(shield=True):
            while not core.tasks.forked and (core.size or len(core.tasks.pending) > 1):
                is_late = core.clock() >= deadline
                if is_late:
                    # Each time: a connection may have been on its way to a borrower.
                    self.closing.close_by_force()
                    self.closing.cancel(State.VALIDATING)
                    options.check_timeout = 0.0
                look_at = self._carry_out()
                try:
                    await self._turn(look_at if is_late else min(look_at, deadline))
                except get_cancelled_exc_class() as error:  # a native one
                    cancellation = error
        if cancellation is not None:
            try:
                raise cancellation
            finally:
                del cancellation  # break the reference cycle through the traceback

    def _finish(self) -> None:
        self.finished = True
        self.connecting.admission.end()
        self.inventory.close(self.closed)
        wake_all(self._ready_waiters)
        wake_all(self._close_waiters.copy())
