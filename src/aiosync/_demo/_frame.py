"""The present as lines of text: what every worker does now, the permits and the pool."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ._history import State
from ._terminal import BOLD
from ._timeline import draw_row

if TYPE_CHECKING:
    from ._history import History
    from ._terminal import Terminal
    from ._workers import Crew

_LONGEST = max(len(state.value) for state in State)


class Frames:
    """Draws frames of one run. Beside each worker are its states in the last frames.

    :param files: how many files there are
    """

    def __init__(self, backend: str, files: int, crew: Crew, history: History) -> None:
        self._backend = backend
        self._files = files
        self._crew = crew
        self._history = history
        self._trails: list[deque[State]] = [deque(maxlen=500) for _ in history.rows]

    def draw(self, terminal: Terminal) -> list[str]:
        """Return the lines of the next frame, none wider than the terminal."""
        crew, history = self._crew, self._history
        width = terminal.size()[0]
        lines = self._draw_head(terminal, width)
        margin = max(map(len, history.rows)) + 2
        room = max(width - margin - _LONGEST - 2, 0)
        states = history.snapshot()
        for name, state, trail in zip(history.rows, states, self._trails, strict=True):
            trail.append(state)
            text = terminal.paint(state.value.ljust(_LONGEST), state)
            recent = draw_row(list(trail)[len(trail) - min(room, len(trail)) :], terminal)
            lines.append(f"{name:<{margin}}{text}  {recent}")
        hidden = len(crew.tasks) + len(crew.threads) - len(history.rows)
        if hidden:
            lines.append(f"and {hidden:,} more")
        return lines

    def _draw_head(self, terminal: Terminal, width: int) -> list[str]:
        semaphore = self._crew.permits.statistics()
        barrier = self._crew.barrier.statistics()
        pool = self._crew.pool.statistics()
        # Not by the statistics: those of a closed pool are all 0.
        permits = self._history.limits[State.READING]
        connections = self._history.limits[State.CONNECTED]
        arrived = barrier.tasks_waiting + barrier.threads_waiting
        waiting = pool.tasks_waiting + pool.threads_waiting
        title, *lines = (
            line[:width]
            for line in [
                self._draw_title(),
                _draw_gauge("semaphore", permits - semaphore.value, permits, terminal)
                + f" in use, {semaphore.waiting} waiting",
                _draw_gauge("pool", pool.in_use, connections, terminal)
                + f" in use, {waiting} waiting",
                _draw_gauge("barrier", arrived, barrier.parties, terminal) + " arrived",
            ]
        )
        return [terminal.style(title, BOLD), *lines]

    def _draw_title(self) -> str:
        title = f"{self._backend}, {self._history.elapsed():.1f} s: "
        if not self._crew.rounds:
            return f"{title}reading, {len(self._crew.crowds):,} of {self._files:,} files"
        return title + ("counting" if self._crew.rounds == 1 else "done")


def _draw_gauge(label: str, used: int, total: int, terminal: Terminal) -> str:
    return f"{label:<10}{terminal.gauge(used, total)}{used} of {total}"
