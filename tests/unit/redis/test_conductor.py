"""The conductors of a semaphore and of a barrier, by hand: no server, no event loop, no time."""

from __future__ import annotations

import time
from itertools import count
from math import inf
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

import pytest
from support.helpers import settle

from aiosync._park import ThreadWaiter, run_in_thread, task_waiter
from aiosync.redis import BackendUnavailable
from aiosync.redis._arrivals import Arrivals
from aiosync.redis._batch import Batch, Settings
from aiosync.redis._conductor import Conductor, Stale
from aiosync.redis._party import Broken, Party, Passed, Phase
from aiosync.redis._permits import Permits, PermitTicket
from aiosync.redis._semaphore_calls import SemaphoreCalls
from aiosync.redis._ticket import Ticket

pytestmark = pytest.mark.timeout(20)

LEASE = 9.0
GIVE_UP = 20.0
C = TypeVar("C", bound=Conductor)


class Bench(Generic[C]):
    """A conductor, and the hand that carries its batches.

    :param known: parties, or permits
    """

    def __init__(self, kind: type[C], value: int = 2, **settings: Any) -> None:
        self.now = 1000.0
        options: dict[str, Any] = {
            "member": "me",
            "clock": lambda: self.now,
            "lease": LEASE,
            "prefix": "p",
            "give_up": GIVE_UP,
            "restart_gate": True,
            "numbers": count(1),
        }
        self.it = kind("x", value, Settings(**options | settings))

    def connect(self, fresh: float = 0.0) -> None:
        self.it.connect("run", fresh, "PUBLISH")

    def batch(self, *operations: str) -> Batch:
        """Return what is to be sent, which has to be `operations`."""
        batch = self.it.next_batch()
        assert batch is not None
        assert [" ".join(operation.arguments) for operation in batch.operations] == [*operations]
        return batch

    def nothing(self) -> bool:
        return self.it.next_batch() is None


class PermitBench(Bench[Permits]):
    def __init__(self, **settings: Any) -> None:
        super().__init__(Permits, **settings)
        self.connect()

    def ask(self, *, may_wait: bool = True) -> PermitTicket:
        ticket = PermitTicket(self.it, ThreadWaiter(), may_wait=may_wait)
        self.it.ask(ticket)
        return ticket

    def reply(
        self,
        batch: Batch,
        *answers: str,
        newly: int = 0,
        look: int = -1,
        mine: int | None = None,
        waiting: int = 0,
        grants: tuple[str, ...] = (),
    ) -> None:
        if mine is None:  # as the process counts
            mine = len(self.it._held) + len(self.it._returning) if batch.audit else -1
            mine += sum(answer[0] == "g" for answer in answers) + len(grants)
            sent = [operation.arguments for operation in batch.operations]
            mine -= sum(kind == "r" and rest[1] != "-" for kind, *rest in sent)
        self.it.take_reply(batch, ["ok", newly, look, mine, waiting, [*grants], [*answers]])

    def hold(self, fence: str = "100") -> PermitTicket:
        """Return a permit."""
        ticket = self.ask()
        self.reply(self.batch(f"a {ticket.number}"), f"g{fence}")
        assert ticket.outcome is True
        return ticket

    def wait(self) -> PermitTicket:
        """Return a ticket that waits on the server."""
        ticket = self.ask()
        self.reply(self.batch(f"a {ticket.number}"), f"w{ticket.number}0")
        assert not ticket.decided
        return ticket

    def withdraw(self, ticket: PermitTicket) -> None:
        assert ticket.withdraw()
        self.it.leave(ticket)

    def reconnect(self) -> None:
        self.it.disconnect()
        self.connect()


class ArrivalBench(Bench[Arrivals]):
    round = 50

    def __init__(self, **settings: Any) -> None:
        super().__init__(Arrivals, **settings)
        self.connect()

    def arrive(self, *, has_action: bool = False) -> Party:
        party = Party(Ticket(ThreadWaiter()), has_action)
        self.it.arrive(party)
        return party

    def reply(
        self,
        batch: Batch,
        *answers: str,
        newly: int = 0,
        look: int = -1,
        round: int | None = None,
        waiting: int = 1,
        status: str = "filling",
        events: tuple[str, ...] = (),
    ) -> None:
        number = str(self.round if round is None else round)
        self.it.take_reply(
            batch, ["ok", newly, look, number, waiting, status, [*events], [*answers]]
        )

    def arrived(self, *, has_action: bool = False, index: int = 0) -> Party:
        """Return a party that has arrived in the current round."""
        party = self.arrive(has_action=has_action)
        batch = self.batch(f"a {party.number} {int(has_action)}")
        self.reply(batch, f"w {self.round} {index}")
        assert party.phase is Phase.ARRIVED
        return party

    def acting(self) -> Party:
        """Return a party that runs the action."""
        party = self.arrive(has_action=True)
        self.reply(self.batch(f"a {party.number} 1"), f"y {self.round} 1")
        assert party.ticket.outcome == Passed(1, acts=True)
        party.ticket = Ticket(ThreadWaiter())
        return party

    def leave(self, party: Party) -> None:
        """Have the owner of `party` run out of time."""
        assert party.ticket.withdraw()
        party.ticket = Ticket(ThreadWaiter())
        self.it.leave(party, "timeout")

    def cancel(self, party: Party) -> None:
        assert party.ticket.withdraw()
        party.cancelled = True
        self.it.leave(party, "cancelled")

    def reconnect(self) -> None:
        self.it.disconnect()
        self.connect()


def unavailable(ticket: Ticket) -> bool:
    """Whether the owner is told that there is no server."""
    with pytest.raises(BackendUnavailable):
        ticket.result()
    return True


# --- tickets


def test_a_ticket_is_decided_once() -> None:
    ticket = Ticket(ThreadWaiter())
    assert not ticket.decided
    assert ticket.settle(5)
    assert not ticket.settle(6)
    assert not ticket.withdraw()
    assert ticket.outcome == 5
    assert ticket.decided


def test_a_ticket_that_its_owner_has_left_takes_no_outcome() -> None:
    ticket = Ticket(ThreadWaiter())
    assert ticket.withdraw()
    assert not ticket.settle(5)


