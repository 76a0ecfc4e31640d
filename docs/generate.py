"""Writes what the pages contain that is made from other files: ``python docs/generate.py``.

pool-states.svg, and the table in pool.md    from the table of states in the code of the pool
bugs-of-others.md, its table                 from the exhibits in tests/museum
timeline.svg                                 from timeline.json, a recording of the program in
                                             debugging.md
speed.svg                                    from the output of the benchmarks in performance.md

The tests call `outdated`, and fail if a file is not what this program would write.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from aiosync._pool._entry import TRANSITIONS, State

DOCS = Path(__file__).resolve().parent

# When a connection changes its state. The keys have to be those of `TRANSITIONS`.
REASONS = {
    (State.CONNECTING, State.CONFIGURING): "`connect` has returned a connection",
    (State.CONNECTING, State.CLOSED): "`connect` has failed, or is no longer needed",
    (State.CONFIGURING, State.IDLE): "`configure` has succeeded",
    (State.CONFIGURING, State.STANDBY): "the same, but what it replaces still exists",
    (State.CONFIGURING, State.CLOSING): "`configure` has failed, or the pool is closed",
    (State.STANDBY, State.IDLE): "the connection that it replaces is gone",
    (State.STANDBY, State.CLOSING): "it is no longer needed, or the pool is closed",
    (State.IDLE, State.IN_USE): "a task or a thread borrows it",
    (State.IDLE, State.VALIDATING): "it is checked before the next loan, or for `keepalive`",
    (State.IDLE, State.CLOSING): "it is too old, idle for too long, or no longer needed",
    (State.IN_USE, State.IDLE): "it is given back, and there is nothing to reset",
    (State.IN_USE, State.RETURNING): "it is given back, to be reset or closed",
    (State.IN_USE, State.CLOSING): "the pool is closed, and its borrower has taken too long",
    (State.RETURNING, State.IDLE): "`reset` has succeeded",
    (State.RETURNING, State.CLOSING): "`reset` has failed, or the connection is too old",
    (State.VALIDATING, State.IDLE): "`check` has succeeded",
    (State.VALIDATING, State.CLOSING): "`check` has failed",
    (State.CLOSING, State.CLOSED): "`close` has returned or failed",
}

# Where the states are drawn: the centre of each box.
PLACES = {
    State.CONNECTING: (80, 45),
    State.CONFIGURING: (265, 45),
    State.STANDBY: (450, 45),
    State.IDLE: (450, 155),
    State.IN_USE: (650, 155),
    State.VALIDATING: (450, 285),
    State.RETURNING: (650, 285),
    State.CLOSING: (265, 405),
    State.CLOSED: (80, 405),
}
WIDTH, HEIGHT = 112, 36
# The control points of the arrows that are bent around a box.
BENDS = {
    (State.STANDBY, State.CLOSING): (345, 170),
    (State.IN_USE, State.CLOSING): (385, 222),
    (State.RETURNING, State.CLOSING): (610, 430),
}

STYLE = """\
  <style>
    svg { font: 14px system-ui, sans-serif; }
    .paper { fill: #fff; } .text { fill: #222; } .small { font-size: 12px; fill: #555; }
    .box { fill: #eef3fb; stroke: #3b6fb6; } .edge { fill: none; stroke: #666; stroke-width: 1.3; }
    .tip { fill: #666; } .grid { stroke: #ddd; } .one { stroke: #888; }
    .mark { fill: #3b6fb6; } .line { stroke: #3b6fb6; stroke-width: 2; }
    .slice { stroke: #fff; stroke-width: 0.5; } .label { font-size: 11px; fill: #fff; }
    .have { fill: #2f7d4f; } .wait { fill: #b6533b; } .meet { fill: #6a56a8; }
    .work { fill: #3b6fb6; }
    .slow { fill: #b6533b; } .slower { stroke: #b6533b; stroke-width: 2; }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #1b1f24; } .text { fill: #ddd; } .small { fill: #aaa; }
      .box { fill: #22303f; stroke: #7fb0ee; } .edge { stroke: #aaa; }
      .tip { fill: #aaa; } .grid { stroke: #363c44; } .one { stroke: #888; }
      .mark { fill: #7fb0ee; } .line { stroke: #7fb0ee; }
      .slow { fill: #ee9a7f; } .slower { stroke: #ee9a7f; }
    }
  </style>
"""


def svg(width: int, height: int, title: str, body: list[str]) -> str:
    """Return a drawing."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">\n'
        f"  <title>{html.escape(title)}</title>\n{STYLE}"
        f'  <rect class="paper" width="{width}" height="{height}" rx="6"/>\n'
        + "".join(f"  {line}\n" for line in body)
        + "</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "text", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )


# The states of a connection.


def leave_box(state: State, toward: tuple[float, float]) -> tuple[float, float]:
    """Return where a line from the centre of a box towards a point leaves the box."""
    x, y = PLACES[state]
    dx, dy = toward[0] - x, toward[1] - y
    gap = 3
    scale = min(
        (WIDTH / 2 + gap) / abs(dx) if dx else math.inf,
        (HEIGHT / 2 + gap) / abs(dy) if dy else math.inf,
    )
    return x + dx * scale, y + dy * scale


def arrow(source: State, target: State) -> str:
    bend = BENDS.get((source, target))
    if bend is not None:
        (ax, ay), (bx, by) = leave_box(source, bend), leave_box(target, bend)
        path = f"M{ax:.0f},{ay:.0f} Q{bend[0]},{bend[1]} {bx:.0f},{by:.0f}"
    else:
        (ax, ay), (bx, by) = leave_box(source, PLACES[target]), leave_box(target, PLACES[source])
        if source in TRANSITIONS[target]:  # two arrows, side by side
            length = math.hypot(bx - ax, by - ay)
            shift_x, shift_y = -6 * (by - ay) / length, 6 * (bx - ax) / length
            ax, bx, ay, by = ax + shift_x, bx + shift_x, ay + shift_y, by + shift_y
        path = f"M{ax:.0f},{ay:.0f} L{bx:.0f},{by:.0f}"
    return f'<path class="edge" d="{path}" marker-end="url(#tip)"/>'


def edges() -> list[tuple[State, State]]:
    """Return all transitions.

    :raises AssertionError: if `REASONS` does not explain just these
    """
    allowed = {(a, b) for a in State for b in TRANSITIONS[a]}
    assert allowed == set(REASONS), allowed ^ set(REASONS)
    return list(REASONS)


def draw_states() -> str:
    body = [
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="tip" d="M0,0 L10,5 L0,10 z"/></marker></defs>'
    ]
    body += [arrow(source, target) for source, target in edges()]
    for state, (x, y) in PLACES.items():
        body.append(
            f'<rect class="box" x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" '
            f'width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        )
        body.append(text(x, y + 5, state.value, anchor="middle"))
    return svg(730, 448, "The states of a connection", body)


def table_of_states() -> str:
    lines = ["| from | to | when |", "|---|---|---|"]
    lines += [f"| {a.value} | {b.value} | {REASONS[a, b]} |" for a, b in edges()]
    return "\n".join(lines) + "\n"


# The speed of semaphores and barriers.


class Figure(NamedTuple):
    work: str
    peer: str
    ratio: float
    low: float
    high: float


def read_figures(page: str) -> list[Figure]:
    """Return the ratios in the first output of the benchmarks on the page, without the floors."""
    figures = []
    work = ""
    for line in page.splitlines():
        if heading := re.fullmatch(r" {4}(\S.*) \(\d+ rounds\)", line):
            work = heading[1]
        row = re.match(r" {5,}([\d.]+)x +\[([\d.]+), ([\d.]+)\] +(\S.*?)  ", line)
        if row and work and not row[4].startswith("floor"):
            figures.append(Figure(work, row[4], *map(float, row.group(1, 2, 3))))
    return figures


def draw_speed(page: str) -> str:
    """Draw the ratios as points on a logarithmic scale, each with its interval."""
    python = re.search(r"On CPython (\d+\.\d+)", page)
    assert python, "the page does not say on which CPython it was"
    left, right, top, step = 200, 700, 62, 22
    low, high = math.log(0.5), math.log(12)

    def x_of(ratio: float) -> float:
        return left + (math.log(ratio) - low) / (high - low) * (right - left)

    body = [
        text(16, 24, "Time that others take, divided by the time of aiosync"),
        text(16, 44, f"CPython {python[1]}; right of 1, aiosync is faster", "small"),
    ]
    y = float(top)
    work = ""
    for figure in read_figures(page):
        if figure.work != work:
            work = figure.work
            y += 14
            title = f"barrier, {work}" if work.endswith("parties") else work
            if figure.peer.startswith("threading") and "threads" not in work:
                title = f"{work}, in a thread"
            body.append(text(16, y + step - 4, title))
            y += step
        y += step
        kind, line = ("mark", "line") if figure.ratio >= 1 else ("slow", "slower")
        body.append(text(left - 12, y, figure.peer, "small", "end"))
        body.append(
            f'<line class="{line}" x1="{x_of(figure.low):.1f}" x2="{x_of(figure.high):.1f}" '
            f'y1="{y - 4:g}" y2="{y - 4:g}"/>'
        )
        body.append(f'<circle class="{kind}" cx="{x_of(figure.ratio):.1f}" cy="{y - 4:g}" r="5"/>')
        if figure.ratio >= 1:
            body.append(text(x_of(figure.high) + 9, y, f"{figure.ratio:.2f}", "small"))
        else:
            body.append(text(x_of(figure.low) - 9, y, f"{figure.ratio:.2f}", "small", "end"))
    bottom = y + 14
    for tick in (0.5, 1, 2, 4, 8):
        kind = "one" if tick == 1 else "grid"
        x = x_of(tick)
        line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:g}"/>'
        body.insert(2, line)
        body.append(text(x, bottom + 18, f"{tick:g}", "small", "middle"))
    return svg(760, int(bottom) + 32, "How fast aiosync is, compared with others", body)


# A recording.

# The colours of slices, by how their names begin.
COLOURS = {
    "has ": "have", "used by ": "have", "wait for ": "wait", "at ": "meet", "round": "meet",
    "connect": "work", "reset": "work", "check": "work",
}  # fmt: skip


def draw_timeline(trace: list[dict[str, Any]]) -> str:
    """Draw a recording as Perfetto does: a row for each task, barrier and connection."""
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace
        if event["name"] == "thread_name"
    }
    slices = [event for event in complete(trace) if (event["pid"], event["tid"]) in names]
    rows = sorted({(event["pid"], event["tid"]) for event in slices})
    end = max(event["ts"] + event["dur"] for event in slices)
    left, right, top, step = 130, 740, 40, 30
    scale = (right - left) / end
    body = [
        text(16, 24, "A recording of three workers"),
        text(250, 24, "green: has it; red: waits for it; violet: at the barrier", "small"),
    ]
    bottom = top + len(rows) * step
    for tick in range(0, int(end / 1000) + 1, 10):
        x = left + tick * 1000 * scale
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(text(x, bottom + 18, f"{tick} ms", "small", "middle"))
    for number, row in enumerate(rows):
        y = top + number * step
        body.append(text(left - 10, y + 17, names[row], "small", "end"))
        for event in (event for event in slices if (event["pid"], event["tid"]) == row):
            kind = next((k for start, k in COLOURS.items() if event["name"].startswith(start)), "")
            x, width = left + event["ts"] * scale, max(1.5, event["dur"] * scale)
            title = html.escape(f"{event['name']}: {event['dur'] / 1000:.1f} ms")
            body.append(
                f'<rect class="slice {kind}" x="{x:.1f}" y="{y + 2}" width="{width:.1f}" '
                f'height="{step - 8}"><title>{title}</title></rect>'
            )
            if width > 6.3 * len(event["name"]) + 8:
                body.append(text(x + 4, y + 18, event["name"], "label"))
    return svg(760, bottom + 30, "A recording of three workers", body)


def complete(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all slices with a duration, also those that have a begin and an end."""
    found: list[dict[str, Any]] = []
    begun: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in trace:
        row = begun.setdefault((event["pid"], event["tid"]), [])
        if event["ph"] == "X":
            found.append(event)
        elif event["ph"] == "B":
            row.append(event)
        elif event["ph"] == "E":
            start = row.pop()
            found.append({**start, "dur": event["ts"] - start["ts"]})
    return found


# The bugs of others.


def table_of_bugs() -> str:
    tests = str(DOCS.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    found: str = importlib.import_module("museum.exhibits").table()
    return found


def put_between(name: str, table: str, page: str) -> str:
    """Return the page with a table between the two comments that mark its place."""
    begin, end = f"<!-- {name}: made by generate.py -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    assert found, f"the page has no {begin!r}"
    assert ends, f"the page has no {end!r}"
    return before + begin + "\n" + table + "\n" + end + after


def pages() -> dict[str, str]:
    """Return the name of each file that is made, and what it should contain."""
    pool = (DOCS / "pool.md").read_text("utf-8")
    bugs = (DOCS / "bugs-of-others.md").read_text("utf-8")
    performance = (DOCS / "performance.md").read_text("utf-8")
    return {
        "pool-states.svg": draw_states(),
        "pool.md": put_between("transitions", table_of_states(), pool),
        "bugs-of-others.md": put_between("exhibits", table_of_bugs(), bugs),
        "timeline.svg": draw_timeline(json.loads((DOCS / "timeline.json").read_text("utf-8"))),
        "speed.svg": draw_speed(performance),
    }


def outdated() -> list[str]:
    """Return the names of the files that are not as this program would write them."""
    names = []
    for name, content in pages().items():
        file = DOCS / name
        if not file.is_file() or file.read_text("utf-8") != content:
            names.append(name)
    return names


if __name__ == "__main__":
    for name, content in pages().items():
        (DOCS / name).write_text(content, "utf-8", newline="\n")
