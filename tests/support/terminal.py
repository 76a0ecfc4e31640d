"""A terminal: what is on the screen after a program has written to it."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class FakeTerminal:
    """Follows the escape sequences that the demo uses, and refuses all others.

    Characters beyond the last column are lost, as with the automatic wrap turned off, or begin a
    new line.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.columns = columns
        self.lines = lines
        self.screen: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True
        self.cursor = True
        self.style = "0"
        self.frames = 0

    def feed(self, data: str) -> None:
        position = 0
        while position < len(data):
            token = _TOKEN.match(data, position)
            assert token, f"not understood: {data[position : position + 20]!r}"
            position = token.end()
            private, number, command, home, newline, text = token.groups()
            if command:
                self._command(private, number, command)
            elif home:
                self.column = 0
            elif newline:
                self.column = 0
                self._down()
            else:
                self._write(text)

    def _command(self, private: str, number: str, command: str) -> None:
        if private:
            assert number in {"7", "25"}
            assert command in "hl"
            if number == "7":
                self.wraps = command == "h"
            else:
                self.cursor = command == "h"
                self.frames += self.cursor
        elif command == "A":
            self.row -= int(number)
            assert self.row >= 0, "above the screen"
        elif command == "K":
            del self.screen[self.row][self.column :]
        elif command == "J":
            del self.screen[self.row][self.column :]
            del self.screen[self.row + 1 :]
        else:
            assert command == "m"
            self.style = number

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.screen):
            self.screen.append([])
        if self.row == self.lines:
            del self.screen[0]
            self.row -= 1

    def _write(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                if not self.wraps:
                    return
                self.column = 0
                self._down()
            line = self.screen[self.row]
            line += " " * (self.column - len(line))
            line[self.column : self.column + 1] = character
            self.column += 1

    @property
    def text(self) -> list[str]:
        """The lines on the screen, without blanks at their end."""
        return ["".join(line).rstrip() for line in self.screen]

    @property
    def is_as_before(self) -> bool:
        """Whether the cursor is shown, lines wrap, and no attribute is left."""
        return self.cursor and self.wraps and self.style in {"", "0"}
