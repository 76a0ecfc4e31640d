"""Plain data: a batch of operations, and the settings of a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that all conductors of one session share."""

    member: str
    """The id of this process on the servers."""
    clock: Callable[[], float]
    """Returns seconds, and runs while the process is paused too."""

    lease: float
    """Seconds without a heartbeat after which the server takes a process for dead."""
    prefix: str
    """The beginning of all keys and channels."""
    give_up: float
    """Seconds without a server after which waiters get an error."""
    restart_gate: bool
    """Whether a server that has just been started grants nothing for one lease."""
    numbers: Iterator[int] = field(default_factory=partial(count, 1))
    """Numbers of tickets and connections. All names share it, since a name may get a second
    conductor, whose numbers must not repeat those of the first."""


@dataclass(slots=True)
class Operation:
    """One operation of a batch."""

    arguments: tuple[str, ...]
    answered: Callable[[str], object]
    """Called with the answer of the server to this operation."""
    asker: object = None
    """The request that it belongs to, which gets the error if the operation is refused."""


@dataclass(slots=True)
class Batch:
    """The content of one call of the script."""

    arguments: list[str]
    operations: list[Operation]
    sent: float
    """When it was created, on the clock of the settings."""
    timeout: float
    """How many seconds the reply may take."""
    audit: bool
    """Whether it also compares what the conductor and the server know."""
    known: bool
    """Whether the server should have this process as a member already."""
