"""What the terminal can do, and writing to it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple, TextIO

from ._history import State

if TYPE_CHECKING:
    from typing import Self

# One character for each state; then one for what is in use, and one for what is free.
_UNICODE = " ·▒│▄█", "■", "□"
_ASCII = " .r|c#", "#", "-"
# Colours of ANSI escape sequences.
_COLOURS = {
    State.IDLE: "0",
    State.WAITING: "90",
    State.READING: "36",
    State.AT_BARRIER: "35",
    State.COUNTING: "33",
    State.CONNECTED: "32",
}
BOLD = "1"


class Terminal(NamedTuple):
    """Where the demo draws."""

    stream: TextIO
    # Whether it moves the cursor as escape sequences say, and whether colours are wanted.
    live: bool = False
    colour: bool = False
    unicode: bool = False

    @classmethod
    def of(cls, stream: TextIO, live: bool | None = None) -> Self:
        """Return what is known about a stream.

        :param live: whether the user wants it to be redrawn; None: if it is a terminal
        """
        is_able = stream.isatty() and _follows_escapes()
        colour = bool(os.environ.get("FORCE_COLOR")) or is_able
        return cls(
            stream,
            is_able if live is None else live,
            colour and not os.environ.get("NO_COLOR"),
            _can_write(stream, "".join(_UNICODE)),
        )

    def size(self) -> tuple[int, int]:
        """Return how many columns and lines to use. The last column is left free.

        Some terminals begin a new line when the last column is written.
        """
        columns, lines = shutil.get_terminal_size()
        return max(columns - 1, 30), lines

    def rows(self) -> int:
        """Return how many workers have room in a frame, or in a timeline and its summary."""
        return max(self.size()[1] - 7, 1)

    def mark(self, state: State) -> str:
        """Return the character that stands for a state."""
        return (_UNICODE if self.unicode else _ASCII)[0][list(State).index(state)]

    def gauge(self, used: int, total: int, most: int = 20) -> str:
        """Return one character for each permit or connection, or "" if there are too many."""
        _, full, free = _UNICODE if self.unicode else _ASCII
        used = min(used, total)
        return full * used + free * (total - used) + " " if total <= most else ""

    def paint(self, text: str, state: State) -> str:
        """Return text in the colour of a state."""
        return self.style(text, _COLOURS[state])

    def style(self, text: str, code: str) -> str:
        """Return text with an attribute."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text.strip() else text


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def _follows_escapes() -> bool:
    """Return whether the terminal of the process follows escape sequences."""
    if sys.platform == "win32":
        return _enable_escapes()
    return os.environ.get("TERM", "dumb") != "dumb"


def _enable_escapes() -> bool:
    """Have a console of Windows follow escape sequences. Older ones can't."""
    import ctypes

    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    handle = kernel32.GetStdHandle(-11)  # STD_OUTPUT_HANDLE
    mode = ctypes.c_uint32()
    if not kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
        return False
    return bool(kernel32.SetConsoleMode(handle, mode.value | 4))  # VIRTUAL_TERMINAL_PROCESSING


def write_out(text: str) -> None:
    """Print to stdout, whatever its encoding.

    :raises OSError: if that fails; nothing more is written when the interpreter exits
    """
    if sys.stdout is None:  # a service
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        _discard(sys.stdout)
        raise


def write_error(text: str) -> None:
    """Write to stderr, if there is one and somebody reads it."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard what is in the buffer of a stream that can't be written.

    Otherwise Python flushes it at exit, which fails as well, with a traceback or another status.
    """
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), stream.fileno())
