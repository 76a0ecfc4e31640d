"""The benchmarks work: `python -m benchmarks`, by the smallest runs. No figure is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmarks.__main__ import EFFORTS, main
from benchmarks.model import Key, Outcome, Row
from benchmarks.record import describe, environment
from benchmarks.suites import SUITES
from benchmarks.summary import LINES
from benchmarks.summary import lines as summary
from benchmarks.targets import TARGETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
HAS_MATPLOTLIB = find_spec("matplotlib") is not None
HAS_UVLOOP = find_spec("uvloop") is not None


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=150,
        check=False,
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    """Do what `run` does where nothing is measured, which is faster without another process."""
    status: Any
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as ending:
        status = ending.code
    return status, *capsys.readouterr()


def outcome(
    work: str, ours: list[float], peer: str, theirs: list[float], suite: str = "semaphore"
) -> dict[str, Any]:
    return {
        "suite": suite,
        "backend": "asyncio",
        "work": work,
        "size": 0,
        "unit": "s",
        "samples": {"aiosync": ours, peer: theirs},
    }


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text(json.dumps({"version": 1, "rows": rows}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "there is no suite 'nonsense', but semaphore, "),
        (["--backend", "curio"], "invalid choice: 'curio'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--json", "no/such/folder/new.json"], "there is no such folder"),
        (["--compare", "no-such-file.json"], "no-such-file.json"),
        (["--compare", __file__], "test_benchmarks.py: "),
    ],
)
def test_wrong_arguments_are_told_of_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, told = call(capsys, *arguments)
    assert (status, output) == (2, "")
    assert told.count("\n") == 1
    assert complaint in told


@pytest.mark.parametrize(
    ("suite", "work"),
    [
        *((suite, "") for suite in SUITES if suite not in {"drivers", "redis"}),
        *(("drivers", driver) for driver in ("asyncpg", "psycopg", "SQLite")),
        *(
            pytest.param("redis", work, marks=pytest.mark.redis)
            for work in ("pair", "50 tasks", "barrier", "hand-off", "takeover", "1,000 waiters")
        ),
    ],
)
def test_a_suite(tmp_path: Path, suite: str, work: str) -> None:
    file = tmp_path / "new.json"
    backend = "all" if suite == "semaphore" else "asyncio"
    done = run(suite, "--tiny", "--work", work, "--backend", backend, "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert suite.upper() in done.stdout
    found = json.loads(file.read_text("utf-8"))
    assert {"version", "environment", "effort", "left_out", "rows"} == set(found)
    assert {"python", "machine", "cores", "packages"} <= set(found["environment"])
    assert {"aiosync", "anyio"} <= set(found["environment"]["packages"])
    assert str(ROOT) not in file.read_text("utf-8") + done.stdout
    assert {row["suite"] for row in found["rows"]} == {suite}
    assert all(work in row["work"] for row in found["rows"])
    for row in found["rows"]:
        # Nothing to compare with, if peers are not installed; but then that has been said.
        assert all(sample > 0 for samples in row["samples"].values() for sample in samples)
        for comparison in row["comparisons"]:
            assert comparison["low"] <= comparison["ratio"] <= comparison["high"]
            assert comparison["peer"] in row["samples"]
    assert any(row["comparisons"] for row in found["rows"]) or found["left_out"]
    if suite == "semaphore":
        backends = {"asyncio", "trio"} | ({"uvloop"} if HAS_UVLOOP else set())
        assert {row["backend"] for row in found["rows"]} == backends


def test_only_the_rows_with_a_text_in_the_title(tmp_path: Path) -> None:
    file = tmp_path / "new.json"
    done = run("barrier", "--tiny", "--work", "2 parties", "--backend", "trio", "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    works = {row["work"] for row in json.loads(file.read_text("utf-8"))["rows"]}
    assert "2 parties" in works
    assert all("2 parties" in work for work in works)


def hide_servers(folder: Path) -> None:
    """Write modules that, with `folder` on PYTHONPATH, say that there are no servers."""
    support = folder / "support"
    support.mkdir()
    support.joinpath("__init__.py").touch()
    support.joinpath("postgres_server.py").write_text(
        "class PostgresServer:\n    why_not = staticmethod(lambda: 'there is no server')\n",
        encoding="utf-8",
    )
    support.joinpath("redis_servers.py").write_text(
        "RedisServer = None\navailable_servers = tuple\n", encoding="utf-8"
    )


def test_without_a_server_the_rows_that_need_one_are_left_out(tmp_path: Path) -> None:
    hide_servers(tmp_path)
    file = tmp_path / "new.json"
    done = run(
        "drivers", "--tiny", "--backend", "asyncio", "--json", file, PYTHONPATH=str(tmp_path)
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(file.read_text("utf-8"))
    for row in found["rows"]:
        assert bool(row["samples"]) == row["work"].startswith("SQLite")
    if find_spec("asyncpg") is not None:
        assert found["left_out"]["drivers: asyncpg, SELECT 1"] == "there is no server"
        assert found["left_out"]["asyncpg.Pool"] == "there is no server"


def test_without_a_redis_server_nothing_of_it_is_measured(tmp_path: Path) -> None:
    hide_servers(tmp_path)
    file = tmp_path / "new.json"
    done = run("redis", "--tiny", "--backend", "asyncio", "--json", file, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(file.read_text("utf-8"))
    assert not any(row["samples"] for row in found["rows"])
    assert "no server" in found["left_out"]["redis: pair"]


def test_peers_that_are_missing_are_named_and_left_out(tmp_path: Path) -> None:
    for module in ("aiologic", "uvloop"):
        tmp_path.joinpath(f"{module}.py").write_text(
            f"raise ModuleNotFoundError('no {module} here')", encoding="utf-8"
        )
    file = tmp_path / "new.json"
    done = run("barrier", "--tiny", "--json", file, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("aiologic.Barrier is left out: no aiologic here\n") == 1
    assert "uvloop is left out: no uvloop here\n" in done.stdout
    assert "aiologic.Barrier" in json.loads(file.read_text("utf-8"))["left_out"]


def test_a_peer_that_fails_is_left_out(tmp_path: Path) -> None:
    tmp_path.joinpath("aiologic.py").write_text("Barrier = None", encoding="utf-8")
    done = run("barrier", "--tiny", "--backend", "trio", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "aiologic.Barrier is left out: it fails with TypeError" in done.stdout


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = "anyio.Semaphore"
    old = write(
        tmp_path / "old.json",
        outcome("the same", [1.0, 1.1, 1.2], peer, [2.0, 2.1, 2.2]),
        outcome("faster", [2.0, 2.1, 2.2], peer, [2.0, 2.1, 2.2]),
        outcome("gone", [1.0], peer, [7.0]),
    )
    new = write(
        tmp_path / "new.json",
        outcome("the same", [1.0, 1.1, 1.2], peer, [2.0, 2.2, 2.3]),
        outcome("faster", [0.5, 0.5, 0.5], peer, [2.0, 2.0, 2.2]),
        outcome("new", [1.0], peer, [5.0]),
    )
    status, output, complaint = call(capsys, "--replay", new, "--compare", old)
    assert (status, complaint) == (0, "")
    lines = [line.split() for line in output.splitlines()[-4:]]
    title = ["semaphore", "asyncio:"]
    assert lines == [
        ["1.91x", "2.00x", "overlap", *title, "the", "same", "/", peer],
        ["1.00x", "4.00x", "APART", *title, "faster", "/", peer],
        ["-", "5.00x", *title, "new", "/", peer],
        ["7.00x", "-", *title, "gone", "/", peer],
    ]


@pytest.mark.parametrize(
    ("peer_takes", "status", "verdict"),
    [
        ([3.0, 3.0, 3.0], 0, "3.00  met"),
        ([1.29, 1.29, 1.29], 1, "1.29  SHORT by 40%"),
        ([2.1, 2.1, 2.4], 1, "2.10  SHORT by 2%, within the noise"),
    ],
)
def test_check(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    peer_takes: list[float],
    status: int,
    verdict: str,
) -> None:
    work, peer = "free permit, fast_acquire", "asyncio.Semaphore"
    row = outcome(work, [1.0, 1.0, 1.0], peer, peer_takes)
    file = write(tmp_path / "new.json", row)
    found, output, complaint = call(capsys, "--replay", file, "--check")
    assert (found, complaint) == (status, "")
    judged = [line for line in output.splitlines() if line.endswith(verdict)]
    assert len(judged) == 1
    assert work in judged[0]
    assert peer in judged[0]
    # Two more peers of this row have targets. Nothing is said of rows that were not run.
    unknown = [line for line in output.splitlines() if line.endswith("not measured")]
    assert len(unknown) == 2
    assert all(work in line for line in unknown)
    assert "barrier" not in output


def test_the_summary_shows_what_matters_most_in_twenty_lines() -> None:
    samples = {"aiosync": [1.0] * 3, "asyncio.Semaphore": [2.0] * 3, "floor: nothing": [1.0] * 3}
    outcomes = [Outcome(*line[2:], "s", samples) for line in LINES]
    outcomes.append(Outcome("semaphore", "trio", "another row", 0, "s", samples))
    comparisons = [comparison for outcome in outcomes for comparison in outcome.comparisons()]
    lines = list(summary(comparisons, "a machine"))
    assert lines[0] == "SUMMARY"
    assert lines[2] == "a machine"
    assert len(lines) == 3 + len(LINES) <= 20
    assert lines[3].split() == [
        "asyncio",
        *["free", "permit", "2.00x", "asyncio", "(target", "2.15)"],
    ]
    assert lines[4].split() == ["hand-off", "2.00x", "asyncio"]
    assert sum(line.startswith("threads ") for line in lines) == 1
    assert list(summary([], "a machine")) == []


def test_the_summary_marks_what_may_be_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = outcome("hand-off", [1.0, 1.0, 1.0], "anyio, fast_acquire", [0.9, 1.1, 1.2])
    status, output, _ = call(capsys, "--replay", write(tmp_path / "new.json", row))
    assert status == 0
    assert re.fullmatch(r"asyncio +hand-off +~1\.10x anyio", output.splitlines()[-1])


def test_each_line_of_the_summary_belongs_to_a_row() -> None:
    rows = {(row.suite, row.backend, row.work, row.size) for row in all_rows()}
    assert {line[2:] for line in LINES} <= rows


def all_rows() -> Iterator[Row]:
    for suite in SUITES.values():
        for backend in ("", "asyncio", "trio"):
            yield from suite.rows(backend, EFFORTS["full"])


def test_each_target_belongs_to_a_row() -> None:
    keys = {
        Key(row.suite, row.backend, row.work, row.size, contender.name)
        for row in all_rows()
        for contender in row.contenders
    }
    assert {target.key for target in TARGETS} <= keys
    assert len({target.key for target in TARGETS}) == len(TARGETS)


def test_the_performance_page_names_only_rows_that_exist() -> None:
    page = ROOT.joinpath("docs", "performance.md").read_text("utf-8")
    named = [
        (suite, work)
        for suite, works in re.findall(r"\| `(\w+)`: (`[^|]+) \|$", page, re.MULTILINE)
        for work in re.findall(r"`([^`]+)`", works)
    ]
    assert len(named) > 10
    assert set(named) <= {(row.suite, row.work) for row in all_rows()}


def test_the_suites_use_only_the_public_api() -> None:
    sources = {file: file.read_text("utf-8") for file in ROOT.joinpath("benchmarks").rglob("*.py")}
    assert ROOT / "benchmarks" / "suites" / "threads.py" in sources
    for file, source in sources.items():
        assert not re.search(r"aiosync(\.\w+)*\._|from aiosync\S* import .*\b_", source), file


def test_without_matplotlib_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output, complaint = call(capsys, "--plot", tmp_path / "figures")
    assert (status, output) == (2, "")
    assert complaint.count("\n") == 1
    assert "--plot needs matplotlib: " in complaint


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_plot(tmp_path: Path) -> None:
    line = {**outcome("grant", [1.0, 1.1], "anyio.Semaphore", [2.0, 2.2], "scale"), "size": 10}
    bar = outcome("free permit", [1.0, 1.1], "anyio.Semaphore", [2.0, 2.2])
    file = write(tmp_path / "new.json", line, bar)
    run_file = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**run_file, "environment": environment()}), encoding="utf-8")
    done = run("--replay", file, "--plot", tmp_path / "figures")
    assert (done.returncode, done.stderr) == (0, "")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        f"{suite}.{kind}" for suite in ("scale", "semaphore") for kind in ("svg", "png")
    }
    assert all(file.stat().st_size > 1000 for file in (tmp_path / "figures").iterdir())
    for file in (tmp_path / "figures").glob("*.svg"):
        # The text is drawn as paths; each of its lines stands in a comment.
        assert f"<!-- {describe(environment())[:40]}" in file.read_text("utf-8")


def test_a_run_without_an_environment_has_no_description() -> None:
    assert describe({}) == ""
    assert f"anyio {environment()['packages']['anyio']}, " in describe(environment())
