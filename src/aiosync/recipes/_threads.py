"""Worker threads, and how to close a connection that another thread may be using."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import (
    CancelScope,
    CapacityLimiter,
    NoEventLoopError,
    get_cancelled_exc_class,
    move_on_after,
    sleep,
    to_thread,
)
from anyio.lowlevel import current_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Lock
    from typing import Self

C = TypeVar("C")
R = TypeVar("R")

# How long to wait until a connection that nobody wants is closed, in seconds. The thread goes on.
_PATIENCE = 5.0
# How often a call is interrupted that has been cancelled: at first, and at the least, in seconds.
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


class _NoLimit(CapacityLimiter):
    """A limiter that never waits. It has what anyio (on asyncio) and trio call, and no more.

    One of anyio with infinitely many tokens yields to the event loop for each call of a thread.
    """

    def __new__(cls) -> Self:
        return object.__new__(cls)

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def acquire_on_behalf_of(self, borrower: object) -> None: ...

    def release_on_behalf_of(self, borrower: object) -> None: ...


_NO_LIMIT = _NoLimit()


class Threads:
    """The worker threads of one pool. A caller that leaves loses nothing.

    Only the pool limits their number: so many connections, one call of each.
    """

    async def run(self, work: Callable[..., R], *args: Any) -> R:
        """Call ``work(*args)`` in a thread. If cancelled, let the thread go on alone."""
        return await to_thread.run_sync(
            partial(work, *args), abandon_on_cancel=True, limiter=_NO_LIMIT
        )

    async def call(
        self, hook: Callable[[C], object], connection: C, lock: Lock | None = None
    ) -> None:
        """Call a hook: a plain one in a thread, an async one here.

        :param lock: held by the thread meanwhile
        """

        def work() -> object:
            with nullcontext() if lock is None else lock:
                return hook(connection)

        result = hook(connection) if iscoroutinefunction(hook) else await self.run(work)
        if isawaitable(result):
            await result

    async def run_to_end(
        self, work: Callable[[], R], interrupt: Callable[[], object] | None = None
    ) -> R:
        """Call `work` in a thread. If cancelled, wait for its end, and call `interrupt` meanwhile.

        Unlike `anyio.to_thread.run_sync`, this holds for ``task.cancel()`` of asyncio too.

        :param interrupt: ends what `work` is doing; plain or async. It is repeated, because it has
            no effect between two statements.
        """
        # To remove it is to decide whether `work` is called at all.
        turn = [True]
        ended: list[bool] = []

        def job() -> Any:
            try:
                return work() if _take(turn) else None  # None: nobody waits for it
            finally:
                ended.append(True)

        try:
            return await self.run(job)
        except BaseException:
            if not _take(turn) and not ended:
                await self._wait(ended, interrupt)
            raise

    async def _wait(self, ended: list[bool], interrupt: Callable[[], object] | None) -> None:
        pause = _PAUSE
        with CancelScope(shield=True):
            while not ended:
                # A scope does not shield from `task.cancel()`. The caller of this method raises
                # the first cancellation again.
                with suppress(get_cancelled_exc_class()):
                    with suppress(Exception):
                        result = interrupt() if interrupt is not None else None
                        if isawaitable(result):
                            await result
                    await sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def run_anyway(self, work: Callable[..., object], *args: Any) -> None:
        """Call ``work(*args)`` in a thread, also if cancelled before that thread has begun."""
        turn = [True]  # as in `run_to_end`

        def job() -> None:
            if _take(turn):
                work(*args)

        try:
            await self.run(job)
        finally:
            if _take(turn):
                threading.Thread(target=work, args=args, daemon=True).start()

    async def make(self, connect: Callable[[], R], close: Callable[[R], object]) -> R:
        """Call `connect` in a thread. If cancelled, its result is closed, be it now or later."""
        # To remove it from here is to claim it.
        made: list[R] = []
        abandoned = False

        def work() -> None:
            made.append(connect())
            if abandoned:
                drop()

        def drop() -> None:
            try:
                connection = made.pop()
            except IndexError:
                return
            close(connection)

        try:
            await self.run(work)
            return made.pop()
        except BaseException:
            # First say so, then look: `work` does it the other way round, so one of us finds it.
            abandoned = True
            if made:
                with move_on_after(_PATIENCE, shield=True):
                    await self.run(drop)
            raise


def _take(turn: list[bool]) -> bool:
    try:
        return turn.pop()
    except IndexError:
        return False


def close_when_free(connection: Any, lock: Lock, stop: Callable[[], object]) -> None:
    """Close a connection, in a thread; but end what another thread is doing with it before.

    It may be a call that took too long, so that its thread was left behind, or a borrower that had
    to be left behind. A driver may crash if a connection is closed while it is used.
    """
    if not lock.acquire(blocking=False):
        stop()
        lock.acquire()
    try:
        connection.close()
    finally:
        lock.release()


def in_event_loop() -> bool:
    """Return whether an event loop is running on this thread."""
    try:
        current_token()
    except NoEventLoopError:
        return False
    return True
