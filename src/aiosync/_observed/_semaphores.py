"""What observed semaphores and barriers do in addition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._barrier import _Broken
from .._errors import BrokenBarrierError, check_timeout, normalize_timeout
from .._park import ki_protected, real_clock
from ._extend import extend
from ._record import Attempt, BrokenRound

if TYPE_CHECKING:
    from typing import SupportsIndex

    from .._barrier import Barrier, _Round
    from .._semaphore import Semaphore
    from ._record import Outcome, Record

    SemaphoreBase = Semaphore
    BarrierBase = Barrier
else:
    SemaphoreBase = BarrierBase = object


def outcome_of(error: BaseException) -> Outcome:
    """Return how a wait has ended that raised `error`."""
    if isinstance(error, BrokenBarrierError):
        return "timeout" if error.reason == "timeout" else "failed"
    if isinstance(error, TimeoutError):
        return "timeout"
    return "failed" if isinstance(error, Exception) else "cancelled"


def permits(semaphore: Semaphore) -> int:
    """Return how many permits are free. A class of a user may have a `value` of its own."""
    return semaphore._queue.free()


class ObservedSemaphore(SemaphoreBase):
    """A `Semaphore` that keeps a record of its holders and waiters."""

    __slots__ = ()

    _record: Record

    def _for_threads(self) -> Semaphore:
        twin: Any = super()._for_threads()
        extend(twin, ObservedSemaphore)
        twin._record = self._record
        twin._slow_path = True  # so that a view calls `acquire`
        return twin  # type: ignore[no-any-return]

    @ki_protected
    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `Semaphore.acquire`."""
        return await self._acquire(normalize_timeout(blocking, timeout), scoped=False)

    @ki_protected
    async def __aenter__(self) -> bool:
        """See `Semaphore.acquire`."""
        if type(self).acquire is not ObservedSemaphore.acquire:  # overridden by a user
            return await super().__aenter__()
        return await self._acquire(None, scoped=True)

    @ki_protected
    async def _acquire(self, timeout: float | None, *, scoped: bool) -> bool:
        record = self._record
        acquired = False
        began: float = real_clock()
        wait = None if timeout == 0 else record.begin(timeout, scoped=scoped)
        try:
            acquired = await super().acquire(True, timeout)
            if wait is not None:
                record.end(wait, "got" if acquired else "timeout")
            elif acquired:
                record.tell(Attempt("got", real_clock() - began))
            if acquired:
                record.hold(wait)
        except BaseException as error:
            if acquired:  # a signal handler has raised
                super().release()
            if wait is not None:
                record.end(wait, outcome_of(error))
            raise
        return acquired

    @ki_protected
    def acquire_nowait(self) -> None:
        """See `Semaphore.acquire_nowait`."""
        super().acquire_nowait()
        self._record.tell(Attempt("got", 0.0))
        self._record.hold()

    @ki_protected
    def release(self, n: SupportsIndex = 1) -> None:
        """See `Semaphore.release`."""
        super().release(n)
        self._record.released(int(n))

    def observed_state(self) -> str:
        """See `View`."""
        return f"value={permits(self)}"

    def observed_missing(self) -> int:
        """See `View`."""
        is_free = permits(self) > 0 and not self._waiters
        return int(not is_free and len(self._record.holds) >= self._record.capacity)


class ObservedBarrier(BarrierBase):
    """A `Barrier` that keeps a record of its parties."""

    __slots__ = ()

    _record: Record

    def _for_threads(self) -> Barrier:
        twin: Any = super()._for_threads()
        extend(twin, ObservedBarrier)
        twin._record = self._record
        return twin  # type: ignore[no-any-return]

    @ki_protected
    async def wait(self, timeout: float | None = None) -> int:
        """See `Barrier.wait`."""
        limit = check_timeout(timeout)
        earlier = self._rounds.latest
        wait = self._record.begin(self._timeout if limit is None else limit)
        try:
            index = await super().wait(timeout)
        except BaseException as error:
            self._tell_broken(earlier)
            self._record.end(wait, outcome_of(error))
            raise
        finally:
            del earlier  # see `Barrier.wait`
        self._record.end(wait, "got")
        return index

    @ki_protected
    def abort(self) -> None:
        """See `Barrier.abort`."""
        earlier = self._rounds.latest
        super().abort()
        self._tell_broken(earlier)

    @ki_protected
    def reset(self) -> None:
        """See `Barrier.reset`."""
        earlier = self._rounds.latest
        super().reset()
        self._tell_broken(earlier)

    @ki_protected
    def _tell_broken(self, round: _Round | None) -> None:
        """Tell of each round that was broken, from `round` on, unless another caller has done so.

        Every caller that breaks a round calls this after it, so none is missed. To write into the
        round is the claim to tell of it.
        """
        while round is not None:
            outcome = round.outcome
            if isinstance(outcome, _Broken):
                # The reset of a barrier without waiting parties has no effect.
                is_unused = outcome.reason == "reset" and outcome.missing == self.parties
                claim = object()
                if not is_unused and round.decided.setdefault("told", claim) is claim:
                    self._record.tell(BrokenRound(outcome.reason))
            round = round.decided.get("next")

    def observed_state(self) -> str:
        """See `View`."""
        state = "broken" if self.broken else f"arrived={self.n_waiting}"
        return f"parties={self.parties} {state}"

    def observed_missing(self) -> int:
        """See `View`."""
        # A party that has passed, but has not run since, is not counted by the barrier any more.
        arrived = self.n_waiting
        return 0 if self.broken or arrived < len(self._record.waits) else self.parties - arrived
