"""What the demo shows of the present."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from support.terminal import FakeTerminal

from aiosync import ConnectionPool
from aiosync._demo._frame import Frames
from aiosync._demo._history import History, State
from aiosync._demo._terminal import Terminal
from aiosync._demo._workers import Crew

TERMINAL = Terminal(io.StringIO(), unicode=True)


class Scene:
    """A crew that does not run, and what is drawn of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int, rows: int) -> None:
        pool = ConnectionPool(connect=object, max_size=3)
        self.crew = Crew([[]] * workers, workers // 2, 3, pool)  # type: ignore[arg-type]
        names = [*self.crew.tasks, *self.crew.threads][:rows]
        self.history = History(names, self.crew.permits, self.crew.barrier, pool)
        monkeypatch.setattr(self.history, "elapsed", lambda: 1.25)
        self.frames = Frames("trio", 1790, self.crew, self.history)

    def show(self, *states: State) -> None:
        for row, state in zip(self.history.rows.values(), states, strict=True):
            row.state = state


def test_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "61")
    scene = Scene(monkeypatch, 4, 4)
    scene.crew.crowds += [1] * 1234
    scene.show(State.READING, State.WAITING, State.AT_BARRIER, State.CONNECTED)
    scene.frames.draw(TERMINAL)
    scene.show(State.AT_BARRIER, State.READING, State.AT_BARRIER, State.IDLE)
    assert scene.frames.draw(TERMINAL) == [
        "trio, 1.2 s: reading, 1,234 of 1,790 files",
        "semaphore □□□ 0 of 3 in use, 0 waiting",
        "pool      □□□ 0 of 3 in use, 0 waiting",
        "barrier   □□□□ 0 of 4 arrived",
        "task-1    at the barrier    ▒│",
        "task-2    reading           ·▒",
        "thread-3  at the barrier    ││",
        "thread-4  idle              █ ",
    ]


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 30, 2)
    for _ in range(2):
        scene.crew.permits.acquire_nowait()
    scene.crew.rounds = 1
    lines = scene.frames.draw(TERMINAL)
    assert lines[0] == "trio, 1.2 s: counting"
    assert lines[1] == "semaphore ■■□ 2 of 3 in use, 0 waiting"
    assert lines[3] == "barrier   0 of 30 arrived"
    assert lines[-1] == "and 28 more"
    scene.crew.rounds = 2
    assert scene.frames.draw(TERMINAL)[0] == "trio, 1.2 s: done"


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    scene = Scene(monkeypatch, 8, 8)
    for _ in range(600):
        lines = scene.frames.draw(TERMINAL._replace(colour=True))
    screen = FakeTerminal(1000, 50)
    screen.feed("\n".join(lines))
    width = TERMINAL.size()[0]
    assert all(len(line) <= width for line in screen.text)
    assert screen.is_as_before


def test_the_last_states_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "41")
    scene = Scene(monkeypatch, 2, 1)
    scene.show(State.READING)
    for _ in range(20):
        scene.frames.draw(TERMINAL)
    scene.show(State.WAITING)
    scene.frames.draw(TERMINAL)
    lines = scene.frames.draw(TERMINAL)
    assert lines[4] == "task-1  waiting           ▒▒▒▒▒▒▒▒▒▒▒▒··"
    assert lines[5] == "and 1 more"


def test_names_of_workers() -> None:
    parts = [[Path(str(number))] for number in range(3)]
    crew = Crew(parts, 2, 1, ConnectionPool(connect=object))  # type: ignore[arg-type]
    assert crew.tasks == {"task-1": parts[0]}
    assert crew.threads == {"thread-2": parts[1], "thread-3": parts[2]}