def test_an_owner_that_leaves_just_when_a_ticket_is_settled() -> None:
    class Racing(list[bool]):
        """Looks as if there was an entry, which another thread has taken."""

        def __bool__(self) -> bool:
            return True

    ticket = Ticket(ThreadWaiter())
    ticket._undecided = Racing()
    assert not ticket.settle(5)


def test_waiting_for_a_ticket() -> None:
    ticket = Ticket(ThreadWaiter())
    assert not run_in_thread(ticket.wait(0))
    assert ticket.decided
    ticket = Ticket(ThreadWaiter())
    ticket.settle("answer")
    assert run_in_thread(ticket.wait(1))
    assert run_in_thread(ticket.wait_for_outcome()) == "answer"


def test_each_owner_gets_a_copy_of_the_error() -> None:
    error = BackendUnavailable("text")
    error.__cause__ = OSError("cause")
    tickets = [Ticket(ThreadWaiter()) for _ in range(2)]
    for ticket in tickets:
        ticket.settle(error)
    raised = []
    for ticket in tickets:
        with pytest.raises(BackendUnavailable, match="text") as info:
            ticket.result()
        assert isinstance(info.value.__cause__, OSError)
        raised.append(info.value)
    assert raised[0] is not raised[1]


def test_an_interrupted_wait_withdraws() -> None:
    ticket = Ticket(ThreadWaiter())
    coroutine = ticket.wait_for_outcome()
    ticket.waiter = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(coroutine)
    assert ticket.decided
    assert not ticket.settle(1)


class Interrupted:
    def done(self) -> bool:
        return False

    def __await__(self) -> Any:
        raise KeyboardInterrupt
        yield  # type: ignore[unreachable]


@pytest.mark.anyio
async def test_a_task_waits_for_several_tickets_that_are_settled_meanwhile() -> None:
    tickets = [Ticket(task_waiter()) for _ in range(3)]

    def settle_all() -> None:
        for ticket in reversed(tickets):
            ticket.settle("done")

    import anyio

    async def settle_later() -> None:
        await settle()
        settle_all()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(settle_later)
        for ticket in tickets:
            assert await ticket.wait_for_outcome() == "done"


@pytest.mark.anyio
async def test_a_task_whose_waiter_is_over_lets_others_run() -> None:
    ticket = Ticket(task_waiter())
    ticket.settle(True)
    assert await ticket.wait(None)


# --- permits: asking


def test_a_permit_that_is_free() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    assert batch.arguments == ["2", "9000", "me", "1", "run", "0", "1", "PUBLISH", "a", "2"]
    bench.reply(batch, "g77", waiting=3)
    assert (ticket.outcome, ticket.fence) == (True, "77")
    assert bench.it.keys[0] == "p:{x}:semaphore"
    assert bench.it.channel == "p:{x}:semaphore!me"


def test_a_permit_that_is_granted_later() -> None:
    bench = PermitBench()
    ticket = bench.wait()
    bench.it.take_message(f"{ticket.number}:78")
    assert (ticket.outcome, ticket.fence) == (True, "78")


def test_a_permit_that_is_granted_by_an_own_release() -> None:
    bench = PermitBench()
    held, waiting = bench.hold(), bench.wait()
    bench.it.give_back(held)
    batch = bench.batch(f"r {held.number} 100")
    bench.reply(batch, "-", grants=(f"{waiting.number}:101",))
    assert waiting.fence == "101"
    assert not bench.it._returning


def test_release_and_acquire_travel_together() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.it.give_back(held)
    ticket = bench.ask()
    bench.batch(f"r {held.number} 100", f"a {ticket.number}")


def test_giving_back_twice_is_harmless() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.it.give_back(held)
    bench.it.give_back(held)
    bench.batch("r 2 100")


def test_a_permit_is_given_back_by_its_holder() -> None:
    bench = PermitBench()
    held = bench.hold()
    held.give_back()
    job = bench.it.inbox.get_nowait(None)
    assert job is not None
    job()
    bench.batch("r 2 100")
    held.lose()
    held.give_back()
    assert bench.it.inbox.get_nowait(None) is None


@pytest.mark.parametrize(("answer", "outcome"), [("-", False), ("g7", True)])
def test_an_attempt_that_does_not_wait(answer: str, outcome: bool) -> None:
    bench = PermitBench()
    ticket = bench.ask(may_wait=False)
    bench.reply(bench.batch("t 2"), answer)
    assert ticket.outcome is outcome
    assert not bench.it._waiting


def test_an_attempt_that_does_not_wait_needs_a_connection() -> None:
    bench = PermitBench()
    bench.it.disconnect()
    assert unavailable(bench.ask(may_wait=False))
    assert bench.it.is_idle


def test_an_attempt_whose_reply_is_lost_leaves_nothing_behind() -> None:
    bench = PermitBench()
    ticket = bench.ask(may_wait=False)
    bench.batch("t 2")
    bench.it.disconnect()
    assert unavailable(ticket)
    bench.connect()
    bench.reply(bench.batch("r 2 -"), "-")
    assert bench.it.is_idle


def test_an_attempt_that_was_not_sent_is_refused_without_more() -> None:
    bench = PermitBench()
    ticket = bench.ask(may_wait=False)
    bench.reconnect()
    assert unavailable(ticket)
    assert bench.nothing()


def test_a_ticket_that_was_left_before_the_conductor_saw_it() -> None:
    bench = PermitBench()
    ticket = PermitTicket(bench.it, ThreadWaiter(), may_wait=True)
    ticket.withdraw()
    bench.it.ask(ticket)
    bench.it.leave(ticket)
    assert bench.it.is_idle
    assert bench.nothing()


# --- permits: leaving


def test_a_ticket_that_is_left_before_it_is_sent() -> None:
    bench = PermitBench()
    bench.withdraw(bench.ask())
    assert bench.it.is_idle
    assert bench.nothing()


def test_a_ticket_whose_owner_has_left_is_not_sent() -> None:
    """The owner has withdrawn, but the job that says so has not run yet."""
    bench = PermitBench()
    ticket = bench.ask()
    ticket.withdraw()
    bench.batch()
    bench.it.leave(ticket)
    assert bench.it.is_idle


