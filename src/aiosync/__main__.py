"""The demo: ``python -m aiosync`` counts the most frequent words in a tree of text files.

How it uses aiosync is in `aiosync._demo._workers`.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ._demo._errors import explain
from ._demo._live import Notes
from ._demo._run import run
from ._demo._terminal import write_error

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, and return its exit status."""
    log, notes = logging.getLogger("aiosync"), Notes()
    log.addHandler(notes)
    try:
        return run(argv, notes)
    except BaseException as error:
        line, status = explain(error)
        write_error(line)
        return status
    finally:
        log.removeHandler(notes)


if __name__ == "__main__":
    sys.exit(main())
