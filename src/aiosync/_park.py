"""One blocked task or thread: how it goes to sleep, and how anybody wakes it.

This is the only file that knows asyncio, trio and OS threads, and so the only one that imports
``asyncio``, ``trio`` or ``_thread``. It knows nothing of permits, rounds or queues.

A *waiter* stands for one sleep of one task or thread. Its owner creates it, shows it to others,
and only then sleeps; from the moment it can be seen anybody may ring its bell, from any thread. The
bell says "look again" and carries no data: what it announces has been decided, and stands
elsewhere, before it is rung. So a bell that nobody hears any more loses nothing.

The waiter of an asyncio task is a bare `asyncio.Future`, and the others speak those few words of
its language that are needed. An object of our own around the future would be cleaner, and make a
barrier's round take a tenth longer.
"""

from __future__ import annotations

import sys
import sysconfig
from _thread import TIMEOUT_MAX, allocate_lock
from asyncio import (
    AbstractEventLoop,
    BaseEventLoop,
    BrokenBarrierError,
    Future,
    _get_running_loop,
    get_running_loop,
)
from asyncio import (
    InvalidStateError as InvalidStateError,  # noqa: PLC0414  (for `_handoff` too)
)
from contextvars import copy_context
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, Union

from anyio import CancelScope, NoEventLoopError

if TYPE_CHECKING:
    from asyncio import Task as AsyncioTask
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable

    from trio.lowlevel import Abort, Task, TrioToken

T = TypeVar("T")

# Whether this interpreter may run without the GIL, so that one C call is not one atomic step.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

if sys.version_info >= (3, 12):
    from asyncio import current_task

    _seems_to_run: Callable[[], object] = _get_running_loop
else:  # Python 3.11, in which that is written in Python and takes four times as long
    from asyncio.tasks import _current_tasks  # type: ignore[attr-defined,unused-ignore]

    current_task = _current_tasks.get
    # `_get_running_loop` makes a system call each time; with it a checkpoint takes a tenth longer.
    # This tells whether some event loop, on whichever thread, is running a task just now.
    _seems_to_run = _current_tasks.__len__

AsyncioBrokenBarrierError = BrokenBarrierError

F = TypeVar("F", bound="Callable[..., object]")

_modules = sys.modules

_ki_protected: list[Callable[..., object]] = []


def ki_protected(function: F) -> F:
    """Let no KeyboardInterrupt of trio's come in the middle of `function`, but at a checkpoint.

    As in trio's own primitives; it costs nothing, since trio takes note of the code only. Outside
    of trio nobody can promise this.
    """
    _ki_protected.append(function)
    return function


def enable_ki_protection() -> None:
    """Tell trio which functions are ki_protected, if it is there, and has not been told before.

    To be called when an object is made. One that was made before trio was imported is protected
    from the first checkpoint or wait under trio on.
    """
    enable = getattr(_modules.get("trio.lowlevel"), "enable_ki_protection", None)
    while enable is not None and _ki_protected:
        try:
            enable(_ki_protected.pop())
        except IndexError:
            pass  # another thread was faster


