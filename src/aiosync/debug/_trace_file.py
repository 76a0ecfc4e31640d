"""The file of a recording: a JSON array that grows, and is valid after `end` in any case."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .._park import real_clock
from ._tracker import log

if TYPE_CHECKING:
    import os

# How many elements to collect before they are written, and for how many seconds at most.
_BATCH = 256
_INTERVAL = 0.5


class TraceFile:
    """A JSON array in a file. Its methods are called by one thread at a time.

    A signal handler may interrupt any method, and call others or raise.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.path: str | bytes | os.PathLike[str] = path
        self.closed = False
        # Lines that are not in `_batch` yet.
        self._pending: deque[str] = deque()
        # Lines to be written at `_size`, the end of the file.
        self._batch: list[str] = []
        self._size = 0
        self._is_writing = False
        self._written_at: float = real_clock()

    def add(self, line: str) -> None:
        """Append an element."""
        self._pending.append(line)

    def write_if_due(self) -> None:
        """Write what was added, unless that is little and was done just before."""
        now = real_clock()
        if len(self._pending) >= _BATCH or now - self._written_at > _INTERVAL:
            self._written_at = now
            self._write()

    def end(self) -> None:
        """End the array and close the file. Does nothing if that has been done."""
        self.closed = True
        self._write()

    def forget(self) -> None:
        """In a forked process: leave the file to the parent."""
        self.closed = True
        self._file.close()

    def _write(self) -> None:
        if self._is_writing:
            return  # this has interrupted another call, which goes on when this returns
        try:
            self._is_writing = True
            self._append_pending()
        except OSError as error:
            self._fail(error)
        finally:
            self._is_writing = False
            # Not in the block above: a signal handler may have ended it there, and raised.
            if self.closed:
                self._end()

    def _end(self) -> None:
        if self._file.closed:
            return
        try:
            self._append_pending()
            self._append("\n]\n")
        except OSError as error:
            self._fail(error)
        finally:
            self._file.close()

    def _append_pending(self) -> None:
        # A signal handler may raise between any two steps. Each line is a string of its own, so
        # one that is in the batch already is known. A batch that was not counted is written again,
        # to the same place.
        while self._pending:
            line = self._pending[0]
            if not self._batch or self._batch[-1] is not line:
                self._batch.append(line)
            self._pending.popleft()
        if self._batch:
            begin = ",\n" if self._size else "[\n"
            self._append(begin + ",\n".join(self._batch))

    def _append(self, text: str) -> None:
        data = text.encode()
        self._file.seek(self._size)
        rest = data
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size, self._batch = self._size + len(data), []

    def _fail(self, error: OSError) -> None:
        self.closed = True
        self._file.close()
        log.warning("the recording ends, because %r cannot be written: %s", self.path, error)
