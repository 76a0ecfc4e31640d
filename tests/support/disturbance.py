"""Tests that measure time are repeated if the machine kept them waiting.

A test that expects something within a tenth of a second says nothing on a machine that gives its
process, or that of a server, no processor for so long. The first is measured beside the test; the
second may be so if more processes are ready to run than there are processors. A test that fails
although the machine was fast enough fails at once.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from _pytest.runner import runtestprotocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    import pytest

# Seconds of lateness that make a measurement void.
VOID = 0.03
ATTEMPTS = 4
# Seconds after which no new attempt begins: the timeout of a test is for all of its attempts.
LAST_START = 20.0
# The markers of tests that measure time.
MARKERS = ("redis", "postgres", "timing")


class Disturbance:
    """A thread that measures how late it is woken, at worst. Use it as a context manager."""

    PERIOD = 0.005

    def __init__(
        self,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._over = threading.Event()
        # The event ends the last sleep early: the test that follows need not wait for it.
        self._sleep, self._clock = sleep or self._over.wait, clock
        self._thread = threading.Thread(target=self._measure, name="disturbance", daemon=True)
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _measure(self) -> None:
        while not self._over.is_set():
            start = self._clock()
            self._sleep(self.PERIOD)
            self.seconds = max(self.seconds, self._clock() - start - self.PERIOD)


def is_overloaded() -> bool:
    """Return whether, in the last minute, more processes were ready to run than can run at once."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def measures_time(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(marker) for marker in MARKERS)


def run(item: pytest.Item, nextitem: pytest.Item | None) -> list[str]:
    """Run a test until it passes, or fails undisturbed; return what is to be said of it."""
    said: list[str] = []
    start = time.monotonic()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for attempt in range(ATTEMPTS):
        with Disturbance() as disturbance:
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
        is_void = any(report.failed for report in reports) and (
            disturbance.seconds > VOID or is_overloaded()
        )
        if not is_void or attempt == ATTEMPTS - 1 or time.monotonic() - start > LAST_START:
            break
        said.append(f"{item.nodeid}: repeated, was {disturbance.seconds * 1000:.0f} ms late")
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return said
