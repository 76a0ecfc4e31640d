"""The policy of a pool: pure functions of a snapshot and the time. They neither act nor wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._backoff import Backoff
from ._entry import FOREVER, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._entry import PoolEntry
    from ._events import CloseReason
    from ._options import Options

# The shortest time between two looks for idle connections and leaks, in seconds.
_GRAIN = 0.05
# How long waiters rely on a connection that is being reset or checked, in seconds. After that it
# may hang: another one is checked, or opened.
SOON = 0.1
# How long a reset that was cancelled may go on, in seconds.
GRACE = 0.1
# A replacement is started at least this part of the time before the old connection has to go.
_MARGIN = 0.025
# These may become idle at any moment, without a word to maintenance; see `_active`.
_ACTIVE = (State.IN_USE, State.RETURNING, State.VALIDATING, State.IDLE)


@dataclass
class Snapshot:
    """The situation of a pool."""

    options: Options
    # All connections that are not closed, and the attempts to connect, oldest first.
    entries: Sequence[PoolEntry[Any]] = ()
    # The available ones, the one that was used last at the end. Other idle ones are on
    # their way to a waiter.
    idle: Sequence[PoolEntry[Any]] = ()
    attempts: Sequence[PoolEntry[Any]] = ()
    # How many callers wait; at least 1 if a caller that does not wait found no connection.
    waiting: int = 0
    backoff: Backoff = field(default_factory=Backoff)
    # How long it takes to connect, in seconds.
    connect_time: float = 0.0

    @property
    def size(self) -> int:
        return len(self.entries) + len(self.attempts)


@dataclass
class Plan:
    """What is to be done, and when to look again."""

    # How many connections to open, and the connections that need a replacement soon.
    open: int = 0
    replace: list[PoolEntry[Any]] = field(default_factory=list)
    # The connections to close, each with the reason. One that is borrowed before it is closed is
    # closed when it comes back, unless the reason is "idle".
    close: list[tuple[PoolEntry[Any], CloseReason]] = field(default_factory=list)
    check: list[PoolEntry[Any]] = field(default_factory=list)
    # The replacements to make available.
    admit: list[PoolEntry[Any]] = field(default_factory=list)
    # The connections whose reset takes too long, and those that are borrowed for too long.
    overdue: list[PoolEntry[Any]] = field(default_factory=list)
    leaked: list[PoolEntry[Any]] = field(default_factory=list)
    # Whether one more may be opened than are open or planned.
    has_capacity: bool = False
    # When to look again, if nothing happens before.
    look_at: float = FOREVER

    def look(self, at: float) -> None:
        self.look_at = min(self.look_at, at)


def plan(s: Snapshot, now: float) -> Plan:
    """Decide what to do with the connections of a pool."""
    p = Plan()
    _evict(s, p, now)
    _shrink(s, p, now)
    _replace(s, p, now)
    _validate(s, p, now)
    _supervise(s, p, now)
    _open(s, p, now)
    return p


def _in(s: Snapshot, *states: State) -> list[PoolEntry[Any]]:
    return [entry for entry in s.entries if entry.state in states]


def _active(s: Snapshot) -> list[PoolEntry[Any]]:
    """Return those that are in use, or soon may be."""
    idle = set(s.idle)
    return [entry for entry in _in(s, *_ACTIVE) if entry not in idle]


def _evict(s: Snapshot, p: Plan, now: float) -> None:
    """Close what is too old, or idle for too long."""
    for entry in s.idle:
        if entry.expires <= now:
            p.close.append((entry, entry.retired))
        elif entry.evict_at(s.options.max_idle) <= now:
            p.close.append((entry, "idle"))
        else:
            p.look(entry.evict_at(s.options.max_idle))
    active = _active(s)
    if active and s.options.max_idle < FOREVER:
        # One may become idle at once. Its replacement is to be opened in time; see `_to_renew`.
        p.look(now + max(s.options.max_idle - _margin(s, s.options.max_idle), _GRAIN))
    for entry in active:
        if entry.expires > now:
            p.look(entry.expires)


def _lendable(s: Snapshot, p: Plan, now: float) -> list[PoolEntry[Any]]:
    """Return those that stay: the idle ones first, oldest first."""
    closing = {entry for entry, _ in p.close}
    active = [entry for entry in _active(s) if entry.expires > now]
    return [entry for entry in (*s.idle, *active) if entry not in closing]


def _shrink(s: Snapshot, p: Plan, now: float) -> None:
    """Close what is more than `max_size`: the oldest idle ones first."""
    lendable = _lendable(s, p, now)
    coming = len(_in(s, State.CONFIGURING)) + len(s.attempts)
    coming -= sum(entry.replaces is not None for entry in _coming(s))
    surplus = len(lendable) + coming - s.options.max_size
    for entry in lendable[: max(0, surplus)]:
        p.close.append((entry, _no_room(s)))


def _no_room(s: Snapshot) -> CloseReason:
    """Return why a connection is closed for which there is no room."""
    # `resize` allows no 0: a pool that is being closed has it.
    return "resize" if s.options.max_size else "shutdown"


def _coming(s: Snapshot) -> list[PoolEntry[Any]]:
    return [*s.attempts, *_in(s, State.CONFIGURING)]


def _replace(s: Snapshot, p: Plan, now: float) -> None:
    """Let a replacement take the place of the connection that it was opened for."""
    lendable = _lendable(s, p, now)
    lent = len(lendable) + sum(entry.expires <= now for entry in _active(s))
    for entry in _in(s, State.STANDBY):
        old = entry.replaces
        if old in lendable:
            by_age = old.evict_at(s.options.max_idle) == old.expires or old.state is not State.IDLE
            p.close.append((old, "lifetime" if by_age else "idle"))
        if lent < s.options.max_size:
            p.admit.append(entry)
            lent += 1
        elif old is None or old.state not in _ACTIVE or not s.options.max_size:
            p.close.append((entry, _no_room(s)))  # its place was taken away meanwhile


def _soon(s: Snapshot, p: Plan, now: float) -> int:
    """Return how many connections will probably be available in a moment."""
    working = _in(s, State.RETURNING, State.VALIDATING)
    since = [entry.since for entry in working if now < entry.since + SOON]
    if s.waiting:
        for begin in since:
            p.look(begin + SOON)
    return len(since)


def _validate(s: Snapshot, p: Plan, now: float) -> None:
    """Check stale connections if callers wait, and those that need a keepalive."""
    wanted = s.waiting - _soon(s, p, now)
    closing = {entry for entry, _ in p.close}
    for entry in reversed(s.idle) if s.options.lifo else s.idle:
        if entry in closing:
            continue
        due = max(entry.idle_since, entry.keepalive_from) + s.options.keepalive
        if wanted > 0 and (entry.fresh_until <= now or entry.is_suspect):
            p.check.append(entry)
            p.look(now + SOON)  # if it hangs, another one is needed
            wanted -= 1
        elif due <= now:
            p.check.append(entry)
        else:
            p.look(due)
    if _active(s):
        p.look(now + s.options.keepalive)


def _supervise(s: Snapshot, p: Plan, now: float) -> None:
    """Find those that a borrower has for too long, or resets for too long."""
    for entry in s.entries:
        if entry.state is State.RETURNING:
            is_cancelled = entry.grace_until != FOREVER
            end = entry.grace_until if is_cancelled else entry.since + s.options.check_timeout
            if end <= now:
                p.overdue.append(entry)
                p.look(now + GRACE)
            else:
                p.look(end)
        elif entry.state is State.IN_USE and not entry.reported:
            if entry.taken + s.options.leak_timeout <= now:
                p.leaked.append(entry)
            else:
                p.look(entry.taken + s.options.leak_timeout)
    if s.entries:
        p.look(now + max(s.options.leak_timeout, _GRAIN))  # an idle one may be borrowed meanwhile


def _open(s: Snapshot, p: Plan, now: float) -> None:
    """Open as many as are missing, and those that replace others in time."""
    renew = _to_renew(s, p, now)
    room = s.options.max_size - s.size
    connecting = _coming(s)
    missing = s.waiting - len(connecting) - _soon(s, p, now) - len(p.check)
    number = max(s.options.min_size - s.size, missing, 0)
    under_way = sum(entry.failures == s.backoff.failures for entry in connecting)
    limit = s.backoff.limit(under_way, now)
    if s.backoff.failures and not under_way:
        # One attempt goes on even if nobody waits; otherwise the outage would never be over.
        number = max(number, 1)
    limit = min(limit, s.options.max_connecting - len(connecting))
    p.open = max(0, int(min(number, room, limit)))
    is_replacing = any(entry.replaces is not None for entry in (*s.attempts, *s.entries))
    extra = 1 if s.options.overlap and not is_replacing else 0
    for entry in renew:
        if s.backoff.failures or p.open + len(p.replace) >= limit:
            break
        if p.open + len(p.replace) >= room + extra:
            break
        p.replace.append(entry)
    p.has_capacity = p.open + len(p.replace) < room
    if p.has_capacity and not under_way + p.open and s.backoff.next_attempt > now:
        p.look(s.backoff.next_attempt)


def surplus(s: Snapshot) -> int:
    """Return how many attempts to connect are not needed, if they can still be stopped.

    What `_open` opens is none of them; otherwise it would be stopped and opened for ever.
    """
    present = len(s.entries) - len(_in(s, State.CONFIGURING))
    needed = max(s.waiting, s.options.min_size - present, bool(s.backoff.failures))
    coming = sum(entry.failures == s.backoff.failures for entry in _coming(s))
    all_but_closing = (
        entry for entry in (*s.entries, *s.attempts) if entry.state is not State.CLOSING
    )
    size = sum(entry.replaces is None for entry in all_but_closing)
    return max(coming - needed, size - s.options.max_size, 0)


def _to_renew(s: Snapshot, p: Plan, now: float) -> list[PoolEntry[Any]]:
    """Return those that will have to go soon and are needed, the most urgent first."""
    due = []
    spare = 0 if s.waiting else len(_lendable(s, p, now)) - s.options.min_size
    for entry in _lendable(s, p, now):
        is_spare = entry.state is State.IDLE and spare > 0
        spare -= is_spare
        ends = entry.evict_at(s.options.max_idle) if entry.state is State.IDLE else entry.expires
        if entry.renewed or ends == FOREVER or ends <= now:  # a thread may just have retired it
            continue
        began = entry.created if ends == entry.expires else entry.idle_since
        begin = ends - _margin(s, ends - began)
        if begin > now:
            p.look(begin)
        elif is_spare:
            p.look(max((now + ends) / 2, now + _GRAIN))  # it may be borrowed meanwhile
        else:
            due.append((ends, entry))
    return [entry for _, entry in sorted(due, key=lambda pair: pair[0])]


def _margin(s: Snapshot, lifetime: float) -> float:
    """Return how long before a connection has to go its replacement is to be opened."""
    return min(lifetime / 2, max(lifetime * _MARGIN, 2 * s.connect_time))
