"""Which task or thread has called the package: one object for each."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary, ref

from .._callers import module_of
from .._park import running_task

if TYPE_CHECKING:
    from types import FrameType


class Caller:
    """A task or thread that has called this package. It keeps neither alive.

    There is one object for each task or thread, so callers are compared by identity.
    """

    __slots__ = ("__weakref__", "_last_name", "_origin", "kind", "loop")

    def __init__(self, origin: Any, kind: Literal["task", "thread"]) -> None:
        self._origin = ref(origin)
        self._last_name = ""
        self.kind: Literal["task", "thread"] = kind
        # The kind of event loop of a task, and the thread in which it runs.
        self.loop: str | None = None
        if kind == "task":
            framework = "trio" if hasattr(origin, "parent_nursery") else "asyncio"
            self.loop = f"{framework} in {threading.current_thread().name}"
        _ = self.name

    @property
    def name(self) -> str:
        """The name of the task or thread; the last one that is known if it is gone."""
        origin = self._origin()
        if origin is not None:
            # A task of asyncio, or one of trio, or a thread.
            self._last_name = origin.get_name() if hasattr(origin, "get_name") else origin.name
        return self._last_name

    @property
    def ended(self) -> bool:
        """Whether the task or thread has ended."""
        origin = self._origin()
        if origin is None:
            return True
        if self.kind == "thread":
            return not origin.is_alive()
        if hasattr(origin, "done"):
            return bool(origin.done())
        return origin.coro.cr_frame is None  # trio

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


class _Nobody:
    name = "unknown"


# The caller in records that nobody reads callers from: finding the caller takes time.
UNKNOWN = Caller(_Nobody(), "thread")

_known: WeakKeyDictionary[object, Caller] = WeakKeyDictionary()


def current_caller() -> Caller:
    """Return the task that is running on this thread, or else the thread."""
    task = running_task()
    origin = threading.current_thread() if task is None else task
    caller = _known.get(origin)
    if caller is None:
        caller = _known.setdefault(origin, Caller(origin, "thread" if task is None else "task"))
    return caller


def called_by_with() -> bool:
    """Return whether it is a ``with`` or ``async with`` block that has called this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and module_of(frame).partition(".")[0] == "aiosync":
        if frame.f_code.co_name in {"__aenter__", "__enter__"}:
            return True
        frame = frame.f_back
    return False
