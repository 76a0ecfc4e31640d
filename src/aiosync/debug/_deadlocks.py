"""Find those that can never go on. Pure: it takes a snapshot and calls nothing.

A *blocked* caller waits for an object. It can go on if one of the holders of a permit can go on, or
if as many parties as a barrier still needs can. The search begins with the set of all blocked
callers, and removes each one that can go on, until there is none. The callers that are left only
wait for one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._observed import Wait
    from .._observed._caller import Caller
    from ._situation import Seen


@dataclass(frozen=True)
class Link:
    """One caller of a deadlock, and for whom it waits."""

    caller: Caller
    wait: Wait
    seen: Seen
    """What it waits for."""
    absent: list[Caller]
    """The callers that would have to come to a barrier, and wait elsewhere."""


@dataclass(frozen=True)
class Deadlock:
    """Callers that only wait for one another."""

    links: list[Link]
    """In the order in which they began to wait."""
    is_certain: bool
    """False if another party may come to a barrier, or if permits were taken outside of ``with``
    blocks, so that others may release them.
    """


def find_deadlocks(situation: list[Seen]) -> list[Deadlock]:
    """Return all deadlocks of a snapshot, the oldest first."""
    return _Search(situation).found()


class _Search:
    def __init__(self, situation: list[Seen]) -> None:
        # What each caller waits for; the last to begin, if it waits for several (a barrier whose
        # action waits for a semaphore).
        self._blocked: dict[Caller, tuple[Wait, Seen]] = {}
        waits = [(wait, seen) for seen in situation for wait in seen.waits]
        for wait, seen in sorted(waits, key=lambda pair: pair[0].since):
            self._blocked[wait.caller] = (wait, seen)
        self._stuck: set[Caller] = set()
        # Barriers of which not enough parties are known to be stuck, so that others may come.
        self._hopeful: list[Seen] = []

    def found(self) -> list[Deadlock]:
        while True:
            self._strike_off()
            hopeful = [seen for seen in self._barriers() if self._may_be_joined(seen)]
            if not hopeful:
                break
            self._hopeful += hopeful
        groups = _groups({caller: self._needs(caller) for caller in self._stuck})
        found = [self._deadlock(group) for group in groups]
        return sorted(found, key=lambda deadlock: deadlock.links[0].wait.since)

    def _strike_off(self) -> None:
        self._stuck = set(self._blocked)
        while True:
            free = {caller for caller in self._stuck if self._can_go_on(*self._blocked[caller])}
            if not free:
                return
            self._stuck -= free

    def _can_go_on(self, wait: Wait, seen: Seen) -> bool:
        if seen.is_open or seen in self._hopeful:
            return True
        if seen.is_barrier:
            if not seen.missing:
                return not self._actors(seen) & self._stuck
            known = self._known_absent(seen)
            return len(known) >= seen.missing and len(known - self._stuck) >= seen.missing
        holders = {hold.caller for hold in seen.holds}
        return not seen.missing or not holders or not holders <= self._stuck

    def _actors(self, seen: Seen) -> set[Caller]:
        """Return the party that runs the action of a barrier, and waits for something in it."""
        return {w.caller for w in seen.waits if self._blocked[w.caller][1] is not seen}

    def _known_absent(self, seen: Seen) -> set[Caller]:
        """Return the parties of earlier rounds that have not come to this one."""
        arrived = {wait.caller for wait in seen.waits}
        return {party for party in seen.parties - arrived if not party.ended}

    def _barriers(self) -> list[Seen]:
        waited_for = [self._blocked[caller][1] for caller in self._stuck]
        unique = {id(seen): seen for seen in waited_for if seen.is_barrier and seen.missing}
        return list(unique.values())

    def _may_be_joined(self, seen: Seen) -> bool:
        """Return whether parties may still come to a barrier whose parties are not all known."""
        if len(self._known_absent(seen)) >= seen.missing:
            return False
        return len(self._behind(seen)) < seen.missing

    def _behind(self, seen: Seen) -> set[Caller]:
        """Return the callers that are blocked elsewhere by the parties that wait at a barrier."""
        arrived = {wait.caller for wait in seen.waits}
        behind: set[Caller] = set()
        while True:
            more = {
                caller
                for caller in self._stuck - arrived - behind
                if self._holders(caller) & (arrived | behind)
            }
            if not more:
                return behind
            behind |= more

    def _holders(self, caller: Caller) -> set[Caller]:
        return {hold.caller for hold in self._blocked[caller][1].holds}

    def _needs(self, caller: Caller) -> set[Caller]:
        """Return those of whom one, or some, would have to go on first."""
        seen = self._blocked[caller][1]
        if not seen.is_barrier:
            return self._holders(caller)
        if not seen.missing:
            return self._actors(seen)
        known = self._known_absent(seen)
        return (known if len(known) >= seen.missing else self._behind(seen)) & self._stuck

    def _deadlock(self, group: set[Caller]) -> Deadlock:
        links: list[Link] = []
        is_certain = True
        for caller in sorted(group, key=lambda caller: self._blocked[caller][0].since):
            wait, seen = self._blocked[caller]
            absent = sorted(self._needs(caller), key=lambda c: c.name) if seen.is_barrier else []
            links.append(Link(caller, wait, seen, absent))
            is_certain = is_certain and all(hold.scoped for hold in seen.holds)
            # One more party may come, which has not taken part in a round yet.
            is_certain = is_certain and not (seen.is_barrier and seen.missing)
        return Deadlock(links, is_certain)


def _groups(needs: dict[Caller, set[Caller]]) -> list[set[Caller]]:
    """Return the groups of callers that need one another; not those that only wait behind one."""
    core = set(needs)
    while True:
        needed = {other for caller in core for other in needs[caller]}
        if core <= needed:
            break
        core &= needed
    groups: list[set[Caller]] = []
    for caller in core:
        group = {caller} | (needs[caller] & core)
        joined = [other for other in groups if other & group]
        groups = [other for other in groups if not other & group]
        groups.append(group.union(*joined))
    return groups
