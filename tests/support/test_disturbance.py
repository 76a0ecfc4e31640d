"""Tests that measure time are repeated if, and only if, the machine was late."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from support import disturbance
from support.disturbance import ATTEMPTS, VOID, Disturbance
from support.helpers import until


class Hook:
    def __init__(self) -> None:
        self.logged: list[object] = []

    def pytest_runtest_logreport(self, report: object) -> None:
        self.logged.append(report)

    def __getattr__(self, name: str) -> Any:
        return lambda **_: None


class Item:
    nodeid = "a test"
    location = ("", 0, "")

    def __init__(self) -> None:
        self.ihook = Hook()


class Report:
    def __init__(self, failed: bool) -> None:
        self.failed = failed


@pytest.fixture
def lateness(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How late the machine is in each attempt."""
    left: list[float] = []

    class Measured(Disturbance):
        def __enter__(self) -> Any:
            self.seconds = left.pop(0)
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(disturbance, "Disturbance", Measured)
    monkeypatch.setattr(disturbance, "is_overloaded", lambda: False)
    return left


def run(monkeypatch: pytest.MonkeyPatch, *failures: bool) -> tuple[int, bool, list[str]]:
    """Run a test that fails as told; return how often it ran, whether it failed, what is said."""
    reports = [Report(failed) for failed in failures]
    left = reports.copy()
    monkeypatch.setattr(disturbance, "runtestprotocol", lambda *_, **__: [left.pop(0)])
    item: Any = Item()
    said = disturbance.run(item, None)
    (report,) = item.ihook.logged
    return len(reports) - len(left), report.failed, said


def test_a_test_that_fails_undisturbed_fails(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    lateness[:] = [VOID]
    assert run(monkeypatch, True, False) == (1, True, [])


def test_a_test_that_fails_disturbed_is_repeated(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    lateness[:] = [0.25, 0.0]
    said = ["a test: repeated, was 250 ms late"]
    assert run(monkeypatch, True, False) == (2, False, said)


def test_a_test_that_fails_on_an_overloaded_machine_is_repeated(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    lateness[:] = [0.0, 0.0]
    monkeypatch.setattr(disturbance, "is_overloaded", lambda: True)
    assert run(monkeypatch, True, False)[:2] == (2, False)


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="there is no load average")
@pytest.mark.parametrize(("load", "overloaded"), [(2.0, False), (2.5, True)])
def test_a_machine_is_overloaded_if_processes_wait_for_a_processor(
    monkeypatch: pytest.MonkeyPatch, load: float, overloaded: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert disturbance.is_overloaded() is overloaded


def test_it_is_not_repeated_for_ever(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    lateness[:] = [1.0] * 9
    times, failed, said = run(monkeypatch, *[True] * 9)
    assert (times, failed, len(said)) == (ATTEMPTS, True, ATTEMPTS - 1)


def test_a_test_that_takes_long_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    monkeypatch.setattr(disturbance, "LAST_START", 0.0)
    lateness[:] = [1.0]
    assert run(monkeypatch, True, False) == (1, True, [])


def test_a_test_that_passes_disturbed_has_passed(
    monkeypatch: pytest.MonkeyPatch, lateness: list[float]
) -> None:
    lateness[:] = [1.0]
    assert run(monkeypatch, False, True) == (1, False, [])


def test_the_worst_lateness_counts() -> None:
    period = Disturbance.PERIOD
    clock = itertools.chain([0, period, 1, 3 + period, 4, 4 + period], itertools.repeat(5.0))
    with Disturbance(lambda _: None, lambda: next(clock)) as measured:
        until(lambda: next(clock) == 5.0)
    assert measured.seconds == pytest.approx(2)
