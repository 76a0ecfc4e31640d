"""The beginning of a connection: connect and configure, and what a failure means.

On the event loop of the pool. An attempt has a deadline and is shielded from cancellation.
"""

from __future__ import annotations

import os
import random
from contextlib import (
    _AsyncGeneratorContextManager,
    _GeneratorContextManager,
    nullcontext,
    suppress,
)
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

from anyio import CancelScope, Event, current_time

from .._errors import PoolMisuse
from .._scopes import abandon_scopes, innermost_scope
from ._admission import Admission
from ._core import copied
from ._entry import FOREVER, Failure, PoolEntry, State
from ._statistics import describe, log

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ._closing import Closing
    from ._core import Core
    from ._validation import Validation

T = TypeVar("T")

_chance = random.Random()  # noqa: S311  (not for secrets)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_chance.seed)  # otherwise all children do the same

# Each connection lives up to this much shorter than `max_lifetime`, so that not all are replaced at
# the same time.
_LIFETIME_JITTER = 0.025


# What takes too long, by whether the connection is being closed.
_VERBS = {False: "connect", True: "leave the context manager"}


class Connecting(Generic[T]):
    """Opens connections."""

    def __init__(self, core: Core[T], closing: Closing[T], validation: Validation[T]) -> None:
        self._core = core
        self._closing = closing
        self._validation = validation
        self.admission = Admission(core, closing)

    def connect(self, replaces: PoolEntry[T] | None = None) -> None:
        """Begin to open a connection.

        :param replaces: the one that it is to replace, in excess of `max_size`
        """
        attempt: PoolEntry[T] = PoolEntry(self._core.clock(), self._core.backoff.failures, replaces)
        self._core.attempts.append(attempt)
        has_limit = self._core.options.limit is not None
        self._core.tasks.start(self._admit if has_limit else self._connect, attempt)

    def _give_up(self, attempt: PoolEntry[T]) -> None:
        self._core.forget_attempt(attempt)
        self._core.wake()

    async def _admit(self, entry: PoolEntry[T]) -> None:
        """Connect, if there is a permit of `limit`."""
        try:
            is_admitted = await self.admission.admit(entry)
        except Exception as error:
            if entry.state is State.CONNECTING:  # otherwise it was stopped
                self._ended(entry, entry.since, error)
        except BaseException:
            self._give_up(entry)
            raise
        else:
            if is_admitted:
                await self._connect(entry)
            else:
                self._give_up(entry)

    async def _connect(self, entry: PoolEntry[T]) -> None:
        """Connect. With the option `context`, stay inside of the context manager until the end."""
        began = entry.since
        error: BaseException | None = None
        ready = False
        options, leave = self._core.options, Event()
        # One scope for the whole life, since the scopes inside of it have to be left before it.
        # It is not `fail_after`: on CPython 3.13, the frames of its context managers and the
        # traceback of a cancellation keep one another alive, and a half-made connection with them.
        scope = CancelScope(deadline=current_time() + options.connect_timeout, shield=True)
        try:
            with scope:
                entry.scope = scope
                if self._core.stopping:
                    return
                async with await self._call_connect() as connection:
                    self._adopt(entry, connection)
                    if options.configure is not None:
                        await self._core.tasks.call(options.configure, connection)
                    ready = True
                    entry.scope = None
                    if options.context:
                        scope.deadline = FOREVER
                        entry.leave = leave
                    self._connected(entry, began)
                    if options.context:
                        await leave.wait()
                    scope.deadline = current_time() + options.time_to_close
            if scope.cancelled_caught and (ready or current_time() >= scope.deadline):
                error = TimeoutError(f"it takes too long to {_VERBS[leave.is_set()]}")
            elif not (ready or scope.cancel_called):
                error = ConnectionError("its context manager hides why it can't be configured")
        except Exception as caught:
            # To leave our scope inside of one that is still open fails, too.
            misuse = caught.__context__
            error = misuse if isinstance(misuse, PoolMisuse) else caught
        except BaseException as caught:
            error = ConnectionError(f"the task of a connection was ended by {caught!r}")
            raise
        finally:
            if not ready:
                self._ended(entry, began, error)
            elif options.context:
                self._closing.context_left(entry, error)
            del error  # break the reference cycle through the traceback

    async def _call_connect(self) -> AbstractAsyncContextManager[T]:
        """Call `connect`. Return the context manager of the connection.

        :raises PoolMisuse: if it has entered a cancel scope and not left it
        """
        outside = innermost_scope()
        result = self._core.tasks.begin(self._core.options.connect)
        if self._core.options.context:
            return await _context_of(result)
        connection: T = await self._core.tasks.finish(result)
        if innermost_scope() is not outside:
            await self._core.tasks.call(self._core.options.close, connection)
            if innermost_scope() is not outside:
                abandon_scopes()
            raise PoolMisuse(
                "connect() of the pool entered a task group or cancel scope and did not leave it; "
                "return an async context manager, and give the pool context=True"
            )
        return nullcontext(connection)

    def _ended(self, entry: PoolEntry[T], began: float, error: BaseException | None) -> None:
        """Take note of the end of an attempt without a connection, because of `error` if any."""
        # Before any hook is called: a hook that raises must not prevent these.
        self._core.wake()
        self._core.statistics.count("connects")
        if entry.state is State.CONNECTING:
            self._core.forget_attempt(entry)
        else:
            self._closing.discard(entry, "configure", error)
        if error is not None:
            self._failed(entry, began, error)

    def _adopt(self, entry: PoolEntry[T], connection: T) -> None:
        if connection is None:
            raise PoolMisuse("connect() of the pool returned None; it must return a connection")
        if isinstance(connection, (_AsyncGeneratorContextManager, _GeneratorContextManager)):
            raise PoolMisuse(
                "connect() of the pool returned a context manager that was not entered; "
                "if it is an async one, give the pool context=True"
            )
        entries = self._core.inventory.entries
        known = entries.get(id(connection))
        if known is not None:
            if known.alive() is connection:
                raise PoolMisuse(
                    "connect() of the pool returned a connection that the pool has already; "
                    "it must make a new one each time"
                )
            self._closing.lost(known)  # it was collected, and the new one has its address
        now = self._core.clock()
        entry.connection = entry.kept = connection
        entry.key = id(connection)
        entry.number = next(self._core.statistics.numbers)
        entry.created = now
        lifetime = self._core.options.max_lifetime * (1 - _LIFETIME_JITTER * _chance.random())
        # Not later than now if it was retired meanwhile.
        entry.expires = min(entry.expires, now + lifetime)
        with suppress(TypeError):  # it can't be weakly referenced
            entry.ref = ref(connection, partial(self._closing.collected, entry))
            entry.kept = None
        self._core.attempts.remove(entry)
        entry.enter(State.CONFIGURING, now)
        entries[entry.key] = entry

    def _connected(self, entry: PoolEntry[T], began: float) -> None:
        self._core.wake()
        self._core.statistics.count("connects")
        now = self._core.clock()
        self._core.connect_time = now - began
        self._core.statistics.observe_connect(self._core.connect_time)
        if entry.replaces is None:
            self._validation.make_available(entry, is_new=True)
        else:
            entry.enter(State.STANDBY, now)
        self._core.last_error = None
        if self._core.backoff.succeeded(now):
            log.info("%s: connected again", self._core.name)
            self._core.emit("recovered")
        self._core.emit("connected", entry, seconds=self._core.connect_time)

    def _failed(self, entry: PoolEntry[T], began: float, error: BaseException) -> None:
        self._core.statistics.count("connect_errors")
        if entry.replaces is not None:  # perhaps the backend allows no more than `max_size`
            self._core.emit("connect_failed", error=error)
            return
        self._core.last_error = error
        now = self._core.clock()
        begins = self._core.backoff.failed(entry.failures, began, now, _chance.random())
        if isinstance(error, PoolMisuse):
            # Not `connect_failure`: another attempt may succeed before they run.
            self._core.inventory.fail(Failure(partial(copied, error)))
        elif self._core.cannot_connect():
            self._core.inventory.fail(self._core.connect_failure)
        self._core.emit("connect_failed", error=error)
        if begins:
            log.warning("%s: cannot connect: %s", self._core.name, describe(error))
            self._core.emit("outage", error=error)


async def _context_of(result: Any) -> AbstractAsyncContextManager[Any]:
    """Return the context manager that `connect` returned, or awaits to."""
    if not hasattr(type(result), "__aenter__") and isawaitable(result):
        result = await result
    if not hasattr(type(result), "__aenter__"):
        raise PoolMisuse(
            f"connect() of a pool with context=True must return an async context manager, "
            f"not {type(result).__name__}"
        )
    context: AbstractAsyncContextManager[Any] = result
    return context
