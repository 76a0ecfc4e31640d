"""The conductor of a barrier: the parties of this process, and the outcomes of their rounds."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ._conductor import SAFE_PART, Conductor, unavailable_error
from ._errors import BackendUnavailable
from ._party import Broken, Party, Passed, Phase
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._batch import Batch, Operation, Settings

# The number of ended rounds that are kept. A message about a round may arrive before the reply to a
# command that was sent earlier, which then refers to a round that has ended.
_REMEMBERED = 16


class Arrivals(Conductor):
    """The parties of one process at one barrier."""

    script: ClassVar[str] = "barrier"

    def __init__(self, name: str, value: int, settings: Settings) -> None:
        super().__init__(name, value, settings)
        # What the server has last reported.
        self.n_waiting: int = 0
        self.broken: bool = False
        self._round = "0"
        self._parties: dict[int, Party] = {}
        self._ended: dict[str, Passed | Broken] = {}
        # The latest broken rounds that observers were told of.
        self._told: deque[str] = deque(maxlen=_REMEMBERED)
        # Aborts and resets that the server has not confirmed yet, by their numbers.
        self._plain: dict[int, Literal["z", "n"]] = {}

    def _keys(self, stem: str) -> tuple[str, ...]:
        state = f"{stem}:barrier"
        return (
            state,
            f"{state}:members",
            f"{state}:arrivals",
            f"{state}:last",
            f"{state}:broken",
        )

    @property
    def channel(self) -> str:
        return f"{self.keys[0]}!"

    @property
    def is_idle(self) -> bool:
        return not (self._parties or self._plain or self._requests)

    def _is_known(self) -> bool:
        return any(party.phase is not Phase.ARRIVING for party in self._parties.values())

    # -- Jobs that the owners of parties post.

    def arrive(self, party: Party) -> None:
        """Arrive at the barrier."""
        if party.cancelled:
            return
        party.number = next(self.settings.numbers)
        party.since = self._clock()
        self._parties[party.number] = party
        self._send_state(party)

    def leave(self, party: Party, reason: str) -> None:
        """Leave the round, which breaks it unless all parties have arrived.

        :param reason: "cancelled" or "timeout"; after a timeout the owner still waits for the
            outcome, since all parties may have arrived meanwhile
        """
        if party.number not in self._parties:
            party.ticket.settle(party.outcome or Broken("timeout", self.n_waiting))
            return
        has_arrived = party.sent and party.phase is not Phase.LATER
        if party.phase is Phase.LATER or (reason == "cancelled" and not party.sent):
            self._end(party, Broken("timeout", self.n_waiting))
        elif party.phase is Phase.ACTING:
            self._ask_to_act(party)
        elif not self.connected and not has_arrived:
            self._end(party, unavailable_error(f"barrier {self.name!r}", 0, None))
        elif not self.connected:
            party.ticket.settle(outcome_unknown(self.name))
            self._mark_leaving(party)
        elif party.phase not in {Phase.LEAVING, Phase.DONE, Phase.FAILED}:
            # If the arrival has not been sent, it is sent together with this.
            party.reason = reason
            self._enter(party, Phase.LEAVING)

    def _mark_leaving(self, party: Party) -> None:
        """Let the next connection report that the owner of `party` has left.

        An action that has ended is still reported, so that the others can pass.
        """
        if party.phase not in {Phase.DONE, Phase.FAILED}:
            party.phase = Phase.LEAVING

    def end_action(self, party: Party, *, failed: bool) -> None:
        """Report that the action of the round has ended or failed."""
        if party.number in self._parties and party.phase is Phase.ACTING:
            party.since = self._clock()
            self._enter(party, Phase.FAILED if failed else Phase.DONE)
        else:
            party.ticket.settle(party.outcome)

    def abort(self) -> None:
        """Break the barrier."""
        self.broken = True
        self._send_plain("z")

    def reset(self) -> None:
        """Return the barrier to its initial state."""
        self._send_plain("n")

    def _send_plain(self, kind: Literal["z", "n"]) -> None:
        number = next(self.settings.numbers)
        self._plain[number] = kind
        self._repeat_plain(number)

    def _repeat_plain(self, number: int) -> None:
        self._send(
            self._plain[number],
            str(number),
            answered=lambda _: self._plain.pop(number, None),
            asker=number,
        )

    def _enter(self, party: Party, phase: Phase) -> None:
        party.phase = phase
        self._send_state(party)

    def _send_state(self, party: Party) -> None:
        """Send the operation that belongs to the phase of `party`."""
        number, action = str(party.number), "1" if party.has_action else "0"
        match party.phase:
            case Phase.ARRIVING if party.sent:
                arguments: tuple[str, ...] = ("A", number, self._last_known_round(party), action)
            case Phase.ARRIVING:
                arguments = ("a", number, action)
            case Phase.LATER:
                return
            case Phase.LEAVING:
                arguments = ("l", number, party.round, party.reason)
            case Phase.ARRIVED | Phase.ACTING:
                arguments = ("q", number, party.round)
            case phase:
                arguments = (phase.value, number, party.round)
        self._send(*arguments, answered=partial(self._take_answer, party, party.phase), asker=party)

    def _last_known_round(self, party: Party) -> str:
        """Return the last round in which `party` cannot have arrived yet; -1: not known."""
        # The server forgets a process after a lease. An arrival that is repeated later would look
        # to it like the first one of a new process, although a round may have ended since.
        is_forgotten = self._clock() - party.since >= SAFE_PART * self.settings.lease
        return "-1" if party.known_round == "0" and is_forgotten else party.known_round

    # -- The connection.

    def disconnect(self) -> None:
        super().disconnect()
        for party in [*self._parties.values()]:
            if party.phase is Phase.LEAVING:  # its owner has left or timed out
                party.ticket.settle(outcome_unknown(self.name))
                if not party.sent:
                    del self._parties[party.number]

    def _ask_again(self) -> None:
        # In the order of the calls, so that a reset before a `wait` does not break that round.
        for number in sorted([*self._parties, *self._plain]):
            if number in self._plain:
                self._repeat_plain(number)
            else:
                party = self._parties[number]
                if party.phase is Phase.LATER:
                    party.phase, party.sent = Phase.ARRIVING, False
                self._send_state(party)
        super()._ask_again()

    def _header(self, audit: bool) -> list[str]:
        return [
            str(self.value),
            self._lease_ms,
            self.member,
            str(self._epoch),
            self._run,
            self._publish,
        ]

    def _is_wanted(self, asker: object) -> bool:
        if isinstance(asker, Party):
            # If the owner was cancelled before the arrival was sent, the party does not arrive.
            return asker.number in self._parties and (asker.sent or not asker.cancelled)
        return asker in self._plain or (isinstance(asker, Ticket) and not asker.decided)

    def _sent(self, operation: Operation) -> None:
        party = operation.asker
        if isinstance(party, Party) and not party.sent:
            party.sent, party.known_round = True, self._round

    def _audit(self) -> list[Operation]:
        """Ask about one party of each round, since the message about its end may have been lost."""
        rounds: dict[str, Party] = {}
        for party in self._parties.values():
            if party.phase in {Phase.ARRIVED, Phase.ACTING}:
                rounds.setdefault(party.round, party)
            self._arrive_again(party)
        for party in rounds.values():
            self._send_state(party)
        return []

    # -- Answers.

    def _take(self, batch: Batch, reply: Sequence[Any]) -> None:
        self._round, self.n_waiting, status, events, answers = reply
        self.broken = status == "broken"
        ended = self._ended.get(self._round)
        if ended is not None:  # the message arrived before this reply
            self.n_waiting, self.broken = 0, isinstance(ended, Broken)
        for operation, answer in zip(batch.operations, answers, strict=True):
            operation.answered(answer)
        for event in events:
            self._take_event(event)

    def _take_answer(self, party: Party, asked_in: Phase, answer: str) -> None:
        """Take the answer to an operation that was sent when `party` was in phase `asked_in`."""
        if party.number not in self._parties:
            return
        kind, *fields = answer.split()
        if kind == "l":
            if party.phase is Phase.ARRIVING:
                party.phase = Phase.LATER
                if self._round in self._ended:  # the message arrived before this answer
                    self._arrive_again(party)
        elif kind == "?":
            self._end(party, outcome_unknown(self.name))
        elif kind == "-" and party.round != "0":
            self._send_state(party)  # it was not known yet when this was asked
        elif kind == "-":
            self._end(party, Broken("timeout", self.n_waiting))
        elif kind == "b":
            self._end(party, Broken(fields[1], int(fields[2])))  # type: ignore[arg-type]
        else:
            party.round = fields[0]
            if fields[1] != "-1":
                party.index = int(fields[1])
            if kind == "t":
                self._end(party, Passed(party.index))
            elif kind == "y":
                self._become_actor(party)
            elif asked_in in {Phase.ARRIVING, Phase.LEAVING}:
                self._has_arrived(party, asked_in)

    def _has_arrived(self, party: Party, asked_in: Phase) -> None:
        """Note that `party` waits in its round, unless that has ended already."""
        ended = self._ended.get(party.round)
        if ended is not None:  # the message arrived before this answer
            self._end_with(party, ended)
        elif asked_in is party.phase:
            party.phase = Phase.ARRIVED
            if party.round != self._round:
                self._send_state(party)

    def _become_actor(self, party: Party) -> None:
        if party.phase in {Phase.ARRIVING, Phase.ARRIVED, Phase.LEAVING}:
            party.phase = Phase.ACTING
            self._ask_to_act(party)

    def _ask_to_act(self, party: Party) -> None:
        told = party.ticket.settle(Passed(party.index, acts=True))
        if not told and party.cancelled:
            self._enter(party, Phase.FAILED)
        # Otherwise the owner knows already, or it has timed out and is about to post `leave`.

    def _end(self, party: Party, outcome: Passed | Broken | BackendUnavailable) -> None:
        party.outcome = outcome
        del self._parties[party.number]
        if isinstance(outcome, Broken):
            self._tell_broken(party, outcome)
        if party.phase is not Phase.ACTING:  # otherwise the owner gets it after the action
            party.ticket.settle(outcome)

    def _tell_broken(self, party: Party, outcome: Broken) -> None:
        """Tell the observer of a broken round, on behalf of its first party of this process."""
        # A party that has found the barrier broken has arrived in no round.
        if party.on_broken is not None and party.round != "0" and party.round not in self._told:
            self._told.append(party.round)
            party.on_broken(outcome.reason)

    def _end_with(self, party: Party, outcome: Passed | Broken) -> None:
        self._end(party, Passed(party.index) if isinstance(outcome, Passed) else outcome)

    def take_message(self, message: str) -> None:
        for event in message.split():
            self._take_event(event)

    def _take_event(self, event: str) -> None:
        kind, *fields = event.split(":")
        # Whether this is not older than the last reply.
        is_news = int(fields[0]) >= int(self._round)
        if kind == "n":
            if is_news and fields[0] not in self._ended:
                self.broken = False
        else:
            outcome = Passed(-1) if kind == "t" else Broken(fields[1], int(fields[2]))  # type: ignore[arg-type]
            if fields[0] in self._ended:
                return  # the reply has told of it already
            self._remember(fields[0], outcome)
            if is_news:
                self.n_waiting, self.broken = 0, kind == "b"
            for party in [*self._parties.values()]:
                if party.round == fields[0] and party.phase is not Phase.ARRIVING:
                    self._end_with(party, outcome)
        for party in [*self._parties.values()]:
            self._arrive_again(party)

    def _arrive_again(self, party: Party) -> None:
        if party.phase is Phase.LATER:
            party.sent = False
            self._enter(party, Phase.ARRIVING)

    def _remember(self, number: str, outcome: Passed | Broken) -> None:
        self._ended[number] = outcome
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _differs(self, number: int, lease_ms: int) -> ValueError:
        return ValueError(
            f"barrier {self.name!r} has other settings on the server "
            f"(parties={number}, lease={lease_ms / 1000:g} s there; "
            f"parties={self.value}, lease={self.settings.lease:g} s here)"
        )

    # -- Time.

    def expire(self, now: float) -> None:
        """Do nothing: the server breaks the round if it does not hear of this process."""

    def unavailable(self, since: float, now: float, cause: BaseException | None) -> float:
        look_at = super().unavailable(since, now, cause)
        for party in [*self._parties.values()]:
            limit = max(since, party.since) + self.settings.give_up
            if now < limit:
                look_at = min(look_at, limit)
            elif party.ticket.settle(outcome_unknown(self.name, now - since, cause)):
                if party.sent:
                    self._mark_leaving(party)
                else:
                    del self._parties[party.number]
        return look_at

    def close(self, error: Exception) -> None:
        super().close(error)
        for party in [*self._parties.values()]:
            party.ticket.settle(error)
            party.outcome = error  # for the owner that runs the action
            match party.phase:
                case Phase.ACTING:
                    self._enter(party, Phase.FAILED)
                case Phase.ARRIVING | Phase.ARRIVED if party.sent:
                    self._enter(party, Phase.LEAVING)
                case Phase.ARRIVING | Phase.ARRIVED | Phase.LATER:
                    del self._parties[party.number]

    def _refuse(self, asker: object, error: Exception) -> None:
        if isinstance(asker, Party):
            self._parties.pop(asker.number, None)
            asker.ticket.settle(error)
        elif isinstance(asker, int):
            self._plain.pop(asker, None)
        else:
            super()._refuse(asker, error)


def outcome_unknown(
    name: str, seconds: float = 0.0, cause: BaseException | None = None
) -> BackendUnavailable:
    """Return the error for a party that cannot learn whether its round has tripped."""
    if seconds:
        why = f"no server could be reached for {seconds:.3g} s"
    else:
        why = "the connection was lost"
    error = BackendUnavailable(f"barrier {name!r}: {why}; the others may have passed")
    error.__cause__ = cause
    return error
