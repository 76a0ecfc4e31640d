"""from_threading: objects that threads own and that cannot be changed, awaited by tasks.

What must live here: all that touches an object of `threading`. Such an object can only be waited
for by blocking a thread, and a thread that blocks in it can't be called back. So nobody blocks in
it for long: one helper thread for each object, and only while tasks wait, tries for a moment again
and again, and hands what it gets to the oldest of them. What nobody wants any more goes back. Only
a barrier takes a thread for each party, because each has to arrive; `abort` calls that one back.

All these threads are our own, so that no worker thread of anyio's is occupied.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Union, overload

from anyio import CancelScope

from ._errors import NotCopied, check_timeout, normalize_timeout
from ._handoff import HandoffQueue
from ._park import checkpoint, is_abandoned, task_waiter, wait_shielded, wait_with_timeout, wake_all

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from ._park import Waiter

# How long a helper blocks in a foreign object, in seconds: first, and at most. Each time in vain it
# stays twice as long, since whoever waits there loses its place in line by looking around. A task
# that was cancelled waits for the helper to come out.
_MOMENT, _WHILE = 0.02, 0.5

_LOCK = type(threading.Lock())  # before Python 3.13, threading.Lock is a function


class _Helper(HandoffQueue[Union[bool, BaseException]]):
    """A thread that tries to get something, as long as somebody waits for it.

    What was got, or what went wrong, is handed over; nothing stays in the queue if nobody waits.
    """

    __slots__ = ("_give_back", "_lock", "_out", "_try", "_waiters")

    def __init__(self, try_for: Callable[[float], object], give_back: Callable[[], object]) -> None:
        super().__init__()
        # Tries for so many seconds; something true if it was successful.
        self._try = try_for
        self._give_back = give_back
        # Protects the two below; held for an instant by the helper and by tasks.
        self._lock = threading.Lock()
        # Whether no helper is running.
        self._out = True
        # Those who wait for the helper to come out of the foreign object.
        self._waiters: list[Waiter] = []

    async def get(self, timeout: float | None) -> bool:
        """Wait in line for what the helper gets; False if the time is over.

        When this returns False or raises, the helper has come out of the foreign object, unless
        others still wait.
        """
        waiter = task_waiter()
        try:
            got = await self.wait(waiter, timeout, False)
        except GeneratorExit:
            raise  # nobody runs us any more, so we can't wait
        except BaseException:
            await self._come_out()
            raise
        if isinstance(got, BaseException):
            raise got
        if not got:
            await self._come_out()
        return got

    def join(self, waiter: Waiter, deadline: float | None = None) -> None:
        super().join(waiter, deadline)
        self._send()

    def _send(self) -> None:
        with self._lock:
            if self._out:
                _start(self._run)
                self._out = False

    def _run(self) -> None:
        moment = _MOMENT
        while not self._stop():
            try:
                for waiter in list(self.waiters):
                    if is_abandoned(waiter):
                        self.waiters.pop(waiter, None)
                if self._try(moment):
                    self.put(True)
                    moment = _MOMENT
                else:
                    moment = min(2 * moment, _WHILE)
            except BaseException as error:
                self.put(error)

    def _stop(self) -> bool:
        """Stop if nobody waits any more."""
        with self._lock:
            if self.waiters:
                return False
            self._out = True
        while self._waiters:
            wake_all([self._waiters.pop()])
        return True

    def put(self, item: bool | BaseException) -> None:
        """Hand what was got to the oldest who waits, or back."""
        super().put(item)
        while left := self.get_nowait(False):
            if left is True:
                try:
                    self._give_back()
                except (ValueError, RuntimeError):
                    pass  # somebody else has released it in our place

    async def _come_out(self) -> None:
        """Wait until no helper is inside the foreign object, unless others wait for it."""
        await wait_shielded(self._is_out, self._waiters)

    def _is_out(self) -> bool:
        with self._lock:
            return self._out or bool(self.waiters)


def _start(run: Callable[[], object]) -> None:
    # A daemon, because the loop of those who wait may be closed without their being told.
    threading.Thread(target=run, name="aiosync.from_threading", daemon=True).start()


class _View(NotCopied):
    """A view of an object that threads own."""

    __slots__ = ("__weakref__", "_owned")

    def __init__(self, owned: Any) -> None:
        self._owned = owned

    def __repr__(self) -> str:
        return f"<from_threading {self._owned!r}>"


class _Acquirable(_View):
    __slots__ = ("_helper",)

    def __init__(self, owned: Any) -> None:
        super().__init__(owned)
        self._helper = _Helper(lambda moment: owned.acquire(True, moment), owned.release)

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Acquire the object of the threads, waiting in line with other tasks if need be.

        May be called from any task under asyncio or trio. If it is cancelled, or returns False, it
        holds nothing, and no thread is left that would take anything later. This may delay it: by
        some hundredths of a second, or half a second if it has waited for longer than that.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if it was acquired, False if not (in time)
        :raises ValueError: if `blocking` is False and there is a `timeout`, or if that is NaN
        :raises TypeError: if `timeout` is no number
        :raises anyio.NoEventLoopError: if not run by asyncio or trio
        """
        timeout = normalize_timeout(blocking, timeout)
        acquired = not self._helper.waiters and self._owned.acquire(False)
        if not acquired and timeout != 0:
            return await self._helper.get(timeout)
        try:
            await checkpoint()
        except BaseException:
            if acquired:
                self._owned.release()
            raise
        return bool(acquired)

    def __aenter__(self) -> Coroutine[Any, Any, bool]:
        """Do what ``acquire()`` does."""
        return self.acquire()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what ``release()`` does; there is nothing to wait for."""
        self._owned.release()


class TaskSemaphore(_Acquirable):
    """What `from_threading` makes of a `threading.Semaphore` or `threading.BoundedSemaphore`."""

    __slots__ = ()

    def release(self, n: int = 1) -> None:
        """Release the semaphore `n` times; threads and tasks that wait for it get a permit.

        May be called from anywhere. Blocks no longer than `release` of the semaphore itself.

        :raises ValueError: if `n` is smaller than 1, or by a BoundedSemaphore released too often
        """
        self._owned.release(n)


class TaskLock(_Acquirable):
    """What `from_threading` makes of a `threading.Lock`."""

    __slots__ = ()

    def release(self) -> None:
        """Release the lock, whoever holds it. May be called from anywhere.

        :raises RuntimeError: if it is not locked
        """
        self._owned.release()

    def locked(self) -> bool:
        """Tell whether the lock is locked."""
        return bool(self._owned.locked())


class _Vigil:
    """What the helper of an event and those who wait for it have in common."""

    __slots__ = ("over", "waiters")

    def __init__(self) -> None:
        self.over = False
        self.waiters: dict[Waiter, None] = {}


class TaskEvent(_View):
    """What `from_threading` makes of a `threading.Event`."""

    __slots__ = ("_lock", "_vigil")

    def __init__(self, owned: threading.Event) -> None:
        super().__init__(owned)
        # Protects the one below, and its contents; held for an instant by the helper and by tasks.
        self._lock = threading.Lock()
        # That of the helper that waits for the event; None if there is none.
        self._vigil: _Vigil | None = None

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set.

        May be called from any task under asyncio or trio, and may be cancelled. Who comes just
        after an event was set and cleared at once may still be told that it was set.

        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if the event is or was set, False if it was not in time; as
            `threading.Event.wait`
        :raises TypeError: if `timeout` is no number
        :raises ValueError: if `timeout` is NaN
        :raises anyio.NoEventLoopError: if not run by asyncio or trio
        """
        timeout = normalize_timeout(True, timeout)
        is_set = bool(self._owned.is_set())
        if is_set or timeout == 0:
            await checkpoint()
            return is_set
        waiter = task_waiter()
        with self._lock:
            vigil = self._vigil
            if vigil is None:
                vigil = _Vigil()
                _start(lambda: self._keep(vigil))
                self._vigil = vigil
            vigil.waiters[waiter] = None
        try:
            await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
        finally:
            with self._lock:
                vigil.waiters.pop(waiter, None)
        return vigil.over

    def _keep(self, vigil: _Vigil) -> None:
        # Seldom interrupted: whoever waits for an event takes nothing from anybody, and between two
        # waits an event that is set and cleared at once might be missed.
        while not self._owned.wait(_WHILE):
            with self._lock:
                if all(map(is_abandoned, vigil.waiters)):
                    self._vigil = None
                    return
        with self._lock:
            self._vigil = None
            vigil.over = True
            waiters = list(vigil.waiters)
        wake_all(waiters)

    def is_set(self) -> bool:
        """Tell whether the event is set."""
        return bool(self._owned.is_set())

    def set(self) -> None:
        """Set the event: all threads and tasks that wait go on. May be called from anywhere."""
        self._owned.set()

    def clear(self) -> None:
        """Reset the event, so that who waits from now on waits for the next `set`."""
        self._owned.clear()


