"""An exception out of nowhere, as a signal handler raises it, at the worst places of a call."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from support.helpers import Interrupt, join, wait_in_threads

from aiosync import Barrier, BrokenBarrierError, Semaphore, _barrier, _park, as_threading


def interrupt_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let the next call of a function raise before it does anything."""
    genuine = getattr(owner, name)
    done = False

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if not done:
            done = True
            raise Interrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


class TestTheLastPartyOfABarrier:
    @pytest.mark.parametrize(
        ("owner", "name", "action", "expected"),
        [
            (_barrier._Rounds, "trip", None, ["broken", "broken"]),
            (_barrier._Rounds, "trip", bool, ["broken", "broken"]),
            # From here on the round has tripped, and stays so.
            (_barrier, "_Round", None, [0, 1]),
            (_barrier, "_Round", bool, [0, 1]),
            (_barrier._Round, "wake", None, [0, 1]),
            (_barrier._Round, "wake_a_thread", None, [0, 1]),
        ],
    )
    def test_interrupted_anywhere_it_tells_the_others(
        self,
        owner: Any,
        name: str,
        action: Any,
        expected: list[object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        barrier = Barrier(3, action)
        threads, outcomes = wait_in_threads(barrier, 2)
        interrupt_once(monkeypatch, owner, name)
        with pytest.raises(Interrupt):
            as_threading(barrier).wait()
        join(threads)
        assert sorted(outcomes, key=str) == expected
        assert barrier.broken is ("broken" in expected)

    def test_interrupted_as_it_arrives_it_breaks_the_round(self) -> None:
        class Indices(list[int]):
            def pop(self, index: Any = -1) -> int:
                super().pop(index)
                raise Interrupt  # it has arrived, and does not know it

        barrier = Barrier(3)
        threads, outcomes = wait_in_threads(barrier, 2)
        barrier._rounds.latest.indices = Indices(barrier._rounds.latest.indices)
        with pytest.raises(Interrupt):
            as_threading(barrier).wait()
        join(threads)
        assert outcomes == ["broken", "broken"]


def test_a_task_that_comes_last_and_is_interrupted_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def come_last() -> None:
        with pytest.raises(Interrupt):
            await barrier.wait()

    barrier = Barrier(3)
    threads, outcomes = wait_in_threads(barrier, 2)
    interrupt_once(monkeypatch, _barrier._Round, "wake")
    asyncio.run(come_last())
    join(threads)
    assert sorted(outcomes, key=str) == [0, 1]


def test_a_thread_that_comes_first_and_is_interrupted_breaks_the_barrier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    barrier = Barrier(3)
    interrupt_once(monkeypatch, _park.ThreadWaiter, "__await__")
    with pytest.raises(Interrupt):
        as_threading(barrier).wait()
    assert barrier.broken


def test_a_thread_that_can_not_arrive_breaks_nothing() -> None:
    async def block() -> None:
        with pytest.raises(RuntimeError, match="would block the event loop"):
            as_threading(barrier).wait()

    barrier = Barrier(3)
    threads, outcomes = wait_in_threads(barrier, 1)
    asyncio.run(block())
    assert (barrier.n_waiting, barrier.broken) == (1, False)
    barrier.abort()
    with pytest.raises(BrokenBarrierError):
        as_threading(barrier).wait()
    join(threads)
    assert outcomes == ["broken"]


def test_a_thread_that_is_interrupted_as_it_breaks_the_barrier_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    barrier = Barrier(3)
    told: list[str] = []

    async def wait() -> None:
        with pytest.raises(BrokenBarrierError) as caught:
            await barrier.wait()
        told.append(str(caught.value))

    task = threading.Thread(target=lambda: trio.run(wait), daemon=True)
    task.start()
    deadline = time.monotonic() + 10
    while not barrier.n_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    interrupt_once(monkeypatch, _barrier._Round, "wake")
    with pytest.raises(Interrupt):
        as_threading(barrier).wait(0.001)
    join([task])
    assert told == ["barrier is broken: timeout (arrived=2, parties=3)"]


@pytest.mark.parametrize("how", ["abort", "reset"])
def test_an_abort_that_was_interrupted_can_be_done_again(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = Barrier(3)
    threads, outcomes = wait_in_threads(barrier, 2)
    interrupt_once(monkeypatch, _barrier._Round, "wake_a_thread")
    with pytest.raises(Interrupt):
        barrier.abort()
    assert barrier.broken
    getattr(barrier, how)()
    join(threads)
    assert outcomes == ["broken", "broken"]
    assert barrier.broken is (how == "abort")


@pytest.mark.parametrize("wait", [Semaphore(0).acquire, Barrier(2).wait])
def test_a_trio_task_interrupted_before_it_sleeps_is_not_woken_from_another_sleep(
    wait: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with monkeypatch.context() as patch:
            interrupt_once(patch, trio.lowlevel, "wait_task_rescheduled")
            with pytest.raises(Interrupt):
                await wait()
        # A bell that is rung late now would make trio fail.
        await trio.sleep(5)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
