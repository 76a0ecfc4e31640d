"""The report: text for a person that looks for the cause."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ._deadlocks import find_deadlocks
from ._situation import see

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._callers import CallSite
    from .._observed import Hold, Record, Wait
    from .._observed._caller import Caller
    from ._deadlocks import Deadlock, Link
    from ._situation import Seen


def render(records: Iterable[Record], now: float, limit: int) -> str:
    """Return the report on `records`.

    :param now: on the clock of the records
    :param limit: how many holders, and how many waiters, of one object to list
    """
    records = list(records)
    situation = see(records)
    used = [seen for seen in situation if seen.holds or seen.waits]
    # The object with the longest wait comes first.
    used.sort(key=lambda seen: min((wait.since for wait in seen.waits), default=now))
    deadlocks = find_deadlocks(situation)
    if deadlocks:
        # The program may have gone on while the snapshot was taken. What is there to stay is found
        # again, with the same waits.
        before = {wait for seen in situation for wait in seen.waits}
        deadlocks = [
            deadlock
            for deadlock in find_deadlocks(see(records))
            if all(link.wait in before for link in deadlock.links)
        ]
    blocks = [_summary(used, len(situation) - len(used), deadlocks)]
    blocks += [_describe_deadlock(deadlock, now, limit) for deadlock in deadlocks]
    blocks += [_describe(seen, now, limit) for seen in used]
    return "\n\n".join(blocks)


def _summary(used: list[Seen], unused: int, deadlocks: list[Deadlock]) -> str:
    waiting = sum(len(seen.waits) for seen in used)
    certain = sum(deadlock.is_certain for deadlock in deadlocks)
    parts = [f"in use: {len(used)}", f"not in use: {unused}", f"waiting: {waiting}"]
    if certain:
        parts.append(f"deadlocks: {certain}")
    if len(deadlocks) > certain:
        parts.append(f"possible deadlocks: {len(deadlocks) - certain}")
    return "aiosync report: " + ", ".join(parts)


# -- Deadlocks.


def _describe_deadlock(deadlock: Deadlock, now: float, limit: int) -> str:
    count = len(deadlock.links)
    what = "DEADLOCK" if deadlock.is_certain else "POSSIBLE DEADLOCK"
    who = f"{count} tasks or threads wait for one another"
    if count == 1:
        who = f"{deadlock.links[0].caller} waits for itself"
    lines = [f"{what}: {who}"]
    lines += [_describe_link(link, limit) for link in deadlock.links[:limit]]
    if count > limit:
        lines.append(f"  and {count - limit} more")
    lines += _escapes(deadlock, now)
    return "\n".join(lines)


def _describe_link(link: Link, limit: int) -> str:
    line = f"  {link.caller} waits for {link.seen.label} at {_site(link.wait.site)}"
    if link.seen.is_barrier:
        if not link.seen.missing:
            return f"{line}\n    whose action is run by {_names(link.absent, limit)}"
        missing = _names(link.absent, limit)
        return f"{line}\n    which needs {link.seen.missing} more; missing: {missing}"
    if {hold.caller for hold in link.seen.holds} == {link.caller}:
        return f"{line}\n    held by itself since {_site(link.seen.holds[0].site)}"
    held = ", ".join(f"{hold.caller} since {_site(hold.site)}" for hold in link.seen.holds[:limit])
    held += _more(link.seen.holds, limit)
    return f"{line}\n    held by {held}"


def _names(callers: list[Caller], limit: int) -> str:
    return ", ".join(map(str, callers[:limit])) + _more(callers, limit)


def _more(rows: list[Any], limit: int) -> str:
    return f" and {len(rows) - limit} more" if len(rows) > limit else ""


def _escapes(deadlock: Deadlock, now: float) -> list[str]:
    """Return what may end a deadlock all the same."""
    ways: list[str] = []
    if not all(hold.scoped for link in deadlock.links for hold in link.seen.holds):
        ways.append("releases a permit or connection that it did not take")
    if any(link.seen.is_barrier and link.seen.missing for link in deadlock.links):
        ways.append("comes to the barrier")
    lines = [f"  unless another task or thread {' or '.join(ways)}"] if ways else []
    timed = [link for link in deadlock.links if link.wait.timeout is not None]
    if timed:
        left = {id(link): (link.wait.timeout or 0) - (now - link.wait.since) for link in timed}
        first = min(timed, key=lambda link: left[id(link)])
        lines.append(f"  until the timeout of {first.caller}, in {max(0, left[id(first)]):.1f} s")
    return lines


# -- Objects.


def _describe(seen: Seen, now: float, limit: int) -> str:
    created = "" if seen.created is None else f", created at {_site(seen.created)}"
    lines = [f"{seen.label}: {seen.state}{created}"]
    lines += _table("held", seen.holds, now, limit)
    lines += _table("arrived" if seen.is_barrier else "waiting", seen.waits, now, limit)
    absent = sorted(str(party) for party in seen.parties - {wait.caller for wait in seen.waits})
    if seen.is_barrier and seen.waits and absent:
        more = _more(absent, limit)
        lines.append(f"  absent: {', '.join(absent[:limit])}{more}, of earlier rounds")
    return "\n".join(lines)


def _table(title: str, rows: list[Hold] | list[Wait], now: float, limit: int) -> list[str]:
    lines = [_row(title, row, now) for row in rows[:limit]]
    if len(rows) > limit:
        lines.append(f"  {title}: {len(rows) - limit} more")
    return lines


def _row(title: str, row: Hold | Wait, now: float) -> str:
    caller = row.caller
    loop = "" if caller.loop is None else f" ({caller.loop})"
    ended = ", which has ended" if caller.ended else ""
    timeout: float | None = getattr(row, "timeout", None)
    limit = "" if timeout is None else f", timeout {timeout:g} s"
    age = f"{now - row.since:.1f} s"
    return f"  {title:<7} {age:>8} by {caller}{loop}{ended} at {_site(row.site)}{limit}"


def _site(site: CallSite | None) -> str:
    if site is None:
        return "an unknown line"
    return f"{site.file.removeprefix(_here())}:{site.line} in {site.function}"


def _here() -> str:
    try:
        return os.getcwd() + os.sep
    except OSError:  # the directory has been removed
        return ""
