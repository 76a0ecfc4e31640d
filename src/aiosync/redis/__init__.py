"""Semaphores and barriers that processes and machines share, on a Redis or Valkey server.

::

    redis = Redis("redis://localhost")
    limit = redis.semaphore("mail", 3)

    async with redis:
        async with limit:
            ...

The objects have the interface of `aiosync.Semaphore` and `aiosync.Barrier`. A permit is a lease: if
its process dies, the permit passes on to another one. Needs the extra ``aiosync[redis]``.
"""

from importlib.util import find_spec

if find_spec("coredis") is None:
    raise ImportError("aiosync.redis needs coredis: pip install 'aiosync[redis]'")

from ._barrier import DistributedBarrier
from ._barrier_calls import DistributedBarrierStatistics
from ._client import Redis
from ._errors import BackendUnavailable, LeaseLost
from ._hold import Hold, Permit
from ._semaphore import DistributedSemaphore
from ._semaphore_calls import DistributedSemaphoreStatistics
from ._threads import ThreadDistributedBarrier, ThreadDistributedSemaphore, ThreadHold

__all__ = [
    "BackendUnavailable",
    "DistributedBarrier",
    "DistributedBarrierStatistics",
    "DistributedSemaphore",
    "DistributedSemaphoreStatistics",
    "Hold",
    "LeaseLost",
    "Permit",
    "Redis",
    "ThreadDistributedBarrier",
    "ThreadDistributedSemaphore",
    "ThreadHold",
]

# Tracebacks and help() show the public name, not the private module.
for _name in __all__:
    globals()[_name].__module__ = __name__