def test_a_ticket_that_is_left_after_it_is_sent() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    bench.withdraw(ticket)
    bench.reply(batch, "w5")
    bench.reply(bench.batch("r 2 -"), "-")
    assert bench.it.is_idle


def test_a_ticket_that_is_granted_after_its_owner_has_left() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    ticket.withdraw()
    bench.reply(batch, "g5")
    bench.it.leave(ticket)
    assert not bench.it._held
    bench.reply(bench.batch("r 2 5"), "-")
    assert bench.it.is_idle


def test_a_message_for_a_ticket_whose_owner_has_left() -> None:
    bench = PermitBench()
    ticket = bench.wait()
    ticket.withdraw()
    bench.it.take_message("2:9")
    bench.it.leave(ticket)
    bench.reply(bench.batch("r 2 9"), "-")
    assert bench.it.is_idle


def test_a_message_for_a_ticket_that_leaves() -> None:
    bench = PermitBench()
    bench.withdraw(bench.wait())
    bench.it.take_message("2:9")
    bench.reply(bench.batch("r 2 -"), "-")
    assert bench.it.is_idle


def test_a_message_that_comes_twice() -> None:
    bench = PermitBench()
    ticket = bench.wait()
    bench.it.take_message("2:9")
    bench.it.take_message("2:9")
    assert bench.nothing()
    bench.it.give_back(ticket)
    bench.it.take_message("2:9")
    bench.batch("r 2 9")


def test_a_message_for_an_unknown_ticket_gives_the_permit_back() -> None:
    """A waiter of an old state of the server is served at last. Nobody else should wait for it."""
    bench = PermitBench()
    bench.hold()
    bench.it.take_message("55:9")
    bench.reply(bench.batch("r 55 9"), "-")
    assert not bench.it._returning


# --- permits: order and loss of messages and replies


def test_a_message_that_comes_before_the_reply() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    bench.it.take_message("2:9")
    assert ticket.outcome is True
    assert bench.it.deadline() == batch.sent + 0.9 * LEASE
    bench.reply(batch, "w5", mine=0)
    assert bench.it._held == {2: ticket}


def test_a_message_that_comes_before_a_reply_that_is_lost() -> None:
    """It shows that the request has come, so the permit is held for as long as by the reply."""
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    bench.now += 1
    bench.it.take_message("2:9")
    bench.it.disconnect()
    bench.it.expire(batch.sent + 0.9 * LEASE - 0.001)
    assert not ticket.lost
    bench.it.expire(batch.sent + 0.9 * LEASE)
    assert ticket.lost


def test_a_message_that_was_late_is_not_trusted() -> None:
    """While the process was paused the permit may have passed on to another one."""
    bench = PermitBench()
    ticket = bench.wait()
    bench.now += 2 * LEASE
    bench.it.take_message("2:9")
    assert not ticket.decided
    batch = bench.batch()
    assert batch.audit
    bench.reply(batch, mine=1)
    bench.reply(bench.batch("L"), "2:9")
    assert ticket.outcome is True


def test_a_reply_that_was_late_is_not_trusted() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    batch = bench.batch("a 2")
    bench.now += 2 * LEASE
    bench.reply(batch, "g9")
    assert not ticket.decided


def test_a_lost_reply() -> None:
    bench = PermitBench()
    ticket = bench.ask()
    bench.batch("a 2")
    bench.reconnect()
    bench.reply(bench.batch("A 2 0"), "w9")
    bench.reconnect()
    bench.reply(bench.batch("A 2 9"), "g10")
    assert ticket.outcome is True


def test_a_request_that_was_not_sent_is_sent_on_the_next_connection() -> None:
    bench = PermitBench()
    bench.ask()
    bench.reconnect()
    bench.batch("a 2")


def test_a_new_connection_asks_for_everything_in_order() -> None:
    bench = PermitBench()
    held, returned, left, waiting = bench.hold("1"), bench.hold("2"), bench.wait(), bench.wait()
    request = Ticket(ThreadWaiter())
    bench.it.request(request, "S")
    bench.it.give_back(returned)
    bench.withdraw(left)
    bench.it.disconnect()
    last = bench.ask()
    bench.connect(fresh=2.5)
    batch = bench.batch(
        f"c {held.number} 1",
        f"r {returned.number} 2",
        f"r {left.number} -",
        f"A {waiting.number} {waiting.place}",
        f"a {last.number}",
        "S",
    )
    assert batch.audit
    assert batch.arguments[5] == "2500"
    bench.reply(batch, "0", "-", "-", "w9", "w10", "statistics")
    assert held.lost
    assert request.outcome == "statistics"
    assert set(bench.it._waiting.values()) == {waiting, last}


def test_no_gate_on_request() -> None:
    bench = PermitBench(restart_gate=False)
    bench.connect(fresh=2.5)
    bench.ask()
    assert bench.it.next_batch().arguments[5] == "0"  # type: ignore[union-attr]


def test_a_claim_that_is_granted() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.reconnect()
    bench.reply(bench.batch("c 2 100"), "1")
    assert not held.lost


def test_a_claim_that_is_refused_after_the_permit_was_given_back() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.reconnect()
    batch = bench.batch("c 2 100")
    bench.it.give_back(held)
    bench.reply(batch, "0", mine=1)
    assert not held.lost


def test_the_server_has_forgotten_the_process() -> None:
    bench = PermitBench()
    held, waiting = bench.hold(), bench.wait()
    last = bench.ask()
    batch = bench.batch(f"a {last.number}")
    bench.reply(batch, "w1", newly=1)
    bench.batch("c 2 100", f"A {waiting.number} {waiting.place}", f"A {last.number} 1")
    assert not held.lost


def test_the_server_does_not_know_a_new_process() -> None:
    bench = PermitBench()
    bench.ask()
    bench.reply(bench.batch("a 2"), "w1", newly=1)
    assert bench.nothing()
    other = PermitBench()
    other.withdraw(other.wait())
    other.reply(other.batch("r 2 -"), "-")
    other.ask()
    other.reply(other.batch("a 3"), "w1", newly=1)  # it was idle for more than a lease
    assert other.nothing()


