"""The history of a run as lines of text: a row for each worker, and time from left to right."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ._history import State
from ._terminal import BOLD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._history import History
    from ._terminal import Terminal

Shares = list[dict[State, float]]


def choose_rows(tasks: Sequence[str], threads: Sequence[str], most: int) -> list[str]:
    """Return which workers to show: as many of both kinds, if there is no room for all."""
    n_tasks = min(len(tasks), max(most - len(threads), (most + 1) // 2))
    return [*tasks[:n_tasks], *threads[: max(most - n_tasks, 0)]]


def assign(strips: Sequence[Shares], limits: dict[State, int]) -> list[list[State]]:
    """Return one state for each row and column.

    A worker may change its state many times within a column. Along a row, each state gets columns
    in proportion to its time: a column goes to the state that is the furthest behind, of those that
    the row had in it. In a column, no more rows get a state than `limits` allows.

    :param strips: for each row, the shares of the states in each column
    """
    states = list(State)
    behind = [dict.fromkeys(states, 0.0) for _ in strips]
    drawn: list[list[State]] = [[] for _ in strips]
    for column in zip(*strips, strict=True):
        for row, shares in enumerate(column):
            for state, share in shares.items():
                behind[row][state] += share
        free = {state: limits.get(state, len(strips)) for state in states}
        wanted = [(row, state) for row, shares in enumerate(column) for state in shares]
        wanted.sort(key=lambda pair: -behind[pair[0]][pair[1]])
        given: dict[int, State] = {}
        for row, state in wanted:
            if row not in given and free[state]:
                given[row] = state
                free[state] -= 1
        for row in range(len(strips)):
            state = given.get(row, State.IDLE)
            behind[row][state] -= 1
            drawn[row].append(state)
    return drawn


def draw_row(states: Sequence[State], terminal: Terminal) -> str:
    """Return a character for each state."""
    return "".join(
        terminal.paint(terminal.mark(state) * len(list(same)), state)
        for state, same in groupby(states)
    )


def draw_phases(history: History, columns: int, total: float) -> str:
    """Return a line that tells which phase is in which columns."""
    if not history.rounds:
        return "reading"
    first = min(round(columns * history.rounds[0] / total), columns)
    second = "counting and storing"[: columns - first]
    return "reading"[:first].ljust(first) + second


def draw_axis(columns: int, total: float) -> str:
    """Return the line below the rows: moments in seconds."""
    digits = 2 if total < 100 else 0
    end, middle = f"{total:.{digits}f} s", f"{total / 2:.{digits}f} s"
    line = "0" + middle.rjust(columns // 2 + len(middle) // 2 - 1)
    if len(line) + len(end) >= columns:
        line = "0"
    return line + end.rjust(columns - len(line))


def draw_legend(terminal: Terminal, width: int) -> list[str]:
    """Return what each character stands for, in as many lines as it takes."""
    lines: list[str] = []
    used = width
    for state in State:
        if state is State.IDLE:
            continue
        entry = f"{terminal.mark(state)} {state.value}"
        if used + 3 + len(entry) > width:
            lines.append("")
            used = -3
        lines[-1] += ("   " if lines[-1] else "") + terminal.paint(entry, state)
        used += 3 + len(entry)
    return lines


def draw_timeline(history: History, total: float, hidden: int, terminal: Terminal) -> list[str]:
    """Return the lines of the timeline, to the width of the terminal.

    :param total: the length of the history in seconds
    :param hidden: how many workers are not in the history
    """
    width = terminal.size()[0]
    margin = max(map(len, history.rows)) + 2
    columns = width - margin
    strips = [row.strip.shares(columns, total) for row in history.rows.values()]
    blank = " " * margin
    lines = [blank + terminal.style(draw_phases(history, columns, total), BOLD)]
    for name, states in zip(history.rows, assign(strips, history.limits), strict=True):
        lines.append(name.ljust(margin) + draw_row(states, terminal))
    if hidden:
        lines.append(f"{blank}and {hidden:,} more")
    lines.append(blank + draw_axis(columns, total))
    lines += draw_legend(terminal, width)
    return [line.rstrip() for line in lines]
