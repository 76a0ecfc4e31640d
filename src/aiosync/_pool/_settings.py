"""What a pool was told by its maker, checked.

What must live here: defaults that depend on other arguments, and a clear error for bad input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from .._errors import check_count, check_timeout
from ._records import ALWAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._face import ConnectionPool
    from ._records import PoolEvent

T = TypeVar("T")

if TYPE_CHECKING:

    class CommonOptions(TypedDict, Generic[T], total=False):
        """The options of `ConnectionPool` that do not depend on the driver."""

        configure: Callable[[T], object] | None
        min_size: int
        max_size: int
        name: str | None
        timeout: float | None
        max_waiting: int
        max_lifetime: float | None
        max_idle: float | None
        lifo: bool
        check_idle: float | None
        check_timeout: float | None
        connect_timeout: float | None
        close_timeout: float | None
        max_connecting: int
        reconnect_timeout: float | None
        reconnect_failed: Callable[[ConnectionPool[T]], object] | None
        fail_fast: bool
        leak_timeout: float | None
        on_event: Callable[[PoolEvent], object] | None
        fast_acquire: bool

    class PoolOptions(CommonOptions[T], Generic[T], total=False):
        """All of them."""

        close: Callable[[T], object] | None
        check: Callable[[T], object] | None
        reset: Callable[[T], object] | None


@dataclass
class Settings(Generic[T]):
    """The arguments of `ConnectionPool`, by their names. Of the times None means for ever."""

    connect: Callable[[], Any]
    close: Any
    check: Callable[[T], Any] | None
    configure: Callable[[T], Any] | None
    reset: Callable[[T], Any] | None
    min_size: int
    max_size: int
    name: str
    timeout: Any
    max_waiting: int
    max_lifetime: Any
    max_idle: Any
    lifo: bool
    check_idle: Any
    check_timeout: Any
    connect_timeout: Any
    close_timeout: Any
    max_connecting: int
    reconnect_timeout: Any
    reconnect_failed: Callable[[Any], Any] | None
    fail_fast: bool
    leak_timeout: Any
    on_event: Callable[[Any], Any] | None

    def __post_init__(self) -> None:
        if not callable(self.connect):
            raise TypeError(f"connect must be callable, not {type(self.connect).__name__}")
        for name in ("close", "check", "configure", "reset", "reconnect_failed", "on_event"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(f"{name} must be callable or None, not {type(hook).__name__}")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str or None, not {type(self.name).__name__}")
        check_sizes(self.min_size, self.max_size)
        check_count("max_waiting", self.max_waiting, 0)
        check_count("max_connecting", self.max_connecting, 1)
        self._finish("timeout", None)
        if self.connect_timeout is None:
            self.connect_timeout = self.timeout or 30.0  # who waits has given up by then
        self._finish("connect_timeout", None)
        if self.check is None:
            self.check_idle = None  # what else should become of it?
        for name in (
            "max_lifetime", "max_idle", "check_idle", "check_timeout", "close_timeout",
            "reconnect_timeout", "leak_timeout",
        ):  # fmt: skip
            self._finish(name, ALWAYS)
        for name in ("max_lifetime", "max_idle", "leak_timeout"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be more than 0 seconds, or None for ever")
        if self.close is None:
            self.close = close_by_method

    def _finish(self, name: str, for_ever: float | None) -> None:
        """Check a time, and put `for_ever` for those that mean it."""
        try:
            seconds = check_timeout(getattr(self, name))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if seconds is not None and seconds < 0:
            raise ValueError(f"{name} must be 0 seconds or more, or None, not {seconds}")
        setattr(self, name, for_ever if seconds is None else seconds)

    @property
    def time_to_close(self) -> float:
        """How long `close` may take, in seconds, even if borrowers get no time at all."""
        seconds: float = self.close_timeout or 5.0
        return seconds

    @property
    def fresh(self) -> float:
        """For how long an idle connection may be handed out just as it is, in seconds."""
        idle: float = min(self.max_idle, self.check_idle)
        return idle


def check_sizes(min_size: int, max_size: int) -> None:
    check_count("min_size", min_size, 0)
    check_count("max_size", max_size, 1)
    if min_size > max_size:
        raise ValueError(f"min_size ({min_size}) must not exceed max_size ({max_size})")


def close_by_method(connection: Any) -> Any:
    """Close a connection in the way most of them are: by ``aclose()``, or else ``close()``."""
    for name in ("aclose", "close"):
        method = getattr(connection, name, None)
        if callable(method):
            return method()
    return None  # there is nothing to close
