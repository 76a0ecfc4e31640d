"""All records that debugging keeps, what it logs, and the watchdog."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .._observed import Listener, Records, observe
from .._park import real_clock
from ._report import render

if TYPE_CHECKING:
    from .._observed import Hold, Outcome, Record, Wait

log = logging.getLogger("aiosync.debug")

# How many holders or waiters of one object a log message lists.
_FEW = 5
# How often in each threshold the watchdog looks.
_LOOKS = 4


class Recorder(Listener, Protocol):
    """A listener for all records."""

    def forget(self) -> None:
        """Do nothing from now on, since this is a forked process."""


class Tracker:
    """All objects that keep a record for debugging."""

    def __init__(self) -> None:
        self.records: Records = Records()
        # What else is told of all changes.
        self.recorders: tuple[Recorder, ...] = ()
        # How many seconds a caller may be blocked; None: there is no watchdog.
        self.threshold: float | None = None
        self._stop = threading.Event()

    def created(self, shared: Any) -> None:
        """Observe a new object."""
        self.records.add(observe(shared, self))

    def report(self, limit: int) -> str:
        """Return the report on all objects."""
        return render(list(self.records), real_clock(), limit)

    # -- Listener.

    def wait_began(self, wait: Wait) -> None:
        """See `Listener`."""
        for recorder in self.recorders:
            recorder.wait_began(wait)

    def wait_ended(self, wait: Wait, outcome: Outcome) -> None:
        """Log a timeout, with the holders of what was waited for."""
        for recorder in self.recorders:
            recorder.wait_ended(wait, outcome)
        if outcome == "timeout" and log.isEnabledFor(logging.INFO):
            report = render([wait.record], real_clock(), _FEW).partition("\n\n")[2]
            log.info("%s timed out waiting for %s\n%s", wait.caller, wait.record, report)

    def hold_began(self, hold: Hold) -> None:
        """See `Listener`."""
        for recorder in self.recorders:
            recorder.hold_began(hold)

    def hold_ended(self, hold: Hold) -> None:
        """See `Listener`."""
        for recorder in self.recorders:
            recorder.hold_ended(hold)

    def happened(self, record: Record, event: Any) -> None:
        """See `Listener`."""
        for recorder in self.recorders:
            recorder.happened(record, event)

    # -- The watchdog.

    def watch(self, threshold: float | None) -> None:
        """Start a watchdog in place of the one that may be running.

        :param threshold: see `threshold`
        """
        self._stop.set()
        self._start_watchdog(threshold)

    def _start_watchdog(self, threshold: float | None) -> None:
        self._stop = threading.Event()
        self.threshold = threshold
        if threshold is not None:
            watch = partial(self._watch, threshold, self._stop)
            threading.Thread(target=watch, name="aiosync-watchdog", daemon=True).start()

    def _watch(self, threshold: float, stop: threading.Event) -> None:
        while not stop.wait(threshold / _LOOKS):
            try:
                self.look(threshold)
            except Exception:  # such as one of a log handler
                log.exception("the watchdog has failed")

    def look(self, threshold: float) -> None:
        """Report each caller that is blocked for longer than `threshold` seconds, once."""
        since: float = real_clock() - threshold
        waits = [wait for record in list(self.records) for wait in list(record.waits)]
        late = [wait for wait in waits if wait.since <= since and not wait.reported]
        if not late:
            return
        for wait in late:
            wait.reported = True
        log.warning(
            "%s has been blocked for more than %g s by %s%s\n%s",
            late[0].caller,
            threshold,
            late[0].record,
            f", and {len(late) - 1} more" if len(late) > 1 else "",
            self.report(_FEW),
        )

    def after_fork(self) -> None:
        """In a forked process: start its own watchdog, and leave the recordings to the parent."""
        for recorder in self.recorders:
            recorder.forget()
        self.recorders = ()
        for record in self.records:
            record.waits.clear()  # of threads that this process has not, and of their tasks
        # The lock of `_stop` may be held by the watchdog, which this process has not.
        self._start_watchdog(self.threshold)
