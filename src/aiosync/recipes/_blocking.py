"""BlockingPool: a pool of connections whose calls block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from .._pool import ConnectionPool
from ._threads import Threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Unpack

    from .._pool import PoolOptions

C = TypeVar("C")
R = TypeVar("R")
Args = TypeVarTuple("Args")


class BlockingPool(ConnectionPool[C]):
    """A `ConnectionPool` of connections whose calls block, used by `run`.

    The recipes for such drivers return it. A recipe of your own may use it too; docs/recipes.md
    shows how.

    :param connect: as that of `ConnectionPool`; it must not block
    :param interrupt: called with a connection, on the event loop, to end what a thread is doing
        with it; plain or async. It must not affect what is done with the connection afterwards.
    :param finish: called with a connection in the worker thread after a function that `run` has
        called there has returned; for instance to commit
    :param options: those of `ConnectionPool`, and so are the exceptions
    """

    __slots__ = ("_finish", "_interrupt", "_threads")

    def __init__(
        self,
        connect: Callable[[], Awaitable[C]],
        *,
        interrupt: Callable[[C], object] | None = None,
        finish: Callable[[C], object] | None = None,
        **options: Unpack[PoolOptions[C]],
    ) -> None:
        super().__init__(connect, **options)
        self._interrupt = interrupt
        self._finish = finish
        self._threads = Threads()

    async def run(
        self,
        function: Callable[[C, *Args], R],
        *args: *Args,
        timeout: float | None = None,
    ) -> R:
        """Borrow a connection, call ``function(connection, *args)`` in a thread, and give it back.

        The thread belongs to the pool, so calls that have a connection never wait for a thread that
        is waiting for a connection. What the function did not commit is rolled back, except by
        psycopg, which commits, unless the function raises.

        If the caller is cancelled, the statement that the function is executing is interrupted, and
        the call waits until the function has ended: the connection is not lent before. The
        cancellation is then raised, whatever the function returned or raised.

        :param timeout: how long to wait for a connection, as that of `ConnectionPool.acquire`; so
            are the exceptions. There is no limit to the time of the function itself.
        """
        async with self.connection(timeout) as connection:
            work = partial(_work, self._finish, connection, partial(function, connection, *args))
            interrupt = self._interrupt
            return await self._threads.run_to_end(
                work, None if interrupt is None else partial(interrupt, connection)
            )


def _work(finish: Callable[[Any], object] | None, connection: object, call: Callable[[], R]) -> R:
    result = call()
    if finish is not None:
        finish(connection)
    return result