class TaskBarrier(_View):
    """What `from_threading` makes of a `threading.Barrier`."""

    __slots__ = ()

    async def wait(self, timeout: float | None = None) -> int:
        """Arrive at the barrier of the threads, and wait until all parties have.

        May be called from any task under asyncio or trio. Each call takes a thread of its own while
        it waits, which counts against nobody's limit, and an action runs in the thread that
        arrives last. If the task is cancelled before the barrier has let its thread pass, it aborts
        the barrier, so the others get BrokenBarrierError.

        :param timeout: how many seconds to wait for the others to arrive, at most; then the barrier
            is broken for all. None: the barrier's own timeout.
        :return: the index of the party in its round, 0 to parties - 1
        :raises threading.BrokenBarrierError: if the barrier is broken, or is broken or reset while
            waiting
        :raises TypeError: if `timeout` is no number
        :raises ValueError: if `timeout` is NaN
        :raises anyio.NoEventLoopError: if not run by asyncio or trio
        """
        if timeout is not None and check_timeout(timeout) is None:
            timeout = threading.TIMEOUT_MAX  # for ever; None would mean the barrier's own
        waiter = task_waiter()
        outcome: list[int | BaseException] = []

        def arrive() -> None:
            try:
                outcome.append(self._owned.wait(timeout))
            except BaseException as error:
                outcome.append(error)
            wake_all([waiter])

        _start(arrive)
        try:
            await waiter
        except GeneratorExit:
            # Nobody runs us any more, so we can't wait.
            _start(lambda: self._call_back(outcome))
            raise
        except BaseException:
            with CancelScope(shield=True):
                waiter = task_waiter()
                try:
                    _start(lambda: self._call_back(outcome, waiter))
                except RuntimeError:  # there are too many threads
                    self._call_back(outcome)
                else:
                    await waiter
            raise
        found = outcome.pop()
        try:
            if isinstance(found, BaseException):
                raise found
            return found
        finally:
            del found  # or else an error would keep itself, by its traceback

    def _call_back(self, outcome: list[int | BaseException], *waiters: Waiter) -> None:
        """Abort the barrier, unless it has let our thread pass, until that has come out of it.

        By a thread of its own: an action that is running holds the lock of the barrier.
        """
        pause = 0.001
        while not outcome:
            time.sleep(pause)  # it may be on its way out
            pause = min(2 * pause, _MOMENT)
            # If all have arrived the action is running. To abort would wait for it, and then split
            # the round: those who are quick would pass, and the others would not. If nobody waits
            # the round has tripped, and lets its parties out; or our thread is yet to arrive.
            if not outcome and 0 < self._owned.n_waiting < self._owned.parties:
                self._owned.abort()
        wake_all(waiters)

    def abort(self) -> None:
        """Break the barrier. Waits for an action that is running. See `threading.Barrier.abort`."""
        self._owned.abort()

    def reset(self) -> None:
        """Make the barrier as new. Waits for an action that is running; as in `threading`."""
        self._owned.reset()

    @property
    def parties(self) -> int:
        """How many have to arrive."""
        return int(self._owned.parties)

    @property
    def n_waiting(self) -> int:
        """How many have arrived in the current round."""
        return int(self._owned.n_waiting)

    @property
    def broken(self) -> bool:
        """Whether `wait` raises BrokenBarrierError."""
        return bool(self._owned.broken)


