"""The timeline at the end of the demo, drawn from made-up histories."""

from __future__ import annotations

import io

import pytest
from support.terminal import FakeTerminal

from aiosync import Barrier, ConnectionPool, Semaphore
from aiosync._demo._history import History, State
from aiosync._demo._terminal import Terminal
from aiosync._demo._timeline import (
    assign,
    choose_rows,
    draw_axis,
    draw_legend,
    draw_phases,
    draw_row,
    draw_timeline,
)

IDLE, WAITING, READING, AT_BARRIER, COUNTING, CONNECTED = State

TERMINAL = Terminal(io.StringIO(), unicode=True)
ASCII = Terminal(io.StringIO())


def made_up() -> History:
    """The history of two workers that share one permit and one connection, for ten seconds."""
    pool = ConnectionPool(connect=object, max_size=1)
    history = History(["task-1", "thread-2"], Semaphore(1), Barrier(2), pool)
    stays: dict[str, list[tuple[State, float]]] = {
        "task-1": [(READING, 1), (WAITING, 2), (AT_BARRIER, 4), (COUNTING, 8), (CONNECTED, 10)],
        "thread-2": [(WAITING, 1), (READING, 4), (COUNTING, 6), (CONNECTED, 7), (AT_BARRIER, 10)],
    }
    for name, parts in stays.items():
        began = 0.0
        for state, ended in parts:
            history.rows[name].strip.add(state, began, ended)
            began = ended
    history.rounds += [4.0, 10.0]
    return history


def test_the_timeline_at_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "41")
    assert draw_timeline(made_up(), 10.0, 0, TERMINAL) == [
        "          reading     counting and stori",
        "task-1    ▒▒▒···││││││▄▄▄▄▄▄▄▄▄▄▄▄██████",
        "thread-2  ···▒▒▒▒▒▒▒▒▒▄▄▄▄▄▄███│││││││││",
        "          0           5.00 s     10.00 s",
        "· waiting   ▒ reading   │ at the barrier",
        "▄ counting   █ has a connection",
    ]


@pytest.mark.parametrize("columns", [40, 80, 120, 300])
@pytest.mark.parametrize("colour", [False, True])
def test_the_timeline_is_as_wide_as_the_terminal(
    columns: int, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = draw_timeline(made_up(), 10.0, 0, TERMINAL._replace(colour=colour))
    screen = FakeTerminal(columns, 50)
    screen.feed("\n".join(lines))
    assert len(screen.text) == len(lines)
    assert screen.is_as_before
    assert [len(line) for line in screen.text[1:4]] == [columns - 1] * 3
    assert all(len(line) < columns for line in screen.text)
    assert all(line == line.rstrip() for line in lines)
    assert ("\x1b" in "".join(lines)) is colour


def test_plain_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "81")
    lines = draw_timeline(made_up(), 10.0, 1234, ASCII)
    assert "\n".join(lines).isascii()
    assert lines[1] == "task-1    " + "r" * 7 + "." * 7 + "|" * 14 + "c" * 28 + "#" * 14
    assert lines[3] == "          and 1,234 more"
    assert lines[5:] == [
        ". waiting   r reading   | at the barrier   c counting   # has a connection"
    ]


def test_a_state_gets_columns_in_proportion_to_its_time() -> None:
    strips = [[{READING: 0.25, WAITING: 0.75}] * 40, [{READING: 0.1, WAITING: 0.9}] * 40]
    drawn = assign(strips, {READING: 2})
    assert [states.count(READING) for states in drawn] == [10, 4]
    assert [states.count(WAITING) for states in drawn] == [30, 36]


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("workers", [3, 8])
def test_no_column_shows_more_readers_than_there_are_permits(limit: int, workers: int) -> None:
    share = limit / workers
    column: dict[State, float] = {READING: share, WAITING: 1 - share}
    drawn = assign([[column] * 48] * workers, {READING: limit})
    for states in zip(*drawn, strict=True):
        assert states.count(READING) <= limit
    for row in drawn:
        assert abs(row.count(READING) - 48 * share) <= 1.5


def test_a_state_is_drawn_only_where_it_was() -> None:
    # In the first columns, only one of the two may be shown with the permit.
    mixed: list[dict[State, float]] = [{READING: 0.6, WAITING: 0.4}] * 5
    late: list[dict[State, float]] = [{AT_BARRIER: 1.0}] * 5
    for row in assign([mixed + late] * 2, {READING: 1}):
        assert set(row[:5]) <= {READING, WAITING}
        assert row[5:] == [AT_BARRIER] * 5


def test_a_row_whose_only_state_is_taken_gets_another() -> None:
    full: list[dict[State, float]] = [{READING: 1.0}]
    assert assign([full, full], {READING: 1}) == [[READING], [IDLE]]


def test_nothing_recorded_is_blank() -> None:
    assert assign([[{}, {}]], {}) == [[IDLE, IDLE]]
    assert draw_row([IDLE, IDLE], TERMINAL) == "  "
    assert draw_row([], TERMINAL) == ""


def test_equal_states_share_one_attribute() -> None:
    states = [READING, READING, IDLE, CONNECTED]
    expected = "\x1b[36mrr\x1b[0m \x1b[32m#\x1b[0m"
    assert draw_row(states, ASCII._replace(colour=True)) == expected


@pytest.mark.parametrize(
    ("rounds", "line"),
    [
        ([], "reading"),
        ([5.0, 10.0], "reading   counting a"),
        ([0.0], "counting and storing"),
        ([1.0], "recounting and stori"),
        ([11.0], "reading"),
    ],
)
def test_phases(rounds: list[float], line: str) -> None:
    history = made_up()
    history.rounds = rounds
    assert draw_phases(history, 20, 10.0).rstrip() == line


def test_the_axis() -> None:
    assert draw_axis(30, 2.5) == "0           1.25 s      2.50 s"
    assert draw_axis(30, 123.4) == "0            62 s        123 s"
    assert draw_axis(20, 12.5) == "0            12.50 s"


def test_the_legend_in_colour() -> None:
    (line,) = draw_legend(ASCII._replace(colour=True), 79)
    assert "\x1b[36mr reading\x1b[0m   \x1b[35m| at the barrier\x1b[0m" in line


@pytest.mark.parametrize(
    ("tasks", "threads", "most", "shown"),
    [
        ("ab", "xy", 4, "abxy"),
        ("abcd", "xyz", 4, "abxy"),
        ("abcd", "xyz", 5, "abcxy"),
        ("abcd", "x", 4, "abcx"),
        ("a", "wxyz", 4, "awxy"),
        ("abcd", "", 3, "abc"),
        ("", "wxyz", 3, "wxy"),
        ("abcd", "wxyz", 1, "a"),
    ],
)
def test_as_many_workers_of_both_kinds(tasks: str, threads: str, most: int, shown: str) -> None:
    assert "".join(choose_rows(list(tasks), list(threads), most)) == shown
