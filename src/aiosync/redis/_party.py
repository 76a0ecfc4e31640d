"""Plain data: one call of `DistributedBarrier.wait`, its phases and its outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._errors import BrokenReason
    from ._ticket import Ticket


class Phase(Enum):
    """The phases of a party. The values are operations of the script, except "later" and "act"."""

    ARRIVING = "a"
    LATER = "later"
    """The action of a round is still running; the party arrives in the next round."""
    ARRIVED = "q"
    ACTING = "act"
    DONE = "d"
    FAILED = "f"
    LEAVING = "l"


@dataclass(frozen=True, slots=True)
class Passed:
    """The outcome of a party whose round has tripped, or trips after its action."""

    index: int
    acts: bool = False
    """Whether the party has to run the action first."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The outcome of a party whose round was broken."""

    reason: BrokenReason
    arrived: int


@dataclass(eq=False, slots=True)
class Party:
    """One call of `wait`. Its owner writes only `ticket` and `cancelled`.

    After a timeout, the owner waits for the outcome with a new ticket.
    """

    ticket: Ticket
    has_action: bool
    cancelled: bool = False
    """Whether the owner has left. A withdrawn ticket may also mean a timeout."""
    phase: Phase = Phase.ARRIVING
    number: int = 0
    round: str = "0"
    """The round in which it has arrived; "0": not known."""
    known_round: str = "0"
    """The last round that was known when the arrival was sent; "0": none."""
    index: int = -1
    sent: bool = False
    reason: str = "cancelled"
    since: float = 0.0
    outcome: Passed | Broken | Exception | None = None
    on_broken: Callable[[BrokenReason], object] | None = None
    """Called if its round is broken, for one party of this process only."""
