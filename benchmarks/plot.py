"""Figures: one for each suite, as SVG and PNG.

What must live here: everything that needs matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from .model import US, Comparison, Outcome
from .report import factor, quantity
from .runner import why_not as _why_not
from .targets import target_of

# Okabe and Ito: eight colours that the colour-blind can tell apart as well.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

# The first that a name begins with.
COLOURS = {
    US: VERMILION,
    "asyncio": BLUE,
    "anyio": ORANGE,
    "aiologic": GREEN,
    "trio": PURPLE,
    "threading": SKY,
    "SQLAlchemy": PURPLE,
    "redis-fifo": BLUE,
    "redis": YELLOW,
    "py-redis": PURPLE,
    "self-": ORANGE,
    "coredis": GREEN,
    "asyncpg": BLUE,
    "floor": "#999999",
    "bar": "#999999",
    "": SKY,
}
MARKERS = {US: "o", "asyncio": "s", "anyio": "^", "aiologic": "D", "trio": "v", "floor": "x"}


def why_not() -> str | None:
    return _why_not("matplotlib.pyplot")


def _of(name: str, table: dict[str, str]) -> str:
    return next(value for prefix, value in table.items() if name.startswith(prefix))


def draw(folder: Path, outcomes: Sequence[Outcome], machine: str) -> None:
    """Draw a figure of each suite into `folder`.

    :param machine: the versions, and the machine; written below each figure
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": US, "axes.axisbelow": True})
    for suite in dict.fromkeys(outcome.suite for outcome in outcomes):
        of_suite = [outcome for outcome in outcomes if outcome.suite == suite]
        lines = [outcome for outcome in of_suite if outcome.size]
        figure = _lines(lines) if lines else _bars(suite, of_suite)
        if figure is not None:
            figure.supxlabel(machine, x=0.01, ha="left", fontsize=7, color="#555555", wrap=True)
            for kind in ("svg", "png"):
                figure.savefig(folder / f"{suite}.{kind}", dpi=130)


def _bars(suite: str, outcomes: list[Outcome]) -> Any:
    """Return a figure with a panel of horizontal bars for each backend."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Comparison]] = {}
    for outcome in outcomes:
        panels.setdefault(outcome.backend, []).extend(outcome.comparisons())
    panels = {backend: found for backend, found in panels.items() if found}
    if not panels:
        return None
    heights = [len(found) + len({c.key.work for c in found}) + 2 for found in panels.values()]
    figure = Figure(figsize=(9, 0.21 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (backend, found) in zip(axes, panels.items(), strict=True):
        _bar_panel(axis, found)
        axis.set_title(", ".join(filter(None, (suite, backend))), loc="left", weight="bold")
        _ticks(axis.xaxis, lambda value: f"{value:g}x")
    figure.suptitle(
        f"Cost of the other / cost of {US}: right of the dashed line {US} is better.\n"
        "Thin line: 95% interval of the ratio. Thick tick: target.",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    return figure


def _bar_panel(axis: Any, comparisons: list[Comparison]) -> None:
    labels: list[str] = []
    work = ""
    for comparison in comparisons:
        if comparison.key.work != work:
            work = comparison.key.work
            labels.append(work)
        _bar(axis, len(labels), comparison)
        labels.append(comparison.key.peer)
    works = {comparison.key.work for comparison in comparisons}
    axis.set_yticks(range(len(labels)), labels)
    for label in axis.get_yticklabels():
        if label.get_text() in works:
            label.set_weight("bold")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.axvline(1.0, color=BLACK, linewidth=0.8, linestyle="--")
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.margins(x=0.12)


def _ticks(axis: Any, label: Callable[[float], str]) -> None:
    """Label 1, 2 and 5; or the powers of ten where that would be too many; or some more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs: tuple[float, ...] = (1, 2, 5) if high / low < 2000 else (1,)
    if high / low < 5:
        subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: label(value))
    axis.set_minor_formatter(NullFormatter())


def _bar(axis: Any, place: int, comparison: Comparison) -> None:
    ratio = comparison.ratio
    colour = _of(comparison.key.peer, COLOURS)
    # From the line of 1.0, since on a log axis nothing else is a natural beginning.
    axis.barh(place, ratio - 1, left=1, height=0.72, color=colour)
    axis.plot([comparison.low, comparison.high], [place, place], color=BLACK, linewidth=0.9)
    target = target_of(comparison.key)
    if target is not None:
        axis.plot([target, target], [place - 0.42, place + 0.42], color=BLACK, linewidth=2.2)
    edge = max(comparison.high, 1) if ratio >= 1 else comparison.low
    if target is not None and 1 / 2.2 < target / edge < 2.2:  # or the tick would cross the number
        edge = max(edge, target) if ratio >= 1 else min(edge, target)
    axis.annotate(
        factor(ratio),
        (edge, place),
        (4 if ratio >= 1 else -4, 0),
        textcoords="offset points",
        ha="left" if ratio >= 1 else "right",
        va="center",
        fontsize=8,
    )


def _lines(outcomes: list[Outcome]) -> Any:
    """Return a figure of cost against the number of waiters: works by backends, or side by side."""
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(outcome.work for outcome in outcomes))
    backends = list(dict.fromkeys(outcome.backend for outcome in outcomes))
    if len(backends) > 1:
        rows = [[(work, backend) for backend in backends] for work in works]
    else:
        rows = [[(work, backends[0]) for work in works]]
    size = (3.6 * len(rows[0]) + 1, 2.7 * len(rows) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    share: Literal["row", "none"] = "row" if len(backends) > 1 else "none"
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True, sharey=share)
    for line, row in zip(axes, rows, strict=True):
        for axis, (work, backend) in zip(line, row, strict=True):
            found = [o for o in outcomes if (o.work, o.backend) == (work, backend)]
            _line_panel(axis, found)
            axis.set_title(f"{work}\n{backend}", fontsize=9)
        line[0].set_ylabel("cost of each waiter")
    for axis in axes[-1]:
        axis.set_xlabel("waiters")
        axis.set_xticks(sorted({outcome.size for outcome in outcomes}))
        axis.minorticks_off()
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        found, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _line_panel(axis: Any, outcomes: list[Outcome]) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for outcome in outcomes:
        for name, samples in outcome.samples.items():
            points.setdefault(name, []).append((outcome.size, statistics.median(samples)))
    for name, found in points.items():
        axis.plot(
            *zip(*sorted(found), strict=True),
            label=name,
            color=_of(name, COLOURS),
            marker=_of(name, MARKERS),
            linestyle="--" if name.startswith("floor") else "-",
            zorder=3 if name == US else 2,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    unit = outcomes[0].unit if outcomes else "s"
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _ticks(axis.yaxis, lambda value: quantity(value, unit))
    axis.grid(color="#dddddd", linewidth=0.6)
