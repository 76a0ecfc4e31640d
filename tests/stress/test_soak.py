"""The soak in a short form, and that it notices what is wrong.

It runs in processes of its own: signals, the switch interval, the collector and the hooks for
exceptions that nobody sees would disturb pytest, and the other way round. ``AIOSYNC_EXPLORE=long``
has it go on for two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import LONG

pytestmark = pytest.mark.stress

SECONDS = 120.0 if LONG else 3.0
SEED = 20_240_229

# What is done wrong, how long it may take all to rest, and what has to be said.
DEFECTS = {
    "permit": (20.0, " permits, held by []; stale are 0 waiters"),
    "object": (20.0, "memory is not flat"),
    "stuck": (1.0, "waiting for Godot"),
}
# What there is certain to be in any run that was long enough.
CERTAIN = ["operations", "cancels", "timeouts", "rounds", "broken rounds", "checkouts"]


def start(seconds: float, grace: float, defect: str = "") -> subprocess.Popen[str]:
    soak = Path(__file__).parents[2] / "tools" / "soak.py"
    return subprocess.Popen(
        [sys.executable, str(soak), f"--seconds={seconds}", f"--seed={SEED}", f"--grace={grace}"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "AIOSYNC_SOAK_DEFECT": defect},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def end(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, str]:
    with process:
        try:
            output, told = process.communicate(timeout=seconds)
        finally:
            process.kill()
    return process.returncode, output, told


@pytest.mark.timeout(SECONDS + 60)
def test_nothing_is_lost_or_stuck_and_memory_is_flat() -> None:
    status, output, told = end(start(SECONDS, grace=20), SECONDS + 50)
    assert status == 0, output + told
    *lines, leaks, memory = output.splitlines()
    counts = {line[:16].rstrip(): line[16:] for line in lines}
    assert all(int(counts[name]) for name in CERTAIN), output
    assert leaks == "leaks: none"
    assert memory.startswith("memory: flat ")


def test_what_is_wrong_is_noticed_and_the_seed_is_told() -> None:
    processes = [start(0.4, grace, defect) for defect, (grace, _) in DEFECTS.items()]
    outcomes = [end(process, 50) for process in processes]
    for (_, message), (status, output, told) in zip(DEFECTS.values(), outcomes, strict=True):
        assert status == 1, output + told
        assert message in output
        assert output.splitlines()[-1].endswith(f"--seconds 0.4 --seed {SEED}")
    stacks = outcomes[-1][2]
    assert "Current thread" in stacks
    assert "soak.py" in stacks
