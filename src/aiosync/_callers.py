"""Find the caller of this package: the task or thread, and the line of code."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ._park import running_task

if TYPE_CHECKING:
    from types import FrameType
    from typing import Self

# The package itself, and what stands between it and its caller.
_SKIPPED = ("aiosync", "contextlib")
# Functions that await others, such as `asyncio.wait_for`.
_SKIPPED_MODULES = ("asyncio.tasks", "asyncio.timeouts")
# What stands below a task or a thread: then no caller is running.
_RUNNERS = ("anyio", "asyncio", "concurrent", "threading", "trio", "uvloop")


class CallSite(NamedTuple):
    """A line of a file."""

    file: str
    line: int
    function: str

    @classmethod
    def of(cls, frame: FrameType) -> Self:
        """Return the line that a frame is running."""
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def module_of(frame: FrameType) -> str:
    """Return the name of the module whose code a frame is running."""
    return str(frame.f_globals.get("__name__"))


def call_site() -> CallSite | None:
    """Return the innermost line outside of this package; None if only an event loop called it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = module_of(frame)
        package = module.partition(".")[0]
        if package not in _SKIPPED and module not in _SKIPPED_MODULES:
            return None if package in _RUNNERS else CallSite.of(frame)
        frame = frame.f_back
    return None


def call_stack() -> list[CallSite]:
    """Return the lines of the callers outside of this package, the outermost first.

    Unlike `traceback.extract_stack`, it reads no source files.
    """
    frame: FrameType | None = sys._getframe(1)
    stack: list[CallSite] = []
    while frame is not None:
        if module_of(frame).partition(".")[0] != "aiosync":
            stack.append(CallSite.of(frame))
        frame = frame.f_back
    return stack[::-1]


def caller_name() -> str:
    """Return whether a task or a thread is calling, and its name."""
    task: Any = running_task()
    if task is None:
        return f"thread {threading.current_thread().name!r}"
    # A task of asyncio, or one of trio.
    name = task.get_name() if hasattr(task, "get_name") else task.name
    return f"task {name!r}"
