"""ConnectionPool: a `HandoffQueue` of connections, and the life of a connection.

_records   one connection: what the pool knows of it
_idle      the queue in which idle connections and those who wait for one meet
_ledger    what it counts, and whom it tells
_keeper    the background: opens, checks, resets, closes, keeps the size
_borrowing what borrows for the length of a block
_face      what a user sees
"""

from ._borrowing import Borrowing, Checkout
from ._face import ConnectionPool
from ._records import ConnectionInfo, PoolEvent

__all__ = ["Borrowing", "Checkout", "ConnectionInfo", "ConnectionPool", "PoolEvent"]
