"""A job runner: threads with blocking code share a limit and a pool with an event loop.

``python importer.py [PORT]`` serves TCP clients, which send one command a line:

    import tea    a thread asks the price service for the price, and stores it
    verify tea    a task asks the price service, and compares the answer with what is stored
    stats         figures of the pool and of the limit

The answer is one line of JSON. SIGTERM lets the commands that were received end, and no more.

Environment variables: PRICES is the URL of the price service, DATABASE the path of the SQLite file,
BACKEND "asyncio" or "trio".
"""

import json
import os
import signal
import socket
import sqlite3
import sys
from queue import SimpleQueue
from threading import Thread
from typing import Any

import anyio
import httpx
from anyio import CancelScope
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from aiosync import Semaphore, as_threading
from aiosync.recipes import sqlite_pool

PRICES = os.environ["PRICES"]
THREADS = 6

upstream = Semaphore(4, name="price service")  # answers four requests at a time
pool = sqlite_pool(os.environ["DATABASE"], min_size=1, max_size=3, timeout=10, name="prices")
client = httpx.AsyncClient(base_url=PRICES, timeout=10)  # for tasks
blocking_client = httpx.Client(base_url=PRICES, timeout=10)  # for threads; stays open
stop_requests = Semaphore(0)


# --- the threads


class Job:
    """One item to import. `done` gets a permit at the end."""

    def __init__(self, item: str) -> None:
        self.item = item
        self.price = 0
        self.error: Exception | None = None
        self.done = Semaphore(0)


jobs: SimpleQueue[Job | None] = SimpleQueue()


def work() -> None:
    """Run jobs until None comes. This code blocks, and knows nothing of event loops."""
    for job in iter(jobs.get, None):
        try:
            run(job)
        except Exception as error:
            job.error = error
        finally:
            job.done.release()  # wakes the task that waits


def run(job: Job) -> None:
    with as_threading(upstream):
        response = blocking_client.get("/price", params={"item": job.item})
    job.price = response.raise_for_status().json()["price"]
    with as_threading(pool).connection() as connection, connection:  # the second: a transaction
        connection.execute("INSERT OR REPLACE INTO prices VALUES (?, ?)", [job.item, job.price])


# --- the event loop


def create_tables(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS prices (item TEXT PRIMARY KEY, price INTEGER)"
        )


def select_price(connection: sqlite3.Connection, item: str) -> int | None:
    row = connection.execute("SELECT price FROM prices WHERE item = ?", [item]).fetchone()
    return None if row is None else row[0]


async def import_item(item: str) -> dict[str, Any]:
    job = Job(item)
    jobs.put(job)
    await job.done.acquire()
    if job.error is not None:
        return {"error": str(job.error)}
    return {"item": item, "price": job.price}


async def verify_item(item: str) -> dict[str, Any]:
    async with upstream:
        response = await client.get("/price", params={"item": item})
    price = response.raise_for_status().json()["price"]
    return {"item": item, "price": price, "same": price == await pool.run(select_price, item)}


async def answer(line: str) -> dict[str, Any]:
    try:
        match line.split():
            case ["import", item]:
                return await import_item(item)
            case ["verify", item]:
                return await verify_item(item)
            case ["stats"]:
                return {"pool": pool.statistics().as_dict(), "free": upstream.value}
    except (httpx.HTTPError, TimeoutError) as error:
        return {"error": str(error)}
    return {"error": "no such command"}


async def serve_client(stream: SocketStream) -> None:
    lines = BufferedByteReceiveStream(stream)
    async with stream:
        try:
            while True:
                line = await lines.receive_until(b"\n", 1000)
                with CancelScope(shield=True):  # what was received gets its answer
                    await stream.send(json.dumps(await answer(line.decode())).encode() + b"\n")
        except (anyio.IncompleteRead, anyio.BrokenResourceError):
            pass  # the client has left


async def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop_requests.release())
    port = int(sys.argv[1]) if sys.argv[1:] else 8000
    threads = [Thread(target=work) for _ in range(THREADS)]
    async with client, pool:
        await pool.run(create_tables)
        for thread in threads:
            thread.start()
        async with (
            await anyio.create_tcp_listener(
                local_host="127.0.0.1", local_port=port, family=socket.AF_INET
            ) as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, serve_client)
            print(f"tcp://127.0.0.1:{listener.extra(SocketAttribute.local_port)}", flush=True)
            await stop_requests.acquire()
            tasks.cancel_scope.cancel()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)


if __name__ == "__main__":
    anyio.run(main, backend=os.environ.get("BACKEND", "asyncio"))
