"""Records and recordings of permits that other threads release."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.debugging import debugging
from unit.debug.test_trace import check

from aiosync import Semaphore, as_threading, debug

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["debugging"]

pytestmark = [pytest.mark.stress, pytest.mark.usefixtures("fast_switches")]


def test_no_holder_is_left_and_the_slices_are_nested(tmp_path: Path) -> None:
    semaphores = [Semaphore(3, name=f"semaphore {number}") for number in range(3)]
    views = [as_threading(semaphore) for semaphore in semaphores]
    end = time.monotonic() + 2

    def work(seed: int) -> None:
        choices = random.Random(seed)
        while time.monotonic() < end:
            view = choices.choice(views)
            if choices.random() < 0.5:
                with view:
                    pass
            elif view.acquire(timeout=0.001):
                if choices.random() < 0.1:
                    releaser = threading.Thread(target=view.release)
                    releaser.start()
                    releasers.append(releaser)
                else:
                    view.release()

    releasers: list[threading.Thread] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    path = tmp_path / "trace.json"
    with debug.record(path):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert "DEADLOCK" not in debug.report()
            time.sleep(0.001)
        for thread in threads + releasers:
            thread.join(20)
    assert [semaphore.value for semaphore in semaphores] == [3, 3, 3]
    assert [debug.holders(semaphore) for semaphore in semaphores] == [[], [], []]
    assert [debug.waiters(semaphore) for semaphore in semaphores] == [[], [], []]
    check(path.read_text())