class TrioWaiter:
    """A task of a trio run."""

    __slots__ = ("_aborted", "_asleep", "_lowlevel", "_task", "_token")

    def __init__(self, lowlevel: Any) -> None:
        if _ki_protected:
            enable_ki_protection()
        self._lowlevel = lowlevel
        self._task: Task = lowlevel.current_task()
        self._token: TrioToken = lowlevel.current_trio_token()
        # Holds an entry from just before the task yields until somebody removes it, and so claims
        # the right to reschedule the task, once. Touched on the thread of the trio run only, but by
        # signal handlers as well.
        self._asleep: list[bool] = []
        self._aborted = False

    def __await__(self) -> Generator[Any, None, None]:
        self._asleep.append(True)
        try:
            yield from self._lowlevel.wait_task_rescheduled(self._abort).__await__()
        finally:
            # If KeyboardInterrupt comes before it sleeps, no late bell may disturb its next sleep.
            self._asleep.clear()

    def _abort(self, raise_cancel: object) -> Abort:
        abort: type[Abort] = self._lowlevel.Abort
        try:
            self._asleep.pop()
        except IndexError:
            return abort.FAILED  # a signal handler is rescheduling it just now
        self._aborted = True
        return abort.SUCCEEDED

    async def wait_with_timeout(self, timeout: float) -> None:
        with _modules["trio"].move_on_after(timeout):
            await self

    def done(self) -> bool:
        return self._aborted

    def get_loop(self) -> object:
        return self._token

    def set_result(self, result: None) -> None:
        # A signal handler may have interrupted this very task just before it falls asleep, or trio
        # in the middle of cancelling it; then trio must get through with that first.
        # (These are private. There is no other way to ask as fast, but to do without is safe.)
        task: Any = self._task
        try:
            at_rest = (
                task._abort_func is not None
                and not task._cancel_status.effectively_cancelled
                and not task._runner.ki_pending
            )
        except AttributeError:  # another version of trio
            at_rest = False
        if not at_rest:
            self.wake_threadsafe()
            return
        try:  # the same as `_wake`, without the call
            self._asleep.pop()
        except IndexError:
            return
        self._lowlevel.reschedule(task)

    def wake_threadsafe(self) -> None:
        self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        try:
            self._asleep.pop()
        except IndexError:
            return  # rung before, or cancelled
        self._lowlevel.reschedule(self._task)


class ThreadWaiter:
    """An OS thread, asleep on a raw lock of its own.

    To await it blocks the thread and never yields, so that `run_in_thread` can run the very code
    that tasks run.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        bell = self._lock = allocate_lock()
        bell.acquire()

    def __await__(self) -> Generator[Any, None, None]:
        self._lock.acquire()
        nothing: Generator[Any, None, None] = _NOTHING_TO_AWAIT
        return nothing

    async def wait_with_timeout(self, timeout: float) -> None:
        self._lock.acquire(True, min(timeout, TIMEOUT_MAX))

    def done(self) -> bool:
        return False

    def get_loop(self) -> object:
        return None

    def set_result(self, result: None = None) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # rung before

    wake_threadsafe = set_result


_NOTHING_TO_AWAIT: Any = iter(())

# How long, in seconds, a `PollingThreadWaiter` sleeps until it looks around.
_POLL_INTERVAL = 0.5


class PollingThreadWaiter(ThreadWaiter):
    """A thread that looks around now and then while it sleeps, and need not sleep on.

    :param look: called without arguments every half second, and before a timeout; what it raises
        ends the sleep
    """

    __slots__ = ("_look",)

    def __init__(self, look: Callable[[], object]) -> None:
        super().__init__()
        self._look = look

    def __await__(self) -> Generator[Any, None, None]:
        while not self._lock.acquire(True, _POLL_INTERVAL):
            self._look()
        nothing: Generator[Any, None, None] = _NOTHING_TO_AWAIT
        return nothing

    async def wait_with_timeout(self, timeout: float) -> None:
        deadline = monotonic() + timeout
        while timeout > 0 and not self._lock.acquire(True, min(timeout, _POLL_INTERVAL)):
            self._look()
            timeout = deadline - monotonic()


def thread_waiter(look: Callable[[], object] | None = None) -> ThreadWaiter:
    """Return a new waiter for the thread that calls.

    :param look: see `PollingThreadWaiter`; None: it sleeps until it is woken
    :raises RuntimeError: if an event loop is running on this thread, which would freeze
    """
    if _get_running_loop() is not None or _running_trio() is not None:
        raise RuntimeError(
            "this would block the event loop that is running on this thread: await the acquire(), "
            "wait() or connection() of the shared object itself, or do not wait (blocking=False)"
        )
    return ThreadWaiter() if look is None else PollingThreadWaiter(look)


# What every waiter does, in the words of asyncio.Future:
#   await waiter       Sleep until the bell rings. Once, and by the owner. A cancellation is
#                       raised, never swallowed; so is an exception from a signal handler.
#   done()              Whether the owner was cancelled, or its bell has rung because its time was
#                       over, so that it will leave as soon as its loop runs it. (If both happen, an
#                       asyncio.Future knows of the first only.)
#                       Exact on the thread of that loop. From elsewhere a False may be out of date:
#                       harmless, the owner finds out what was decided when it tries to leave.
#   get_loop()          The event loop, the trio token or None (a thread).
#   set_result(None)    Wake it from its own loop: only if `current_token` returned the same. More
#                       than once does no harm; a Future raises InvalidStateError then.
Waiter = Union["Future[None]", TrioWaiter, ThreadWaiter]


def task_waiter() -> Waiter:
    """Return a new waiter for the task that calls.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    if "trio" in _modules:  # what `_running_trio` asks first, without the call
        lowlevel = _running_trio()
        if lowlevel is not None:
            return TrioWaiter(lowlevel)
    loop = _get_running_loop()
    if loop is None:
        raise _no_event_loop()
    return Future(loop=loop)


