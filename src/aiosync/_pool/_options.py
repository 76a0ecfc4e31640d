"""The options of a pool, each declared once: name, type, default and check.

`PoolOptions` is what the type checkers see; `Options` is what it says at run time.
"""

# The annotations are needed at run time, so they are not postponed.
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypedDict, TypeVar, get_type_hints

from .._errors import check_count, check_name, check_timeout
from ._events import PoolEvent
from ._limit import ConnectionLimit

T = TypeVar("T")


# The check of an option takes its name and a value, and returns the value that the pool uses.


def _at_least(least: int) -> Callable[[str, Any], int]:
    """Return the check of an int of at least `least`."""
    return lambda name, value: check_count(name, value, least)


def _count_or_all(name: str, value: Any) -> float:
    return inf if value is None else check_count(name, value, 1)


def _seconds(none: float | None = inf, *, zero: bool = True) -> Callable[[str, Any], float | None]:
    """Return the check of a number of seconds that is 0 or more, or None.

    :param none: what None stands for
    :param zero: whether 0 is allowed
    """

    def check(name: str, value: Any) -> float | None:
        try:
            seconds = check_timeout(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if seconds is None:
            return none
        if seconds < 0:
            raise ValueError(f"{name} must be 0 seconds or more, or None, not {seconds}")
        if seconds == 0 and not zero:
            raise ValueError(f"{name} must be more than 0 seconds, or None for no limit")
        return seconds

    return check


def _hook(name: str, value: Any) -> Any:
    if value is not None:
        if not callable(value):
            raise TypeError(f"{name} must be callable or None, not {type(value).__name__}")
        check_signature(name, value, 1)
    return value


# The methods of a `ConnectionLimit`.
_LIMIT = ("take_for_pool", "watch_contention")


def _limit(name: str, value: Any) -> Any:
    if value is not None and not all(hasattr(type(value), method) for method in _LIMIT):
        raise TypeError(
            f"{name} must be a semaphore of aiosync.redis or None, not {type(value).__name__}"
        )
    return value


def _flag(_: str, value: Any) -> bool:
    return bool(value)


def _name(_: str, value: Any) -> str | None:
    return check_name(value)


class CommonOptions(TypedDict, Generic[T], total=False):
    """The options of `ConnectionPool` that do not depend on the driver; see there."""

    configure: Annotated[Callable[[T], object] | None, None, _hook]
    min_size: Annotated[int, 0, _at_least(0)]
    max_size: Annotated[int, 10, _at_least(1)]
    name: Annotated[str | None, None, _name]
    timeout: Annotated[float | None, 30.0, _seconds(None)]
    max_waiting: Annotated[int, 0, _at_least(0)]
    max_lifetime: Annotated[float | None, 3600.0, _seconds(zero=False)]
    max_idle: Annotated[float | None, 600.0, _seconds(zero=False)]
    keepalive: Annotated[float | None, None, _seconds(zero=False)]
    overlap: Annotated[bool, True, _flag]
    limit: Annotated[ConnectionLimit | None, None, _limit]
    lifo: Annotated[bool, True, _flag]
    check_idle: Annotated[float | None, 0.5, _seconds()]
    check_timeout: Annotated[float | None, 5.0, _seconds()]
    connect_timeout: Annotated[float | None, None, _seconds()]
    close_timeout: Annotated[float | None, 5.0, _seconds()]
    max_connecting: Annotated[int | None, None, _count_or_all]
    fail_fast: Annotated[bool, False, _flag]
    leak_timeout: Annotated[float | None, None, _seconds(zero=False)]
    on_event: Annotated[Callable[[PoolEvent], object] | None, None, _hook]
    loan_events: Annotated[bool, False, _flag]
    fast_acquire: Annotated[bool, False, _flag]


class PoolOptions(CommonOptions[T], Generic[T], total=False):
    """All options of `ConnectionPool`."""

    close: Annotated[Callable[[T], object] | None, None, _hook]
    check: Annotated[Callable[[T], object] | None, None, _hook]
    reset: Annotated[Callable[[T], object] | None, None, _hook]
    commit: Annotated[Callable[[T], object] | None, None, _hook]
    is_closed: Annotated[Callable[[T], bool] | None, None, _hook]
    is_fatal: Annotated[Callable[[Exception], bool] | None, None, _hook]


_HINTS = get_type_hints(PoolOptions, include_extras=True)


class Options:
    """The options of one pool, checked. Of the times, infinity stands for "no limit".

    :raises TypeError: if an option is unknown or of the wrong type
    :raises ValueError: if a number is out of range
    """

    if TYPE_CHECKING:
        min_size: int
        max_size: int

        # Each user of another option says of which type it is.
        def __getattr__(self, name: str, /) -> Any: ...
        def __setattr__(self, name: str, value: Any, /) -> None: ...

    def __init__(
        self, connect: Callable[[], object], context: bool, options: dict[str, Any]
    ) -> None:
        if not callable(connect):
            raise TypeError(f"connect must be callable, not {type(connect).__name__}")
        check_signature("connect", connect, 0)
        unknown = options.keys() - _HINTS.keys()
        if unknown:
            raise TypeError(f"ConnectionPool has no option {min(unknown)!r}")
        self.connect = connect
        values: dict[str, Any] = {}
        for name, hint in _HINTS.items():
            default, check = hint.__metadata__
            values[name] = check(name, options.get(name, default))
        check_sizes(values["min_size"], values["max_size"])
        if options.get("connect_timeout") is None:
            values["connect_timeout"] = values["timeout"] or 30.0  # by then, waiters have given up
        if values["check"] is None:
            values["check_idle"] = values["keepalive"] = inf
        if values["close"] is None:
            values["close"] = _nothing if context else close_by_method
        self.context = context
        vars(self).update(values)
        # How long an idle connection may be handed out without a check.
        self.fresh: float = min(values["max_idle"], values["check_idle"])
        # How long `close` may take, even if borrowers get no time at all.
        self.time_to_close: float = values["close_timeout"] or 5.0


def _nothing(_: object) -> None:
    """Close what is closed by leaving its context."""


def parameters() -> Iterator[Parameter]:
    """Yield the options as keyword-only parameters, for ``help()`` and `inspect.signature`."""
    yield Parameter("context", Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    for name, hint in _HINTS.items():
        default, _ = hint.__metadata__
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint.__origin__)


def check_signature(name: str, hook: Callable[..., object], arguments: int) -> None:
    """Check that `hook` can be called with so many positional arguments.

    :raises TypeError: if not
    """
    try:
        hook_signature = signature(hook)
    except (TypeError, ValueError):
        return  # some functions written in C have none
    try:
        hook_signature.bind(*range(arguments))
    except TypeError as error:
        takes = "no argument" if arguments == 0 else "one argument"
        raise TypeError(f"{name} must take {takes}: {error}") from None


def check_sizes(min_size: int, max_size: int) -> tuple[int, int]:
    """Return both as ints.

    :raises TypeError: if one is not an integer
    :raises ValueError: if one is too small, or `min_size` exceeds `max_size`
    """
    min_size = check_count("min_size", min_size, 0)
    max_size = check_count("max_size", max_size, 1)
    if min_size > max_size:
        raise ValueError(f"min_size ({min_size}) must not exceed max_size ({max_size})")
    return min_size, max_size


def close_by_method(connection: Any) -> Any:
    """Call ``aclose()`` or else ``close()``, whichever the connection has."""
    # Looked up on the type: some clients have an attribute of any name.
    for name in ("aclose", "close"):
        if callable(getattr(type(connection), name, None)):
            return getattr(connection, name)()
    return None
