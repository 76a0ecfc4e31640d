"""What reports to one meter provider."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, get_args

from opentelemetry.context import get_current
from opentelemetry.metrics import Observation, get_meter_provider

from .._barrier import Barrier
from .._errors import BrokenReason
from .._observed import Attempt, BrokenRound, Records, observe, unobserve
from .._park import real_clock
from .._pool import ConnectionPool, PoolEvent
from .._semaphore import Semaphore
from ._figures import COUNTERS, GAUGES, HISTOGRAMS, POOL, PREFIXES, attributes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider

    from .._observed import Hold, Outcome, Record, Wait
    from ._figures import Attributes, Gauge

log = logging.getLogger("aiosync.opentelemetry")

# In seconds. The conventions advise these bounds for the durations of database operations, and none
# for connections. The default of the SDK is meant for milliseconds.
_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

# How many values to keep until they can be recorded. It is reached only if nobody collects them.
_MOST_PENDING = 100_000

# What stands for the objects of `aiosync.redis` is defined here.
_DISTRIBUTED = {"aiosync.redis._semaphore_calls", "aiosync.redis._barrier_calls"}


def is_reported(shared: object) -> bool:
    """Return whether an object, or what stands for one of `aiosync.redis`, is of a kind to report.

    Views are not. Tasks that use an object of `threading` see only a part of its users.
    """
    is_local = isinstance(shared, (Semaphore, Barrier, ConnectionPool))
    return is_local or type(shared).__module__ in _DISTRIBUTED


class Reporter:
    """Reports to one meter provider. A `Listener`.

    :param provider: None: the global one, which may be set later
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        self._provider = provider
        self._records = Records()
        # Values to record. `release` and the like may be called by a signal handler or a finalizer
        # that has interrupted the SDK, which then holds a lock. So they only append here, and
        # callers that wait, and the collection of metrics, record what has been appended.
        self._pending: deque[tuple[Callable[..., object], float, Attributes, Context]] = deque(
            maxlen=_MOST_PENDING
        )
        self._thread = threading.local()
        self._has_failed = False
        meter = self.provider.get_meter("aiosync")
        for gauge in GAUGES:
            meter.create_observable_up_down_counter(
                gauge.name, [self._reader_of(gauge)], gauge.unit, gauge.description
            )

        self._writers: dict[str, Callable[..., object]] = {}
        for name, description in HISTOGRAMS.items():
            self._writers[name] = meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=_BOUNDS
            ).record
        for name, (unit, description) in COUNTERS.items():
            self._writers[name] = meter.create_counter(name, unit, description).add

    @property
    def provider(self) -> MeterProvider:
        """The meter provider."""
        return get_meter_provider() if self._provider is None else self._provider

    # -- Which objects.

    def created(self, shared: object) -> None:
        """Instrument a new object, if it is of a kind that is reported. Never raises."""
        if is_reported(shared):
            try:
                self.add(shared)
            except Exception:
                self._failed()

    def add(self, shared: object) -> None:
        """Instrument an object, unless that has been done."""
        record = observe(shared, self, names_callers=False)
        if record in self._records:
            return
        self._records.add(record)
        # Counters begin at 0: the rate of a series that begins with 1 lacks the first event.
        if record.role != "barrier":
            self._put("timeouts", 0, record)
            return
        for reason in get_args(BrokenReason):
            if reason != "lost" or not isinstance(shared, Barrier):
                self._put("broken_rounds", 0, record, {"error.type": reason})

    def remove(self, record: Record) -> None:
        """Report an object no more."""
        unobserve(record, self)
        self._records.discard(record)

    def remove_all(self) -> None:
        """Report no object any more."""
        for record in self._records:
            self.remove(record)

    # -- Listener.

    def wait_began(self, wait: Wait) -> None:
        """See `Listener`."""

    def wait_ended(self, wait: Wait, outcome: Outcome) -> None:
        """See `Listener`."""
        record = wait.record
        if outcome == "got":
            self._put("wait_time", real_clock() - wait.since, record)
        elif outcome == "timeout" and wait.timeout != 0 and record.role != "barrier":
            self._put("timeouts", 1, record)
        self._flush()

    def hold_began(self, hold: Hold) -> None:
        """See `Listener`."""

    def hold_ended(self, hold: Hold) -> None:
        """See `Listener`."""
        if hold.record.role == "pool":
            self._put("use_time", real_clock() - hold.since, hold.record)

    def happened(self, record: Record, event: object) -> None:
        """See `Listener`."""
        if isinstance(event, Attempt):
            if event.outcome == "got":
                self._put("wait_time", event.seconds, record)
            elif event.outcome == "timeout":  # only of a pool
                self._put("timeouts", 1, record)
        elif isinstance(event, BrokenRound):
            self._put("broken_rounds", 1, record, {"error.type": event.reason})
        elif isinstance(event, PoolEvent) and event.seconds is not None:
            self._put("create_time", event.seconds, record)

    # -- Recording.

    def _put(
        self, metric: str, value: float, record: Record, more: Attributes | None = None
    ) -> None:
        """Have a value recorded soon.

        :param metric: the name of the metric, without the prefix
        :param more: attributes besides the name of the object
        """
        write = self._writers[f"{PREFIXES[record.role]}.{metric}"]
        attributes = attributes_of(record)
        if more is not None:
            attributes |= more
        self._pending.append((write, value, attributes, get_current()))

    def _flush(self) -> None:
        """Record what is pending, unless this call has interrupted that."""
        if getattr(self._thread, "is_flushing", False):
            return
        try:
            self._thread.is_flushing = True
            while True:
                try:
                    write, value, attributes, context = self._pending.popleft()
                except IndexError:
                    return
                try:
                    write(value, attributes, context)
                except Exception:
                    self._failed()
        finally:
            self._thread.is_flushing = False

    def _failed(self) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.exception("cannot record metrics; this is logged once")

    def _reader_of(self, gauge: Gauge) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return the function that reads a figure of all objects.

        Objects of the same name are added up: a meter takes one value for each set of attributes.
        """

        def read(_: CallbackOptions) -> Iterable[Observation]:
            self._flush()
            sums: dict[tuple[tuple[str, str], ...], int] = {}
            for record in self._records:
                shared: Any = record.shared
                if record.role != gauge.role or shared is None:
                    continue
                if isinstance(shared, ConnectionPool) and shared.closed:
                    continue
                for state, value in gauge.read(record, shared).items():
                    attributes = attributes_of(record)
                    if state:
                        attributes[f"{POOL}.state"] = state
                    key = tuple(attributes.items())
                    sums[key] = sums.get(key, 0) + value
            return [Observation(value, dict(key)) for key, value in sums.items()]

        return read