async def wait_with_timeout(waiter: Waiter, timeout: float) -> None:
    """Sleep until the bell rings or `timeout` seconds have passed; which of the two: look."""
    if not isinstance(waiter, Future):
        await waiter.wait_with_timeout(timeout)
        return
    timer = waiter.get_loop().call_later(timeout, _wake, waiter)
    try:
        await waiter
    finally:
        timer.cancel()


def run_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run, on the OS thread that calls, a coroutine that sleeps on `ThreadWaiter` only.

    :raises RuntimeError: if it awaits something else; raised where it does so
    """
    try:
        coroutine.send(None)
        while True:
            coroutine.throw(RuntimeError("a thread can't await this; it takes a task to do that"))
    except StopIteration as stop:
        outcome: T = stop.value
        return outcome


def current_token() -> object:
    """Return the event loop, or the trio token, whose task is being run; None if there is none.

    Its other tasks may be woken directly. Not so from a mere callback of the same loop: that may be
    a signal handler or a finalizer, run while the loop sits in select(); then only a thread-safe
    call is heard, because it writes to the loop's pipe. After a step of a task the loop is certain
    to look at its ready queue.
    """
    loop = _get_running_loop()
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
def wake(waiter: Waiter, at: object) -> bool:
    """Ring the bell of `waiter`, from any thread.

    :param at: what `current_token` returned in this very step
    :return: False if nobody is left to hear it, because the event loop has closed
    """
    loop = waiter.get_loop()
    if loop is at:
        try:
            waiter.set_result(None)
        except InvalidStateError:
            pass  # it was cancelled, or its time was over
        return True
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
    """Ring the bells of all `waiters`, in their order, from any thread."""
    at = current_token()
    for waiter in waiters:
        # What `wake` does in the most common case, without the call.
        if waiter.get_loop() is at:
            try:
                waiter.set_result(None)
            except InvalidStateError:
                pass
        else:
            wake(waiter, at)


def is_abandoned(waiter: Waiter) -> bool:
    """Tell whether the loop of `waiter` has closed, as far as can be seen without waking it."""
    return isinstance(waiter, Future) and waiter.get_loop().is_closed()


def _wake(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def clock() -> Callable[[], float]:
    """Return the clock of the running event loop: seconds, to be asked from any thread.

    Virtual if that of the loop is.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    lowlevel = _running_trio()
    if lowlevel is not None:
        tells: Callable[[], float] = lowlevel.current_clock().current_time
        return tells
    loop = _get_running_loop()
    if loop is None:
        raise _no_event_loop()
    # The same clock, without the call in between.
    return monotonic if type(loop).time is BaseEventLoop.time else loop.time


