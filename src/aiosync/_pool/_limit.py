"""A limit on the number of connections that several pools share, as in `aiosync.redis`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class ConnectionPermit(Protocol):
    """The right to one connection."""

    def on_loss(self, token: object, function: Callable[[], object]) -> None:
        """Call `function` on event loop `token` if the permit is lost, or is lost already."""

    def give_back(self) -> None:
        """Give the permit back, once the connection is closed. Never blocks."""


class ConnectionLimit(Protocol):
    """What the option `limit` of a pool takes, such as `aiosync.redis.DistributedSemaphore`."""

    async def take_for_pool(self, *, blocking: bool) -> ConnectionPermit | None:
        """Take a permit for a connection. If it is cancelled, no permit is taken.

        :return: None if `blocking` is False and no permit is free
        :raises RuntimeError: if the limit is not ready for use
        :raises ValueError: if other processes use it with other settings
        """

    def watch_contention(self, function: Callable[[], object]) -> Callable[[], object]:
        """Call `function` from time to time, on any thread, while others wait for a permit.

        :return: a function that stops the calls
        """
        ...
