"""Arguments of the drivers: credentials that are asked for at each connect, and mistakes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from inspect import isawaitable
from os import PathLike
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypeVar, Union

from anyio.lowlevel import current_token

from .._errors import PoolMisuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

V = TypeVar("V")

# A value, or a plain or async function that returns it.
Provided: TypeAlias = Union[V, Callable[[], V], Callable[[], Awaitable[V]]]
Arguments: TypeAlias = Provided[Mapping[str, Any]]

# What the drivers for PostgreSQL accept; some convert anything else, or fail at each connect.
_TYPES: dict[str, tuple[type, ...]] = {
    "host": (str, PathLike, list, tuple, type(None)),
    "port": (SupportsIndex, str, list, tuple, type(None)),
}


async def provide(value: Any) -> Any:
    """Return a value, or what the function returns that stands for it."""
    if callable(value):
        value = value()
        if isawaitable(value):
            value = await value
    return value


async def provide_arguments(kwargs: Arguments | None) -> dict[str, Any]:
    """Return the keyword arguments of a connect, with the password that is right now."""
    given = await provide(kwargs)
    with mistakes():
        arguments = dict(given or {})
        check_address(arguments)
    if "password" in arguments:
        arguments["password"] = await provide(arguments["password"])
    return arguments


async def provide_text(name: str, value: Provided[str] | None) -> str | None:
    """Return a connection string.

    :raises PoolMisuse: if it is no str
    """
    text: str | None = await provide(value)
    with mistakes():
        check_text(name, text)
    return text


def copied(kwargs: Arguments | None) -> Arguments:
    """Return `kwargs`, independent of later changes by the caller.

    :raises TypeError: if they are wrong
    """
    if callable(kwargs):
        return kwargs
    arguments = dict(kwargs or {})
    check_address(arguments)
    return arguments


def check_address(arguments: Mapping[str, Any]) -> None:
    """Check the types of host and port, if they are given.

    :raises TypeError: if one is wrong
    """
    for name, types in _TYPES.items():
        value = arguments.get(name)
        if not isinstance(value, types):
            raise TypeError(f"{name} can't be of type {type(value).__name__}")


def check_text(name: str, value: object) -> None:
    """Check that a connection string is a str, None, or a function that returns one.

    :raises TypeError: if it is not
    """
    if not (value is None or isinstance(value, str) or callable(value)):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Tell callers at once of an error of a driver that means that its arguments are wrong.

    :param kinds: the driver's classes for such errors, besides TypeError
    :raises PoolMisuse: in place of such an error
    """
    errors: tuple[type[Exception], ...] = (TypeError, *kinds)
    try:
        yield
    except errors as error:
        raise PoolMisuse(f"wrong arguments of connect: {error}") from error


def import_driver(name: str) -> ModuleType:
    """Import a driver.

    :raises ImportError: with words on how to install it
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} can't be imported; install it by: pip install 'aiosync[{name}]'"
        ) from error


def require_asyncio(driver: str) -> None:
    """Check that no other kind of event loop is running.

    :raises PoolMisuse: if one is
    """
    if type(current_token().native_token).__module__.startswith("trio"):
        raise PoolMisuse(f"{driver} needs asyncio; under trio use psycopg_thread_pool")
