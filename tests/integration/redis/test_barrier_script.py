"""barrier.lua against a model in plain Python, on a real server, driven by hypothesis.

The script is called as a conductor does it, but by hand and in any order. Time is moved by letting
the lease of a member run out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.helpers import LONG

from aiosync.redis._link import SCRIPTS

if TYPE_CHECKING:
    from support.redis_servers import RedisServer
    from support.resp import Argument

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]

MEMBERS = ("ann", "bob", "eve")
PARTIES = 3
LEASE = 600_000

members = st.sampled_from(MEMBERS)


@dataclass
class Round:
    """One round, as it should be."""

    arrived: dict[str, int] = field(default_factory=dict)
    """The indices, by "member:ticket"."""
    actor: str | None = None
    why: str | None = None
    """Why it was broken."""
    tripped: bool = False

    @property
    def is_over(self) -> bool:
        return self.tripped or self.why is not None


class BarrierModel:
    """A barrier in one process that cannot fail."""

    def __init__(self) -> None:
        self.rounds = [Round()]
        self.is_broken = False
        self.events: list[str] = []
        # Of each member: the number of its last abort or reset, and whether its lease runs.
        self.plain: dict[str, int] = {}
        self.alive: set[str] = set()

    @property
    def now(self) -> Round:
        return self.rounds[-1]

    def break_round(self, why: str) -> None:
        self.now.why = why
        self.is_broken = True
        self._end(f"b {why} {len(self.now.arrived)}")

    def trip(self) -> None:
        self.now.tripped = True
        self._end("t")

    def _end(self, event: str) -> None:
        self.events.append(f"{len(self.rounds) - 1} {event}")
        self.rounds.append(Round())

    def last_break(self) -> Round:
        return next(each for each in reversed(self.rounds) if each.why is not None)

    def find(self, party: str) -> tuple[int, Round] | None:
        for number, each in enumerate(self.rounds):
            if party in each.arrived:
                return number, each
        return None

    def fate(self, party: str) -> str:
        """What is to be answered to a question about the round in which `party` has arrived."""
        found = self.find(party)
        assert found is not None
        number, each = found
        if each.why is not None:
            return f"b {number} {each.why} {len(each.arrived)}"
        if each.tripped:
            return f"t {number}"
        return f"{'y' if each.actor == party else 'w'} {number} {each.arrived[party]}"

    def arrive(self, party: str, action: bool) -> str:
        if self.is_broken:
            last = self.last_break()
            return f"b {last.why} {len(last.arrived)}"
        if self.now.actor is not None:
            return "l"
        index = self.now.arrived[party] = len(self.now.arrived)
        number = len(self.rounds) - 1
        if index + 1 < PARTIES:
            return f"w {number} {index}"
        if action:
            self.now.actor = party
            return f"y {number} {index}"
        self.trip()
        return f"t {number} {index}"

    def leave(self, party: str, why: str) -> None:
        if party in self.now.arrived and self.now.actor is None:
            self.break_round(why)

    def end_action(self, party: str, failed: bool) -> None:
        if self.now.actor == party:
            if failed:
                self.break_round("action")
            else:
                self.trip()

    def abort(self) -> None:
        if not self.is_broken:
            self.break_round("aborted")

    def reset(self) -> None:
        if not self.is_broken and self.now.arrived:
            self.break_round("reset")
        if self.is_broken:
            self.is_broken = False
            self.events.append("n")

    def bury(self, dead: set[str]) -> None:
        """Break the round if one of `dead` has arrived."""
        for member in dead:
            self.alive.discard(member)
            self.plain.pop(member, None)
        if any(party.split(":")[0] in dead for party in self.now.arrived):
            self.break_round("lost")


class BarrierScript(RuleBasedStateMachine):
    """Calls of the script, with the answers that the model gives."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.client = self.server.client()
        self.listener = self.server.client()
        self.hash = self.client.command("SCRIPT", "LOAD", SCRIPTS["barrier"])
        stem = f"test:{{{token_hex(8)}}}:barrier"
        suffixes = ("", ":members", ":arrivals", ":last", ":broken")
        self.keys = [stem + suffix for suffix in suffixes]
        self.listener.command("SUBSCRIBE", f"{stem}!")
        self.model = BarrierModel()
        self.numbers = 0
        self.run = "run 1"
        self.dying: set[str] = set()

    def teardown(self) -> None:
        self.client.command("DEL", *self.keys)
        self.client.close()
        self.listener.close()

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def call(self, member: str, *operations: Argument, parties: int = PARTIES) -> Any:
        """Call the script, and check all of the reply but the answers, which are returned."""
        model = self.model
        was_alive = member in model.alive and member not in self.dying
        model.bury(self.dying)
        self.dying = set()
        model.alive.add(member)
        reply = _text(
            self.client.command(
                "EVALSHA",
                self.hash,
                len(self.keys),
                *self.keys,
                parties,
                LEASE,
                member,
                1,
                self.run,
                "PUBLISH",
                *operations,
            )
        )
        assert reply[0] == "ok"
        _, newly, _, self.round, self.n_arrived, self.status, _, answers = reply
        assert newly == (0 if was_alive else 1)
        return answers

    def number(self, index: int) -> str:
        """The number on the server of a round of the model."""
        return str(self.first + index)

    @property
    def first(self) -> int:
        value = self.client.command("HGET", self.keys[0], "since")
        return int(value) if value else 0

    def check(self, answer: str, expected: str) -> None:
        """Compare, with the numbers of the server in place of those of the model."""
        kind, *rest = expected.split()
        if rest:
            rest[0] = self.number(int(rest[0]))
        assert answer.split()[: 1 + len(rest)] == [kind, *rest], (answer, expected)

    # -- The operations.

    @rule(member=members, action=st.booleans(), n=st.integers(1, 3))
    def arrive(self, member: str, action: bool, n: int) -> None:
        tickets = [self.next_number() for _ in range(n)]
        operations = [part for ticket in tickets for part in ("a", ticket, int(action))]
        answers = self.call(member, *operations)
        for ticket, answer in zip(tickets, answers, strict=True):
            expected = self.model.arrive(f"{member}:{ticket}", action)
            if expected[0] == "b":
                assert answer.split()[0] == "b"
                assert answer.split()[2:] == expected.split()[1:]
            else:
                self.check(answer, expected)

    @precondition(lambda self: not self.model.is_broken and self.model.now.actor is None)
    @rule(member=members, action=st.booleans())
    def fill(self, member: str, action: bool) -> None:
        """All that are missing arrive."""
        self.arrive(member, action, PARTIES - len(self.model.now.arrived))

    @precondition(lambda self: self.model.now.actor is not None)
    @rule(failed=st.booleans())
    def end_action(self, failed: bool) -> None:
        actor = self.model.now.actor
        assert actor is not None
        number = self.number(len(self.model.rounds) - 1)
        member, ticket = actor.split(":")
        (answer,) = self.call(member, "f" if failed else "d", ticket, number)
        self.model.end_action(actor, failed)
        self.check(answer, self.model.fate(actor))

    @precondition(lambda self: self.model.is_broken)
    @rule(member=members)
    def mend(self, member: str) -> None:
        self.reset(member, False)

    @precondition(lambda self: any(each.arrived for each in self.model.rounds))
    @rule(data=st.data(), kind=st.sampled_from(["q", "l", "d", "f"]))
    def tell(self, data: st.DataObject, kind: str) -> None:
        """A party asks, leaves or ends the action, now or of an old round."""
        parties = [party for each in self.model.rounds for party in each.arrived]
        party = data.draw(st.sampled_from(parties[-8:]))
        member, ticket = party.split(":")
        found = self.model.find(party)
        assert found is not None
        extra = ["cancelled"] if kind == "l" else []
        (answer,) = self.call(member, kind, ticket, self.number(found[0]), *extra)
        if kind == "l":
            self.model.leave(party, "cancelled")
        elif kind in "df":
            self.model.end_action(party, kind == "f")
        self.check(answer, self.model.fate(party))

    @precondition(lambda self: any(each.arrived for each in self.model.rounds))
    @rule(data=st.data())
    def arrive_again(self, data: st.DataObject) -> None:
        """The reply to the arrival was lost. It must not arrive a second time."""
        parties = [party for each in self.model.rounds for party in each.arrived]
        party = data.draw(st.sampled_from(parties[-8:]))
        member, ticket = party.split(":")
        found = self.model.find(party)
        assert found is not None
        (answer,) = self.call(member, "A", ticket, self.number(found[0]), 0)
        tripped_later = any(each.tripped for each in self.model.rounds[found[0] + 1 :])
        if self.model.find(party) == (len(self.model.rounds) - 1, self.model.now) or (
            found[1].tripped and not tripped_later
        ):
            self.check(answer, self.model.fate(party))
        elif self.model.is_broken and not tripped_later:
            assert answer[0] == "b"
        else:
            assert answer == "?"

    @rule(member=members)
    def arrive_after_a_loss(self, member: str) -> None:
        """The arrival itself was lost: it arrives now, if that was in the current round."""
        ticket = self.next_number()
        self.call(member, "S")
        number = self.round
        (answer,) = self.call(member, "A", ticket, number, 0)
        expected = self.model.arrive(f"{member}:{ticket}", False)
        if expected == "l":
            assert answer == "l"
        else:
            assert answer.split()[0] == expected.split()[0]

    @rule(member=members, repeat=st.booleans())
    def abort(self, member: str, repeat: bool) -> None:
        self.plain(member, "z", repeat, self.model.abort)

    @rule(member=members, repeat=st.booleans())
    def reset(self, member: str, repeat: bool) -> None:
        self.plain(member, "n", repeat, self.model.reset)

    def plain(self, member: str, kind: str, repeat: bool, do: Any) -> None:
        last = self.model.plain.get(member)
        if repeat and last is not None and member not in self.dying:
            assert self.call(member, kind, last) == ["-"]
            return
        number = self.next_number()
        assert self.call(member, kind, number) == ["-"]
        do()
        self.model.plain[member] = number

    @precondition(lambda self: bool(self.model.alive))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """The lease of a member runs out; the next command notices."""
        member = data.draw(st.sampled_from(sorted(self.model.alive)))
        self.client.command("ZADD", self.keys[1], "XX", 1, member)
        self.dying.add(member)

    @precondition(lambda self: self.model.alive)
    @rule(member=members)
    def other_parties(self, member: str) -> None:
        arguments: list[Argument] = [PARTIES + 1, LEASE, member, 1, self.run, "PUBLISH", "a", 1, 0]
        reply = self.client.command("EVALSHA", self.hash, len(self.keys), *self.keys, *arguments)
        assert _text(reply) == ["differs", PARTIES, LEASE]

    @rule(member=members)
    def statistics(self, member: str) -> None:
        (answer,) = self.call(member, "S")
        parties, waiting, status, n_members = answer.split()
        model = self.model
        assert (int(parties), int(waiting)) == (PARTIES, len(model.now.arrived))
        assert status == self.expected_status()
        assert int(n_members) == len(model.alive)

    def expected_status(self) -> str:
        if self.model.is_broken:
            return "broken"
        return "filling" if self.model.now.actor is None else "acting"

    # -- What is always true.

    @invariant()
    def reply_and_messages_agree_with_the_model(self) -> None:
        if not self.model.alive:
            return
        expected, self.model.events = self.model.events, []
        heard = []
        self.listener.send("PING")
        while (message := self.listener.receive())[0] == b"message":
            heard += message[2].decode().split()
        names = []
        for event in expected:
            number, _, rest = event.partition(" ")
            if event == "n":
                names.append("n")
                continue
            kind, *why = rest.split()
            names.append(":".join([kind, self.number(int(number)), *why]))
        assert ["n" if event[0] == "n" else event for event in heard] == names
        if not self.dying:
            assert self.status == self.expected_status()
            assert self.n_arrived == len(self.model.now.arrived)
            assert self.round == self.number(len(self.model.rounds) - 1)

    @invariant()
    def everything_expires(self) -> None:
        for key in self.keys:
            assert self.client.command("PTTL", key) != -1, key


