"""A server, and the connection that is kept to it."""

from __future__ import annotations

import logging
import random
import time
from math import inf
from typing import TYPE_CHECKING

from anyio import sleep

from ._connect import open_link
from ._link import LinkLost, Refused, root_cause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._conductor import Conductor
    from ._link import Client, Link

logger = logging.getLogger("aiosync.redis")

# Seconds between two attempts to connect, without jitter: at first, and at most.
FIRST_DELAY, LONGEST_DELAY = 0.02, 0.5


def clock() -> float:
    """Return seconds, on a clock that runs while the process or the machine is suspended too."""
    if _SUSPENDED_CLOCK is not None:
        return time.clock_gettime(_SUSPENDED_CLOCK)
    return time.monotonic()


_SUSPENDED_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


class Server:
    """A server, and the link to it, if there is one.

    :param connect: returns a new client
    :param timeout: how many seconds it may take to connect, and then each request
    :param prefix: what the keys and channels begin with
    :param tag: in a cluster, the name whose keys are on the server; None: any server
    :param changed: called when there is a new link, and when there is none any more
    """

    def __init__(
        self,
        connect: Callable[[], Client | Awaitable[Client]],
        timeout: float,
        prefix: str,
        tag: str | None,
        changed: Callable[[Server], object],
    ) -> None:
        self._connect = connect
        self._timeout = timeout
        self._prefix = prefix
        self.tag = tag
        self._changed = changed
        self.link: Link | None = None
        # Since when, and why, there is no link. Not valid while there is one that is of use.
        self.down_since = clock()
        # When the link has begun, and whether a script has been answered on it.
        self._linked_at = -inf
        self.is_useful = False
        self.error: BaseException | None = None
        # Whether a loss was logged, so the next connection is logged too.
        self._was_lost = False
        # By their channels.
        self.conductors: dict[str, Conductor] = {}
        # In a cluster, another object for the same server.
        self.duplicate_of: Server | None = None

    async def keep_connected(self) -> None:
        """Connect, and connect again whenever the link is lost."""
        delay = FIRST_DELAY
        while self.duplicate_of is None:
            begun = clock()
            try:
                await self._serve()
            except Exception as error:
                self.lose(root_cause(error))
            if clock() - begun > LONGEST_DELAY:  # a link that is lost at once does not count
                delay = FIRST_DELAY
            await sleep(with_jitter(delay))
            delay = min(2 * delay, LONGEST_DELAY)

    async def _serve(self) -> None:
        async with open_link(self._connect, self._timeout, self.tag, self._prefix) as link:
            self.link = link
            self._linked_at, self.is_useful = clock(), False
            self._changed(self)
            if self.duplicate_of is not None:
                self.link = None
                return
            if self._was_lost:
                self._was_lost = False
                logger.warning("connected to the server again")
            self.wake()
            try:
                async for channel, message in link.messages():  # pragma: no branch
                    conductor = self.conductors.get(channel)
                    if conductor is not None:
                        conductor.take_message(message)
                        conductor.post(noop)
            except LinkLost:
                if self.link is link:
                    raise
                # A request has reported the loss before, with its cause.

    def lose(self, error: BaseException) -> None:
        """Note that there is no link, because of `error`."""
        cause = error.__cause__ if isinstance(error, (LinkLost, Refused)) else None
        cause = error if cause is None else cause
        if isinstance(error, Refused):
            permission = PermissionError(describe(cause))
            permission.__cause__ = cause
            cause = permission
        if self.link is not None:
            logger.warning("lost the connection to the server: %s", describe(cause))
            self._was_lost = True
            self.link.close()
            self.link = None
            # A server may accept connections and refuse all scripts, since it cannot write. But a
            # link that was idle for longer than a call takes was not in vain.
            if self.is_useful or clock() - self._linked_at > 2 * self._timeout:
                self.down_since = clock()
        self.error = cause
        self._changed(self)
        self.wake()

    def wake(self) -> None:
        """Wake the carriers of all conductors."""
        for conductor in self.conductors.values():
            conductor.post(noop)


def with_jitter(delay: float) -> float:
    """Return 50 to 100% of `delay`, so that processes do not reconnect all at the same time."""
    return delay * random.uniform(0.5, 1)  # noqa: S311


def noop() -> None:
    """Do nothing: a job that only wakes a carrier."""


def describe(error: BaseException) -> str:
    """Return the type and the text of `error`."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
