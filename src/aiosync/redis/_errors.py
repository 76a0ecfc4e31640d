"""The exceptions of `aiosync.redis`."""

from __future__ import annotations


# Without the suffix "Error": these are the usual names in systems with leases.
class LeaseLost(RuntimeError):  # noqa: N818
    """Raised if a permit was lost while it was held, so others may have had it since.

    Either the process got no reply from the server for 0.9 leases, because the connection was cut
    or the process was paused; or the server no longer has the permit.
    """


class BackendUnavailable(ConnectionError):  # noqa: N818
    """Raised if the server could not be reached for too long.

    The error of the client library is the ``__cause__``.
    """
