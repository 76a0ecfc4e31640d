"""One blocked task or thread: how it sleeps, and how anything wakes it.

This is the only module that imports `asyncio`, `trio` or `_thread`. It knows nothing of permits,
rounds or queues.

A *waiter* stands for one sleep of one task or thread. Its owner creates it, publishes it, and then
sleeps by awaiting it. From the moment it is published, any thread may wake it.

- A task on the event loop of the waiter wakes it with ``set_result(item)``, and the ``await``
  returns the item. InvalidStateError means that the waiter is over: cancelled, timed out, or
  already woken.
- From anywhere else, `wake` makes the ``await`` return None, which means "look again": an item that
  the waiter was given has already been published elsewhere.

The waiter of an asyncio task is a bare `asyncio.Future`, for speed: see docs/performance.md.
`TrioWaiter` and `ThreadWaiter` implement those methods of a Future that are needed here.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from _thread import TIMEOUT_MAX, allocate_lock
from asyncio import (
    AbstractEventLoop,
    BaseEventLoop,
    CancelledError,
    Future,
    InvalidStateError,
    get_running_loop,
)
from asyncio import BrokenBarrierError as AsyncioBrokenBarrierError
from asyncio import _get_running_loop as running_loop
from contextvars import copy_context
from functools import partial
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, TypeVar, Union

from anyio import NoEventLoopError

if TYPE_CHECKING:
    from asyncio import Task as AsyncioTask
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable

    from trio.lowlevel import Abort, Task, TrioToken

# Re-exported for the modules above, which do not import asyncio themselves.
__all__ = [
    "AsyncioBrokenBarrierError",
    "CancelledError",
    "InvalidStateError",
    "current_task",
    "running_loop",
]

T = TypeVar("T")

# Whether this interpreter may run without the GIL, so that one C call is not one atomic step. The
# version is compared first because `get_config_var` has to load a large module.
FREE_THREADED = sys.version_info >= (3, 13) and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

if sys.version_info >= (3, 12):
    from asyncio import current_task

    _may_run: Callable[[], object] = running_loop
else:  # Python 3.11
    # `asyncio.current_task` is written in Python here, and `running_loop` makes a system call.
    from asyncio.tasks import _current_tasks  # type: ignore[attr-defined,unused-ignore]

    current_task = _current_tasks.get
    # Returns how many event loops, on all threads, are running a task.
    _may_run = _current_tasks.__len__


# The clock behind `time.monotonic`, which tests do not replace. Windows has no other name for it.
real_clock: Callable[[], float] = time.monotonic
if hasattr(time, "clock_gettime"):
    real_clock = partial(
        time.clock_gettime, getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)
    )

F = TypeVar("F", bound="Callable[..., object]")

_modules = sys.modules

_ki_protected: list[Callable[..., object]] = []


def ki_protected(function: F) -> F:
    """Protect `function` from trio's KeyboardInterrupt, except at its checkpoints.

    This is what `trio.lowlevel.enable_ki_protection` does for trio's own primitives. It is free:
    trio only records the code object. Without trio, KeyboardInterrupt can be raised anywhere.
    """
    _ki_protected.append(function)
    return function


def enable_ki_protection() -> None:
    """Pass the functions marked as `ki_protected` to trio, if it is imported.

    Called whenever an object is created. An object that was created before trio was imported is
    protected only after its first checkpoint or wait under trio has begun.
    """
    enable = getattr(_modules.get("trio.lowlevel"), "enable_ki_protection", None)
    while enable is not None and _ki_protected:
        try:
            enable(_ki_protected.pop())
        except IndexError:
            pass  # another thread took it


# The iterator of an awaitable that never yields.
_NOTHING_TO_AWAIT: Generator[Any, None, None] = iter(())  # type: ignore[assignment]


class TrioWaiter:
    """A task of a trio run; only `wake_threadsafe` may be called from other threads."""

    __slots__ = ("_asleep", "_item", "_lowlevel", "_over", "_task", "_token")

    def __init__(self, lowlevel: Any) -> None:
        if _ki_protected:
            enable_ki_protection()
        self._lowlevel = lowlevel
        self._task: Task = lowlevel.current_task()
        self._token: TrioToken = lowlevel.current_trio_token()
        # Has an entry while the task sleeps. Removing it is the claim to reschedule the task: a
        # signal handler may interrupt one attempt and make another.
        self._asleep: dict[str, bool] = {}
        self._over = False
        self._item: Any = None

    @ki_protected
    def __await__(self) -> Generator[Any, Any, Any]:
        self._asleep["yes"] = True
        sleep: Any = self._lowlevel.wait_task_rescheduled(self._abort)
        generator: Generator[Any, Any, Any] = sleep.__await__()
        return generator

    @ki_protected
    def _abort(self, raise_cancel: object) -> Abort:
        abort: type[Abort] = self._lowlevel.Abort
        if not self._asleep.pop("yes", False):
            return abort.FAILED  # a signal handler is rescheduling the task
        self._over = True
        return abort.SUCCEEDED

    @ki_protected
    async def wait_with_timeout(self, timeout: float) -> Any:
        with _modules["trio"].move_on_after(timeout):
            return await self

    def done(self) -> bool:
        return self._over

    @ki_protected
    def end(self) -> Any:
        """See `end_wait`."""
        self._over = True
        self._asleep.clear()
        return self._item

    def get_loop(self) -> object:
        return self._token

    @ki_protected
    def set_result(self, result: object) -> None:
        task: Any = self._task
        # The caller may be a signal handler that interrupted the task just before it sleeps, or
        # trio while it cancels the task. Then trio has to finish before the task is rescheduled.
        # These attributes are private; without them, the slow path is used, which is safe too.
        try:
            may_reschedule = (
                task._abort_func is not None
                and not task._cancel_status.effectively_cancelled
                and not task._runner.ki_pending
            )
        except AttributeError:
            may_reschedule = False
        may_reschedule = may_reschedule and self._asleep.pop("yes", False)
        if self._over:
            raise InvalidStateError
        if result is not None:  # `wake_all` may come after an item that is still to be delivered
            self._item = result
        if may_reschedule:
            self._lowlevel.reschedule(task, _modules["outcome"].Value(result))
        else:
            self._token.run_sync_soon(self._wake)

    def wake_threadsafe(self) -> None:
        self._token.run_sync_soon(self._wake)

    @ki_protected
    def _wake(self) -> None:
        if self._asleep.pop("yes", False):  # otherwise it was already woken or cancelled
            self._lowlevel.reschedule(self._task, _modules["outcome"].Value(self._item))


# How often, in seconds, a sleeping thread calls the function that it was given.
_POLL_INTERVAL = 0.5


class ThreadWaiter:
    """An OS thread, which sleeps on a lock of its own.

    Awaiting it blocks the thread and never yields, so `run_in_thread` can run the same coroutines
    as tasks do. A thread is never woken with an item, because it runs in parallel with its waker.

    :param poll: called every half second of the sleep; an exception that it raises ends the sleep
    """

    __slots__ = ("_lock", "_over", "_poll")

    def __init__(self, poll: Callable[[], object] | None = None) -> None:
        lock = self._lock = allocate_lock()
        lock.acquire()
        self._over = False
        self._poll = poll

    def __await__(self) -> Generator[Any, None, None]:
        if self._poll is None:
            self._lock.acquire()
        else:
            while not self._lock.acquire(True, _POLL_INTERVAL):
                self._poll()
        return _NOTHING_TO_AWAIT

    async def wait_with_timeout(self, timeout: float) -> None:
        longest = TIMEOUT_MAX if self._poll is None else _POLL_INTERVAL
        # Counted down, not read from a clock: `time.monotonic` may be frozen by a test.
        while timeout > 0 and not self._lock.acquire(True, min(timeout, longest)):
            timeout -= longest
            if self._poll is not None:
                self._poll()

    def done(self) -> bool:
        return self._over

    def end(self) -> None:
        """See `end_wait`."""
        self._over = True

    def get_loop(self) -> object:
        return _NO_LOOP

    def wake_threadsafe(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # already woken


_NO_LOOP = object()


Waiter = Union["Future[Any]", TrioWaiter, ThreadWaiter]


def thread_waiter(poll: Callable[[], object] | None = None) -> ThreadWaiter:
    """Return a new waiter for the calling thread.

    :param poll: see `ThreadWaiter`
    :raises RuntimeError: if an event loop is running on this thread, since waiting would block it
    """
    if running_loop() is not None or _running_trio() is not None:
        raise RuntimeError(
            "this would block the event loop that is running on this thread: await the acquire(), "
            "wait() or connection() of the shared object itself, or do not wait (blocking=False)"
        )
    return ThreadWaiter(poll)


def task_waiter() -> Waiter:
    """Return a new waiter for the calling task.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    lowlevel = _running_trio()
    if lowlevel is not None:
        return TrioWaiter(lowlevel)
    # As in `checkpoint`. A future finds the event loop itself.
    if not _may_run() and running_loop() is None:
        raise _no_event_loop()
    return Future()