def _text(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_text(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply


@pytest.mark.slow
def test_the_script_does_what_the_model_does(redis_server: RedisServer) -> None:
    machine = type("Machine", (BarrierScript,), {"server": redis_server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=1500 if LONG else 40,
            stateful_step_count=30,
            deadline=None,
            derandomize=not LONG,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_what_is_known_of_broken_rounds_does_not_grow_for_ever(redis_server: RedisServer) -> None:
    """Also if not all rounds are broken."""
    with redis_server.client() as client:
        script = client.command("SCRIPT", "LOAD", SCRIPTS["barrier"])
        stem = f"test:{{{token_hex(8)}}}:barrier"
        keys = [stem, *(f"{stem}:{each}" for each in ("members", "arrivals", "last", "broken"))]
        number = 0
        for _ in range(30):
            operations: list[Argument] = []
            for _ in range(100):
                number += 3
                operations += ["a", number, 0, "z", number + 1, "n", number + 2]
            client.command(
                "EVALSHA", script, 5, *keys, 1, LEASE, "ann", 1, "run", "PUBLISH", *operations
            )
        assert client.command("HLEN", keys[4]) <= 1000
        client.command("DEL", *keys)


def test_a_party_that_may_have_passed_is_not_told_that_the_barrier_is_broken(
    redis_server: RedisServer,
) -> None:
    """The other party of its round has passed. Two rounds later, nobody knows that any more."""
    with redis_server.client() as client:
        script = client.command("SCRIPT", "LOAD", SCRIPTS["barrier"])
        stem = f"test:{{{token_hex(8)}}}:barrier"
        keys = [stem, *(f"{stem}:{each}" for each in ("members", "arrivals", "last", "broken"))]

        def call(member: str, *operations: Argument) -> Any:
            return _text(
                client.command(
                    "EVALSHA", script, 5, *keys, 2, LEASE, member, 1, "run", "PUBLISH", *operations
                )
            )

        *_, before, _, _, _, _ = call("ann", "S")
        call("ann", "a", 1, 0)  # the reply is lost
        assert call("bob", "a", 1, 0)[-1] == [f"t {before} 1"]
        call("bob", "a", 2, 0, "a", 3, 0, "z", 4)
        assert call("ann", "A", 1, before, 0)[-1] == ["?"]
        # It cannot have passed if no round has tripped since.
        now = call("ann", "S")[3]
        assert call("ann", "A", 2, now, 0)[-1][0].split()[2:] == ["aborted", "0"]
        client.command("DEL", *keys)
