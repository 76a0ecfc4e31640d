"""Cancel scopes of anyio that the pool enters in the tasks of others, or finds left open."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Union

from anyio import CancelScope, get_current_task

from ._park import CancelledError, _running_trio, current_task, running_loop

if TYPE_CHECKING:
    from typing import Self

_modules = sys.modules


def current_task_id() -> int:
    """Return what ``anyio.get_current_task().id`` is, at less cost."""
    loop = running_loop()
    task: object = None if loop is None else current_task(loop)
    return get_current_task().id if task is None else id(task)


class _TaskScope:
    """A block of an asyncio task that is in no cancel scope; `cancel` ends the block early.

    It works like `asyncio.timeout`, and has the names of `anyio.CancelScope`.
    """

    __slots__ = ("_cancelling", "_task", "cancel_called")

    def __init__(self, task: Any) -> None:
        self._task = task
        self._cancelling = task.cancelling()
        self.cancel_called = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> bool:
        if not self.cancel_called:
            return False
        is_ours = self._task.uncancel() <= self._cancelling
        return is_ours and exc_type is not None and issubclass(exc_type, CancelledError)

    def cancel(self) -> None:
        if not self.cancel_called:
            self.cancel_called = True
            self._task.cancel()


def innermost_scope() -> object:
    """Return an object that identifies the innermost cancel scope of the running task.

    It is None if there is none, or if this version of anyio or trio does not tell.
    """
    lowlevel = _running_trio()
    try:
        if lowlevel is not None:
            return lowlevel.current_task()._cancel_status
        task = current_task(running_loop())
        return _modules["anyio._backends._asyncio"]._task_states[task].cancel_scope
    except (AttributeError, KeyError):
        return None


ShieldedScope = Union[CancelScope, _TaskScope]


def shielded_scope() -> ShieldedScope:
    """Return a context manager that shields the running task from the cancel scopes around it.

    A cancel scope of anyio is expensive under asyncio. A task that is in no scope gets a cheaper
    object, see docs/performance.md. Only a private attribute of anyio tells whether it is in one.
    """
    loop = running_loop()
    task = None if loop is None or _running_trio() is not None else current_task(loop)
    if task is not None:
        try:
            state = _modules["anyio._backends._asyncio"]._task_states.get(task)
            if state is None or state.cancel_scope is None:
                return _TaskScope(task)
        except (AttributeError, KeyError):
            pass  # another version of anyio
    return CancelScope(shield=True)


def abandon_scopes() -> None:
    """Cancel the scopes that the running background task has entered and will never leave.

    It may end then. Otherwise, a task of trio that ends inside of a nursery fails, and the failure
    of a background task ends the program.
    """
    lowlevel = _running_trio()
    if lowlevel is None:
        scope: Any = innermost_scope()
        scope.cancel()
        return
    task = lowlevel.current_task()
    for nursery in task.child_nurseries:
        nursery.cancel_scope.cancel()
    with suppress(AttributeError):  # another version of trio: there is no public way
        task._child_nurseries.clear()
