"""What the demo takes a terminal to be able to do."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from aiosync._demo._history import State
from aiosync._demo._terminal import BOLD, Terminal, write_error, write_out


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", *, tty: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize(
    ("tty", "variables", "live", "colour"),
    [
        (True, {}, True, True),
        (True, {"TERM": "dumb"}, False, False),
        (True, {"TERM": None}, False, False),
        (True, {"NO_COLOR": "1"}, True, False),
        (True, {"NO_COLOR": ""}, True, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        (True, {"TERM": "dumb", "FORCE_COLOR": "1"}, False, True),
        (False, {}, False, False),
        (False, {"FORCE_COLOR": "1"}, False, True),
        (False, {"FORCE_COLOR": ""}, False, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_redrawing_and_colours(
    tty: bool,
    variables: dict[str, str | None],
    live: bool,
    colour: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in ({"TERM": "xterm"} | variables).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    stream = Stream(tty=tty)
    assert Terminal.of(stream)[1:3] == (live, colour)
    # The user knows better.
    assert Terminal.of(stream, True)[1:3] == (True, colour)
    assert Terminal.of(stream, False)[1:3] == (False, colour)


@pytest.mark.parametrize(
    ("encoding", "unicode"),
    [("utf-8", True), ("utf-16", True), ("ascii", False), ("latin-1", False), ("cp1252", False)],
)
def test_the_characters_that_the_encoding_has(encoding: str, unicode: bool) -> None:
    terminal = Terminal.of(Stream(encoding))
    assert terminal.unicode is unicode
    marks = [terminal.mark(state) for state in State]
    assert "".join(marks) == (" ·▒│▄█" if unicode else " .r|c#")


def test_a_stream_without_an_encoding() -> None:
    assert not Terminal.of(io.StringIO()).unicode


class Console:
    """The functions of Windows that tell of a console and change it."""

    def __init__(self, *, known: bool = True, new: bool = True) -> None:
        self.known = known
        self.new = new
        self.mode = 3

    def GetStdHandle(self, number: int) -> int:
        assert number == -11
        return 7

    def GetConsoleMode(self, handle: int, mode: Any) -> int:
        assert handle == 7
        mode._obj.value = self.mode
        return int(self.known)

    def SetConsoleMode(self, handle: int, mode: int) -> int:
        assert handle == 7
        if self.new:
            self.mode = mode
        return int(self.new)


@pytest.mark.parametrize(
    ("console", "live", "mode"),
    [(Console(), True, 7), (Console(known=False), False, 3), (Console(new=False), False, 3)],
    ids=["new", "no console", "old"],
)
def test_a_console_of_windows(
    console: Console, live: bool, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=console), raising=False)
    terminal = Terminal.of(Stream())
    assert (terminal.live, terminal.colour, console.mode) == (live, live, mode)


@pytest.mark.parametrize(
    ("columns", "lines", "size", "rows"),
    [
        (80, 24, (79, 24), 17),
        (40, 10, (39, 10), 3),
        (10, 4, (30, 4), 1),
        (300, 100, (299, 100), 93),
    ],
)
def test_size(
    columns: int,
    lines: int,
    size: tuple[int, int],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    terminal = Terminal(io.StringIO())
    assert (terminal.size(), terminal.rows()) == (size, rows)


def test_a_gauge() -> None:
    terminal = Terminal(io.StringIO(), unicode=True)
    assert terminal.gauge(2, 3) == "■■□ "
    assert terminal.gauge(4, 3) == "■■■ "
    assert terminal.gauge(2, 21) == ""
    assert terminal._replace(unicode=False).gauge(2, 3) == "##- "


def test_attributes() -> None:
    plain = Terminal(io.StringIO())
    colour = plain._replace(colour=True)
    assert plain.paint("text", State.READING) == "text"
    assert colour.paint("text", State.READING) == "\x1b[36mtext\x1b[0m"
    assert colour.style("text", BOLD) == "\x1b[1mtext\x1b[0m"
    assert colour.style("  ", BOLD) == "  "


def test_write_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="latin-1", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    write_out("Größe")
    write_out("ö is not \N{SNOWMAN}")
    assert raw.getvalue() == b"Gr\xf6\xdfe\n\xf6 is not \\u2603\n"


def test_a_service_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    write_out("nobody reads it")
    write_error("nobody reads it")


def test_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        write_error("nobody reads it")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):
            write_out("nobody reads it")
