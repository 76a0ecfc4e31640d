"""`python -m benchmarks`: its arguments, and the order of its steps.

What must live here: the command line, and the calls that carry it out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from . import plot, record, report, runner, summary, targets
from .loops import BACKENDS
from .model import Comparison, Effort, Outcome, Row, work_title
from .progress import progress
from .suites import SUITES

EFFORTS = {
    "full": Effort("full", 25, 9, 3, 4.0, 1.0, (1000, 4000, 16_000, 64_000)),
    "quick": Effort("quick", 9, 5, 3, 0.4, 0.3, (1000, 4000)),
    "tiny": Effort("tiny", 1, 1, 1, 0.0, 0.01, (10, 20)),  # to see that it works
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the message in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m benchmarks",
        description="How fast aiosync is beside its peers, as ratios of interleaved rounds.",
        epilog="Peers that are not installed are left out: pip install -e '.[bench]' has them all.",
    )
    parser.add_argument(
        "suites",
        metavar="SUITE",
        nargs="*",
        help=f"of {', '.join(SUITES)}; without any: all of them",
    )
    parser.add_argument("--backend", choices=[*BACKENDS, "all"], default="all")
    parser.add_argument("--work", metavar="TEXT", default="", help="only rows with it in the title")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw figures of each suite")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier --json")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a ratio misses its target"
    )
    # For the tests: the smallest run, and a saved run.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--replay", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser


def _load(parser: _Parser, file: Path | None) -> tuple[dict[str, Any], list[Outcome]]:
    try:
        return record.load(file) if file is not None else ({}, [])
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}")


def _check_arguments(parser: _Parser, arguments: argparse.Namespace) -> None:
    """Refuse wrong arguments now, not after all has been measured."""
    for name in arguments.suites:
        if name not in SUITES:
            parser.error(f"there is no suite {name!r}, but {', '.join(SUITES)}")
    reason = runner.why_not(BACKENDS.get(arguments.backend, ""))
    if reason is not None:
        parser.error(f"--backend {arguments.backend}: {reason}")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no such folder")
    if arguments.plot is not None:
        reason = plot.why_not()
        if reason is not None:
            parser.error(f"--plot needs matplotlib: {reason}")
        try:
            arguments.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--plot: {error}")


class _LeftOut(dict[str, str]):
    """The contenders that can't be measured, and the reasons; prints each once."""

    def __call__(self, name: str, reason: str) -> None:
        if name not in self:
            print(f"{name} is left out: {reason}", flush=True)
        self[name] = reason


def _rows(arguments: argparse.Namespace, effort: Effort, left_out: _LeftOut) -> list[Row]:
    suites, backend = arguments.suites, arguments.backend
    backends = [""]
    for name, needs in BACKENDS.items():
        if backend in (name, "all"):
            reason = runner.why_not(needs)
            if reason is None:
                backends.append(name)
            else:
                left_out(name, reason)
    return [
        row
        for name in SUITES
        if name in suites or not suites
        for backend in backends
        for row in SUITES[name].rows(backend, effort)
        if arguments.work in row.work
    ]


def _measure(rows: Sequence[Row], effort: Effort, left_out: _LeftOut) -> list[Outcome]:
    outcomes = []
    with progress(len(rows)) as step:
        for (suite, backend), group in groupby(rows, lambda row: (row.suite, row.backend)):
            found = []
            for row in group:
                step(f"{suite} {backend} {work_title(row.work, row.size)}")
                found.append(runner.measure(row, effort, left_out))
            _print_group(suite, backend, found)
            outcomes += found
    return outcomes


def _print_group(suite: str, backend: str, outcomes: list[Outcome]) -> None:
    print("\n" + ", ".join(filter(None, (suite, backend))).upper())
    if SUITES[suite].note:
        print(SUITES[suite].note)
    print(*report.table(_comparisons(outcomes)), sep="\n", flush=True)


def _comparisons(outcomes: Sequence[Outcome]) -> list[Comparison]:
    return [comparison for outcome in outcomes for comparison in outcome.comparisons()]


def _replay(outcomes: list[Outcome]) -> None:
    """Print a saved run."""
    for (suite, backend), group in groupby(outcomes, lambda found: (found.suite, found.backend)):
        _print_group(suite, backend, list(group))


def _print_environment(environment: dict[str, Any], effort: Effort) -> None:
    packages = environment["packages"].items()
    print(
        f"{environment['python']} ({environment['compiler']}), {environment['system']} "
        f"{environment['machine']}, {environment['cores']} cores\n{environment['processor']}"
    )
    print(", ".join(f"{name} {version}" for name, version in packages))
    print(runner.METHOD)
    print(f"Effort: {effort.name}, at most {effort.rounds} rounds of each row.", flush=True)


def _effort(arguments: argparse.Namespace) -> Effort:
    return EFFORTS["tiny" if arguments.tiny else "quick" if arguments.quick else "full"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_arguments(parser, arguments)
    _, old = _load(parser, arguments.compare)
    left_out = _LeftOut()
    if arguments.replay is not None:
        environment, outcomes = _load(parser, arguments.replay)
        _replay(outcomes)
    else:
        effort = _effort(arguments)
        environment = record.environment()
        _print_environment(environment, effort)
        rows = _rows(arguments, effort, left_out)
        outcomes = _measure(rows, effort, left_out)
        if arguments.json is not None:
            record.save(arguments.json, environment, effort.name, outcomes, left_out)
    comparisons = _comparisons(outcomes)
    if arguments.plot is not None:
        plot.draw(arguments.plot, outcomes, record.describe(environment))
    if arguments.compare is not None:
        print("\nCOMPARED WITH THE EARLIER RUN")
        print(*report.changes(_comparisons(old), comparisons), sep="\n")
    status = 0
    if arguments.check:
        lines, all_met = targets.check(outcomes)
        print(
            "\nTARGETS", f"{'':18} {'':41} {'':27} {'least':>7} {'measured':>8}", *lines, sep="\n"
        )
        status = 0 if all_met else 1
    lines = [*summary.lines(comparisons, record.describe(environment))]
    if lines:
        print("", *lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
