"""Redraws a frame while the workers run."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ._terminal import write_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ._terminal import Terminal

# Seconds between two frames, at the least.
_INTERVAL = 1 / 15

# Each frame leaves the terminal as it was: if the process is killed, the cursor is visible. While
# it is drawn, the cursor is hidden, and long lines are cut off at the right instead of wrapped.
_BEGIN = "\x1b[?25l\x1b[?7l"
_END = "\x1b[?7h\x1b[?25h"
_CLEAR_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"


def redraw(before: int, lines: list[str]) -> str:
    """Return what replaces a frame of `before` lines by `lines`.

    The cursor is below the frame before and after it.
    """
    up = f"\r\x1b[{before}A" if before else "\r"
    body = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines)
    return f"{_BEGIN}{up}{body}{_CLEAR_BELOW}{_END}"


class Live:
    """A context manager that redraws a frame, by a thread, until it ends.

    The last frame is wiped if the block ends well; otherwise it stays, with the cursor below it.

    :param draw: returns the lines of the next frame
    """

    def __init__(self, terminal: Terminal, draw: Callable[[Terminal], list[str]]) -> None:
        self._terminal = terminal
        self._draw = draw
        self._height = 0
        # A finalizer may log a warning at any time.
        self._lock = threading.RLock()
        self._stop = threading.Event()
        # A daemon: a second Ctrl-C ends the program without waiting for it.
        self._thread = threading.Thread(target=self._run, name="aiosync-demo", daemon=True)

    def __enter__(self) -> Self:
        if self._terminal.live:
            self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._terminal.live:
            self._thread.join()
            self._show([] if exc is None else self._draw(self._terminal))

    def _run(self) -> None:
        while True:
            self._show(self._draw(self._terminal))
            if self._stop.wait(_INTERVAL):
                return

    def _show(self, lines: list[str]) -> None:
        lines = lines[: self._terminal.size()[1] - 1]  # the cursor can't go up any further
        with self._lock:
            self._write(redraw(self._height, lines))
            self._height = len(lines)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal has been closed
            self._terminal.stream.write(text)
            self._terminal.stream.flush()

    def note(self, line: str) -> None:
        """Write a line to stderr, above the frame."""
        with self._lock:
            if self._height:
                self._write(redraw(self._height, []))
                self._height = 0
            write_error(line + "\n")


class Notes(logging.Handler):
    """Writes the warnings of aiosync to stderr, so that they do not garble the frame."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.live: Live | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.live is None:
            write_error(line + "\n")
        else:
            self.live.note(line)