@overload
def from_threading(owned: threading.Semaphore) -> TaskSemaphore: ...
@overload
def from_threading(owned: threading.Barrier) -> TaskBarrier: ...
@overload
def from_threading(owned: threading.Event) -> TaskEvent: ...
@overload
def from_threading(owned: threading.Lock) -> TaskLock: ...


def from_threading(owned: Any) -> TaskSemaphore | TaskBarrier | TaskEvent | TaskLock:
    """Return a view of `owned` for tasks: the same object, to be awaited.

    For code that can't be changed: if you can, make the object one of aiosync's, and give the
    threads `as_threading` of it, which is faster by far. Make one view and share it: tasks that use
    the same view stand in one line, but each view stands in line with the threads for itself. May
    be called from anywhere.

    A task that waits for a semaphore or a lock has no fixed place among the threads that do, since
    `threading` promises no order. While tasks wait, one thread of ours waits with them for each
    view; for a barrier one for each task.

    :param owned: a `threading.Semaphore`, `BoundedSemaphore`, `Barrier`, `Lock` or `Event`
    :raises TypeError: if it is anything else
    """
    if isinstance(owned, threading.Semaphore):
        return TaskSemaphore(owned)
    if isinstance(owned, threading.Barrier):
        return TaskBarrier(owned)
    if isinstance(owned, threading.Event):
        return TaskEvent(owned)
    if isinstance(owned, _LOCK):
        return TaskLock(owned)
    raise TypeError(
        f"from_threading() takes a Semaphore, BoundedSemaphore, Barrier, Lock or Event of "
        f"threading, not {type(owned).__name__}"
    )
