"""The base class of conductors: the state of one name in one process.

A `Conductor` does no input or output: it returns batches of operations, and takes replies and
messages. A `Carrier` sends and receives them. The conductor is given a clock, so that it can be
tested without a server.

At most one batch is in flight. Operations that are added meanwhile go into the next one, so a
release and the acquire that follows it are sent together.

All methods run on the event loop of the session, except `post`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from .._handoff import Mailbox
from ._batch import Batch, Operation, Settings
from ._errors import BackendUnavailable
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The most operations of a batch, so that no script runs for long.
_MAX_BATCH = 256
# A lease counts as lost after this part of it. The rest allows for clocks that run at different
# speeds, and gives a cancelled block time to end.
SAFE_PART = 0.9


class Stale(Exception):  # noqa: N818
    """The server has seen a newer connection of this process."""


class Conductor(ABC):
    """The operations on one name, in order.

    :param name: the name of the semaphore or barrier
    :param value: how many permits, or parties
    :param settings: those of the session
    """

    script: ClassVar[str]
    """The name of the Lua file."""

    def __init__(self, name: str, value: int, settings: Settings) -> None:
        self.name = name
        self.value = value
        self.member: str = settings.member
        self.settings = settings
        # Whether its carrier ends when there is nothing left to send.
        self.retired = False
        # Whether the session has ended.
        self.closed: bool = False
        # Whether its carrier has ended, so that jobs are not run any more.
        self.ended = False
        self.inbox: Mailbox[Callable[[], object]] = Mailbox()
        # An earlier conductor for the same name, whose task does the jobs of this one too while
        # there is no link. This one begins when that one has ended.
        self.ahead: Conductor | None = None
        self.keys: tuple[str, ...] = self._keys(f"{settings.prefix}:{{{name}}}")
        self._clock = settings.clock
        self._lease_ms = str(round(settings.lease * 1000))
        self._outbox: deque[Operation] = deque()
        # Requests without an answer yet, with their arguments.
        self._requests: dict[Ticket, tuple[str, ...]] = {}
        # The connection.
        self.connected: bool = False
        self._epoch = 0
        self._run = ""
        # Until when a missing state may be the result of a restart of the server.
        self._fresh_until = -inf
        self._publish = "PUBLISH"
        self._first = True
        # When the last audit was sent, when the last answered command was sent (until all permits
        # were claimed, on an earlier connection), and when to send a command without operations: a
        # gate opens then, or the lease of a process ends.
        self._audited = -inf
        self._answered = -inf
        self._look_at = inf

    @property
    @abstractmethod
    def channel(self) -> str:
        """The channel of the messages for this conductor."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether this process has no state on the server and waits for nothing."""

    @abstractmethod
    def _keys(self, stem: str) -> tuple[str, ...]:
        """Return the keys of the script."""

    @abstractmethod
    def _is_known(self) -> bool:
        """Return whether the server should have this process as a member."""

    # -- From any thread.

    def post(self, job: Callable[[], object]) -> None:
        """Run `job` on the event loop of the session, then send what there is to send."""
        self.inbox.post(job)
        if (ahead := self.ahead) is not None:
            ahead.inbox.post(bool)

    # -- Jobs.

    def request(self, ticket: Ticket, *arguments: str) -> None:
        """Send an operation whose answer is the outcome of `ticket`."""
        if not ticket.decided:
            self._requests[ticket] = arguments
            self._send_request(ticket)

    def flush(self, ticket: Ticket) -> None:
        """Settle `ticket` when the server has received everything so far."""
        if self.is_idle:
            ticket.settle("")
        else:
            self.request(ticket, "S")

    def _send_request(self, ticket: Ticket) -> None:
        def settle(answer: str) -> None:
            self._requests.pop(ticket, None)
            ticket.settle(answer)

        self._send(*self._requests[ticket], answered=settle, asker=ticket)

    # -- The connection.

    def connect(self, run: str, fresh: float, publish: str) -> None:
        """Start with a new connection, and ask the server about everything again.

        :param run: identifies the server process
        :param fresh: in how many seconds the server will have run for one lease
        :param publish: the command for messages
        """
        self.connected = True
        self._epoch = next(self.settings.numbers)
        self._run = run
        self._fresh_until = self._clock() + fresh if self.settings.restart_gate else -inf
        self._publish = publish
        self._first = True
        self._audited = -inf
        self._outbox.clear()
        self._ask_again()

    def disconnect(self) -> None:
        """End a connection. Operations without an answer may or may not have run."""
        self.connected = False
        self._outbox.clear()

    def _ask_again(self) -> None:
        """Fill the outbox with questions about everything that concerns this process."""
        for request in self._requests:
            self._send_request(request)

    # -- Sending.

    def due(self) -> float:
        """Return when `next_batch` has something to send, if nothing is posted before."""
        if self._outbox:
            return -inf
        if self.is_idle:
            return inf
        return min(self._audited + self.settings.lease / 3, self._look_at)

    def next_batch(self) -> Batch | None:
        """Return what is to be sent now, or None."""
        now = self._clock()
        self.expire(now)
        known = self._is_known()
        operations: list[Operation] = []
        # A third of a lease after the last audit, not after the last command: otherwise a busy name
        # would never be audited.
        audit = not self.is_idle and now >= self._audited + self.settings.lease / 3
        if audit:
            operations += self._audit()
        while self._outbox and len(operations) < _MAX_BATCH:
            operation = self._outbox.popleft()
            if operation.asker is None or self._is_wanted(operation.asker):
                operations.append(operation)
                self._sent(operation)
            elif isinstance(operation.asker, Ticket):
                self._requests.pop(operation.asker, None)  # its owner has left
        if not operations and not audit and (self.is_idle or now < self._look_at):
            return None
        self._look_at = inf
        if audit:
            self._audited = now
        arguments = self._header(audit)
        for operation in operations:
            arguments += operation.arguments
        # Permits may expire while the carrier waits for the reply, and it calls `expire` only then.
        timeout = self.settings.lease / 3
        if now < self._safe_until():
            timeout = min(timeout, self._safe_until() - now)
        return Batch(arguments, operations, now, timeout, audit, known)

    @abstractmethod
    def _header(self, audit: bool) -> list[str]:
        """Return the arguments of the script that come before the operations."""

    @abstractmethod
    def _is_wanted(self, asker: object) -> bool:
        """Return whether an operation for `asker` is still to be sent."""

    @abstractmethod
    def _sent(self, operation: Operation) -> None:
        """Note that `operation` is being sent, so it may run even if no answer comes."""

    def _audit(self) -> list[Operation]:
        """Return operations that compare the state of this process with that of the server."""
        return []

    def _send(
        self, *arguments: str, answered: Callable[[str], object], asker: object = None
    ) -> None:
        if self.connected:  # otherwise `connect` asks for all that is still wanted then
            self._outbox.append(Operation(arguments, answered, asker))

    # -- Receiving.

    def take_reply(self, batch: Batch, reply: Sequence[Any]) -> None:
        """Take the reply to `batch`.

        :raises Stale: if the server refused the batch
        """
        kind, *rest = reply
        if kind == "stale":
            raise Stale
        if kind == "differs":
            self.refuse(batch, self._differs(*rest))
            return
        first, self._first = self._first, False
        if not self._has_claims_left():
            self._answered = batch.sent
        newly, look_in, *rest = rest
        if look_in != -1:
            self._look_at = self._clock() + look_in / 1000
        self._take(batch, rest)
        if newly and batch.known and not first:
            # The server has lost the state of this process, although the connection was not lost.
            self._outbox.clear()
            self._ask_again()

    @abstractmethod
    def _take(self, batch: Batch, reply: Sequence[Any]) -> None:
        """Take the part of a reply that is specific to the script."""

    @abstractmethod
    def _differs(self, number: int, lease_ms: int) -> ValueError:
        """Return the error for another process that uses another value or lease."""

    def refuse(self, batch: Batch, error: Exception) -> None:
        """Settle the requests of `batch` with `error`: the server has run none of them."""
        for operation in batch.operations:
            if operation.asker is not None:
                self._refuse(operation.asker, error)

    @abstractmethod
    def take_message(self, message: str) -> None:
        """Take a message from the channel."""

    # -- Time.

    def _has_claims_left(self) -> bool:
        """Return whether permits were not claimed yet on the present connection."""
        return False

    def _safe_until(self) -> float:
        """Return until when no other process is granted what this one holds."""
        return inf

    def deadline(self) -> float:
        """Return when to call `expire`."""
        return inf

    @abstractmethod
    def expire(self, now: float) -> None:
        """Give up permits whose lease may have ended on the server."""

    def unavailable(self, since: float, now: float, cause: BaseException | None) -> float:
        """Settle the waiters with an error if there has been no server for `give_up` seconds.

        :return: when to call this again
        """
        limit = since + self.settings.give_up
        if not self._requests:
            return inf
        if now < limit:
            return limit
        for ticket in [*self._requests]:
            self._refuse(ticket, unavailable_error(repr(self.name), now - since, cause))
        return inf

    def close(self, error: Exception) -> None:
        """Settle all waiters with `error`, since the session has ended."""
        self.closed = True
        for ticket in [*self._requests]:
            self._refuse(ticket, error)

    def _refuse(self, asker: object, error: Exception) -> None:
        """Settle the request `asker` with `error`."""
        if isinstance(asker, Ticket):
            self._requests.pop(asker, None)
            asker.settle(error)


def unavailable_error(what: str, seconds: float, cause: BaseException | None) -> BackendUnavailable:
    """Return the error for a waiter that gets no answer."""
    why = f"no server could be reached for {seconds:.3g} s" if seconds else "not connected just now"
    error = BackendUnavailable(f"{what}: {why}")
    error.__cause__ = cause
    return error
