"""Records of the holders and waiters of objects.

`observe` makes one object keep a `Record`; `aiosync.debug` and `aiosync.opentelemetry` listen to
it. All other objects are left alone, and are as fast as before.

_caller       a task or thread
_record       what is known about one object
_extend       how the class of one object is replaced
_semaphores, _pools, _views, _distributed   what observed objects do in addition
"""

from __future__ import annotations

import sys
from threading import RLock
from typing import Any

from .._barrier import Barrier
from .._from_threading import TaskBarrier, TaskEvent, TaskLock, TaskSemaphore
from .._pool import ConnectionPool
from .._semaphore import Semaphore
from ._distributed import ObservedBarrierCalls, ObservedSemaphoreCalls
from ._extend import extend
from ._pools import ObservedPool, Step
from ._record import (
    Attempt,
    BrokenRound,
    Hold,
    Listener,
    Outcome,
    Record,
    Records,
    Role,
    Wait,
)
from ._semaphores import ObservedBarrier, ObservedSemaphore, permits
from ._views import ObservedTaskBarrier, ObservedTaskEvent, ObservedTaskLock, ObservedTaskSemaphore

__all__ = [
    "Attempt",
    "BrokenRound",
    "Hold",
    "Listener",
    "Outcome",
    "Record",
    "Records",
    "Role",
    "Step",
    "Wait",
    "observe",
    "record_of",
    "unobserve",
]

# What each class is, and what is put in front of it.
_EXTENSIONS: list[tuple[type, Role, type]] = [
    (Semaphore, "semaphore", ObservedSemaphore),
    (Barrier, "barrier", ObservedBarrier),
    (ConnectionPool, "pool", ObservedPool),
    (TaskSemaphore, "semaphore", ObservedTaskSemaphore),
    (TaskLock, "semaphore", ObservedTaskLock),
    (TaskEvent, "event", ObservedTaskEvent),
    (TaskBarrier, "barrier", ObservedTaskBarrier),
]
# The public names of what stands for the objects of `aiosync.redis`, and of pools of recipes.
_PUBLIC_NAMES = {
    "SemaphoreCalls": "DistributedSemaphore",
    "BarrierCalls": "DistributedBarrier",
    "BlockingPool": "ConnectionPool",
}

# Two threads may observe one object at the same time.
_lock = RLock()


def observe(shared: Any, listener: Listener, *, names_callers: bool = True) -> Record:
    """Tell `listener` of all waiters and holders of an object, from now on.

    If it is told already, nothing changes.

    :param shared: a semaphore, barrier, pool, view of a `threading` object, or what stands for an
        object of `aiosync.redis`. Views for threads that exist already are not observed.
    :param names_callers: whether the listener reads the callers of waits and holds, and their lines
    :return: the record of the object, which is the same for all listeners
    """
    with _lock:
        record: Record | None = getattr(shared, "_record", None)
        if record is None:
            role, extension = _extension_of(shared)
            record = _new_record(shared, role)
            # A class of a user may refuse to have its attributes set.
            object.__setattr__(shared, "_record", record)
            extend(shared, extension)
            if isinstance(shared, ObservedPool):
                shared._observe()
        record.names_callers |= names_callers
        if listener not in record.listeners:
            record.listeners += (listener,)
        return record


def unobserve(record: Record, listener: Listener) -> None:
    """Have `listener` told no more. The object keeps its record."""
    with _lock:
        record.listeners = tuple(other for other in record.listeners if other is not listener)


def _new_record(shared: Any, role: Role) -> Record:
    kind = type(shared).__name__
    value = 0
    if isinstance(shared, Semaphore):
        value = permits(shared)
    elif kind == "SemaphoreCalls":
        value = shared.value
    public = _PUBLIC_NAMES.get(kind, kind)
    record = Record(shared, role, public, getattr(shared, "name", None), value)
    is_local = isinstance(shared, (Semaphore, Barrier, ConnectionPool, TaskLock))
    is_local = is_local or kind == "SemaphoreCalls"
    # A semaphore without permits is a signal: others release than those that acquire.
    record.is_open = not is_local or (isinstance(shared, Semaphore) and value == 0)
    return record


def _extension_of(shared: object) -> tuple[Role, type]:
    """Return what an object is, and what is put in front of its class."""
    for base, role, extension in _EXTENSIONS:
        if isinstance(shared, base):
            return role, extension
    calls: Any = sys.modules.get("aiosync.redis._semaphore_calls")
    is_semaphore = calls is not None and isinstance(shared, calls.SemaphoreCalls)
    if is_semaphore:
        return "semaphore", ObservedSemaphoreCalls
    return "barrier", ObservedBarrierCalls


def record_of(shared: Any) -> Record | None:
    """Return the record of an object or of a view of it; None if it is not observed."""
    for attribute in ("_semaphore", "_barrier", "_shared", "_calls"):
        record: Record | None = getattr(shared, "_record", None)
        if record is not None:
            return record
        shared = getattr(shared, attribute, shared)
    return getattr(shared, "_record", None)
