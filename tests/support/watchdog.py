"""A process that kills servers whose test run is gone, however the run ended.

PR_SET_PDEATHSIG is no alternative: it is sent when the *thread* that started the child ends, and
only Linux has it.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from contextlib import suppress

# It reads "+pid folder" and "-pid folder". At the end of the file this process is gone, and so must
# be what has been added and not removed.
_PROGRAM = """
import os, shutil, signal, sys
watched = {}
for line in sys.stdin:
    pid, _, folder = line[1:].rstrip("\\n").partition(" ")
    if line[0] == "+":
        watched[int(pid)] = folder
    else:
        watched.pop(int(pid), None)
for pid in watched:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
for folder in watched.values():
    shutil.rmtree(folder, ignore_errors=True)
"""

_lock = threading.Lock()
_watchdogs: dict[int, subprocess.Popen[str]] = {}  # by the process that started them


def watch(pid: int, folder: str) -> None:
    """Kill `pid` and remove `folder` when this process has ended, unless `unwatch` comes first."""
    _tell(f"+{pid} {folder}\n")


def unwatch(pid: int, folder: str) -> None:
    """Forget `pid`. Must follow the `wait` for it: its number may be used again."""
    _tell(f"-{pid} {folder}\n")


@atexit.register
def _end() -> None:
    watchdog = _watchdogs.pop(os.getpid(), None)
    if watchdog is not None and watchdog.stdin is not None:
        with suppress(BrokenPipeError):
            watchdog.stdin.close()
        watchdog.wait()


def _tell(line: str) -> None:
    with _lock:
        watchdog = _watchdogs.get(os.getpid())
        if watchdog is None:
            watchdog = _watchdogs[os.getpid()] = subprocess.Popen(
                [sys.executable, "-ISc", _PROGRAM],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        assert watchdog.stdin is not None
        with suppress(BrokenPipeError):
            watchdog.stdin.write(line)
            watchdog.stdin.flush()
