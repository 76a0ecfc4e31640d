"""A recording in the Chrome trace event format, which Perfetto shows as a timeline."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .._observed import Step
from .._park import real_clock
from .._pool import PoolEvent
from ._trace_file import TraceFile

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .._callers import CallSite
    from .._observed import Hold, Outcome, Record, Wait
    from .._observed._caller import Caller
    from ._tracker import Tracker

# A wait that took no longer, in seconds, found what it wanted free. It is left out.
_BRIEF = 5e-5

# The groups of rows ("processes" in the format). Pools follow.
_CALLERS, _BARRIERS, _FIRST_POOL = 1, 2, 3


class _Round:
    """A round of a barrier, from the first arrival."""

    def __init__(self) -> None:
        self.began: float = real_clock()
        self.ended = False


class Recording:
    """A file that is being written. Created by `record`.

    It can be used as a context manager, which closes it.
    """

    def __init__(self, path: str | os.PathLike[str], max_events: int, tracker: Tracker) -> None:
        self._file = TraceFile(path)
        self._tracker = tracker
        self._left = max_events
        self._began: float = real_clock()
        # Reentrant, since a signal handler or finalizer may interrupt any step.
        self._lock = threading.RLock()
        # The rows of tasks and threads, of barriers, and of connections, by pool.
        self._rows: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._groups: WeakKeyDictionary[Record, int] = WeakKeyDictionary()
        self._next_row = 1
        self._next_group = _FIRST_POOL
        # What each row holds, the outermost first.
        self._held: dict[int, list[Hold]] = {}
        # What each caller waits for, and from when on that is not written yet.
        self._waits: dict[Caller, dict[Wait, float]] = {}
        self._rounds: dict[Wait, _Round] = {}
        self._current: WeakKeyDictionary[Record, _Round] = WeakKeyDictionary()
        program = os.path.basename(sys.argv[0]) or "python"
        self._name("process_name", _CALLERS, 0, f"{program} (pid {os.getpid()})")
        self._name("process_name", _BARRIERS, 0, "barriers")
        tracker.recorders += (self,)
        atexit.register(self.close)

    def close(self) -> None:
        """End the recording and close the file. Does nothing if that has been done.

        What is still held or waited for ends here in the timeline.
        """
        with self._lock:
            if not self._file.closed:
                for record in self._tracker.records:
                    for wait in list(record.waits):
                        self._write_wait(wait, "unfinished")
                for row in list(self._held):
                    for _ in self._held.pop(row):
                        self._event("E", _CALLERS, row)
                self._file.end()
        self._tracker.recorders = tuple(r for r in self._tracker.recorders if r is not self)
        atexit.unregister(self.close)

    def forget(self) -> None:
        """In a forked process: leave the file to the parent."""
        self._file.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `close` does."""
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._file.closed else "open"
        return f"<aiosync.debug.Recording {self._file.path!r} {state}>"

    # -- Writing.

    def _event(
        self,
        phase: str,
        group: int,
        row: int,
        name: str = "",
        at: float | None = None,
        **more: object,
    ) -> None:
        """Add an event.

        Called by the owner of the lock.

        :param phase: "X": with a duration, "B" and "E": begin and end, "i": an instant
        :param at: when; None: now
        """
        if self._left <= 0 or self._file.closed:
            return
        self._left -= 1
        now: float = real_clock()
        if not self._left:
            phase, name, more = "i", "the recording is full", {"s": "g"}
        event: dict[str, object] = {"ph": phase, "pid": group, "tid": row, "name": name}
        event["ts"] = self._microseconds(now if at is None else at)
        event.update(more)
        self._file.add(json.dumps(event))

    def _microseconds(self, moment: float) -> float:
        return round((moment - self._began) * 1e6, 3)

    def _slice(
        self, group: int, row: int, name: str, began: float, ended: float, **more: object
    ) -> None:
        began = max(began, self._began)  # it may have begun before the recording
        duration = round((ended - began) * 1e6, 3)
        self._event("X", group, row, name, began, dur=duration, args=more)

    def _name(self, what: str, group: int, row: int, name: str) -> None:
        self._event("M", group, row, what, args={"name": name})

    # -- Rows.

    def _row(self, owner: Caller | Record, group: int, name: str) -> int:
        row = self._rows.get(owner)
        if row is None:
            row = self._rows[owner] = self._next_row
            self._next_row += 1
            self._name("thread_name", group, row, name)
        return row

    def _caller_row(self, caller: Caller) -> int:
        return self._row(caller, _CALLERS, str(caller))

    def _pool_group(self, record: Record) -> int:
        group = self._groups.get(record)
        if group is None:
            group = self._groups[record] = self._next_group
            self._next_group += 1
            self._name("process_name", group, 0, f"connections of {record.name}")
            self._name("thread_name", group, 0, "all")
        return group

    # -- Listener.

    def wait_began(self, wait: Wait) -> None:
        """See `Listener`."""
        with self._lock:
            # Not `since`: what the caller had may have been released by another thread after that.
            self._waits.setdefault(wait.caller, {})[wait] = real_clock()
            if wait.record.is_barrier:
                current = self._current.get(wait.record)
                if current is None or current.ended:
                    current = self._current[wait.record] = _Round()
                self._rounds[wait] = current
            self._file.write_if_due()

    def wait_ended(self, wait: Wait, outcome: Outcome) -> None:
        """See `Listener`."""
        with self._lock:
            self._write_wait(wait, outcome)
            current = self._rounds.pop(wait, None)
            if current is not None and not current.ended:
                current.ended = True
                name = "round" if outcome == "got" else f"broken round: {outcome}"
                row = self._row(wait.record, _BARRIERS, str(wait.record))
                self._slice(_BARRIERS, row, name, current.began, real_clock())
            self._file.write_if_due()

    def _write_wait(self, wait: Wait, outcome: str) -> None:
        waits = self._waits.get(wait.caller, {})
        began = waits.pop(wait, wait.since)
        if not waits:
            self._waits.pop(wait.caller, None)
        if real_clock() - wait.since >= _BRIEF:
            self._write_part(wait, began, outcome)

    def _write_part(self, wait: Wait, began: float, outcome: str) -> None:
        row = self._caller_row(wait.caller)
        # Slices of one row have to be nested: it ends before what is held since.
        holds = self._held.get(row, [])
        ended = min((hold.since for hold in holds if hold.since >= began), default=real_clock())
        name = f"{'at' if wait.record.is_barrier else 'wait for'} {wait.record}"
        line = _line(wait.site)
        self._slice(_CALLERS, row, name, began, ended, line=line, outcome=outcome)

    def hold_began(self, hold: Hold) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._caller_row(hold.caller)
            self._held.setdefault(row, []).append(hold)
            self._begin_hold(row, hold)
            self._file.write_if_due()

    def _begin_hold(self, row: int, hold: Hold) -> None:
        args = {"line": _line(hold.site)}
        self._event("B", _CALLERS, row, f"has {hold.record}", args=args)

    def hold_ended(self, hold: Hold) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._caller_row(hold.caller)
            held = self._held.get(row, [])
            if hold in held:
                self._end_hold(row, held, hold)
            if hold.item is not None:
                group, number = self._pool_group(hold.record), getattr(hold.item, "number", 0)
                name = f"used by {hold.caller}"
                line = _line(hold.site)
                self._slice(group, number, name, hold.since, real_clock(), line=line)
            self._file.write_if_due()

    def _end_hold(self, row: int, held: list[Hold], hold: Hold) -> None:
        # Slices of one row have to be nested: those that began later are cut in two.
        waits = self._waits.get(hold.caller, {})
        # It is released by another task or thread.
        cut = [wait for wait, began in waits.items() if began >= hold.since]
        for wait in cut:
            self._write_part(wait, waits[wait], "goes on")
        above = held[held.index(hold) + 1 :]
        held.remove(hold)
        for _ in range(len(above) + 1):
            self._event("E", _CALLERS, row)
        for other in above:
            self._begin_hold(row, other)
        waits.update(dict.fromkeys(cut, real_clock()))
        if not held:
            del self._held[row]

    def happened(self, record: Record, event: Any) -> None:
        """See `Listener`."""
        if not isinstance(event, (PoolEvent, Step)):
            return
        with self._lock:
            self._write_happened(record, event)
            self._file.write_if_due()

    def _write_happened(self, record: Record, event: PoolEvent | Step) -> None:
        group = self._pool_group(record)
        if isinstance(event, Step):
            self._slice(group, event.connection, event.kind, event.began, event.ended)
            return
        number = 0 if event.info is None else event.info.number
        if event.kind == "connected":
            self._name("thread_name", group, number, f"connection {number}")
            now = real_clock()
            self._slice(group, number, "connect", now - (event.seconds or 0), now)
        elif event.kind == "outage":
            self._event("B", group, 0, "outage")
        elif event.kind == "recovered":
            self._event("E", group, 0)
        elif event.kind not in {"acquired", "released"}:
            reason = event.reason if event.error is None else repr(event.error)
            self._event("i", group, number, event.kind, s="t", args={"reason": reason})


def _line(site: CallSite | None) -> str:
    return "" if site is None else str(site)
