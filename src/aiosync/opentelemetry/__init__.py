"""Metrics of pools, semaphores and barriers for OpenTelemetry.

`instrument` reports one object to a meter provider; `instrument_all` the open pools, and all
objects that are created afterwards. Pools report the metrics of the semantic conventions for
database client connections; semaphores and barriers have names of their own, listed in
docs/metrics.md. Objects that are not instrumented are as fast as if this module did not exist.

Only ``opentelemetry-api`` is needed. Without a meter provider nothing is reported.

Every function may be called from any thread. An error of the meter provider is never raised to the
users of an object; the logger ``aiosync.opentelemetry`` reports the first one of each provider.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import _created
from .._observed import record_of
from .._pool import open_pools

if find_spec("opentelemetry") is None or find_spec("opentelemetry.metrics") is None:
    raise ImportError(
        "aiosync.opentelemetry needs opentelemetry-api: pip install 'aiosync[opentelemetry]'"
    )

from opentelemetry.metrics import get_meter_provider

from ._reporter import Reporter, is_reported

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

__all__ = ["instrument", "instrument_all", "uninstrument", "uninstrument_all"]

# One for each meter provider that was ever used.
_reporters: list[Reporter] = []
_lock = threading.RLock()


def _reporter_of(provider: MeterProvider | None) -> Reporter:
    default = get_meter_provider()
    wanted = default if provider is None else provider
    with _lock:
        for reporter in _reporters:
            if reporter.provider is wanted:
                return reporter
        reporter = Reporter(None if wanted is default else wanted)
        _reporters.append(reporter)
        return reporter


def _reported(obj: object) -> Any:
    """Return the object that keeps the record of `obj`.

    :raises TypeError: if its kind is not reported
    """
    shared = getattr(obj, "_calls", obj)
    if not is_reported(shared):
        raise TypeError(
            f"aiosync.opentelemetry reports semaphores, barriers and pools of aiosync, "
            f"not {type(obj).__name__}"
        )
    return shared


def instrument(obj: object, meter_provider: MeterProvider | None = None) -> None:
    """Report the metrics of one object.

    Views by `as_threading` that exist already are counted, but their wait times are not. An object
    that is instrumented twice with the same provider is reported once; several providers may be
    used at the same time. The object is not kept alive.

    :param obj: a `Semaphore`, `BoundedSemaphore`, `Barrier` or `ConnectionPool`, or a semaphore or
        barrier of `aiosync.redis`, of which the waiters of this process are reported
    :param meter_provider: where to report; None: the global one of OpenTelemetry, which may be set
        later
    :raises TypeError: if `obj` is anything else, such as a view by `as_threading` or
        `from_threading`
    """
    _reporter_of(meter_provider).add(_reported(obj))


def instrument_all(meter_provider: MeterProvider | None = None) -> None:
    """Report all pools that are open, and all objects that are created from now on.

    Does nothing if that has been done with the same provider.

    :param meter_provider: see `instrument`
    """
    reporter = _reporter_of(meter_provider)
    with _lock:
        if reporter.created not in _created.watchers:
            _created.watchers.append(reporter.created)
    for pool in open_pools():
        reporter.add(pool)


def uninstrument(obj: object, meter_provider: MeterProvider | None = None) -> None:
    """Report one object no more. Does nothing if it is not instrumented.

    Its calls take as long as if it were.

    :param meter_provider: that of `instrument`
    :raises TypeError: if `obj` is of a kind that cannot be instrumented
    """
    record = record_of(_reported(obj))
    if record is not None:
        _reporter_of(meter_provider).remove(record)


def uninstrument_all(meter_provider: MeterProvider | None = None) -> None:
    """Report no object any more, neither old nor new.

    :param meter_provider: that of `instrument_all` or `instrument`
    """
    reporter = _reporter_of(meter_provider)
    with _lock:
        if reporter.created in _created.watchers:
            _created.watchers.remove(reporter.created)
    reporter.remove_all()
