"""An event loop in a thread of its own, for programs without one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from anyio.from_thread import start_blocking_portal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.from_thread import BlockingPortal


class LoopThread:
    """The event loop of one object, which a plain ``with`` on the object starts and stops."""

    __slots__ = ("_running",)

    def __init__(self) -> None:
        self._running: tuple[ExitStack, BlockingPortal] | None = None

    def start(self, begin: Callable[[], Awaitable[object]]) -> None:
        """Start the event loop, and await `begin` on it. If that raises, stop it again."""
        stack = ExitStack()
        portal = stack.enter_context(start_blocking_portal("asyncio"))
        try:
            portal.call(begin)
        except BaseException:
            stack.close()
            raise
        self._running = stack, portal

    def stop(self, end: Callable[[], Awaitable[object]]) -> None:
        """Await `end` on the event loop, and stop it. Do nothing if it is not running."""
        if self._running is not None:
            (stack, portal), self._running = self._running, None
            with stack:
                portal.call(end)