async def wait_with_timeout(waiter: Waiter, timeout: float) -> Any:
    """Await `waiter` for at most `timeout` seconds; return None on timeout."""
    if not isinstance(waiter, Future):
        return await waiter.wait_with_timeout(timeout)
    loop = waiter.get_loop()
    if _clock_is_replaced(loop):
        timer: Any = threading.Timer(timeout, wake, [waiter])
        timer.daemon = True
        timer.start()
    else:
        timer = loop.call_later(timeout, _wake, waiter)
    try:
        return await waiter
    finally:
        timer.cancel()


def _clock_is_replaced(loop: AbstractEventLoop) -> bool:
    """Return whether a test has replaced the clock of `loop`, so that its timers may never run.

    Freezegun and mocks replace `time.monotonic`, and time-machine changes what it returns. A loop
    with a clock of its own is on virtual time, or written in C.
    """
    if type(loop).time is not BaseEventLoop.time:
        return False
    if type(time.monotonic) is not BuiltinFunctionType:
        return True
    machine: Any = _modules.get("time_machine")
    return machine is not None and bool(machine.escape_hatch.is_travelling())


@ki_protected
def end_wait(waiter: Waiter) -> Any:
    """Declare `waiter` over, so that nothing can be given to it from now on.

    Called by its owner. Returns the item that `set_result` has already given to it, or None.
    """
    if not isinstance(waiter, Future):
        return waiter.end()
    if not waiter.done():
        # If the loop is closed, the coroutine of the waiter is being collected, and `wake` fails
        # anyway. Then `cancel` would destroy the task of that coroutine while the coroutine runs.
        if not waiter.get_loop().is_closed():
            waiter.cancel()
        return None
    return None if waiter.cancelled() else waiter.result()


