"""Programs that fork while an event loop runs, and go on in both processes.

What must live here: how they fork. What they do before and after it is the matter of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.helpers import run_python

if TYPE_CHECKING:
    import subprocess

_FORK = """
def fork():
    if os.fork():
        assert os.wait()[1] == 0, "the child has failed"
        return False
    return True

def leave():
    sys.stderr.flush()
    os._exit(0)

async def run_trio():
    await prepare()
    if fork():
        await child()
        leave()
    await parent()

if sys.argv[1] == "trio":
    trio.run(run_trio)
else:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(prepare())
    if fork():
        loop.run_until_complete(child())
        leave()
    loop.run_until_complete(parent())
    loop.close()
print("the end")
"""


def run_forking(program: str, backend: str) -> subprocess.CompletedProcess[str]:
    """Run a program, which prints "the end" if nothing was wrong in either process.

    :param program: it imports what it needs, also asyncio, os, sys and trio, and has the async
        functions ``prepare``, then ``child`` and ``parent`` for the two processes
    """
    return run_python("-c", program + _FORK, backend)
