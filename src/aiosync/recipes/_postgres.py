"""The statements that reset a session of PostgreSQL, besides the end of its transaction.

DISCARD ALL would do all of that, but it also forgets the prepared statements that the drivers still
count on, and it can't be sent together with others.
"""

# RESET ALL leaves out both of these. In this order: the second depends on the first.
AUTHORIZATION = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE;"
SETTINGS = """\
SELECT pg_catalog.pg_advisory_unlock_all();
CLOSE ALL;
UNLISTEN *;
RESET ALL;"""
TEMPORARY = "DISCARD TEMP; DISCARD SEQUENCES;"
# Those that were prepared by SQL; the drivers prepare theirs by the protocol.
PREPARED = """\
DO $$
DECLARE statement text;
BEGIN
    FOR statement IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP
        EXECUTE pg_catalog.format('DEALLOCATE %I', statement);
    END LOOP;
END $$;"""
SESSION = f"{AUTHORIZATION}\n{SETTINGS}\n{TEMPORARY}\n{PREPARED}"

LEFT_OPEN = "configure() has left a transaction open: let it end by a commit"

# The classes of SQLSTATE after which a connection is of no use: connection exception, operator
# intervention (of which the cancellation of a query is no reason), system error.
_FATAL = ("08", "57P", "58")


def is_fatal_state(sqlstate: str | None) -> bool:
    """Return whether an error with this SQLSTATE means that the connection is broken."""
    return sqlstate is not None and sqlstate.startswith(_FATAL)