def test_an_old_connection() -> None:
    bench = PermitBench()
    bench.ask()
    with pytest.raises(Stale):
        bench.it.take_reply(bench.batch("a 2"), ["stale"])


def test_other_settings_on_the_server() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.reconnect()
    waiting, request = bench.ask(), Ticket(ThreadWaiter())
    bench.it.request(request, "S")
    batch = bench.batch("c 2 100", f"a {waiting.number}", "S")
    bench.it._refuse("nobody", OSError())
    bench.it.take_reply(batch, ["differs", 5, 10000])
    for ticket in (waiting, request):
        with pytest.raises(ValueError, match=r"value=5, lease=10 s there; value=2, lease=9 s here"):
            ticket.result()
    assert bench.it._held == {2: held}
    assert not bench.it._waiting
    assert not bench.it._requests


# --- permits: audits


def test_audits_are_due_though_the_name_is_busy() -> None:
    bench = PermitBench()
    held = bench.hold()
    start = bench.now
    audits = []
    for _ in range(20):
        bench.now += 0.5
        bench.it.give_back(held)
        ticket = bench.ask()
        batch = bench.batch(f"r {held.number} 100", f"a {ticket.number}")
        bench.reply(batch, "-", "g100")
        held = ticket
        if batch.audit:
            audits.append(bench.now - start)
    assert audits == [3, 6, 9]


def test_an_audit_is_due_at_a_third_of_a_lease() -> None:
    bench = PermitBench()
    bench.hold()
    assert bench.it.due() == bench.now + LEASE / 3
    bench.now += LEASE / 3 - 0.001
    assert bench.nothing()
    bench.now += 0.001
    assert bench.batch().audit


def test_nothing_is_due_while_idle() -> None:
    bench = PermitBench()
    assert bench.it.due() == inf
    bench.now += 100
    assert bench.nothing()
    bench.ask()
    assert bench.it.due() == -inf


def test_a_count_that_is_right() -> None:
    bench = PermitBench()
    bench.hold()
    bench.now += 3
    bench.reply(bench.batch(), mine=1)
    assert bench.nothing()


def audited(bench: PermitBench, mine: int) -> Batch:
    """Have an audit count `mine` permits, which is not right. Return the question that follows."""
    bench.now += 3
    bench.reply(bench.batch(), mine=mine)
    return bench.batch("L")


def test_an_audit_finds_that_a_permit_is_lost() -> None:
    bench = PermitBench()
    held, other = bench.hold("1"), bench.hold("2")
    bench.reply(audited(bench, 1), f"{other.number}:2")
    assert held.lost
    assert not other.lost


def test_an_audit_finds_a_permit_that_nobody_knows() -> None:
    bench = PermitBench()
    bench.hold()
    bench.reply(audited(bench, 2), "2:100 50:99")
    bench.reply(bench.batch("r 50 99"), "-")
    assert not bench.it._returning


def test_an_audit_finds_a_permit_whose_message_was_lost() -> None:
    bench = PermitBench()
    ticket = bench.wait()
    bench.reply(audited(bench, 1), "2:99")
    assert (ticket.outcome, ticket.fence) == (True, "99")


def test_an_audit_leaves_alone_what_is_being_given_back() -> None:
    bench = PermitBench()
    held = bench.hold()
    batch = audited(bench, 5)
    bench.it.give_back(held)
    bench.reply(batch, "2:100")
    bench.batch("r 2 100")


def test_an_audit_finds_that_a_ticket_holds_two_permits() -> None:
    bench = PermitBench()
    held = bench.hold()
    bench.reply(audited(bench, 2), "2:100 2:101")
    assert not held.lost
    bench.reply(bench.batch("r 2 101"), "-")
    assert bench.it._held == {2: held}


def test_a_process_is_not_idle_until_it_has_returned_what_an_audit_has_found() -> None:
    """The carrier of a retired name ended before it asked for the list."""
    bench = PermitBench()
    bench.it.give_back(bench.hold())
    bench.reconnect()
    bench.reply(bench.batch("r 2 100"), "-", mine=1)
    assert not bench.it.is_idle
    bench.reconnect()  # the link was lost before the list came
    bench.reply(bench.batch(), mine=1)
    bench.reply(bench.batch("L"), "50:99")
    assert not bench.it.is_idle
    bench.reply(bench.batch("r 50 99"), "-")
    assert bench.it.is_idle


def test_a_process_is_idle_though_the_server_refuses_the_list() -> None:
    bench = PermitBench()
    held = bench.hold()
    batch = audited(bench, 2)
    bench.it.give_back(held)
    bench.it.refuse(batch, PermissionError("no"))
    bench.reply(bench.batch("r 2 100"), "-")
    assert bench.it.is_idle


def test_a_permit_that_is_granted_after_the_list_was_sent_is_not_lost() -> None:
    bench = PermitBench()
    bench.hold()
    waiting = bench.wait()
    batch = audited(bench, 2)
    bench.it.take_message(f"{waiting.number}:101")
    bench.reply(batch, "2:100")
    assert waiting.outcome is True
    assert not waiting.lost


def test_a_look_at_what_may_have_changed() -> None:
    bench = PermitBench()
    bench.ask()
    bench.reply(bench.batch("a 2"), "w1", look=1500)
    assert bench.it.due() == bench.now + 1.5
    bench.now += 1.4
    assert bench.nothing()
    bench.now += 0.2
    batch = bench.batch()
    assert not batch.audit
    bench.reply(batch)
    assert bench.nothing()


# --- permits: deadlines


def test_a_deadline_only_while_something_is_held() -> None:
    bench = PermitBench()
    assert bench.it.deadline() == inf
    ticket = bench.ask()
    batch = bench.batch("a 2")
    bench.now += 2
    bench.reply(batch, "g1")
    assert bench.it.deadline() == batch.sent + 0.9 * LEASE
    bench.it.give_back(ticket)
    assert bench.it.deadline() == inf


