"""The public class `Redis`."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from math import isfinite
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeVar

from .._errors import NotCopied, check_count, check_timeout
from .._loop_thread import LoopThread
from .._park import current_token, task_waiter
from ._arrivals import Arrivals
from ._barrier import DistributedBarrier
from ._batch import Settings
from ._connect import check_url, client_for
from ._permits import Permits
from ._semaphore import DistributedSemaphore
from ._server import clock
from ._session import CurrentSession, Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self, SupportsIndex

    from ._conductor import Conductor
    from ._link import Client

T = TypeVar("T", DistributedSemaphore, DistributedBarrier)


# Seconds. In a shorter lease no command could be answered.
_SHORTEST = 0.05


class Redis(NotCopied):
    """Semaphores and barriers on a Redis or Valkey server, shared by processes and machines.

    It may be created anywhere, at import time too. ``async with redis:`` connects; what
    `semaphore` and `barrier` return can be used while it is entered. It may be entered again later,
    also on another event loop. ``with redis:`` is for programs that have threads only: it runs an
    event loop in a thread of its own. Use it also if the event loop of a program may be blocked for
    long, since a blocked event loop sends no heartbeats.

    An object that is entered may be used by any thread and any event loop. After a fork, the child
    needs a `Redis` of its own.

    A user of the server with an ACL needs these rights, with `prefix` in place of ``aiosync``::

        ~aiosync:* &aiosync:*
        +info +script|load +evalsha +client|reply
        +subscribe +unsubscribe +publish
        +time +del +rename +pexpire +hget +hmget +hset +hdel +hlen +hkeys
        +zadd +zrem +zcard +zscore +zrange +zrangebyscore +zrangebylex +zlexcount +zpopmin

    A database other than 0 needs ``+select`` too, Sentinel ``+role``, and a Cluster
    ``+cluster|slots +config|get +ssubscribe +sunsubscribe +spublish``.

    The logger ``aiosync.redis`` reports lost connections and reconnections. coredis also logs each
    attempt to connect that fails late, with a long traceback:
    ``logging.getLogger("coredis").setLevel(logging.CRITICAL)`` silences it.

    :param url: such as ``redis://user:password@host:6379/0``, ``rediss://host`` (TLS) or
        ``unix:///path``; needs Redis 6.2 or Valkey. Special characters in the user and password
        are percent-encoded. TLS verifies the name of the host only with
        ``?ssl_check_hostname=true``.
    :param lease: how many seconds after the last heartbeat of a process its permits pass on, and
        its rounds are broken. It has to be the same in all processes.
    :param prefix: the beginning of the names of all keys and channels
    :param connect: a function, plain or async, that returns a new coredis client each time it is
        called, for Sentinel, Cluster (Redis 7.0 or Valkey), TLS and credentials; `url` is not used
        then
    :param give_up: after how many seconds without a server waiting callers get BackendUnavailable;
        None: three leases
    :param restart_gate: whether a semaphore without state on the server grants no permit until the
        server has run for one lease, since permits from before a restart may still be held
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if a number is out of range, or `url` is not such a URL
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        lease: float = 10.0,
        prefix: str = "aiosync",
        connect: Callable[[], Client | Awaitable[Client]] | None = None,
        give_up: float | None = None,
        restart_gate: bool = True,
    ) -> None:
        if (url is None) == (connect is None):
            raise TypeError("Redis() takes either a url or connect=")
        if url is not None and not isinstance(url, str):
            raise TypeError(f"url must be a str, not {type(url).__name__}")
        if url is not None:
            check_url(url)
        if connect is not None and not callable(connect):
            raise TypeError(f"connect must be callable, not {type(connect).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        if "{" in prefix:
            raise ValueError(f"prefix must not contain a brace, not {prefix!r}")
        self._lease = _check_seconds("lease", lease)
        self._prefix = prefix
        self._give_up = 3 * self._lease if give_up is None else _check_seconds("give_up", give_up)
        self._restart_gate = restart_gate
        self._url = url
        self._new_client = connect
        self._current = CurrentSession()
        self._known: weakref.WeakValueDictionary[
            tuple[type[Conductor], str], DistributedSemaphore | DistributedBarrier
        ] = weakref.WeakValueDictionary()
        self._loop = LoopThread()
        # Makes `setdefault` of `_known` atomic. Re-entrant, since a finalizer may interrupt it.
        self._lock = threading.RLock()

    def semaphore(self, name: str, value: SupportsIndex = 1) -> DistributedSemaphore:
        """Return the semaphore `name`, the same object for the same name.

        :param name: shared by all processes that use it
        :param value: how many permits there are, 1 or more; the same in all processes
        :raises ValueError: if `name` is empty or begins with a closing brace, or `value` is less
            than 1. Also if this process created the semaphore with another value; if another
            process did, `acquire` raises ValueError.
        :raises TypeError: if an argument has the wrong type
        """
        value = check_count("value", value, 1)
        known = self._known.get((Permits, _check_name(name)))
        if known is None:
            new = DistributedSemaphore(self._current, name, value)
            known = self._remember(Permits, name, new)
        assert isinstance(known, DistributedSemaphore)
        if known.value != value:
            raise ValueError(
                f"semaphore {name!r} was created with another value "
                f"(value={known.value} there, value={value} here)"
            )
        return known

    def barrier(
        self,
        name: str,
        parties: SupportsIndex,
        action: Callable[[], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> DistributedBarrier:
        """Return the barrier `name`, the same object for the same name.

        :param name: shared by all processes that use it
        :param parties: how many parties a round takes, 1 or more; the same in all processes
        :param action: a function, plain or async, that is run by the last party to arrive, if that
            is in this process, before any party passes
        :param timeout: how many seconds `wait` waits by default; None: no limit
        :raises ValueError: if `name` is empty or begins with a closing brace, or `parties` is less
            than 1, or `timeout` is NaN. Also if this process created the barrier with other
            arguments; if another process did with another number of parties, `wait` raises
            ValueError.
        :raises TypeError: if an argument has the wrong type
        """
        parties = check_count("parties", parties, 1)
        if action is not None and not callable(action):
            raise TypeError(f"action must be callable, not {type(action).__name__}")
        timeout = check_timeout(timeout)
        known = self._known.get((Arrivals, _check_name(name)))
        if known is None:
            new = DistributedBarrier(self._current, name, parties, action, timeout)
            known = self._remember(Arrivals, name, new)
        assert isinstance(known, DistributedBarrier)
        calls = known._calls
        if (calls.parties, calls.action, calls.timeout) != (parties, action, timeout):
            raise ValueError(
                f"barrier {name!r} was created with other arguments "
                f"(parties={calls.parties}, action={calls.action!r}, timeout={calls.timeout} "
                f"there; parties={parties}, action={action!r}, timeout={timeout} here)"
            )
        return known

    def _remember(
        self, kind: type[Conductor], name: str, new: T
    ) -> DistributedSemaphore | DistributedBarrier:
        # Two objects for one name would have two conductors, and the second would wait for ever for
        # the end of the first.
        with self._lock:
            known = self._known.setdefault((kind, name), new)
        if known is new:
            user = new._calls.user
            weakref.finalize(new, _retire, self._current, kind, name, user).atexit = False
        return known

    def _connect(self) -> Client | Awaitable[Client]:
        if self._new_client is not None:
            return self._new_client()
        assert self._url is not None
        return client_for(self._url, self._lease / 3)

    def _new_session(self) -> Session:
        settings = Settings(
            member=token_hex(12),
            clock=clock,
            lease=self._lease,
            prefix=self._prefix,
            give_up=self._give_up,
            restart_gate=self._restart_gate,
        )
        return Session(settings, self._connect)

    async def __aenter__(self) -> Self:
        """Connect. If it is cancelled, the object is not entered.

        :raises BackendUnavailable: if there is no server
        :raises PermissionError: if the server does not allow what is needed
        :raises RuntimeError: if it is entered already
        """
        session = self._current.session
        if session is not None and not session.finished:
            self._current.get()  # raises in a forked process
            raise RuntimeError("the Redis object is entered already")
        self._current.session = session = self._new_session()
        try:
            await session.open()
        except BaseException:
            self._current.session = None
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Send what is outstanding, for at most a third of a lease, then disconnect.

        Callers that still wait get BackendUnavailable, and permits that are still held are
        released. A cancellation is raised at the end.
        """
        session, self._current.session = self._current.session, None
        if session is not None:
            await session.close()

    def __enter__(self) -> Self:
        """Connect, on an event loop of its own, which runs in a thread until the block ends.

        For programs without an event loop. Raises what `__aenter__` does, and a TypeError if an
        event loop is running in this thread.
        """
        if current_token() is not None:
            raise TypeError(
                "Redis needs 'async with' in a task; plain 'with' is for programs of threads, "
                "outside of any event loop"
            )
        self._loop.start(self.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect, and end the event loop. See `__aexit__`."""
        self._loop.stop(partial(self.__aexit__, None, None, None))

    async def flush(self) -> None:
        """Wait until the server has received all calls so far of `release`, `abort` and `reset`.

        Cancellation only ends the wait.

        :raises BackendUnavailable: if there is no server for `give_up` seconds
        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        for ticket in self._current.get().flush(task_waiter):
            await ticket.wait_for_outcome()

    def __repr__(self) -> str:
        state = "closed" if self._current.session is None else "open"
        return f"<aiosync.redis.Redis prefix={self._prefix!r} {state} at {id(self):#x}>"


def _retire(current: CurrentSession, kind: type[Conductor], name: str, user: object) -> None:
    session = current.session
    if session is not None:
        session.retire(kind, name, user)


def _check_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not (isfinite(value) and value >= _SHORTEST):
        raise ValueError(f"{name} must be at least {_SHORTEST} seconds, not {value}")
    return float(value)


def _check_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    # Otherwise the hash tag would be empty, and the keys of the name on several servers.
    if not name or name[0] == "}":
        raise ValueError(f"name must not be empty or begin with a brace, not {name!r}")
    return name
