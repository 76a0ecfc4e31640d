"""The task of one name, which sends its batches and passes the replies to the conductor."""

from __future__ import annotations

from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

from .._park import task_waiter
from ._conductor import Stale
from ._link import LinkLost, Moved, Refused, Resharding
from ._server import FIRST_DELAY, LONGEST_DELAY, clock, describe, logger, noop, with_jitter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._handoff import Mailbox
    from ._conductor import Conductor
    from ._link import Link
    from ._server import Server


class Carrier:
    """Sends the batches of a conductor to the server that has its keys.

    :param queue: the conductor for which this runs, and those for the same name that follow it
    :param server_for: returns the server for a name; its second argument is None, or the link that
        has just learned that the keys have moved
    """

    def __init__(
        self, queue: Sequence[Conductor], server_for: Callable[[str, Link | None], Server]
    ) -> None:
        self._conductor = conductor = queue[0]
        self._queue = queue
        self._server_for = server_for
        # The link that the conductor was connected to. It lags behind that of the server.
        self._link: Link | None = None
        # Since when, and why, the name is unavailable although its server is connected.
        self._down_since = -inf
        self._error: BaseException | None = None
        # When to use the link again after `_pause`, and how many seconds the next pause takes.
        self._resume_at = -inf
        self._delay = FIRST_DELAY
        self._attach(server_for(conductor.name, None))

    async def run(self) -> None:
        """Send batches until the conductor is retired and idle."""
        conductor = self._conductor
        while True:
            try:
                self._follow_server()
                # After `_follow_server`: without a link, a request that does not wait is refused.
                do_jobs(conductor.inbox)
                # Without a link, a release is kept until there is one, unless the session ends.
                may_end = conductor.is_idle or (conductor.closed and self._link is None)
                if conductor.retired and may_end:
                    break
                await self._carry()
            except (LinkLost, Stale) as error:
                if self._link is not None and self._server.link is self._link:
                    self._link.close()
                    self._server.lose(error)
            except Moved as error:
                link = self._link
                self._pause(error)
                self._detach()
                self._attach(self._server_for(conductor.name, link))
            except Resharding as error:
                self._pause(error)
        if self._link is not None:
            with suppress(LinkLost):
                self._link.unsubscribe(conductor.channel)
        self._detach()

    def _attach(self, server: Server) -> None:
        self._server = server
        server.conductors[self._conductor.channel] = self._conductor

    def _detach(self) -> None:
        server, conductor = self._server, self._conductor
        del server.conductors[conductor.channel]
        if server.tag == conductor.name:  # the keys of the tag may be elsewhere now
            server.tag = next((each.name for each in server.conductors.values()), None)

    def _follow_server(self) -> None:
        """Connect the conductor to a new link of the server, or disconnect it."""
        while self._server.duplicate_of is not None:
            self._drop_link()
            same = self._server.duplicate_of
            self._detach()
            self._attach(same)
        if self._server.link is not self._link:
            self._drop_link()
            if clock() >= self._resume_at and self._server.link is not None:
                self._connect(self._server.link)

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link = None
            self._conductor.disconnect()

    def _connect(self, link: Link) -> None:
        self._link = link
        # Before the first operation, so that no message can be missed.
        link.subscribe(self._conductor.channel)
        fresh = max(0.0, self._conductor.settings.lease - link.uptime)
        self._conductor.connect(link.run, fresh, link.publish)

    def _pause(self, error: Exception) -> None:
        """Do not use the server for a while, since it cannot serve the name now."""
        self._drop_link()
        now = clock()
        if self._down_since == -inf:
            self._down_since = now
        self._error = error.__cause__
        self._resume_at = now + with_jitter(self._delay)
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    async def _carry(self) -> None:
        """Send one batch, or wait until there is one."""
        conductor, link = self._conductor, self._link
        batch = None if link is None else conductor.next_batch()
        if batch is None or link is None:
            await self._sleep()
            return
        try:
            reply = await link.call(
                conductor.script, conductor.keys, batch.arguments, batch.timeout
            )
        except Refused as error:
            why = describe(error.__cause__ or error)
            # Log it if no caller gets the error.
            if not any(operation.asker for operation in batch.operations):
                logger.error("%s %r: the server refuses: %s", conductor.script, conductor.name, why)
            conductor.refuse(batch, PermissionError(why))
        else:
            self._down_since, self._delay = -inf, FIRST_DELAY
            self._server.is_useful = True
            conductor.take_reply(batch, reply)

    async def _sleep(self) -> None:
        conductor, now = self._conductor, clock()
        look_at = conductor.due() if self._link is not None else self._tell_waiters(now)
        look_at = min(look_at, conductor.deadline())
        timeout = None if look_at == inf else max(0.0, look_at - now)
        job = await conductor.inbox.wait(task_waiter(), timeout, noop)
        job()
        do_jobs(conductor.inbox)
        conductor.expire(clock())

    def _tell_waiters(self, now: float) -> float:
        """Tell the waiters if there has been no link for too long. Return when to do so again."""
        server = self._server
        if server.link is None:
            since, error, look_at = server.down_since, server.error, inf
        else:
            since, error, look_at = self._down_since, self._error, self._resume_at
        for conductor in [*self._queue]:
            if conductor is not self._conductor:
                do_jobs(conductor.inbox)
            look_at = min(look_at, conductor.unavailable(since, now, error))
        return look_at


def do_jobs(inbox: Mailbox[Callable[[], object]]) -> None:
    """Run all jobs in `inbox`."""
    job = inbox.get_nowait(None)
    while job is not None:
        job()
        job = inbox.get_nowait(None)
