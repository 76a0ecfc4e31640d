"""Reports for programs that stand still: holders, waiters and deadlocks.

`enable`, or ``AIOSYNC_DEBUG=1`` in the environment, makes all objects that are created afterwards
keep a record of their holders and waiters: tasks and threads, since when, and the line that asked.
`report` shows it as text and names deadlocks, `dump_on` prints that on a signal, and a watchdog
logs it when a caller is blocked for long. `record` writes a timeline for Perfetto.

Objects that are created while debugging is disabled are as fast as if this module did not exist.

The logger ``aiosync.debug`` reports callers that are blocked for long as warnings, and timeouts,
with the holders of what was waited for, as information.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from .. import _created
from .._errors import check_count, check_timeout
from .._observed import record_of
from .._park import real_clock
from ._signal import Dumper
from ._situation import Holder, Waiter, held, holder, waiter
from ._trace import Recording
from ._tracker import Tracker

if TYPE_CHECKING:
    from typing import SupportsIndex, TextIO

    from .._observed import Record

__all__ = [
    "Holder",
    "Recording",
    "Waiter",
    "disable",
    "dump_on",
    "enable",
    "enabled",
    "holders",
    "record",
    "report",
    "waiters",
]

_tracking = Tracker()
_dumpers: dict[int, Dumper] = {}


def enable(*, watchdog: float | None = 30.0) -> None:
    """Keep records of the holders and waiters of all objects that are created from now on.

    That holds for semaphores, barriers and pools, their views, views of `threading` objects, and
    objects of `aiosync.redis`, of which only the holders and waiters of this process are known. If
    debugging is enabled already, only `watchdog` changes.

    May be called from anywhere.

    :param watchdog: how many seconds a caller may be blocked before a report is logged, once for
        each; None: never
    :raises TypeError: if `watchdog` is not a number
    :raises ValueError: if `watchdog` is 0 or less, or NaN
    """
    threshold = check_timeout(watchdog)
    if threshold is not None and threshold <= 0:
        raise ValueError(f"watchdog must be more than 0, not {threshold:g}")
    _tracking.watch(threshold)
    if not enabled():
        _created.watchers.append(_tracking.created)


def disable() -> None:
    """Leave alone the objects that are created from now on, and stop the watchdog.

    Objects that keep a record go on. May be called from anywhere. Does nothing if debugging is not
    enabled.
    """
    _tracking.watch(None)
    if enabled():
        _created.watchers.remove(_tracking.created)


def enabled() -> bool:
    """Return whether new objects keep a record."""
    return _tracking.created in _created.watchers


def report(*, limit: SupportsIndex = 20) -> str:
    """Return a report on all objects that keep a record and are in use.

    Deadlocks come first. Then each object has a block of lines: its name and figures, its holders,
    the longest first, and its waiters, in order; each with the age in seconds and the line of code.

    May be called from anywhere.

    :param limit: how many holders and how many waiters of one object to list, 1 or more
    :raises TypeError: if `limit` is not an integer
    :raises ValueError: if `limit` is smaller than 1
    """
    return _tracking.report(check_count("limit", limit, 1))


def holders(shared: object) -> list[Holder]:
    """Return the holders of permits or connections of an object, the longest first.

    May be called from anywhere. A barrier has no holders.

    :param shared: an object of this package, or a view of one
    :raises ValueError: if it keeps no record, since debugging was not enabled when it was created
    """
    now = real_clock()
    return [holder(hold, now) for hold in held(_record_of(shared))]


def waiters(shared: object) -> list[Waiter]:
    """Return the waiters of an object, in the order in which they came.

    May be called from anywhere. A caller that has been given what it waits for, but has not run
    since, is still in the list.

    :param shared: an object of this package, or a view of one
    :raises ValueError: if it keeps no record, since debugging was not enabled when it was created
    """
    now = real_clock()
    return [waiter(wait, now) for wait in list(_record_of(shared).waits)]


def _record_of(shared: object) -> Record:
    record = record_of(shared)
    if record is None or not record.names_callers:
        raise ValueError(
            f"this {type(shared).__name__} keeps no record: "
            f"call aiosync.debug.enable() before it is created"
        )
    return record


def dump_on(signum: int, *, file: TextIO | None = None) -> None:
    """Print the report, and the stack of the main thread, whenever the process gets a signal.

    A thread prints it, so it works while the event loop is blocked. If the main thread is in a call
    of C that does not return, but lets other threads run, it works from Python 3.14 on; before, the
    report comes when that call ends. Enables debugging if it is disabled. A forked process has to
    call this again. Not available on Windows.

    Before Python 3.14, to be called by the main thread; since then, by any. If it was called for
    this signal before, only the new `file` is used.

    :param signum: such as ``signal.SIGUSR1``
    :param file: where to print; None: `sys.stderr`
    :raises RuntimeError: if the operating system has no signals
    :raises ValueError: if the signal is unknown; before Python 3.14, also if this is not the main
        thread
    """
    if not enabled():
        enable()
    before = _dumpers.pop(signum, None)
    if before is not None:
        before.stop()
    _dumpers[signum] = Dumper(signum, report, sys.stderr if file is None else file)


def record(path: str | os.PathLike[str], *, max_events: SupportsIndex = 1_000_000) -> Recording:
    """Write what happens from now on to a file that Perfetto and ``chrome://tracing`` show.

    The file is in the Chrome trace event format. Each task or thread has a row with what it waits
    for and what it holds; each barrier one with its rounds; each connection of a pool one with
    connect, use, check and reset. It is written as it grows, so a program that is killed leaves a
    file that can be read. Enables debugging if it is disabled.

    ``with debug.record("trace.json"):`` ends with the block; otherwise it ends by
    `Recording.close`, or when the interpreter exits.

    :param path: the file, which is replaced
    :param max_events: how many events to write at most, so that the file does not fill the disk
    :raises OSError: if the file cannot be opened
    """
    if not enabled():
        enable()
    return Recording(path, check_count("max_events", max_events, 1), _tracking)


def _after_fork() -> None:
    for dumper in _dumpers.values():
        dumper.forget()
    _dumpers.clear()
    _tracking.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# Tracebacks and help() show the public name, not the private module.
for _class in (Holder, Recording, Waiter):
    _class.__module__ = __name__