def test_a_permit_is_lost_at_nine_tenths_of_a_lease() -> None:
    bench = PermitBench()
    held = bench.hold()
    called: list[int] = []
    held.on_loss(None, lambda: called.append(1))
    waiter = ThreadWaiter()
    held.loss_waiters.append(waiter)
    bench.it.expire(bench.it.deadline() - 0.001)
    assert not held.lost
    bench.it.expire(bench.it.deadline())
    assert [held.lost, *called] == [True, 1]
    assert waiter._lock.acquire(False)
    held.on_loss(None, lambda: called.append(2))
    assert called == [1, 2]
    bench.batch("r 2 100")


def test_permits_are_not_safe_for_longer_until_all_of_them_were_claimed() -> None:
    """If the server process has changed, the gate may open between two batches of claims."""
    bench = PermitBench()
    for _ in range(300):
        bench.hold()
    deadline = bench.it.deadline()
    bench.now += 3
    bench.reconnect()
    for number in (256, 44):
        assert bench.it.deadline() == deadline
        batch = bench.it.next_batch()
        assert batch is not None
        assert len(batch.operations) == number
        bench.reply(batch, *["1"] * number)
    assert bench.it.deadline() == bench.now + 0.9 * LEASE


def test_what_is_lost_is_not_asked_for() -> None:
    bench = PermitBench()
    bench.hold()
    bench.now += LEASE
    assert not bench.batch("r 2 100").known


def test_a_reply_may_take_a_third_of_a_lease_but_not_longer_than_permits_are_safe() -> None:
    bench = PermitBench()
    bench.ask()
    assert bench.batch("a 2").timeout == LEASE / 3
    bench = PermitBench()
    bench.hold()
    bench.now += LEASE / 3
    assert bench.batch().timeout == LEASE / 3
    bench.now += LEASE / 3
    assert bench.batch().timeout == pytest.approx(LEASE * (0.9 - 2 / 3))


# --- permits: batches, refusals, the end


def test_batches_are_limited() -> None:
    bench = PermitBench()
    tickets = [bench.ask() for _ in range(600)]
    sizes = []
    while (batch := bench.it.next_batch()) is not None:
        sizes.append(len(batch.operations))
        assert [int(operation.arguments[1]) for operation in batch.operations] == [
            ticket.number for ticket in tickets[sum(sizes[:-1]) : sum(sizes)]
        ]
        bench.reply(batch, *["w1"] * len(batch.operations))
    assert sizes == [256, 256, 88]


def test_what_is_given_back_is_not_repeated_if_it_is_refused() -> None:
    """It was repeated for ever, and a new object of the same name had to wait for the end of it."""
    bench = PermitBench()
    ticket = bench.hold()
    waiter = bench.wait()
    bench.it.give_back(ticket)
    bench.withdraw(waiter)
    batch = bench.batch(f"r {ticket.number} 100", f"r {waiter.number} -")
    bench.it.refuse(batch, PermissionError("no"))
    assert bench.it.is_idle


def test_nothing_is_kept_of_callers_that_have_left_during_an_outage() -> None:
    bench = PermitBench()
    bench.it.disconnect()
    for _ in range(100):
        bench.withdraw(bench.ask())
    parties = ArrivalBench()
    parties.it.disconnect()
    for _ in range(100):
        parties.cancel(parties.arrive())
    for conductor in bench.it, parties.it:
        assert not conductor._outbox
        assert conductor.is_idle


@pytest.mark.slow
def test_many_permits_are_compared_quickly() -> None:
    """It took a time in proportion to the square of their number."""
    bench = PermitBench()
    for number in range(1, 20_001):
        ticket = bench.it._held[number] = PermitTicket(bench.it, ThreadWaiter(), may_wait=True)
        ticket.number, ticket.fence = number, "5"
    held = [*bench.it._held.values()]
    listed = " ".join(f"{number}:5" for number in range(1, 20_001))
    begun = time.process_time()
    bench.it._compare(held, listed)
    assert time.process_time() - begun < 2
    assert len(bench.it._held) == 20_000


def test_the_server_refuses() -> None:
    bench = PermitBench()
    left, ticket = bench.ask(), bench.ask()
    batch = bench.batch("a 2", "a 3")
    bench.withdraw(left)
    bench.it.refuse(batch, PermissionError("no"))
    with pytest.raises(PermissionError, match="no"):
        ticket.result()
    assert not bench.it._waiting


def test_no_server_for_too_long() -> None:
    bench = PermitBench()
    first = bench.wait()
    request = Ticket(ThreadWaiter())
    bench.it.request(request, "S")
    bench.it.disconnect()
    since = bench.now
    assert bench.it.unavailable(since, since, None) == since + GIVE_UP
    bench.now += 5
    second, withdrawn = bench.ask(), bench.ask()
    withdrawn.withdraw()
    assert bench.it.unavailable(since, bench.now, None) == since + GIVE_UP
    cause = OSError("refused")
    bench.now = since + GIVE_UP
    assert bench.it.unavailable(since, bench.now, cause) == bench.now + 5
    for ticket in (first, request):
        with pytest.raises(BackendUnavailable, match=r"'x': no server could .* for 20 s") as info:
            ticket.result()
        assert info.value.__cause__ is cause
    assert not second.decided
    bench.now += 5
    assert bench.it.unavailable(since, bench.now, cause) == inf
    assert unavailable(second)
    bench.it.leave(withdrawn)
    bench.connect()
    bench.batch("r 2 -")


def test_the_session_ends() -> None:
    bench = PermitBench()
    held, waiting, unsent = bench.hold(), bench.wait(), bench.ask()
    request = Ticket(ThreadWaiter())
    bench.it.request(request, "S")
    bench.it.close(BackendUnavailable("closed"))
    assert held.lost
    for ticket in (waiting, unsent, request):
        assert unavailable(ticket)
    bench.reply(bench.batch(f"r {waiting.number} -", "r 2 100"), "-", "-")
    assert bench.it.is_idle


