"""Cancel scopes of anyio that the pool enters in the tasks of others, or finds left open."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Union

from anyio import CancelScope

from ._park import CancelledError, _running_trio, current_task, running_loop, running_task

if TYPE_CHECKING:
    from typing import Self

_modules = sys.modules


def current_task_id() -> int:
    """Return what ``anyio.get_current_task().id`` is, at less cost."""
    return id(running_task())


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


# The innermost scope, if this version of anyio or trio does not tell which it is.
_UNKNOWN = object()


def innermost_scope() -> object:
    """Return an object that identifies the innermost cancel scope of the running task.

    It is None if there is none.
    """
    lowlevel = _running_trio()
    try:
        if lowlevel is not None:
            return lowlevel.current_task()._cancel_status
        states = _modules["anyio._backends._asyncio"]._task_states
        state = states.get(current_task(running_loop()))
        return None if state is None else state.cancel_scope
    except (AttributeError, KeyError):
        return _UNKNOWN


ShieldedScope = Union[CancelScope, _TaskScope]


def shielded_scope() -> ShieldedScope:
    """Return a context manager that shields the running task from the cancel scopes around it.

    A cancel scope of anyio is expensive under asyncio. A task of asyncio that is in no scope gets a
    cheaper object, see docs/performance.md. A task of trio always is in a scope.
    """
    return _TaskScope(running_task()) if innermost_scope() is None else CancelScope(shield=True)


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
