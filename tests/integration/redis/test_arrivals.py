"""The conductor of a barrier and its script, with every call and message carried by hand.

So each of them can be lost, or come late, at any moment, and no test waits for anything.
"""

from __future__ import annotations

import time
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aiosync._park import ThreadWaiter
from aiosync.redis import BackendUnavailable
from aiosync.redis._arrivals import Arrivals
from aiosync.redis._batch import Batch, Settings
from aiosync.redis._conductor import Stale
from aiosync.redis._link import SCRIPTS
from aiosync.redis._party import Broken, Party, Passed
from aiosync.redis._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.redis_servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

LEASE = 10.0


class Process:
    """What a process has of one barrier, without a session.

    Its clock stands still, so it sends a heartbeat only if `now` is moved.
    """

    def __init__(self, server: RedisServer, name: str, parties: int, lease: float = LEASE) -> None:
        self.now = time.monotonic()
        settings = Settings(
            member=token_hex(12),
            clock=lambda: self.now,
            lease=lease,
            prefix="aiosync",
            give_up=3 * lease,
            restart_gate=True,
        )
        self.run = "run 1"
        self.arrivals = Arrivals(name, parties, settings)
        self.member = settings.member
        self.client = server.client()
        self.listener = server.client()
        self.script = self.client.command("SCRIPT", "LOAD", SCRIPTS["barrier"])
        self.listener.command("SUBSCRIBE", self.arrivals.channel)
        self.connect()

    def close(self) -> None:
        self.client.close()
        self.listener.close()

    def connect(self) -> None:
        self.arrivals.connect(self.run, 0.0, "PUBLISH")

    def lose_connection(self) -> None:
        """Lose the connection, and get a new one."""
        self.arrivals.disconnect()
        self.connect()

    # -- What owners do.

    def wait(self, *, action: bool = False) -> Party:
        party = Party(Ticket(ThreadWaiter()), has_action=action)
        self.arrivals.arrive(party)
        return party

    def cancel(self, party: Party) -> None:
        assert party.ticket.withdraw()
        party.cancelled = True
        self.arrivals.leave(party, "cancelled")

    def time_out(self, party: Party) -> None:
        assert party.ticket.withdraw()
        party.ticket = Ticket(ThreadWaiter())
        self.arrivals.leave(party, "timeout")

    def end_action(self, party: Party, *, failed: bool = False) -> None:
        assert outcome(party).acts
        party.ticket = Ticket(ThreadWaiter())
        self.arrivals.end_action(party, failed=failed)

    # -- The wire.

    def call(self) -> tuple[Batch, Any]:
        """Send what is due; return what to give to `take`."""
        batch = self.arrivals.next_batch()
        assert batch is not None, "there was nothing to send"
        return batch, self.call_again(batch)

    def call_again(self, batch: Batch) -> Any:
        keys = self.arrivals.keys
        reply = self.client.command("EVALSHA", self.script, len(keys), *keys, *batch.arguments)
        return _decoded(reply)

    def lose_call(self) -> Batch:
        """Have what is due lost on its way."""
        batch = self.arrivals.next_batch()
        assert batch is not None, "there was nothing to send"
        return batch

    def take(self, call: tuple[Batch, Any]) -> None:
        self.arrivals.take_reply(*call)

    def talk(self) -> None:
        """Send all that is due, and take the replies and the messages, until nothing is left."""
        while True:
            while (batch := self.arrivals.next_batch()) is not None:
                self.take((batch, self.call_again(batch)))
            messages = self.messages()
            if not messages:
                return
            for message in messages:
                self.arrivals.take_message(message)

    def messages(self) -> list[str]:
        """Return the messages that have come meanwhile."""
        self.listener.send("PING")
        found = []
        while (message := self.listener.receive())[0] == b"message":
            found.append(message[2].decode())
        return found

    def hear(self) -> None:
        for message in self.messages():
            self.arrivals.take_message(message)

    def audit(self) -> None:
        """Let a third of a lease pass, and talk."""
        self.now += self.arrivals.settings.lease / 3
        self.talk()

    # -- The server.

    def expire(self, server: RedisServer) -> None:
        """Let the lease of this process run out."""
        server.command("ZADD", self.arrivals.keys[1], 1, self.member)

    def n_arrived(self, server: RedisServer) -> int:
        count: int = server.command("HLEN", self.arrivals.keys[2])
        return count