def test_requests() -> None:
    bench = PermitBench()
    withdrawn, ticket, flushed = (Ticket(ThreadWaiter()) for _ in range(3))
    withdrawn.withdraw()
    bench.it.request(withdrawn, "S")
    bench.it.flush(flushed)
    assert flushed.outcome == ""
    bench.it.request(ticket, "N", "3")
    flushed = Ticket(ThreadWaiter())
    bench.it.flush(flushed)
    late = Ticket(ThreadWaiter())
    bench.it.request(late, "S")
    late.withdraw()
    bench.reply(bench.batch("N 3", "S"), "-", "2 0 0 1 0")
    assert ticket.outcome == "-"
    assert flushed.decided


def test_post_wakes_the_session() -> None:
    bench = PermitBench()
    done: list[int] = []
    bench.it.post(lambda: done.append(1))
    job = bench.it.inbox.get_nowait(None)
    assert job is not None
    job()
    assert done == [1]


# --- parties: arriving


def test_a_party_arrives() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    assert not bench.it._is_known()
    batch = bench.batch("a 2 0")
    assert batch.arguments == ["2", "9000", "me", "1", "run", "PUBLISH", "a", "2", "0"]
    assert batch.timeout == LEASE / 3
    bench.reply(batch, "w 50 0", waiting=1)
    assert (party.phase, party.round, party.index) == (Phase.ARRIVED, "50", 0)
    assert bench.it._is_known()
    assert bench.it.n_waiting == 1
    assert bench.it.keys[0] == "p:{x}:barrier"
    assert bench.it.channel == "p:{x}:barrier!"
    assert bench.it.deadline() == inf
    bench.it.expire(bench.now)


def test_the_last_party_arrives() -> None:
    bench = ArrivalBench()
    first, last = bench.arrived(), bench.arrive()
    bench.reply(bench.batch("a 3 0"), "t 50 1", round=51, waiting=0, events=("t:50",))
    assert first.ticket.outcome == Passed(0)
    assert last.ticket.outcome == Passed(1)
    assert bench.it.is_idle
    assert bench.it.n_waiting == 0


def test_the_round_ends_by_a_message() -> None:
    bench = ArrivalBench()
    first, second = bench.arrived(), bench.arrived(index=1)
    bench.it.take_message("t:49 t:50")
    assert (first.ticket.outcome, second.ticket.outcome) == (Passed(0), Passed(1))
    bench.it.take_message("t:50")
    assert bench.it.is_idle


def test_the_round_is_broken_by_a_message() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    bench.it.take_message("b:50:aborted:1")
    assert party.ticket.outcome == Broken("aborted", 1)
    assert bench.it.broken
    bench.it.take_message("n:51")
    assert not bench.it.broken


def test_the_barrier_is_broken_already() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    bench.reply(bench.batch("a 2 0"), "b 50 timeout 3", status="broken")
    assert party.ticket.outcome == Broken("timeout", 3)
    assert party.round == "0"
    assert bench.it.broken


def test_a_round_that_ends_before_the_reply_about_the_arrival_in_it() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    batch = bench.batch("a 2 0")
    bench.it.take_message("t:50")
    assert not party.ticket.decided
    bench.reply(batch, "w 50 0", round=50, waiting=1)
    assert party.ticket.outcome == Passed(0)
    assert bench.it.n_waiting == 0


def test_a_round_that_is_broken_before_the_reply_about_the_arrival_in_it() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    batch = bench.batch("a 2 0")
    bench.it.take_message("b:50:lost:1")
    bench.reply(batch, "w 50 0")
    assert party.ticket.outcome == Broken("lost", 1)


def test_a_reply_about_another_round_than_the_current_one() -> None:
    """Whatever became of the round meanwhile, the server knows it."""
    bench = ArrivalBench()
    party = bench.arrive()
    bench.reply(bench.batch("a 2 0"), "w 50 0", round=51)
    bench.reply(bench.batch("q 2 50"), "t 50 -1", round=51)
    assert party.ticket.outcome == Passed(0)


def test_only_the_last_rounds_are_remembered() -> None:
    bench = ArrivalBench()
    for number in range(100):
        bench.it.take_message(f"t:{number}")
    assert [*bench.it._ended] == [str(number) for number in range(84, 100)]


def test_a_party_that_was_left_before_the_conductor_saw_it() -> None:
    bench = ArrivalBench()
    party = Party(Ticket(ThreadWaiter()), False)
    party.cancelled = party.ticket.withdraw()
    bench.it.arrive(party)
    assert bench.it.is_idle
    bench.it.leave(party, "cancelled")
    assert bench.it.is_idle


def test_a_round_is_being_completed_by_an_action() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    bench.reply(bench.batch("a 2 0"), "l", status="acting")
    assert bench.nothing()
    bench.it.take_message("t:50")
    bench.reply(bench.batch("a 2 0"), "w 51 0", round=51)
    assert party.phase is Phase.ARRIVED


def test_the_message_about_the_end_of_the_action_is_lost() -> None:
    bench = ArrivalBench()
    bench.arrived()
    party = bench.arrive()
    bench.reply(bench.batch("a 3 0"), "l", status="acting")
    bench.now += LEASE / 3
    batch = bench.batch("a 3 0", "q 2 50")
    bench.reply(batch, "l", "w 50 0", status="acting")
    assert party.phase is Phase.LATER
    bench.reconnect()
    bench.batch("q 2 50", "a 3 0", "q 2 50")  # the last one is the audit


def test_a_party_that_leaves_while_an_action_runs() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    bench.reply(bench.batch("a 2 0"), "l", status="acting", waiting=2)
    bench.leave(party)
    assert party.ticket.outcome == Broken("timeout", 2)
    assert bench.it.is_idle


def test_an_answer_for_later_after_the_owner_has_left() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    batch = bench.batch("a 2 0")
    bench.leave(party)
    bench.reply(batch, "l", status="acting")
    assert party.phase is Phase.LEAVING
    bench.reply(bench.batch("l 2 0 timeout"), "-", status="acting")
    assert party.ticket.outcome == Broken("timeout", 1)


# --- parties: leaving


