"""From one report, the culprit of each program that hangs is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import spin_until, until

PROGRAMS = Path(__file__).parent.parent / "support" / "hanging"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals"),
]


def line_of(program: str, text: str) -> int:
    lines = (PROGRAMS / f"{program}.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def is_idle(pid: int) -> bool:
    """Return whether a process has used no CPU time for a while; True where that is not known."""
    try:
        before = cpu_time(pid)
        time.sleep(0.2)
        return cpu_time(pid) == before
    except FileNotFoundError:
        return True


def cpu_time(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]


def report_of(program: str, backend: str, output: Path, ready: str) -> str:
    """Run a program with debugging, and return its report once it contains `ready`."""
    start = (
        "import runpy, signal, sys; from aiosync import debug; "
        f"debug.dump_on(signal.SIGUSR1, file=open({str(output)!r}, 'w')); "
        "print('started', flush=True); "
        f"runpy.run_path({str(PROGRAMS / program) + '.py'!r}, run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start, backend], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"

            until(lambda: is_idle(process.pid))

            def hangs() -> bool:
                assert process.poll() is None, "it does not hang"
                os.kill(process.pid, signal.SIGUSR1)
                return ready in output.read_text()

            # Not more often: to write a report may take a tenth of a second.
            spin_until(hangs, lambda: time.sleep(0.2))
            return output.read_text().rpartition("aiosync report: ")[2]
        finally:
            process.kill()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
class TestCulprits:
    def test_a_function_that_takes_the_lock_of_its_caller(
        self, backend: str, tmp_path: Path
    ) -> None:
        report = report_of("nested_lock", backend, tmp_path / "out", "DEADLOCK: ")
        assert "waits for itself" in report
        culprit = line_of("nested_lock", "its caller has the lock already")
        assert f"nested_lock.py:{culprit} in store\n    held by itself since " in report

    def test_two_locks_in_different_order(self, backend: str, tmp_path: Path) -> None:
        report = report_of("transfer", backend, tmp_path / "out", "DEADLOCK: ")
        deadlock = report.split("\n\n")[1]
        assert "task 'alice pays bob' waits for Semaphore 'account bob' at " in deadlock
        assert "task 'bob pays alice' waits for Semaphore 'account alice' at " in deadlock
        assert "carol" not in deadlock
        assert f"transfer.py:{line_of('transfer', 'in another order')} in transfer" in deadlock

    def test_nested_checkouts(self, backend: str, tmp_path: Path) -> None:
        report = report_of("nested_checkout", backend, tmp_path / "out", "DEADLOCK: ")
        deadlock = report.split("\n\n")[1]
        assert deadlock.startswith("DEADLOCK: 2 tasks or threads wait for one another")
        culprit = line_of("nested_checkout", "while its caller has one")
        assert f"nested_checkout.py:{culprit} in audit\n    held by task 'request " in deadlock
        assert "ConnectionPool 'database': max=2 in_use=2 idle=0" in report

    def test_the_missing_party_of_a_barrier(self, backend: str, tmp_path: Path) -> None:
        report = report_of("lost_party", backend, tmp_path / "out", "DEADLOCK: ")
        culprit = line_of("lost_party", "with a file open")
        assert f"lost_party.py:{culprit} in careless\n    which needs 1 more" in report
        assert "missing: task 'careful worker'" in report
        assert "task 'careful worker' waits for Semaphore 'open files'" in report

    def test_a_permit_that_is_never_released(self, backend: str, tmp_path: Path) -> None:
        report = report_of("forgotten_release", backend, tmp_path / "out", "waiting: 1")
        assert "DEADLOCK" not in report
        assert "by task 'upload of nothing'" in report
        assert ", which has ended at " in report
        assert "waiting" in report
        assert "by thread 'reporter' at " in report
