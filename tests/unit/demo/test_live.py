"""How the demo redraws, on a terminal that follows what it writes."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest
from support.terminal import FakeTerminal

from aiosync._demo._live import Live, Notes, redraw
from aiosync._demo._terminal import Terminal


@pytest.fixture(autouse=True)
def size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "10")


def shown(stream: io.StringIO) -> FakeTerminal:
    screen = FakeTerminal(40, 10)
    screen.feed(stream.getvalue())
    return screen


def test_a_frame_replaces_the_one_before() -> None:
    screen = FakeTerminal(20, 10)
    screen.feed("above\n")
    screen.feed(redraw(0, ["one", "two", "three"]))
    assert screen.text == ["above", "one", "two", "three", ""]
    screen.feed("^C")
    screen.feed(redraw(3, ["1"]))
    assert screen.text == ["above", "1", ""]
    screen.feed(redraw(1, ["a", "b" * 30]))
    assert screen.text == ["above", "a", "b" * 20, ""]
    screen.feed(redraw(2, []))
    assert screen.text == ["above", ""]
    assert screen.is_as_before


class Drawn:
    """Draws numbered frames, and tells when there have been some."""

    def __init__(self, wanted: int = 2, height: int = 2) -> None:
        self.count = 0
        self.wanted = wanted
        self.height = height
        self.enough = threading.Event()

    def __call__(self, terminal: Terminal) -> list[str]:
        self.count += 1
        if self.count == self.wanted:
            self.enough.set()
        return [f"frame {self.count}", *map(str, range(1, self.height))]


def test_the_frame_is_wiped_at_the_end() -> None:
    stream, draw = io.StringIO(), Drawn()
    with Live(Terminal(stream, live=True), draw):
        assert draw.enough.wait(10)
    assert shown(stream).text == [""]
    assert shown(stream).frames >= 3
    assert shown(stream).is_as_before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_last_frame_stays_after_an_error(error: type[BaseException]) -> None:
    stream, draw = io.StringIO(), Drawn()
    with pytest.raises(error), Live(Terminal(stream, live=True), draw):
        assert draw.enough.wait(10)
        raise error
    assert shown(stream).text == [f"frame {draw.count}", "1", ""]
    assert shown(stream).is_as_before


def test_nothing_is_drawn_where_it_is_not_wanted() -> None:
    stream, draw = io.StringIO(), Drawn()
    with pytest.raises(ValueError, match="no"), Live(Terminal(stream), draw):
        raise ValueError("no")
    assert (stream.getvalue(), draw.count) == ("", 0)


def test_a_frame_that_is_too_tall_is_cut() -> None:
    stream, draw = io.StringIO(), Drawn(height=50)
    with pytest.raises(ValueError, match="no"), Live(Terminal(stream, live=True), draw):
        assert draw.enough.wait(10)
        raise ValueError("no")
    assert shown(stream).text == [f"frame {draw.count}", *map(str, range(1, 9)), ""]


class Clock(threading.Event):
    """Stops the thread when it has waited three times."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        return len(self.waited) == 3


def test_no_more_than_15_frames_a_second() -> None:
    draw = Drawn()
    live = Live(Terminal(io.StringIO(), live=True), draw)
    live._stop = clock = Clock()
    live._run()
    assert draw.count == 3
    assert clock.waited == [1 / 15] * 3


def test_a_terminal_that_has_been_closed() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    draw = Drawn()
    with Live(Terminal(Closed(), live=True), draw):
        assert draw.enough.wait(10)


def test_warnings_are_above_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log, notes = logging.getLogger("aiosync.made-up"), Notes()
    log.addHandler(notes)
    try:
        log.warning("before")
        notes.live = live = Live(Terminal(stream, live=True), Drawn())
        log.warning("above %s", 1)
        live._show(["frame"])
        log.warning("above 2")
        log.info("not shown")
        live._show(["frame"])
    finally:
        log.removeHandler(notes)
    assert shown(stream).text == ["before", "above 1", "above 2", "frame", ""]