def test_out_of_time() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    bench.leave(party)
    bench.it.leave(party, "timeout")
    bench.reply(
        bench.batch("l 2 50 timeout"),
        "b 50 timeout 1",
        round=51,
        status="broken",
        events=("b:50:timeout:1",),
    )
    assert party.ticket.outcome == Broken("timeout", 1)
    assert bench.it.is_idle


def test_out_of_time_though_all_have_come() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    bench.leave(party)
    batch = bench.batch("l 2 50 timeout")
    bench.it.take_message("t:50")
    assert party.ticket.outcome == Passed(0)
    bench.reply(batch, "t 50 0", round=51)
    assert bench.it.is_idle


def test_out_of_time_while_the_action_runs() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    bench.leave(party)
    bench.reply(bench.batch("l 2 50 timeout"), "w 50 0", status="acting")
    assert party.phase is Phase.ARRIVED
    bench.it.take_message("t:50")
    assert party.ticket.outcome == Passed(0)


def test_out_of_time_before_the_arrival_is_sent() -> None:
    """Both are sent together: the round may be complete by this party."""
    bench = ArrivalBench()
    party = bench.arrive()
    bench.leave(party)
    batch = bench.batch("a 2 0", "l 2 0 timeout")
    bench.reply(batch, "w 50 0", "b 50 timeout 1", round=51, status="broken")
    assert party.ticket.outcome == Broken("timeout", 1)


def test_out_of_time_after_the_round_has_ended() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    party.ticket.withdraw()
    bench.it.take_message("t:50")
    party.ticket = Ticket(ThreadWaiter())
    bench.it.leave(party, "timeout")
    assert party.ticket.outcome == Passed(0)


def test_out_of_time_without_a_connection() -> None:
    bench = ArrivalBench()
    sent = bench.arrived()
    bench.it.disconnect()
    unsent = bench.arrive()
    for party in (sent, unsent):
        bench.leave(party)
        assert unavailable(party.ticket)
    assert [*bench.it._parties.values()] == [sent]
    bench.connect()
    bench.reply(bench.batch("l 2 50 cancelled"), "b 50 cancelled 1", round=51)
    assert bench.it.is_idle


def test_the_connection_is_lost_while_a_party_leaves() -> None:
    bench = ArrivalBench()
    sent, unsent = bench.arrived(), bench.arrive()
    bench.leave(sent)
    bench.leave(unsent)
    bench.it.disconnect()
    for party in (sent, unsent):
        assert unavailable(party.ticket)
    bench.connect()
    bench.batch("l 2 50 timeout")


def test_cancelled_before_the_arrival_is_sent() -> None:
    bench = ArrivalBench()
    bench.cancel(bench.arrive())
    assert bench.nothing()
    assert bench.it.is_idle


def test_a_party_whose_owner_has_left_is_not_sent() -> None:
    """The owner has withdrawn, but the job that says so has not run yet."""
    bench = ArrivalBench()
    party = bench.arrive()
    party.cancelled = party.ticket.withdraw()
    bench.batch()
    bench.it.leave(party, "cancelled")
    assert bench.it.is_idle


def test_cancelled_after_the_arrival_is_sent() -> None:
    bench = ArrivalBench()
    party = bench.arrived()
    bench.cancel(party)
    bench.reply(bench.batch("l 2 50 cancelled"), "b 50 cancelled 1", round=51, status="broken")
    assert bench.it.is_idle


# --- parties: the action


def test_the_action() -> None:
    bench = ArrivalBench()
    party = bench.acting()
    bench.it.end_action(party, failed=False)
    bench.reply(bench.batch("d 2 50"), "t 50 -1", round=51, events=("t:50",))
    assert party.ticket.outcome == Passed(1)
    assert bench.it.is_idle


def test_the_action_fails() -> None:
    bench = ArrivalBench()
    party = bench.acting()
    bench.it.end_action(party, failed=True)
    bench.reply(bench.batch("f 2 50"), "b 50 action 2", round=51, status="broken")
    assert party.ticket.outcome == Broken("action", 2)


def test_the_round_ends_while_the_action_runs() -> None:
    bench = ArrivalBench()
    party = bench.acting()
    bench.it.take_message("b:50:reset:2")
    assert not party.ticket.decided
    bench.it.end_action(party, failed=False)
    assert party.ticket.outcome == Broken("reset", 2)


def test_the_owner_has_left_when_it_is_to_act() -> None:
    bench = ArrivalBench()
    party = bench.arrive(has_action=True)
    batch = bench.batch("a 2 1")
    bench.cancel(party)
    bench.reply(batch, "y 50 1", status="acting")
    assert party.phase is Phase.FAILED
    batch = bench.batch("l 2 0 cancelled", "f 2 50")
    bench.reply(batch, "y 50 1", "b 50 action 2", round=51, status="broken")
    assert bench.it.is_idle


def test_the_reply_that_tells_to_act_is_lost() -> None:
    bench = ArrivalBench()
    party = bench.arrive(has_action=True)
    bench.batch("a 2 1")
    bench.reconnect()
    bench.reply(bench.batch("A 2 0 1"), "y 50 1", status="acting")
    assert party.ticket.outcome == Passed(1, acts=True)
    bench.reconnect()
    bench.reply(bench.batch("q 2 50", "q 2 50"), "y 50 1", "y 50 1", status="acting")
    assert party.phase is Phase.ACTING
    bench.it.end_action(party, failed=False)
    bench.reconnect()
    bench.reply(bench.batch("d 2 50"), "t 50 -1", round=51)
    assert bench.it.is_idle


def test_an_acting_party_is_told_that_it_has_arrived() -> None:
    bench = ArrivalBench()
    party = bench.acting()
    bench.reconnect()
    bench.reply(bench.batch("q 2 50", "q 2 50"), "w 50 1", "w 50 1", status="acting")
    assert party.phase is Phase.ACTING


# --- parties: abort and reset


def test_abort_and_reset_are_repeated_in_order() -> None:
    bench = ArrivalBench()
    bench.it.abort()
    assert bench.it.broken
    bench.it.reset()
    bench.arrive()
    bench.batch("z 2", "n 3", "a 4 0")
    bench.reconnect()
    bench.reply(bench.batch("z 2", "n 3", "A 4 0 0"), "-", "-", "w 50 0")
    assert not bench.it._plain
    bench.reconnect()
    bench.batch("q 4 50", "q 4 50")


