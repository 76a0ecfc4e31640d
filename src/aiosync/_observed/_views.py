"""What observed views of `threading` objects do in addition.

Threads may use the object itself, so others than those in the record may hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._errors import check_timeout, normalize_timeout
from ._semaphores import outcome_of

if TYPE_CHECKING:
    from types import TracebackType

    from .._from_threading import TaskBarrier, TaskEvent, TaskLock, TaskSemaphore
    from ._record import Record

    AcquirableBase = TaskSemaphore
    EventBase = TaskEvent
    BarrierBase = TaskBarrier
else:
    AcquirableBase = EventBase = BarrierBase = object


class _ObservedAcquirable(AcquirableBase):
    __slots__ = ()

    _record: Record

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `TaskSemaphore.acquire`."""
        return await self._acquire(normalize_timeout(blocking, timeout), scoped=False)

    async def __aenter__(self) -> bool:
        """See `TaskSemaphore.acquire`."""
        return await self._acquire(None, scoped=True)

    async def _acquire(self, timeout: float | None, *, scoped: bool) -> bool:
        wait = self._record.begin(timeout, scoped=scoped)
        try:
            acquired = await super().acquire(True, timeout)
        except BaseException as error:
            self._record.end(wait, outcome_of(error))
            raise
        self._record.end(wait, "got" if acquired else "timeout")
        if acquired:
            self._record.hold(wait)
        return acquired

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `TaskSemaphore.release`."""
        await super().__aexit__(exc_type, exc, traceback)
        self._record.released(1)


if TYPE_CHECKING:

    class _AcquirableLock(TaskLock):
        _record: Record

    class _AcquirableSemaphore(_ObservedAcquirable): ...

else:
    _AcquirableLock = _AcquirableSemaphore = _ObservedAcquirable


class ObservedTaskSemaphore(_AcquirableSemaphore):
    """A `TaskSemaphore` that keeps a record of the tasks that use it."""

    __slots__ = ()

    def release(self, n: int = 1) -> None:
        """See `TaskSemaphore.release`."""
        super().release(n)
        self._record.released(n)

    def observed_state(self) -> str:
        """See `View`."""
        return f"value={self._owned._value}"

    def observed_missing(self) -> int:
        """See `View`."""
        return 0


class ObservedTaskLock(_AcquirableLock):
    """A `TaskLock` that keeps a record of the tasks that use it."""

    __slots__ = ()

    def release(self) -> None:
        """See `TaskLock.release`."""
        super().release()
        self._record.released(1)

    def observed_state(self) -> str:
        """See `View`."""
        return "locked" if self.locked() else "free"

    def observed_missing(self) -> int:
        """See `View`."""
        return int(self.locked() and bool(self._record.holds))


class ObservedTaskEvent(EventBase):
    """A `TaskEvent` that keeps a record of the tasks that wait."""

    __slots__ = ()

    _record: Record

    async def wait(self, timeout: float | None = None) -> bool:
        """See `TaskEvent.wait`."""
        wait = self._record.begin(check_timeout(timeout))
        try:
            is_set = await super().wait(timeout)
        except BaseException as error:
            self._record.end(wait, outcome_of(error))
            raise
        self._record.end(wait, "got" if is_set else "timeout")
        return is_set

    def observed_state(self) -> str:
        """See `View`."""
        return "set" if self.is_set() else "not set"

    def observed_missing(self) -> int:
        """See `View`."""
        return 0


class ObservedTaskBarrier(BarrierBase):
    """A `TaskBarrier` that keeps a record of the tasks that wait."""

    __slots__ = ()

    _record: Record

    async def wait(self, timeout: float | None = None) -> int:
        """See `TaskBarrier.wait`."""
        wait = self._record.begin(check_timeout(timeout))
        try:
            index = await super().wait(timeout)
        except BaseException as error:
            self._record.end(wait, outcome_of(error))
            raise
        self._record.end(wait, "got")
        return index

    def observed_state(self) -> str:
        """See `View`."""
        state = "broken" if self.broken else f"arrived={self.n_waiting}"
        return f"parties={self.parties} {state}"

    def observed_missing(self) -> int:
        """See `View`."""
        return 0
