"""Synchronization primitives that tasks and threads share, with the semantics of `threading`.

`Semaphore`, `BoundedSemaphore`, `Barrier` and `ConnectionPool` are awaited by tasks of any number
of asyncio and trio event loops. `as_threading` returns a view of such an object for OS threads.
`from_threading` returns a view of an object of `threading` for tasks. The Thread* and Task* classes
are the types of these views; the two functions create them. `aiosync.recipes` creates pools for
common drivers.
"""

from ._as_threading import (
    ThreadBarrier,
    ThreadBoundedSemaphore,
    ThreadCheckout,
    ThreadConnectionPool,
    ThreadSemaphore,
    as_threading,
)
from ._barrier import Barrier, BarrierStatistics
from ._errors import BrokenBarrierError, PoolClosed, PoolTimeout, TooManyRequests
from ._from_threading import TaskBarrier, TaskEvent, TaskLock, TaskSemaphore, from_threading
from ._pool import Checkout, ConnectionInfo, ConnectionPool, PoolEvent
from ._semaphore import BoundedSemaphore, Semaphore, SemaphoreStatistics

__all__ = [
    "Barrier",
    "BarrierStatistics",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "Checkout",
    "ConnectionInfo",
    "ConnectionPool",
    "PoolClosed",
    "PoolEvent",
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
    globals()[_name].__module__ = __name__
