"""ConnectionPool: an inventory of connections, and the task that keeps it in order.

_events       what users are told: events, statistics, facts about a connection
_limit        what the option `limit` takes
_entry        one connection, and its explicit state
_options      all options, each declared once
_backoff      pure: when to connect again after a failure
_policy       pure: what to open, check, replace and close, and when to look again
_inventory    all connections, and the queue in which idle ones and waiters meet
_statistics   counters and histograms
_hooks        runs the user's functions, and the pool's background tasks
_core         what the following five share
_closing      the end of a connection
_validation   reset and check, between two borrowers
_admission    a permit of `limit` before each connect
_connecting   connect and configure, and what a failure means
_maintenance  the task that carries plans out, and the shutdown
_checkout     a connection that is borrowed for the length of a block
_pool         ConnectionPool: the public API, and the hot path

Each imports only from those above it.
"""

from ._checkout import Checkout, Loan
from ._events import ConnectionInfo, Histogram, PoolEvent, PoolStatistics
from ._limit import ConnectionLimit, ConnectionPermit
from ._options import CommonOptions, PoolOptions
from ._pool import ConnectionPool, open_pools

__all__ = [
    "Checkout",
    "CommonOptions",
    "ConnectionInfo",
    "ConnectionLimit",
    "ConnectionPermit",
    "ConnectionPool",
    "Histogram",
    "Loan",
    "PoolEvent",
    "PoolOptions",
    "PoolStatistics",
    "open_pools",
]

# As in `aiosync`, which imports this package late.
for _name in __all__:
    if _name not in {"CommonOptions", "Loan"}:
        globals()[_name].__module__ = "aiosync"