def locate() -> Callable[[], object]:
    """Return a fast function that returns what `current_token` does now, as long as the loop runs.

    Both are to be called by a task. It returns the same as `current_token` does now, and on
    another event loop something else.
    """
    # With trio about it may be a guest of the same asyncio loop.
    return current_token if "trio" in _modules else _get_running_loop


# The event loop holds its tasks by weak references only.
_background: set[AsyncioTask[None]] = set()


def start_background_task(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, end: Callable[[], None]
) -> None:
    """Run `work` in a task of the running event loop that belongs to no other task.

    It is cancelled when the loop ends. No cancel scope is around it, so that it may be started by
    one task and ended by another, as fixtures of tests and frameworks do it.

    :param end: called, by the event loop, when the task has ended; also if it has never begun,
        because it was cancelled natively before
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
        if old.get_loop().is_closed():  # without a word to its tasks
            _background.discard(old)
    _background.add(task)
    task.add_done_callback(_background.discard)
    task.add_done_callback(lambda _: end())


def loop_ended(loop: object) -> bool:
    """Tell whether `loop`, which `current_token` returned once, will never run a task again."""
    try:
        if isinstance(loop, AbstractEventLoop):
            return loop.is_closed()
        token: Any = loop
        token.run_sync_soon(_noop)
    except RuntimeError:
        return True
    return False


def _noop() -> None:
    pass


async def wait_shielded(done: Callable[[], bool], waiters: list[Waiter]) -> None:
    """Wait until ``done()``, whoever cancels this; a cancellation is raised afterwards.

    :param waiters: to whom a waiter is added before `done` is asked; to be woken when it has
        become true
    """
    cancellation: BaseException | None = None
    with CancelScope(shield=True):
        while True:
            waiter = task_waiter()
            waiters.append(waiter)
            if done():
                try:
                    waiters.remove(waiter)
                except ValueError:
                    pass  # it is being woken just now
                break
            try:
                await waiter
            except GeneratorExit:
                raise  # nobody runs us any more, so we can't wait
            except BaseException as error:  # a native one, which no shield holds off
                cancellation = error
    if cancellation is not None:
        try:
            raise cancellation
        finally:
            del cancellation  # or else it would keep itself, by its traceback


def checkpoint() -> Awaitable[None]:
    """Return an awaitable that lets other tasks run, and raises a cancellation that is pending.

    :raises NoEventLoopError: if no asyncio or trio event loop is running on this thread
    """
    lowlevel = _running_trio()
    if lowlevel is not None:
        if _ki_protected:
            enable_ki_protection()
        awaitable: Awaitable[None] = lowlevel.checkpoint()
        return awaitable
    # A hint is enough: nothing is lost if somebody who runs this by hand is not told so.
    if not _seems_to_run() and _get_running_loop() is None:
        raise _no_event_loop()
    return _YIELD_ONCE


class _YieldOnce:
    """What ``asyncio.sleep(0)`` awaits; without its coroutine."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield


_YIELD_ONCE = _YieldOnce()


def _running_trio() -> Any:
    """Return trio.lowlevel if trio runs on this thread; never import it for those who do without.

    To be asked before asyncio is: in trio's guest mode the host's loop is running as well. Trio
    announces itself to sniffio, which it depends on; to ask trio itself (``in_trio_task()``) takes
    nine times as long, longer than a whole acquire and release. Without trio sniffio may be there
    too, and has nothing to say that is worth the time: a tenth of a barrier's round.
    """
    if "trio" not in _modules:
        return None
    try:
        if _modules["sniffio"].thread_local.name == "trio":
            return _modules["trio.lowlevel"]
    except (AttributeError, KeyError):
        pass  # another thread is importing them just now, so trio does not run on this one
    return None


def _no_event_loop() -> NoEventLoopError:
    return NoEventLoopError(
        "no asyncio or trio event loop is running on this thread: "
        "await this in a task, for example under anyio.run()"
    )
