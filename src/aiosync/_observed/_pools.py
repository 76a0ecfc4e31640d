"""What an observed pool does in addition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from .._errors import check_timeout
from .._park import ki_protected, real_clock
from .._pool._entry import FOREVER
from ._caller import called_by_with
from ._extend import extend
from ._record import Attempt
from ._semaphores import outcome_of

if TYPE_CHECKING:
    from .._pool import ConnectionPool, PoolEvent
    from .._pool._entry import PoolEntry
    from .._pool._validation import Validation
    from ._record import Outcome, Record

T = TypeVar("T")

if TYPE_CHECKING:

    class PoolBase(ConnectionPool[T]): ...

    class ValidationBase(Validation[T]): ...

else:

    class PoolBase(Generic[T]):
        __slots__ = ()

    class ValidationBase(Generic[T]):
        __slots__ = ()


class Step(NamedTuple):
    """A check or reset of a connection that has ended."""

    kind: Literal["check", "reset"]
    connection: int
    began: float
    ended: float


class ObservedPool(PoolBase[T]):
    """A `ConnectionPool` that keeps a record of its borrowers and waiters."""

    __slots__ = ()

    _record: Record

    def _observe(self) -> None:
        """Leave the fast paths, which keep no record."""
        self._is_plain = False
        self._tracks_loans = self._validates = True
        hook, record = self._options.on_event, self._record

        def on_event(event: PoolEvent) -> object:
            record.tell(event)
            if event.reason in {"collected", "forced"}:  # nobody gives it back
                record.drop_lost()
            return None if hook is None else hook(event)

        self._options.on_event = on_event
        self._observe_validation()

    def _observe_validation(self) -> None:
        validation: Any = self._maintenance.validation
        extend(validation, ObservedValidation)
        validation._record = self._record
        validation._begun = {}

    def _install(self) -> None:
        super()._install()
        self._observe_validation()

    @ki_protected
    async def _take(self, timeout: float | None, is_task: bool) -> T:
        limit = self._options.timeout if timeout is None else check_timeout(timeout)
        record = self._record
        began: float = real_clock()
        waits = limit is None or limit > 0
        wait = record.begin(limit) if waits else None

        def ended(outcome: Outcome) -> None:
            if wait is not None:
                record.end(wait, outcome)
            else:
                record.tell(Attempt(outcome, real_clock() - began))

        try:
            connection = await super()._take(timeout, is_task)
        except BaseException as error:
            ended(outcome_of(error))
            raise
        try:
            ended("got")
        except BaseException:  # a signal handler has raised
            super().release(connection)
            raise
        return connection

    @ki_protected
    def _grab(self) -> T:
        connection = super()._grab()
        self._record.tell(Attempt("got", 0.0))
        return connection

    def _begin_loan(self, entry: PoolEntry[T]) -> None:
        super()._begin_loan(entry)
        hold = self._record.hold(item=entry, is_kept=lambda: self._in_use.get(entry.key) is entry)
        if self._record.names_callers:
            hold.scoped = called_by_with()
            entry.borrower = str(hold.caller)
            if self._options.leak_timeout == FOREVER:  # otherwise it has the whole stack
                entry.stack = [] if hold.site is None else [hold.site]

    def _end_loan(self, entry: PoolEntry[T]) -> None:
        self._record.drop_item(entry)
        super()._end_loan(entry)

    def observed_state(self) -> str:
        """See `View`."""
        found = self.statistics()
        state = f"max={found.max_size} in_use={found.in_use} idle={found.idle}"
        return state + (f" connecting={found.connecting}" if found.connecting else "")

    def observed_missing(self) -> int:
        """See `View`."""
        return int(len(self._in_use) >= self.max_size)


class ObservedValidation(ValidationBase[T]):
    """A `Validation` that tells of its steps."""

    __slots__ = ()

    _record: Record
    _begun: dict[PoolEntry[T], tuple[Literal["check", "reset"], float]]

    @ki_protected
    def _begin_reset(self, entry: PoolEntry[T]) -> Any:
        self._begun[entry] = "reset", real_clock()
        return super()._begin_reset(entry)

    @ki_protected
    def _finish_return(self, entry: PoolEntry[T]) -> None:
        self._tell(entry)
        super()._finish_return(entry)

    def check(self, entry: PoolEntry[T]) -> None:
        """See `Validation.check`."""
        self._begun[entry] = "check", real_clock()
        super().check(entry)

    def _validated(
        self, entry: PoolEntry[T], step: Literal["check", "reset"], error: BaseException | None
    ) -> None:
        self._tell(entry)
        super()._validated(entry, step, error)

    def _tell(self, entry: PoolEntry[T]) -> None:
        begun = self._begun.pop(entry, None)
        if begun is not None:
            self._record.tell(Step(begun[0], entry.number, begun[1], real_clock()))
