"""Run the service of `orders.py` under trio, by Hypercorn: ``python orders_trio.py [PORT]``."""

import signal
import socket
import sys
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from orders import app, request_stop, wait_until_drained


async def main(listener: socket.socket) -> None:
    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    config.graceful_timeout = 30
    asgi_app: Any = app  # Hypercorn's type of applications is narrower than Starlette's
    await serve(asgi_app, config, shutdown_trigger=wait_until_drained, mode="asgi")


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    trio.run(main, listener)