# --- parties: the connection


def test_what_became_of_an_arrival_is_not_known() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    bench.batch("a 2 0")
    bench.reconnect()
    bench.reply(bench.batch("A 2 0 0"), "?")
    with pytest.raises(BackendUnavailable, match="the connection was lost; the others may have"):
        party.ticket.result()


def test_an_answer_for_a_party_that_is_gone() -> None:
    bench = ArrivalBench()
    bench.arrived()
    bench.now += LEASE / 3
    batch = bench.batch("q 2 50")
    bench.it.take_message("t:50")
    bench.reply(batch, "t 50 -1")
    assert bench.it.is_idle


def test_audits_ask_about_one_party_of_each_round() -> None:
    bench = ArrivalBench()
    bench.arrived()
    bench.arrived(index=1)
    assert bench.it.due() == bench.now + LEASE / 3
    bench.now += LEASE / 3
    batch = bench.batch("q 2 50")
    assert batch.audit
    bench.reply(batch, "w 50 0", look=100)
    assert bench.it.due() == bench.now + 0.1
    bench.now += 0.2
    bench.batch()


def test_the_server_has_forgotten_the_parties() -> None:
    bench = ArrivalBench()
    bench.arrived()
    bench.now += LEASE / 3
    bench.reply(bench.batch("q 2 50"), "w 50 0", newly=1)
    bench.batch("q 2 50")


def test_the_server_refuses_a_party() -> None:
    bench = ArrivalBench()
    party, request = bench.arrive(), Ticket(ThreadWaiter())
    bench.it.request(request, "S")
    bench.it.abort()
    batch = bench.batch("a 2 0", "S", "z 3")
    bench.it.take_reply(batch, ["differs", 3, 9000])
    for ticket in (party.ticket, request):
        with pytest.raises(ValueError, match=r"barrier 'x' has other .* \(parties=3, lease=9 s"):
            ticket.result()


def test_no_server_for_too_long_for_parties() -> None:
    bench = ArrivalBench()
    sent = bench.arrived()
    withdrawn = bench.arrived(index=1)
    bench.it.disconnect()
    since = bench.now
    bench.now += 5
    unsent = bench.arrive()
    assert bench.it.unavailable(since, bench.now, None) == since + GIVE_UP
    withdrawn.ticket.withdraw()
    bench.now = since + GIVE_UP + 5
    cause = OSError("refused")
    assert bench.it.unavailable(since, bench.now, cause) == inf
    for party in (sent, unsent):
        with pytest.raises(BackendUnavailable, match="for 25 s; the others may have") as info:
            party.ticket.result()
        assert info.value.__cause__ is cause
    bench.it.leave(withdrawn, "cancelled")
    bench.connect()
    bench.batch("l 2 50 cancelled", "l 3 50 cancelled")


def test_the_session_of_parties_ends() -> None:
    bench = ArrivalBench()
    acting = bench.acting()
    arrived = bench.arrived()
    later = bench.arrive()
    bench.reply(bench.batch("a 4 0"), "l")
    left, done = bench.arrived(index=2), bench.acting()
    bench.cancel(left)
    bench.it.end_action(done, failed=False)
    unsent = bench.arrive()
    bench.it.close(BackendUnavailable("closed"))
    for party in (acting, arrived, later, unsent):
        assert unavailable(party.ticket)
    operations = bench.it.next_batch()
    assert operations is not None
    assert {" ".join(operation.arguments) for operation in operations.operations} == {
        f"l {left.number} 50 cancelled",
        f"d {done.number} 50",
        f"f {acting.number} 50",
        f"l {arrived.number} 50 cancelled",
    }


def test_out_of_time_just_when_the_party_is_to_act() -> None:
    bench = ArrivalBench()
    party = bench.arrive(has_action=True)
    batch = bench.batch("a 2 1")
    assert party.ticket.withdraw()
    bench.reply(batch, "y 50 1", status="acting")
    party.ticket = Ticket(ThreadWaiter())
    bench.it.leave(party, "timeout")
    assert party.ticket.outcome == Passed(1, acts=True)


def test_no_server_after_the_action() -> None:
    """The others pass when it is back."""
    bench = ArrivalBench()
    party = bench.acting()
    bench.it.end_action(party, failed=False)
    bench.it.disconnect()
    bench.now += GIVE_UP
    bench.it.unavailable(bench.now - GIVE_UP, bench.now, None)
    assert unavailable(party.ticket)
    bench.connect()
    bench.batch("d 2 50")


def test_the_round_is_completed_before_the_reply_to_come_again_later() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    batch = bench.batch("a 2 0")
    bench.it.take_message("t:50")
    bench.reply(batch, "l", status="acting")
    bench.batch("a 2 0")
    assert not party.ticket.decided


def test_a_reset_that_is_older_than_the_last_reply() -> None:
    bench = ArrivalBench()
    bench.arrive()
    bench.reply(bench.batch("a 2 0"), "b 50 timeout 1", status="broken")
    bench.it.take_message("n:49")
    assert bench.it.broken
    bench.it.take_message("n:50")
    assert not bench.it.broken


def test_a_party_that_comes_later_has_nothing_to_say() -> None:
    bench = ArrivalBench()
    party = bench.arrive()
    bench.reply(bench.batch("a 2 0"), "l", status="acting")
    bench.it._send_state(party)
    assert bench.nothing()


def test_an_interruption_just_as_the_request_is_refused_gives_nothing_back() -> None:
    class Refusing:
        """A session that refuses the request while a signal handler interrupts the caller."""

        def conductor(self, *_: object) -> Permits:
            return bench.it

        def post(self, _: object, job: object, ticket: Ticket) -> None:
            assert ticket.settle(BackendUnavailable("gone"))
            raise KeyboardInterrupt

    bench = Bench(Permits, 1)
    calls = SemaphoreCalls(cast("Any", SimpleNamespace(get=Refusing)), "name", 1)
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(calls.take(None, True, None, ThreadWaiter))
    assert bench.it.inbox.get_nowait(None) is None
