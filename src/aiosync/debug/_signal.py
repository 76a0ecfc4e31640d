"""Print the report on a signal, also while the event loop is blocked.

The handler of the signal writes the stack that it interrupts to a pipe. A thread waits at the other
end, and prints the report and that stack.

From Python 3.14 on, the handler is that of `faulthandler`. It runs at once, also while the main
thread is in a call of C that does not return. Before, it may crash a process that is running Python
code at that moment, so the handler is one of `signal`, which runs between two bytecodes of the main
thread.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import TextIO

log = logging.getLogger("aiosync.debug")

_STACK_HEADER = "Stack (most recent call first):\n"
# The pipe takes 64 KiB.
_MOST = 60_000


if sys.version_info >= (3, 14):

    def _listen(signum: int, pipe: int) -> Callable[[], object]:
        # Of one thread only, since the pipe takes 64 KiB.
        faulthandler.register(signum, pipe, all_threads=False)
        return partial(faulthandler.unregister, signum)

else:  # Python 3.11 to 3.13

    def _write_stack(pipe: int, signum: int, frame: FrameType | None) -> None:
        """Write what `faulthandler` writes."""
        lines = [_STACK_HEADER]
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
            frame = frame.f_back
        try:
            os.write(pipe, "".join(lines).encode(errors="replace")[:_MOST])
        except BlockingIOError:
            pass  # the report is being printed already

    def _listen(signum: int, pipe: int) -> Callable[[], object]:
        """Write the stack to a pipe on each signal. Return a function that ends this."""
        before = signal.signal(signum, partial(_write_stack, pipe))
        return partial(signal.signal, signum, signal.SIG_DFL if before is None else before)


class Dumper:
    """Prints the report whenever the process gets a signal.

    :param signum: the signal
    :param report: returns the text
    :param file: where to write it
    """

    def __init__(self, signum: int, report: Callable[[], str], file: TextIO) -> None:
        if not hasattr(faulthandler, "register"):
            raise RuntimeError("dump_on() needs signals, which this operating system does not have")
        self._report = report
        self._file = file
        self._read, self._write = os.pipe()
        # Otherwise the process would hang if nobody read the pipe and it were full.
        os.set_blocking(self._write, False)
        try:
            # Gives up the signal. In a forked process, the rest is the parent's.
            self.forget = _listen(signum, self._write)
        except BaseException:
            os.close(self._read)
            os.close(self._write)
            raise
        self._thread = threading.Thread(target=self._run, name="aiosync-dump", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            stack = os.read(self._read, 65536)
            if not stack:
                os.close(self._read)
                return
            text = stack.decode(errors="replace")
            try:
                if _STACK_HEADER in text:  # otherwise it is the rest of the last one
                    print(self._report(), file=self._file, flush=True)
                print(text, end="", file=self._file, flush=True)
            except Exception:  # such as a file that was closed
                log.exception("the report cannot be printed")

    def stop(self) -> None:
        """Give up the signal, which has its former handler again."""
        self.forget()
        os.close(self._write)
        self._thread.join()
