"""Synchronization primitives that tasks and threads share, with the semantics of `threading`.

Await `Semaphore`, `BoundedSemaphore`, `Barrier` and `ConnectionPool` in tasks of asyncio or trio.
`as_threading` lets OS threads use the same objects; `from_threading` lets tasks await objects of
`threading`. `aiosync.recipes` has pools for common drivers, and `aiosync.redis` has semaphores and
barriers that processes share.
"""

import os as _os
from typing import TYPE_CHECKING

from ._as_threading import ThreadBarrier, ThreadBoundedSemaphore, ThreadSemaphore, as_threading
from ._barrier import Barrier, BarrierStatistics
from ._errors import BrokenBarrierError, PoolClosed, PoolMisuse, PoolTimeout, TooManyRequests
from ._from_threading import TaskBarrier, TaskEvent, TaskLock, TaskSemaphore, from_threading
from ._semaphore import BoundedSemaphore, Semaphore, SemaphoreStatistics

if TYPE_CHECKING:
    from ._as_threading_pool import ThreadCheckout, ThreadConnectionPool
    from ._pool import (
        Checkout,
        ConnectionInfo,
        ConnectionLimit,
        ConnectionPermit,
        ConnectionPool,
        Histogram,
        PoolEvent,
        PoolOptions,
        PoolStatistics,
    )

__all__ = [
    "Barrier",
    "BarrierStatistics",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "Checkout",
    "ConnectionInfo",
    "ConnectionLimit",
    "ConnectionPermit",
    "ConnectionPool",
    "Histogram",
    "PoolClosed",
    "PoolEvent",
    "PoolMisuse",
    "PoolOptions",
    "PoolStatistics",
    "PoolTimeout",
    "Semaphore",
    "SemaphoreStatistics",
    "TaskBarrier",
    "TaskEvent",
    "TaskLock",
    "TaskSemaphore",
    "ThreadBarrier",
    "ThreadBoundedSemaphore",
    "ThreadCheckout",
    "ThreadConnectionPool",
    "ThreadSemaphore",
    "TooManyRequests",
    "as_threading",
    "from_threading",
]

# Tracebacks and help() show the public name, not the private module.
for _name in __all__:
    if _name in globals():
        globals()[_name].__module__ = __name__

if not TYPE_CHECKING:
    # The pool is imported when one of its names is used for the first time, because many programs
    # have no pool, and its import takes longer than the import of everything else.

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _as_threading_pool, _pool

        module = _pool if hasattr(_pool, name) else _as_threading_pool
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


if _os.environ.get("AIOSYNC_DEBUG", "0") not in {"", "0"}:
    from . import debug

    debug.enable()
