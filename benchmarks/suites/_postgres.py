"""The PostgreSQL server of the benchmarks.

What must live here: the one server that all rows use.
"""

from __future__ import annotations

import atexit
import functools
import sys
from pathlib import Path

from ..model import LeftOutError

# The server is started by a helper of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))
from support.postgres_server import PostgresServer


def host() -> str:
    """Return the host of a server that runs until the program ends.

    :raises LeftOutError: if there is none; it is not tried a second time
    """
    found = _start()
    if isinstance(found, LeftOutError):
        raise found
    return found.host


@functools.cache
def _start() -> PostgresServer | LeftOutError:
    why_not = PostgresServer.why_not()
    if why_not is not None:
        return LeftOutError(why_not)
    server = PostgresServer()
    atexit.register(server.__exit__)
    try:
        server.start()
    except RuntimeError as error:
        return LeftOutError(str(error))
    return server
