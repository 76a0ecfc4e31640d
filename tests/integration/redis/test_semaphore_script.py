"""semaphore.lua against a plain model: every reply, message and key, on a real server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.fake_link import ScriptClient
from support.helpers import LONG

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

LEASE = 1000
TTL = 60_000  # ten leases, but at least a minute
STATE = "fake:{x}:semaphore"
KEYS = [STATE, f"{STATE}:members", f"{STATE}:holders", f"{STATE}:waiters"]

# All there is on the server, by one command.
_LOOK = """
local ttls = {}
for i, key in ipairs(KEYS) do
  ttls[i] = redis.call('PTTL', key)
end
return {
  redis.call('HGETALL', KEYS[1]),
  redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES'),
  redis.call('ZRANGE', KEYS[3], 0, -1),
  redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES'),
  ttls,
}
"""


@dataclass
class SemaphoreModel:
    """What the script does, in Python. Times are in milliseconds, except `now_us`."""

    exists: bool = False
    declared: int = 0
    limit: int = 0
    lease: int = 0
    run: str = ""
    gate: int = 0
    seq: int = 0
    epochs: dict[str, int] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)
    holders: set[tuple[str, str, str]] = field(default_factory=set)
    waiters: dict[tuple[str, str], int] = field(default_factory=dict)

    def call(
        self,
        now_us: int,
        header: tuple[int, int, str, int, str, int],
        audit: bool,
        operations: list[tuple[str, ...]],
    ) -> tuple[list[Any], list[tuple[str, str]]]:
        """Return the reply, and the messages."""
        declared, lease, me, epoch, run, fresh = header
        now = now_us // 1000
        if not self.exists:
            self.__init__(True, declared, declared, lease, run, now + fresh, now_us)  # type: ignore[misc]
        elif self.epochs.get(me, 0) > epoch:
            return ["stale"], []
        elif declared not in (self.declared, self.limit) or lease != self.lease:
            return ["differs", self.limit, self.lease], []
        elif run != self.run:
            self.run, self.gate, self.seq = run, now + lease, max(self.seq, now_us)
            self.holders, self.waiters = set(), {}
        self.gated = now < self.gate
        if not self.gated:
            self._remove_dead(now)
        newly = int(me not in self.members)
        self.epochs[me], self.members[me] = epoch, now + lease
        answers = [getattr(self, "_" + kind)(me, *rest) for kind, *rest in operations]
        grants, messages = self._serve(now, me)
        look = -1
        if self.gated:
            look = self.gate - now + 1
        elif self.waiters:
            look = max(1, min(self.members.values()) - now + 1)
        mine = sum(holder[0] == me for holder in self.holders) if audit else -1
        return ["ok", newly, look, mine, len(self.waiters), grants, answers], messages

    def _remove_dead(self, now: int) -> None:
        for dead in sorted(self.members, key=lambda member: (self.members[member], member))[:16]:
            if self.members[dead] <= now:
                del self.members[dead]
                self.epochs.pop(dead, None)
                self.holders = {holder for holder in self.holders if holder[0] != dead}

    def _serve(self, now: int, me: str) -> tuple[list[str], list[tuple[str, str]]]:
        grants: list[str] = []
        doorbells: dict[str, list[str]] = {}
        while not self.gated and self.waiters and len(self.holders) < self.limit:
            member, ticket = min(self.waiters, key=lambda it: (self.waiters[it], ":".join(it)))
            del self.waiters[member, ticket]
            if member == me:
                grants.append(f"{ticket}:{self._grant(member, ticket)}")
            elif self.members.get(member, 0) > now:
                granted = f"{ticket}:{self._grant(member, ticket)}"
                doorbells.setdefault(member, []).append(granted)
        return grants, [(f"{STATE}!{it}", " ".join(doorbells[it])) for it in doorbells]

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _grant(self, me: str, ticket: str) -> str:
        fence = str(self._next())
        self.holders.add((me, ticket, fence))
        return fence

    def _first_of(self, me: str, ticket: str) -> tuple[str, str, str] | None:
        return min((it for it in self.holders if it[:2] == (me, ticket)), default=None)

    def _has_capacity(self) -> bool:
        return not (self.gated or self.waiters) and len(self.holders) < self.limit

    def _wait(self, me: str, ticket: str, place: int) -> str:
        self.waiters[me, ticket] = place
        return f"w{place}"

    def _a(self, me: str, ticket: str) -> str:
        if self._has_capacity():
            return "g" + self._grant(me, ticket)
        return self._wait(me, ticket, self._next())

    def _t(self, me: str, ticket: str) -> str:
        return "g" + self._grant(me, ticket) if self._has_capacity() else "-"

    def _A(self, me: str, ticket: str, place: str) -> str:
        held = self._first_of(me, ticket)
        if held is not None:
            return "g" + held[2]
        if (me, ticket) in self.waiters:
            return f"w{self.waiters[me, ticket]}"
        return self._a(me, ticket) if place == "0" else self._wait(me, ticket, int(place))

    def _r(self, me: str, ticket: str, fence: str) -> str:
        if fence != "-":
            self.holders.discard((me, ticket, fence))
        elif self.waiters.pop((me, ticket), None) is None:
            held = self._first_of(me, ticket)
            if held is not None:
                self.holders.remove(held)
        return "-"

    def _c(self, me: str, ticket: str, fence: str) -> str:
        if (me, ticket, fence) in self.holders:
            return "1"
        if self.gated:
            self.holders.add((me, ticket, fence))
            return "1"
        return "0"

    def _N(self, me: str, limit: str) -> str:
        self.limit = int(limit)
        return "-"

    def _L(self, me: str) -> str:
        mine = sorted(":".join(holder) for holder in self.holders if holder[0] == me)
        return " ".join(permit.partition(":")[2] for permit in mine)

    def _S(self, me: str) -> str:
        numbers = len(self.holders), len(self.waiters), len(self.members), int(self.gated)
        return " ".join(map(str, (self.limit, *numbers)))


MEMBERS = [f"m{number}" for number in range(4)]
members = st.sampled_from(MEMBERS)
picks = st.integers(0, 30)
operations = st.lists(
    st.tuples(st.sampled_from("aaaaatAArrrrccNLS"), picks, st.integers(1, 4)), max_size=6
)


class Semaphores(RuleBasedStateMachine):
    """Several processes that use one semaphore."""

    client: ScriptClient

    def __init__(self) -> None:
        super().__init__()
        self.client.command("DEL", *KEYS)
        self.model = SemaphoreModel()
        self.now_us = 1_700_000_000_000_000
        self.run, self.started = 1, -math.inf
        self.value = 1
        self.numbers = iter(range(1, 1_000_000))
        self.epochs = dict.fromkeys(MEMBERS, 1)
        # What each process was told: its tickets with their places, and its permits.
        self.places: dict[str, dict[str, str]] = {member: {} for member in MEMBERS}
        self.permits: dict[str, list[tuple[str, str]]] = {member: [] for member in MEMBERS}
        self.largest_fence = 0

    @initialize(value=st.integers(1, 3))
    def begin(self, value: int) -> None:
        self.value = value

    @property
    def fresh(self) -> int:
        return max(0, math.ceil(self.started + LEASE - self.now_us / 1000))

    def call(
        self,
        me: str,
        given: list[tuple[str, ...]],
        *,
        audit: bool = True,
        value: int | None = None,
        lease: int = LEASE,
        epoch: int | None = None,
    ) -> list[Any]:
        header = (
            self.value if value is None else value,
            lease,
            me,
            self.epochs[me] if epoch is None else epoch,
            f"run{self.run}",
            max(0, self.fresh) if self.started > 0 else 0,
        )
        expected = self.model.call(self.now_us, header, audit, given)
        arguments = [*map(str, header), str(int(audit)), "PUBLISH"]
        for operation in given:
            arguments += operation
        reply, messages = self.client.run("semaphore", KEYS, arguments, self.now_us)
        assert (reply, messages) == expected
        return [*reply]

    def operation(self, me: str, kind: str, pick: int, limit: int) -> tuple[str, ...]:
        """Return an operation that this process might send; mostly one that makes sense."""
        ticket, place = _pick([*self.places[me].items()], pick) or ("999", "0")
        number, fence = _pick(self.permits[me], pick) or ("998", "5")
        match kind:
            case "a" | "t":
                return kind, str(next(self.numbers))
            case "A":
                return kind, ticket, place
            case "r" if pick % 3 == 0:
                return kind, ticket, "-"
            case "r" | "c":
                return kind, number, fence
            case "N":
                return kind, str(limit)
            case _:
                return (kind,)

    @rule(me=members, chosen=operations, audit=st.booleans())
    def do(self, me: str, chosen: list[tuple[str, int, int]], audit: bool) -> None:
        given = [self.operation(me, *choice) for choice in chosen]
        waiting = [operation[1] for operation in given if operation[0] in "aA"]
        for ticket in waiting:
            self.places[me].setdefault(ticket, "0")
        kind, _, _, _, _, grants, answers = self.call(me, given, audit=audit)
        assert kind == "ok"
        for operation, answer in zip(given, answers, strict=True):
            if operation[0] in "atA" and answer[0] == "g":
                self.permits[me].append((operation[1], answer[1:]))
            elif operation[0] in "aA":
                self.places[me][operation[1]] = answer[1:]
        self.permits[me] += [tuple(grant.split(":")) for grant in grants]

    @rule(milliseconds=st.sampled_from([1, 300, 999, 1000, 1001, 5000, 30_000]))
    def let_time_pass(self, milliseconds: int) -> None:
        self.now_us += milliseconds * 1000 - 7

    @rule(me=members)
    def connect_again(self, me: str) -> None:
        self.epochs[me] += 1

    @rule(me=members)
    def come_late(self, me: str) -> None:
        """A command of an older connection is refused, unless the server has forgotten both."""
        if self.model.exists and self.model.epochs.get(me, 0) > 1:
            assert self.call(me, [("a", "997")], epoch=1) == ["stale"]

    @rule(me=members)
    def differ(self, me: str) -> None:
        if self.model.exists:
            for options in ({"value": 77}, {"lease": LEASE + 1}):
                assert self.call(me, [("a", "997")], **options)[0] == "differs"  # type: ignore[arg-type]

    @rule()
    def change_run(self) -> None:
        self.run += 1

    @rule()
    def restart_empty(self) -> None:
        self.client.command("DEL", *KEYS)
        self.now_us += 1000  # the clock has passed all fences
        self.run += 1
        self.started = self.now_us / 1000
        self.model.exists = False

    @rule()
    def forget_state(self) -> None:
        """Only the HASH is gone. What is left of the others must not count."""
        self.client.command("DEL", STATE)
        self.now_us += 1000
        self.model.exists = False

    @rule(me=members)
    def die(self, me: str) -> None:
        if me in self.model.members:
            past = self.now_us // 1000
            self.client.command("ZADD", KEYS[1], past, me)
            self.model.members[me] = past

    @rule(me=members, other=members, limit=st.integers(1, 4))
    def resize(self, me: str, other: str, limit: int) -> None:
        """The new number may be used as the value too, and the old one still."""
        self.call(me, [("N", str(limit))])
        self.call(other, [("S",)], value=limit)
        self.call(other, [("S",)])

    @invariant()
    def agrees(self) -> None:
        if not self.model.exists:
            return
        fields, ends, holders, places, ttls = self.client.look(_LOOK, KEYS)
        known = dict(zip(fields[::2], fields[1::2], strict=True))
        touched = int(known.pop("touched"))
        epochs = {key[6:]: int(known.pop(key)) for key in [*known] if key.startswith("epoch:")}
        model = self.model
        assert epochs == model.epochs
        assert known == {
            "declared": str(model.declared),
            "limit": str(model.limit),
            "lease": str(model.lease),
            "run": model.run,
            "gate": str(model.gate),
            "seq": str(model.seq),
        }
        assert {it: int(end) for it, end in zip(ends[::2], ends[1::2], strict=True)} == (
            model.members
        )
        assert {*holders} == {":".join(holder) for holder in model.holders}
        assert {it: int(float(at)) for it, at in zip(places[::2], places[1::2], strict=True)} == {
            ":".join(waiter): place for waiter, place in model.waiters.items()
        }
        # -2: there is no such key. -1 would be a key that stays for ever.
        present = [True, bool(model.members), bool(model.holders), bool(model.waiters)]
        for ttl, exists in zip(ttls, present, strict=True):
            assert 0 < ttl <= TTL if exists else ttl == -2
        if touched == self.now_us // 1000:  # all were renewed just now
            assert all(ttl > TTL / 2 for ttl in ttls if ttl > 0)

    @invariant()
    def fences_grow(self) -> None:
        """Also if the state is lost, since the clock is never behind."""
        fences = [int(fence) for _, _, fence in self.model.holders]
        assert all(fence <= self.model.seq for fence in fences)


def _pick(items: list[Any], pick: int) -> Any:
    return items[pick % len(items)] if items else None


@pytest.mark.slow
@pytest.mark.timeout(1800 if LONG else 60)
def test_the_script_does_what_the_model_does(scripts: ScriptClient) -> None:
    class Machine(Semaphores):
        client = scripts

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=2000 if LONG else 20,
            stateful_step_count=60 if LONG else 30,
            deadline=None,
            suppress_health_check=[*HealthCheck],
            derandomize=not LONG,
            database=None,
            phases=[Phase.explicit, Phase.generate],
        ),
    )


def test_many_dead_members_are_removed_in_turns(scripts: ScriptClient) -> None:
    """A command removes sixteen at most, so it is short. A waiter of a dead member is skipped."""
    scripts.command("DEL", *KEYS)
    model, now_us = SemaphoreModel(), 1_700_000_000_000_000

    def call(member: str, *given: tuple[str, ...]) -> list[Any]:
        header = (1, LEASE, member, 1, "run", 0)
        expected = model.call(now_us, header, True, [*given])
        arguments = [*map(str, header), "1", "PUBLISH", *(it for each in given for it in each)]
        assert scripts.run("semaphore", KEYS, arguments, now_us) == expected
        return expected[0]

    for number in range(40):
        call(f"dead{number}", ("a", "1"))
    now_us += LEASE * 1000
    held = [len(model.members)]
    answer = call("me", ("a", "1"))
    assert answer[5] == ["1:" + str(model.seq)]
    while len(model.members) > 1:
        held.append(len(model.members))
        call("me")
    assert held == [40, 25, 9]
    assert model.holders == {("me", "1", str(model.seq))}


def test_a_grant_in_an_old_state_is_not_found_after_a_failover(scripts: ScriptClient) -> None:
    """A process did not hear of a grant before its lease ended, so the permit passed on.

    The server was replaced by a replica that had the state of before. The process reconnected,
    asked about its ticket, and was told that it held the permit, while another process did.
    """
    scripts.command("DEL", *KEYS)
    now_us = 1_700_000_000_000_000

    def call(member: str, epoch: int, run: str, *operations: str) -> list[Any]:
        header = ("1", str(LEASE), member, str(epoch), run, "0", "0", "PUBLISH")
        reply, _ = scripts.run("semaphore", KEYS, [*header, *operations], now_us)
        return [*reply[-1]]

    (first,) = call("other", 1, "run", "a", "1")
    (place,) = call("me", 1, "run", "a", "1")
    call("other", 1, "run", "r", "1", first[1:])  # the permit passes to "me"
    snapshot = {key: scripts.command("DUMP", key) for key in KEYS}
    now_us += LEASE * 1000
    (granted,) = call("other", 1, "run", "a", "2")
    for key, value in snapshot.items():
        if value is None:
            scripts.command("DEL", key)
        else:
            scripts.command("RESTORE", key, 0, value, "REPLACE")
    assert call("other", 2, "run2", "c", "2", granted[1:]) == ["1"]
    assert call("me", 2, "run2", "A", "1", place[1:]) == [place]
    now_us += LEASE * 600
    assert call("other", 2, "run2", "L") == [f"2:{granted[1:]}"]
    assert call("me", 2, "run2", "L") == [""]
    now_us += LEASE * 600  # the gate is open
    assert call("other", 2, "run2", "L") == [f"2:{granted[1:]}"]
    assert call("me", 2, "run2", "L") == [""]
    call("other", 2, "run2", "r", "2", granted[1:])
    (listed,) = call("me", 2, "run2", "L")
    ticket, _, fence = listed.partition(":")
    assert ticket == "1"
    assert int(fence) > int(granted[1:])
