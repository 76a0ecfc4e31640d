"""The museum: bugs that others have, or had, and that aiosync must never have.

What must live here: how the exhibits are run. They stand in the halls; see `exhibits`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from museum import pools
from museum.exhibits import Control, Exhibit, all_exhibits
from museum.stage import Symptom

EXHIBITS = all_exhibits()

# What the projects themselves warn of is not our concern.
others = pytest.mark.filterwarnings("default")


def each_loop() -> list[Any]:
    return [
        pytest.param(shown, loop, id=f"{shown.name}-{loop}")
        for shown in EXHIBITS
        for loop in shown.loops
    ]


def each_control(*, rebuilt: bool) -> list[Any]:
    return [
        pytest.param(shown, control, id=f"{shown.name}-{control.name}")
        for shown in EXHIBITS
        for control in shown.controls
        if control.is_rebuilt is rebuilt
    ]


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("shown", "loop"), each_loop())
def test_aiosync_does_not_have_it(shown: Exhibit, loop: str) -> None:
    shown.play(shown.ours, loop)


@pytest.mark.parametrize(("shown", "control"), each_control(rebuilt=True))
def test_the_old_algorithm_has_it(shown: Exhibit, control: Control) -> None:
    with pytest.raises(Symptom):
        shown.play(control.maker)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(shown, id=shown.name)
        for shown in EXHIBITS
        if shown.scenario.__module__ == pools.__name__ and pools.SMALL not in shown.controls
    ],
)
def test_what_is_rebuilt_has_no_flaw_but_its_own(shown: Exhibit) -> None:
    shown.play(pools.SMALL.maker)


@others
@pytest.mark.slow  # imports all of these projects, and says nothing about aiosync
@pytest.mark.parametrize(("shown", "control"), each_control(rebuilt=False))
def test_whether_the_project_has_it(shown: Exhibit, control: Control) -> None:
    # Never a failure: what others do about their bugs must not break us.
    why_not = control.why_not()
    if why_not:
        pytest.skip(why_not)
    try:
        shown.play(control.maker)
    except Symptom as symptom:
        pytest.xfail(f"{control}: {symptom}")
    except Exception as error:
        pytest.skip(f"{control} has become another: {error!r}")
    print(f"{control} does not have it, or no longer")
