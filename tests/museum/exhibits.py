"""The catalogue of the museum: bugs that others have, or had, each with a scenario that shows it.

What must live here: what an exhibit is, and the list of all; from it the table in
docs/bugs-of-others.md is made. The exhibits stand in the halls.

A scenario is written once, over what a *maker* returns, and raises `Symptom` if it finds the bug.
It is played with a maker of ours, and must find nothing. To show that it would find something it is
also played with controls: with the project that was reported, as it is installed here, or with its
old algorithm, rebuilt in a few lines, which must fail for ever.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from museum.stage import LOOPS, Stage, perform

HALLS = ("museum.barriers", "museum.semaphores", "museum.bridges", "museum.pools")
PYTHON = "python"


@dataclass(frozen=True)
class Control:
    """What shows that a scenario bites."""

    name: str
    maker: Any
    # The distribution to which it belongs, `PYTHON`, or "" if it is rebuilt.
    package: str = ""

    @property
    def is_rebuilt(self) -> bool:
        return not self.package

    def why_not(self) -> str:
        """Tell why it can't be played here; "" if it can."""
        if self.package in {"", PYTHON} or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"{self.package} is not installed"

    def __str__(self) -> str:
        if self.package == PYTHON:
            return f"{self.name} of Python {platform.python_version()}"
        return f"{self.name} {metadata.version(self.package)}" if self.package else self.name


@dataclass(frozen=True)
class Exhibit:
    project: str
    # In the words of who suffers from it.
    symptom: str
    # Issues and pull requests on GitHub, as "owner/name#number". Empty: we know of none.
    reports: tuple[str, ...]
    # With which versions a control that is not rebuilt has failed.
    seen: str
    ours: Any
    controls: tuple[Control, ...]
    scenario: Callable[..., Any]
    # Without those on which it can't be played.
    loops: tuple[str, ...]

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", f"{self.project}: {self.symptom}").strip("-")

    def play(self, maker: Any, loop: str = "asyncio") -> None:
        """Play the scenario.

        :raises Symptom: if it finds the bug
        """
        if not inspect.iscoroutinefunction(self.scenario):
            self.scenario(maker)
            return

        async def scenario(stage: Stage) -> None:
            await self.scenario(stage, maker)

        perform(loop, scenario)


_exhibits: list[Exhibit] = []


def exhibit(
    project: str,
    symptom: str,
    *,
    ours: Any,
    controls: list[Control],
    reports: str = "",
    seen: str = "",
    not_on: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an exhibit of a scenario.

    It is a function of a stage and a maker, or, if it brings its own threads and event loops, a
    plain function of a maker.
    """

    def add(scenario: Callable[..., Any]) -> Callable[..., Any]:
        loops = tuple(LOOPS) if inspect.iscoroutinefunction(scenario) else ("threads",)
        _exhibits.append(
            Exhibit(
                project,
                symptom,
                tuple(reports.split()),
                seen,
                ours,
                tuple(controls),
                scenario,
                tuple(loop for loop in loops if loop not in not_on.split()),
            )
        )
        return scenario

    return add


def all_exhibits() -> list[Exhibit]:
    for hall in HALLS:
        importlib.import_module(hall)
    return sorted(_exhibits, key=lambda shown: HALLS.index(shown.scenario.__module__))


def table() -> str:
    """Return the catalogue as Markdown."""
    lines = ["| project | symptom | report | shown with |", "|---|---|---|---|"]
    for shown in all_exhibits():
        reports = [
            f"[{report}](https://github.com/{report.replace('#', '/issues/')})"
            for report in shown.reports
        ]
        shown_with = [shown.seen] if shown.seen else []
        if any(control.is_rebuilt for control in shown.controls):
            shown_with.append("the old algorithm, rebuilt")
        lines.append(
            f"| {shown.project} | {shown.symptom} | {', '.join(reports) or 'none known'} "
            f"| {'; '.join(shown_with)} |"
        )
    return "\n".join(lines) + "\n"
