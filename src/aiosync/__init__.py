"""Synchronization primitives that tasks and threads share, with the semantics of `threading`.

The face: nothing but re-exports.
"""

from ._as_threading import as_threading
from ._barrier import Barrier
from ._errors import BrokenBarrierError, PoolClosed, PoolTimeout, TooManyRequests
from ._from_threading import from_threading
from ._pool import ConnectionInfo, ConnectionPool, PoolEvent
from ._semaphore import BoundedSemaphore, Semaphore

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "ConnectionInfo",
    "ConnectionPool",
    "PoolClosed",
    "PoolEvent",
    "PoolTimeout",
    "Semaphore",
    "TooManyRequests",
    "as_threading",
    "from_threading",
]