def _decoded(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_decoded(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply


def outcome(party: Party) -> Any:
    """Return what the owner of `party` would see now; None: it still waits."""
    return party.ticket.outcome if party.ticket.decided else None


class Group:
    """Processes that share a barrier."""

    def __init__(self, server: RedisServer, parties: int, n: int) -> None:
        name = token_hex(8)
        self.server = server
        self.processes = [Process(server, name, parties) for _ in range(n)]

    def talk(self) -> None:
        for process in [*self.processes, *self.processes]:
            process.talk()

    def let_arrive(self, *processes: Process) -> None:
        """Let a party of each of `processes` arrive, one after the other."""
        for process in processes:
            process.wait()
            process.talk()

    def begin_action(self) -> tuple[Party, Party]:
        """Let a party of the first process arrive, then one of the second, which acts."""
        first, second = self.processes
        other = first.wait()
        first.talk()
        actor = second.wait(action=True)
        second.talk()
        return other, actor


@pytest.fixture
def group(redis_server: RedisServer) -> Iterator[Any]:
    made: list[Group] = []

    def make(parties: int, n: int) -> Group:
        made.append(Group(redis_server, parties, n))
        return made[-1]

    yield make
    for group in made:
        for process in group.processes:
            process.close()


# --- calls whose reply is lost, or that are lost


def test_an_arrival_whose_reply_is_lost_counts_once(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    a.call()  # its reply is lost
    a.lose_connection()
    a.talk()
    assert a.n_arrived(all_.server) == 1
    assert outcome(party) is None
    other = b.wait()
    all_.talk()
    assert [outcome(party), outcome(other)] == [Passed(0), Passed(1)]


def test_the_last_arrival_whose_reply_is_lost_passes(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    first = a.wait()
    a.talk()
    last = b.wait()
    b.call()
    b.lose_connection()
    all_.talk()
    assert [outcome(first), outcome(last)] == [Passed(0), Passed(1)]
    assert a.n_arrived(all_.server) == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_an_arrival_that_is_lost_is_repeated(group: Any, is_first: bool) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    if not is_first:
        a.arrivals.reset()
        a.talk()
    party = a.wait()
    a.lose_call()
    a.lose_connection()
    a.talk()
    assert a.n_arrived(all_.server) == 1
    other = b.wait()
    all_.talk()
    assert [outcome(party), outcome(other)] == [Passed(0), Passed(1)]


def test_what_became_of_an_arrival_is_unknown_after_two_more_rounds(group: Any) -> None:
    all_ = group(2, 3)
    a, b, c = all_.processes
    a.arrivals.reset()
    a.talk()
    b.wait()
    b.talk()
    party = a.wait()
    a.call()  # passes
    all_.let_arrive(b, c, b, c)
    a.lose_connection()
    a.talk()
    assert isinstance(outcome(party), BackendUnavailable)
    assert "the others may have passed" in str(outcome(party))
    assert a.n_arrived(all_.server) == 0


def test_a_first_arrival_is_not_doubled_after_its_lease(group: Any) -> None:
    all_ = group(2, 3)
    a, b, c = all_.processes
    party = a.wait()
    a.call()  # the first of this process; the reply is lost
    a.arrivals.disconnect()
    # `party` passes with that of `b`; then its round is no longer the last.
    all_.let_arrive(b, c, b, c)
    b.talk()
    a.expire(all_.server)
    a.now += LEASE
    a.connect()
    before = a.n_arrived(all_.server)
    a.talk()
    assert isinstance(outcome(party), BackendUnavailable)
    assert a.n_arrived(all_.server) <= before


def test_an_arrival_that_is_lost_twice_is_not_taken_for_a_new_one(group: Any) -> None:
    """Replies that come in between tell of later rounds, in which it cannot have arrived."""
    all_ = group(2, 3)
    a, b, c = all_.processes
    a.arrivals.reset()
    a.talk()
    b.wait()
    b.talk()
    party = a.wait()
    a.call()  # passes
    all_.let_arrive(b, c, b, c)
    a.lose_connection()
    a.arrivals._round = all_.server.command("HGET", a.arrivals.keys[0], "round").decode()
    a.arrivals.disconnect()
    a.connect()
    a.talk()
    assert isinstance(outcome(party), BackendUnavailable)


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_a_leave_that_is_lost_or_its_reply(
    group: Any, reason: Literal["cancelled", "timeout"], reached: bool
) -> None:
    all_ = group(3, 2)
    a, b = all_.processes
    party, other = a.wait(), b.wait()
    all_.talk()
    if reason == "cancelled":
        a.cancel(party)
    else:
        a.time_out(party)
    if reached:
        a.call()
    else:
        a.lose_call()
    a.lose_connection()
    all_.talk()
    assert outcome(other) == Broken(reason, 2)
    if reason == "timeout":  # what the server says would be known only after a new connection
        assert isinstance(outcome(party), BackendUnavailable)
    assert a.arrivals.is_idle


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("failed", [True, False])
def test_the_end_of_an_action_that_is_lost_or_its_reply(
    group: Any, failed: bool, reached: bool
) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    other, actor = all_.begin_action()
    assert outcome(actor) == Passed(1, acts=True)
    b.end_action(actor, failed=failed)
    if reached:
        b.call()
    else:
        b.lose_call()
    b.lose_connection()
    all_.talk()
    if failed:
        assert outcome(other) == outcome(actor) == Broken("action", 2)
    else:
        assert [outcome(other), outcome(actor)] == [Passed(0), Passed(1)]
    assert a.arrivals.is_idle
    assert b.arrivals.is_idle


def test_the_order_to_act_comes_after_a_new_connection(group: Any) -> None:
    all_ = group(1, 1)
    (a,) = all_.processes
    party = a.wait(action=True)
    a.call()
    a.lose_connection()
    a.talk()
    assert outcome(party) == Passed(0, acts=True)
    a.lose_connection()  # while it acts
    a.talk()
    a.end_action(party)
    a.talk()
    assert outcome(party) == Passed(0)


def test_an_action_that_is_done_counts_though_its_owner_is_cancelled_then(group: Any) -> None:
    all_ = group(2, 2)
    _, b = all_.processes
    other, actor = all_.begin_action()
    b.end_action(actor)
    b.lose_call()
    b.cancel(actor)
    b.lose_connection()
    all_.talk()
    assert outcome(other) == Passed(0)
    assert b.arrivals.is_idle


@pytest.mark.parametrize("connected", [True, False])
def test_the_owner_of_an_action_that_is_done_gives_up(group: Any, connected: bool) -> None:
    all_ = group(2, 2)
    _, b = all_.processes
    other, actor = all_.begin_action()
    if not connected:
        b.arrivals.disconnect()
    b.end_action(actor)
    if connected:
        b.lose_call()
        b.arrivals.disconnect()
    b.now += 3 * LEASE
    b.arrivals.unavailable(b.now - 3 * LEASE, b.now, None)
    assert isinstance(outcome(actor), BackendUnavailable)
    b.connect()
    all_.talk()
    assert outcome(other) == Passed(0)
    assert b.arrivals.is_idle


def test_an_abort_whose_reply_is_lost_is_not_repeated_after_a_reset(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    a.arrivals.abort()
    a.call()
    b.arrivals.reset()
    b.talk()
    party = b.wait()
    b.talk()
    a.lose_connection()
    all_.talk()
    assert outcome(party) is None
    assert a.arrivals.is_idle
    assert not a.arrivals.broken


def test_a_reset_whose_reply_is_lost_breaks_no_later_round(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    a.arrivals.reset()
    a.call()
    party = b.wait()
    b.talk()
    a.lose_connection()
    all_.talk()
    assert outcome(party) is None
    assert a.arrivals.is_idle


def test_plain_calls_that_are_lost_are_repeated_in_order(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    first = a.wait()
    a.arrivals.abort()
    second = a.wait()
    a.arrivals.reset()
    third = a.wait()
    a.lose_call()
    a.lose_connection()
    all_.talk()
    assert [outcome(first), outcome(second)] == [Broken("aborted", 1), Broken("aborted", 1)]
    assert outcome(third) is None
    last = b.wait()
    all_.talk()
    assert [outcome(third), outcome(last)] == [Passed(0), Passed(1)]


def test_a_call_that_comes_after_those_of_a_newer_connection_is_refused(group: Any) -> None:
    all_ = group(2, 1)
    (a,) = all_.processes
    party = a.wait()
    late = a.lose_call()
    a.lose_connection()
    a.talk()
    a.cancel(party)
    a.talk()
    reply = a.call_again(late)
    assert reply == ["stale"]
    with pytest.raises(Stale):
        a.arrivals.take_reply(late, reply)
    assert a.n_arrived(all_.server) == 0


# --- messages that are lost, or come early or late


@pytest.mark.parametrize("end", ["trip", "abort", "reset", "leave", "action"])
def test_a_lost_message_about_the_end_of_a_round_is_made_up_for(group: Any, end: str) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    a.talk()
    match end:
        case "trip":
            b.wait()
            expected: object = Passed(0)
        case "abort":
            b.arrivals.abort()
            expected = Broken("aborted", 1)
        case "reset":
            b.arrivals.reset()
            expected = Broken("reset", 1)
        case "leave":
            b.cancel(a.wait())  # b knows nothing of it: nothing happens there
            a.messages()
            a.cancel(party)
            a.talk()
            return
        case _:
            b.wait(action=True)
            b.talk()
            (acting,) = b.arrivals._parties.values()
            b.end_action(acting, failed=True)
            expected = Broken("action", 2)
    b.talk()
    a.messages()  # lost
    a.talk()
    assert outcome(party) is None
    a.audit()
    assert outcome(party) == expected


def test_the_message_comes_before_the_reply_to_the_arrival(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    call = a.call()
    b.wait()
    b.talk()
    a.hear()
    assert outcome(party) is None
    a.take(call)
    assert outcome(party) == Passed(0)
    assert a.arrivals.n_waiting == 0
    assert a.arrivals.next_batch() is None  # no question about what is known


def test_the_message_about_a_break_comes_before_the_reply_to_the_arrival(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    call = a.call()
    b.arrivals.abort()
    b.talk()
    a.hear()
    a.take(call)
    assert outcome(party) == Broken("aborted", 1)
    assert a.arrivals.broken


def test_the_message_comes_before_the_reply_to_an_arrival_that_is_out_of_time(group: Any) -> None:
    all_ = group(2, 3)
    a, b, c = all_.processes
    party = a.wait()
    call = a.call()
    a.time_out(party)
    # Its own round passes, then another, so that it is no longer the last.
    all_.let_arrive(b, b, c)
    a.hear()
    a.take(call)
    a.talk()
    assert outcome(party) == Passed(0)


def test_out_of_time_while_the_arrival_is_on_its_way_and_two_rounds_end(group: Any) -> None:
    """Its round is not the last any more, and which it was is not known when it leaves."""
    all_ = group(2, 3)
    a, b, c = all_.processes
    party = a.wait()
    call = a.call()
    a.time_out(party)
    all_.let_arrive(b, b, c)
    a.take(call)
    a.take(a.call())  # the messages are seen only after this
    a.talk()
    assert outcome(party) == Passed(0)


def test_the_end_of_an_action_is_heard_before_the_reply_that_says_to_come_later(group: Any) -> None:
    all_ = group(1, 2)
    a, b = all_.processes
    actor = a.wait(action=True)
    a.talk()
    newcomer = b.wait()
    call = b.call()  # "come when the round is over"
    a.end_action(actor)
    a.talk()
    b.hear()
    b.take(call)
    b.talk()
    assert outcome(newcomer) == Passed(0)


def test_a_newcomer_while_the_action_runs_arrives_in_the_next_round(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    a.wait()
    a.talk()
    actor = b.wait(action=True)
    b.talk()
    newcomer = a.wait()
    a.talk()
    assert outcome(newcomer) is None
    assert a.n_arrived(all_.server) == 2
    b.end_action(actor)
    all_.talk()
    assert outcome(newcomer) is None
    assert a.n_arrived(all_.server) == 1
    b.wait()
    all_.talk()
    assert outcome(newcomer) == Passed(0)


def test_a_newcomer_while_the_action_runs_hears_of_a_lost_message_by_the_audit(group: Any) -> None:
    all_ = group(1, 2)
    a, b = all_.processes
    actor = a.wait(action=True)
    a.talk()
    newcomer = b.wait()
    b.talk()
    a.end_action(actor)
    a.talk()
    b.messages()
    b.audit()
    assert outcome(newcomer) == Passed(0)


def test_old_messages_do_not_change_what_is_known(group: Any) -> None:
    """A reply may tell of more than the messages that are seen after it."""
    all_ = group(3, 2)
    a, b = all_.processes
    a.arrivals.abort()
    a.talk()
    a.arrivals.reset()
    a.take(a.call())
    a.arrivals.abort()
    a.take(a.call())
    assert a.arrivals.broken
    a.hear()
    assert a.arrivals.broken
    b.arrivals.reset()
    b.wait()
    b.talk()
    a.wait()
    a.take(a.call())
    assert (a.arrivals.n_waiting, a.arrivals.broken) == (2, False)
    a.hear()
    assert (a.arrivals.n_waiting, a.arrivals.broken) == (2, False)


# --- the server loses its state


def test_an_older_state_comes_back_while_nobody_waits(group: Any) -> None:
    """Rounds have numbers that were used before. Nobody must pass by what is known of those."""
    all_ = group(2, 2)
    a, b = all_.processes
    all_.let_arrive(a, b)
    old = save(all_.server, a.arrivals.keys)
    all_.let_arrive(*(a, b) * 3)
    all_.talk()
    restore(all_.server, old)
    for process in (a, b):
        process.run = "run 2"
        process.lose_connection()
        process.talk()
    party = a.wait()
    all_.talk()
    assert outcome(party) is None
    other = b.wait()
    all_.talk()
    assert [outcome(party), outcome(other)] == [Passed(0), Passed(1)]


def test_an_older_state_comes_back_and_goes_on_before_a_party_asks(group: Any) -> None:
    all_ = group(2, 3)
    a, b, c = all_.processes
    a.wait()
    a.talk()
    b.wait()
    b.talk()
    old = save(all_.server, a.arrivals.keys)
    all_.let_arrive(*(a, b) * 3)
    all_.talk()
    party = c.wait()  # in a round that the restored state does not know
    c.talk()
    restore(all_.server, old)
    a.run = b.run = c.run = "run 2"
    a.lose_connection()
    b.lose_connection()
    all_.let_arrive(*(a, b) * 5)
    c.lose_connection()
    c.messages()
    c.talk()
    assert outcome(party) == Broken("lost", 0)


def test_arrivals_of_another_run_are_lost(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    a.talk()
    b.run = "run 2"
    b.lose_connection()
    other = b.wait()
    b.talk()
    assert outcome(other) == Broken("lost", 1)
    a.run = "run 2"
    a.lose_connection()
    a.talk()
    assert outcome(party) == Broken("lost", 1)


def test_a_round_that_has_tripped_is_known_to_the_next_run(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    party = a.wait()
    a.talk()
    b.wait()
    b.talk()
    a.messages()
    for process in (a, b):
        process.run = "run 2"
        process.lose_connection()
    b.talk()
    a.talk()
    assert outcome(party) == Passed(0)


def test_the_server_forgets_all_while_the_connection_holds(group: Any) -> None:
    all_ = group(3, 2)
    a, b = all_.processes
    waiting, leaving = a.wait(), a.wait()
    a.talk()
    all_.server.command("DEL", *a.arrivals.keys)
    a.cancel(leaving)
    a.audit()
    assert outcome(waiting) == Broken("lost", 0)
    assert a.arrivals.is_idle
    parties = [a.wait(), b.wait(), b.wait()]
    all_.talk()
    assert sorted(outcome(party).index for party in parties) == [0, 1, 2]


def test_the_server_forgets_all_while_the_action_runs(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    other, actor = all_.begin_action()
    all_.server.command("DEL", *a.arrivals.keys)
    b.end_action(actor)
    b.talk()
    a.audit()
    assert outcome(actor) == Broken("lost", 0)
    assert outcome(other) == Broken("lost", 0)


# --- a process dies


@pytest.mark.parametrize("acts", [False, True])
def test_a_process_dies_whose_party_has_arrived(group: Any, acts: bool) -> None:
    all_ = group(2 if acts else 3, 2)
    a, b = all_.processes
    party = a.wait()
    a.talk()
    b.wait(action=acts)
    b.talk()
    b.expire(all_.server)
    a.audit()
    assert outcome(party) == Broken("lost", 2)


def test_a_process_dies_that_has_not_arrived(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    b.arrivals.reset()
    b.talk()
    party = a.wait()
    a.talk()
    b.expire(all_.server)
    a.audit()
    assert outcome(party) is None


# --- owners


def test_out_of_time_at_the_moment_of_the_order_to_act(group: Any) -> None:
    """All have arrived, so the party that is out of time runs the action and passes."""
    all_ = group(1, 1)
    (a,) = all_.processes
    party = a.wait(action=True)
    call = a.call()
    assert party.ticket.withdraw()  # by a thread, which has not told the conductor yet
    a.take(call)
    party.ticket = Ticket(ThreadWaiter())
    a.arrivals.leave(party, "timeout")
    a.talk()
    assert outcome(party) == Passed(0, acts=True)
    a.end_action(party)
    a.talk()
    assert outcome(party) == Passed(0)


@pytest.mark.parametrize("step", ["arrive", "send"])
def test_out_of_time_before_the_arrival_is_sent(group: Any, step: str) -> None:
    """It is a party that has waited and left, so it breaks the round."""
    all_ = group(2, 1)
    (a,) = all_.processes
    party = Party(Ticket(ThreadWaiter()), has_action=False)
    if step == "arrive":
        party.ticket.withdraw()  # by a thread, which has not told the conductor yet
        a.arrivals.arrive(party)
    else:
        a.arrivals.arrive(party)
        party.ticket.withdraw()
    a.talk()
    party.ticket = Ticket(ThreadWaiter())
    a.arrivals.leave(party, "timeout")
    a.talk()
    assert outcome(party) == Broken("timeout", 1)
    assert a.arrivals.broken


def test_cancelled_before_the_arrival_is_sent(group: Any) -> None:
    all_ = group(2, 1)
    (a,) = all_.processes
    a.cancel(a.wait())
    assert a.arrivals.is_idle
    assert a.arrivals.next_batch() is None or a.n_arrived(all_.server) == 0


def test_cancelled_at_the_moment_of_the_order_to_act(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    other = a.wait()
    a.talk()
    party = b.wait(action=True)
    call = b.call()
    b.cancel(party)
    b.take(call)
    all_.talk()
    assert outcome(other) == Broken("action", 2)
    assert b.arrivals.is_idle


# --- the end of a session, and refusals


def test_the_session_ends_while_the_action_runs(group: Any) -> None:
    all_ = group(2, 2)
    a, b = all_.processes
    other, actor = all_.begin_action()
    b.arrivals.close(BackendUnavailable("closed"))
    b.talk()
    a.hear()
    assert outcome(other) == Broken("action", 2)
    assert b.arrivals.is_idle
    b.end_action(actor)
    assert isinstance(outcome(actor), (BackendUnavailable, Broken))


def test_the_session_ends_between_the_order_to_act_and_the_action(group: Any) -> None:
    """The owner acts on what it was told first."""
    all_ = group(2, 2)
    a, b = all_.processes
    other, actor = all_.begin_action()
    b.arrivals.close(BackendUnavailable("closed"))
    assert outcome(actor) == Passed(1, acts=True)
    b.talk()
    a.hear()
    assert outcome(other) == Broken("action", 2)


def test_the_session_ends_while_parties_wait(group: Any) -> None:
    all_ = group(4, 2)
    a, b = all_.processes
    other = b.wait()
    b.talk()
    sent, unsent = a.wait(), None
    a.talk()
    unsent = a.wait()
    a.arrivals.close(BackendUnavailable("closed"))
    a.talk()
    b.hear()
    assert outcome(other) == Broken("cancelled", 2)
    assert isinstance(outcome(sent), BackendUnavailable)
    assert isinstance(outcome(unsent), BackendUnavailable)
    assert a.arrivals.is_idle


def test_an_abort_that_is_refused_is_not_sent_for_ever(redis_server: RedisServer) -> None:
    name = token_hex(8)
    a, b = Process(redis_server, name, 2), Process(redis_server, name, 3)
    try:
        party = a.wait()
        a.talk()
        b.arrivals.abort()
        refused = b.wait()
        b.talk()
        assert isinstance(outcome(refused), ValueError)
        assert b.arrivals.is_idle
        assert outcome(party) is None
    finally:
        a.close()
        b.close()


def save(server: RedisServer, keys: tuple[str, ...]) -> dict[str, bytes | None]:
    return {key: server.command("DUMP", key) for key in keys}


def restore(server: RedisServer, old: dict[str, bytes | None]) -> None:
    for key, dump in old.items():
        server.command("DEL", key)
        if dump is not None:
            server.command("RESTORE", key, 60_000, dump)
