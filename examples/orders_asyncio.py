"""Run the service of `orders.py` under asyncio, by uvicorn: ``python orders_asyncio.py [PORT]``."""

import asyncio
import socket
import sys
from types import FrameType

import uvicorn

from orders import app, request_stop, wait_until_drained


class Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        request_stop()  # and do not stop at once


async def stop(server: Server) -> None:
    await wait_until_drained()
    server.should_exit = True


async def main(listener: socket.socket) -> None:
    server = Server(uvicorn.Config(app, log_level="warning"))
    async with asyncio.TaskGroup() as tasks:
        stopper = tasks.create_task(stop(server))
        await server.serve(sockets=[listener])
        stopper.cancel()  # in case that the server could not start


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(main(listener))
