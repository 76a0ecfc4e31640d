"""The recipe's hooks and the caller's, as one."""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import move_on_after

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from .._pool import PoolOptions

    Hook = Callable[[Any], object]

C = TypeVar("C")
V = TypeVar("V")

# How long a recipe may take to close a connection after the `close` of the caller has failed.
_GRACE = 5.0


def combine(
    options: PoolOptions[C],
    *,
    check: Callable[[C], object],
    reset: Callable[[C], object],
    close: Callable[[C], Any],
    commit: Callable[[C], object] | None = None,
    is_closed: Callable[[C], bool] | None = None,
    is_fatal: Callable[[Exception], bool] | None = None,
) -> None:
    """Add the hooks of a recipe to those that the caller has given."""
    options["check"] = in_order(check, options.get("check"))
    options["reset"] = in_order(reset, options.get("reset"))
    options["commit"] = in_order(options.get("commit"), commit)
    options["close"] = _then_close(options.get("close"), close)
    options["is_closed"] = _either(is_closed, options.get("is_closed"))
    options["is_fatal"] = _either(is_fatal, options.get("is_fatal"))


def in_order(*hooks: Callable[[C], object] | None) -> Callable[[C], object] | None:
    """Return a hook that calls `hooks`, one after the other, until one returns False.

    It is plain for as long as they are: a plain reset costs the pool no switch of tasks.
    """
    given = [hook for hook in hooks if hook is not None]
    if len(given) < 2:
        return given[0] if given else None

    def call_all(connection: C) -> object:
        return _call(given, connection)

    return call_all


def _call(hooks: Sequence[Hook], connection: Any) -> object:
    for number, hook in enumerate(hooks, 1):
        result = hook(connection)
        if isawaitable(result):
            return _Rest(result, hooks[number:], connection)
        if result is False:
            return False
    return None


class _Rest:
    """What is left to await of a chain of hooks."""

    def __init__(self, result: Any, hooks: Sequence[Hook], connection: object) -> None:
        self._result = result
        self._hooks = hooks
        self._connection = connection

    def __await__(self) -> Generator[Any, Any, object]:
        return self._finish().__await__()

    async def _finish(self) -> object:
        if await self._result is False:
            return False
        result = _call(self._hooks, self._connection)
        return await result if isawaitable(result) else result

    def close(self) -> None:
        """Give up before it was awaited; otherwise Python warns of a coroutine never awaited."""
        getattr(self._result, "close", bool)()


def _either(
    own: Callable[[V], bool] | None, users: Callable[[V], bool] | None
) -> Callable[[V], bool] | None:
    if own is None or users is None:
        return own or users
    return lambda value: own(value) or users(value)


def _then_close(
    users: Callable[[C], object] | None, close: Callable[[C], Any]
) -> Callable[[C], object]:
    """Return a hook that calls the caller's `close`, and then always the recipe's, which is async.

    :raises Exception: what the caller's raises, if the recipe's raises nothing
    """
    if users is None:
        return close

    async def close_both(connection: C) -> None:
        try:
            result = users(connection)
            if isawaitable(result):
                await result
        except BaseException:
            # The time that the pool has for it may be over.
            with move_on_after(_GRACE, shield=True):
                await close(connection)
            raise
        await close(connection)

    return close_both
