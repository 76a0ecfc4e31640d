"""Runs the user's functions, which may be plain or async, and the pool's background tasks."""

from __future__ import annotations

from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from anyio import fail_after, get_cancelled_exc_class, get_current_task

from .._park import start_background_task
from ._statistics import log

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class BackgroundTasks:
    """The tasks of one pool, on the event loop that opened it.

    :param name: what the tasks are called
    :param ended: called when a task has ended
    """

    def __init__(self, name: str, ended: Callable[[], object]) -> None:
        self._name = name
        self._ended = ended
        # One item for each task that has not ended.
        self.pending: set[object] = set()
        # The ids of all tasks that run a hook: of these, and of borrowers that reset a connection.
        self.ids: set[int] = set()
        # Whether this process is a fork, so that the tasks are the parent's.
        self.forked = False
        # The error of a task that should not have failed: a defect of the package.
        self.crash: Exception | None = None

    def start(
        self,
        work: Callable[..., Coroutine[Any, Any, None]],
        *args: Any,
        never_started: Callable[[], object] | None = None,
    ) -> None:
        """Run ``work(*args)`` in a new task.

        :param never_started: called if the task is cancelled before it has begun; None: run it in
            another task
        """
        begun: list[bool] = []

        async def run() -> None:
            begun.append(True)
            if self.forked:
                return  # it is the parent's
            task = get_current_task().id
            self.ids.add(task)
            try:
                await work(*args)
            except Exception as error:
                self.crash = error  # on trio it must not end the program
                log.exception("%s: a background task has failed", self._name)
            finally:
                self.ids.discard(task)

        def end() -> None:
            self.pending.discard(key)
            if not begun:
                again()
            self._ended()

        again = never_started or partial(self.start, work, *args)
        key = object()
        self.pending.add(key)
        start_background_task(run, f"{self._name} {work.__name__.lstrip('_')}", end)

    def begin(self, hook: Callable[..., Any], *args: object) -> Any:
        """Call a hook, and return its result, which is awaitable if the hook is async.

        If a plain hook raises KeyboardInterrupt, or another exception that is no Exception, the
        result raises it when it is awaited. So it ends a task, as if the hook were async, and not
        maintenance.

        :raises RuntimeError: in a forked process
        """
        if self.forked:
            raise RuntimeError("the pool was opened before a fork")
        try:
            return hook(*args)
        except (Exception, get_cancelled_exc_class()):  # the latter: of a cancelled Future
            raise
        except BaseException as error:
            return _raise(error)

    async def finish(self, result: Any) -> Any:
        """Await what `begin` returned, if it is awaitable."""
        return await result if isawaitable(result) else result

    async def call(self, hook: Callable[..., Any], *args: object) -> Any:
        """Call a hook, and await its result if it is awaitable."""
        return await self.finish(self.begin(hook, *args))

    def notify(self, timeout: float, hook: Callable[..., Any], *args: object) -> None:
        """Call a hook whose outcome does not matter; in a task of its own if it is async."""
        try:
            result = self.begin(hook, *args)
        except (Exception, get_cancelled_exc_class()):
            log.exception("%s: %r failed", self._name, hook)
            return
        if isawaitable(result):
            self.start(self._notify, timeout, hook, result)

    async def _notify(self, timeout: float, hook: object, result: Any) -> None:
        try:
            with fail_after(timeout, shield=True):
                await self.finish(result)
        except Exception:
            log.exception("%s: %r failed", self._name, hook)


async def _raise(error: BaseException) -> None:
    try:
        raise error
    finally:
        del error  # break the reference cycle through the traceback
