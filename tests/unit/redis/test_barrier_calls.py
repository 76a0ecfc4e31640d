"""A party of a distributed barrier that leaves just as its outcome comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aiosync._park import ThreadWaiter
from aiosync.redis._barrier_calls import BarrierCalls
from aiosync.redis._party import Broken, Party, Passed
from aiosync.redis._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable


class Conductor:
    """Notes what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def post(self, call: Callable[[], object]) -> None:
        call()

    def leave(self, _: Party, reason: str) -> None:
        self.calls.append(f"leave: {reason}")

    def end_action(self, _: Party, *, failed: bool) -> None:
        self.calls.append(f"end of the action, failed={failed}")


@pytest.mark.parametrize(
    ("outcome", "calls"),
    [
        (None, ["leave: cancelled"]),
        (Passed(0), []),
        (Passed(1, acts=True), ["end of the action, failed=True"]),
        (Broken("timeout", 1), []),
    ],
)
def test_a_party_that_leaves_when_it_was_to_act_ends_the_action(
    outcome: object, calls: list[str]
) -> None:
    party = Party(Ticket(ThreadWaiter()), has_action=True)
    if outcome is not None:
        party.ticket.settle(outcome)
    conductor: Any = Conductor()
    withdraw: Any = BarrierCalls._withdraw
    withdraw(None, conductor, party)
    assert conductor.calls == calls
    assert party.cancelled is (outcome is None)
