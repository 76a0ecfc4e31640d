"""Parties that come and go at random, and what must be true of their rounds."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from aiosync import BrokenBarrierError
from aiosync.redis import BackendUnavailable, _barrier_calls
from aiosync.redis._party import Party

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiosync.redis import DistributedBarrier


class Entry(NamedTuple):
    """What became of one party."""

    round: str
    """On the server; 0: not known."""
    place: int
    """The index; -1: not known."""
    end: str
    """"passed", "cancelled", "unknown", or the reason of a break."""


class _Recorded(Party):
    """A party that is remembered, as the one of the task that has made it."""

    __slots__ = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _parties[anyio.get_current_task().id] = self


_parties: dict[int, Party] = {}


class Storm:
    """Tasks that wait at `barrier` again and again, in this process."""

    def __init__(self, barrier: DistributedBarrier, seed: int) -> None:
        self._barrier = barrier
        self._random = random.Random(seed)
        self._ended: list[tuple[Party, str]] = []
        _barrier_calls.__dict__["Party"] = _Recorded

    async def run(self, seconds: float, tasks: int) -> list[Entry]:
        """Return what became of all parties."""
        self._end = anyio.current_time() + seconds
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(self._work)
            group.start_soon(self._disturb)
        return [Entry(party.round, party.index, end) for party, end in self._ended]

    async def _work(self) -> None:
        me = anyio.get_current_task().id
        while anyio.current_time() < self._end:
            chance = self._random.random()
            timeout = 0.0 if chance < 0.01 else 0.01 if chance < 0.05 else 1.0
            patience = self._random.expovariate(100) if chance > 0.95 else 60.0
            end = "cancelled"
            with anyio.move_on_after(patience):
                try:
                    _, end = await self._barrier.wait(timeout), "passed"
                except BrokenBarrierError as error:
                    end = str(error.reason)
                except BackendUnavailable:
                    end = "unknown"
            self._ended.append((_parties[me], end))
            if self._barrier.broken:
                await anyio.sleep(self._random.expovariate(200))
                self._barrier.reset()

    async def _disturb(self) -> None:
        while anyio.current_time() < self._end:
            await anyio.sleep(self._random.expovariate(10))
            if self._random.random() < 0.5:
                self._barrier.abort()
            self._barrier.reset()


def check(entries: Iterable[Entry], parties: int, *, faults: bool) -> int:
    """Check the rounds of all processes, and return how many have passed.

    :param faults: whether replies were lost, so that some do not know what became of them
    """
    rounds: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        rounds[entry.round].append(entry)
    lost = sum(entry.end in {"cancelled", "unknown"} for entry in rounds["0"])
    passed = 0
    for number, members in rounds.items():
        indices = sorted(entry.place for entry in members if entry.end == "passed")
        if not indices:
            continue
        passed += 1
        assert number != "0"
        ends = {entry.end for entry in members}
        assert ends <= {"passed", "cancelled", "unknown"}, (number, members)
        gone = [entry.place for entry in members if entry.end != "passed"]
        if faults:
            assert len(set(indices)) == len(indices), (number, members)
            missing = set(range(parties)).difference(indices)
            assert len(missing) <= len(gone) + lost, (number, members)
        else:
            assert sorted(indices + gone) == list(range(parties)), (number, members)
    return passed
