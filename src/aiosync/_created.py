"""Tell watchers of new objects, which they may observe. By default there are no watchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Called with each new semaphore, barrier, pool and view, at the end of its `__init__`.
watchers: list[Callable[[Any], object]] = []


def created(shared: object) -> None:
    """Tell the watchers of a new object."""
    for watcher in watchers.copy():
        watcher(shared)