def run_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine`, which may await only `ThreadWaiter`, on the calling OS thread.

    :raises RuntimeError: if it awaits anything else; raised inside the coroutine
    """
    try:
        coroutine.send(None)
        while True:
            coroutine.throw(RuntimeError("a thread can't await this; it takes a task to do that"))
    except StopIteration as stop:
        outcome: T = stop.value
        return outcome


def current_token() -> object:
    """Return the event loop (asyncio) or the TrioToken (trio) of the running task, or None.

    It is None in a callback of the loop too, since that may be a signal handler or a finalizer that
    runs while the loop waits in select(). Only a thread-safe call wakes the loop then, by writing
    to the loop's pipe. After a step of a task, the loop checks its ready queue anyway.
    """
    loop = running_loop()
    if loop is not None and current_task(loop) is not None:
        return loop
    lowlevel = _running_trio()
    if lowlevel is not None:
        try:
            lowlevel.current_task()
        except RuntimeError:
            return None  # between two steps
        token: object = lowlevel.current_trio_token()
        return token
    return None


@ki_protected
def wake(waiter: Waiter) -> bool:
    """Make the ``await`` of `waiter` return None. May be called from any thread.

    :return: False if the event loop of the waiter is closed
    """
    try:
        if isinstance(waiter, Future):
            waiter.get_loop().call_soon_threadsafe(_wake, waiter)
        else:
            waiter.wake_threadsafe()
    except RuntimeError:
        return False
    return True


@ki_protected
def wake_all(waiters: Iterable[Waiter]) -> None:
    """Wake all `waiters` in order, without a thread-safe call for those of the running loop."""
    token = current_token()
    for waiter in waiters:
        if waiter.get_loop() is token:
            try:
                waiter.set_result(None)  # type: ignore[union-attr]
            except InvalidStateError:
                pass
        else:
            wake(waiter)


def run_soon(token: object, function: Callable[[], object]) -> bool:
    """Call `function` on an event loop. May be called from any thread.

    :param token: what `current_token` has returned in a task of that loop. If that loop is running
        on this thread, the function is called at once.
    :return: False if the event loop is closed
    """
    if token is current_token():
        function()
        return True
    loop: Any = token
    try:
        if isinstance(loop, AbstractEventLoop):
            loop.call_soon_threadsafe(function)
        else:
            loop.run_sync_soon(function)
    except RuntimeError:
        return False
    return True


def is_abandoned(waiter: Waiter) -> bool:
    """Return whether the loop of `waiter` is closed; only asyncio can tell without a wake."""
    return isinstance(waiter, Future) and waiter.get_loop().is_closed()


def _wake(future: Future[Any]) -> None:
    try:  # one step: a signal handler could cancel the task between a look and this
        future.set_result(None)
    except InvalidStateError:
        pass  # already over


def loop_clock() -> Callable[[], float]:
    """Return the clock of the running event loop, in seconds; any thread may read it.

    It is virtual time if the loop runs on virtual time.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    lowlevel = _running_trio()
    if lowlevel is not None:
        trio_clock: Callable[[], float] = lowlevel.current_clock().current_time
        return trio_clock
    loop = running_loop()
    if loop is None:
        raise _no_event_loop()
    if _clock_is_replaced(loop):
        return real_clock
    # `BaseEventLoop.time` only calls `time.monotonic`.
    return time.monotonic if type(loop).time is BaseEventLoop.time else loop.time


def running_task() -> object:
    """Return the task of asyncio or trio that is running on this thread, or None."""
    lowlevel = _running_trio()
    if lowlevel is not None:
        try:
            task: object = lowlevel.current_task()
        except RuntimeError:  # between two steps
            return None
        return task
    loop = running_loop()
    return None if loop is None else current_task(loop)


def token_getter() -> Callable[[], object]:
    """Return a function that is a faster `current_token` for tasks of the running event loop.

    On any other event loop it returns something else.
    """
    # Trio in guest mode runs inside an asyncio loop, so both can be running on one thread.
    return current_token if "trio" in _modules else running_loop


# Strong references, since an event loop keeps only weak references to its tasks.
_background: set[AsyncioTask[None]] = set()


def start_background_task(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, end: Callable[[], None]
) -> None:
    """Run `work` in a task of the running event loop that has no parent task.

    It is cancelled when the loop ends. It is in no cancel scope, so it may be started by one task
    and ended by another, as fixtures of test frameworks do.

    :param end: called on the event loop when the task has ended, also if it was cancelled natively
        before it started
    """
    lowlevel = _running_trio()
    if lowlevel is not None:

        async def work_and_end() -> None:
            try:
                await work()
            finally:
                end()

        lowlevel.spawn_system_task(work_and_end, name=name, context=copy_context())
        return
    task = get_running_loop().create_task(work(), name=name)
    for old in list(_background):
        if old.get_loop().is_closed():
            _background.discard(old)
    _background.add(task)
    task.add_done_callback(_background.discard)
    task.add_done_callback(lambda _: end())


def loop_ended(token: object) -> bool:
    """Return whether the event loop of `token` will never run a task again."""
    if isinstance(token, AbstractEventLoop):
        return token.is_closed()  # without waking it: after a fork it is the parent's
    return not run_soon(token, bool)  # `bool` does nothing


async def wait_shielded(done: Callable[[], bool], waiters: list[Waiter]) -> None:
    """Wait until ``done()`` is true; raise a cancellation only afterwards.

    :param waiters: a waiter is in this list from before each call of `done`; the code that makes
        `done` true has to wake a copy of the list
    """
    from anyio import CancelScope  # late: it takes as long to import as half of aiosync

    cancellation: BaseException | None = None
    with CancelScope(shield=True):
        while True:
            waiter = task_waiter()
            waiters.append(waiter)
            try:
                if done():
                    break
                await waiter
            except GeneratorExit:
                raise  # the coroutine is being closed and cannot wait
            except BaseException as error:  # native, so the shield does not stop it
                cancellation = error
            finally:
                waiters.remove(waiter)
    if cancellation is not None:
        try:
            raise cancellation
        finally:
            del cancellation  # break the reference cycle through the traceback


def checkpoint() -> Awaitable[None]:
    """Return an awaitable that lets other tasks run and raises a pending cancellation.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    lowlevel = _running_trio()
    if lowlevel is not None:
        if _ki_protected:
            enable_ki_protection()
        awaitable: Awaitable[None] = lowlevel.checkpoint()
        return awaitable
    # `_may_run` is faster but inexact: the error may not be raised, which does no harm.
    if not _may_run() and running_loop() is None:
        raise _no_event_loop()
    return _YIELD_ONCE


class _YieldOnce:
    """What ``asyncio.sleep(0)`` awaits, without a coroutine around it."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield


_YIELD_ONCE = _YieldOnce()


class _NotImported:
    name = None


# sniffio's thread-local variable, which trio sets, once trio is imported.
_current_library: Any = _NotImported


def _running_trio() -> Any:
    """Return `trio.lowlevel` if trio is running on this thread, without importing trio.

    Call it before checking for asyncio: in guest mode both are running.
    """
    if _current_library.name == "trio":
        return _modules["trio.lowlevel"]
    if _current_library is _NotImported and "trio" in _modules and _find_library():
        return _running_trio()
    return None


def _find_library() -> bool:
    global _current_library  # noqa: PLW0603
    try:
        if "trio.lowlevel" in _modules:
            _current_library = _modules["sniffio"].thread_local
    except (AttributeError, KeyError):
        pass  # another thread is importing it
    return _current_library is not _NotImported


def _no_event_loop() -> NoEventLoopError:
    return NoEventLoopError(
        "no asyncio or trio event loop is running on this thread: "
        "await this in a task, for example under anyio.run()"
    )
