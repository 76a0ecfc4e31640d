"""A service that takes orders, for asyncio and trio alike.

`orders_asyncio.py` runs it under uvicorn, `orders_trio.py` under Hypercorn.

    POST /orders?item=tea&amount=2    ask for the price, store the order, return it
    GET  /orders/1                    return an order
    GET  /livez                       200 as long as the process works
    GET  /readyz                      200 from the end of the warm-up until SIGTERM, 503 otherwise
    GET  /metrics                     for Prometheus

Environment variables: PRICES is the URL of the price service, DATABASE the path of the SQLite file,
DRAIN for how many seconds the service goes on after SIGTERM.
"""

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import httpx
from anyio import create_task_group, sleep
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from aiosync import Barrier, PoolTimeout, Semaphore
from aiosync.recipes import sqlite_pool
from prometheus import CONTENT_TYPE, pool_metrics, semaphore_metrics

# All of these may be created before there is an event loop.
upstream = Semaphore(4, name="price service")  # answers four requests at a time
pool = sqlite_pool(os.environ["DATABASE"], min_size=1, max_size=3, timeout=10, name="orders")
client = httpx.AsyncClient(base_url=os.environ["PRICES"], timeout=10)
stop_requests = Semaphore(0)
catalog: set[str] = set()
state: Literal["warming up", "ready", "draining"] = "warming up"


# --- the database; these functions run in a thread of the pool


def create_tables(connection: sqlite3.Connection) -> None:
    with connection:  # a transaction
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders"
            " (number INTEGER PRIMARY KEY, item TEXT, amount INTEGER, total INTEGER)"
        )


def insert_order(connection: sqlite3.Connection, item: str, amount: int, total: int) -> int | None:
    with connection:
        cursor = connection.execute(
            "INSERT INTO orders (item, amount, total) VALUES (?, ?, ?)", [item, amount, total]
        )
        return cursor.lastrowid


def select_order(connection: sqlite3.Connection, number: int) -> tuple[str, int, int] | None:
    rows = connection.execute("SELECT item, amount, total FROM orders WHERE number = ?", [number])
    row: tuple[str, int, int] | None = rows.fetchone()
    return row


# --- warm-up and shutdown


def become_ready() -> None:
    global state
    if state == "warming up":
        state = "ready"


# Each party loads one thing. The last of them runs the action, before any of them goes on.
warm_up = Barrier(2, action=become_ready, name="warm-up")


async def prepare_database() -> None:
    await pool.run(create_tables)
    await warm_up.wait()


async def refresh_catalog() -> None:
    while True:
        try:
            items = (await client.get("/catalog")).raise_for_status().json()
        except httpx.HTTPError:
            await sleep(1)  # the service is not ready meanwhile, or has an old catalog
            continue
        catalog.clear()
        catalog.update(items)
        if state == "warming up":
            await warm_up.wait()
        await sleep(60)


def request_stop(*_: object) -> None:
    """Begin to shut down. This is a signal handler: `release` may be called anywhere."""
    stop_requests.release()


async def wait_until_drained() -> None:
    """Return when the server should stop.

    Between SIGTERM and that, the load balancer sees that the service is not ready, and sends no
    more requests. Those that are still sent are served.
    """
    global state
    await stop_requests.acquire()
    state = "draining"
    await sleep(float(os.environ.get("DRAIN", "5")))


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    # The server leaves this after the last response.
    async with client, pool, create_task_group() as tasks:
        tasks.start_soon(prepare_database)
        tasks.start_soon(refresh_catalog)
        yield
        tasks.cancel_scope.cancel()


# --- requests


async def post_order(request: Request) -> Response:
    item, amount = request.query_params["item"], int(request.query_params["amount"])
    if state == "warming up":
        return JSONResponse({"error": "warming up"}, 503, {"Retry-After": "1"})
    if item not in catalog:
        return JSONResponse({"error": "no such item"}, 404)
    async with upstream:
        response = await client.get("/price", params={"item": item})
    total = amount * int(response.raise_for_status().json()["price"])
    number = await pool.run(insert_order, item, amount, total)
    return JSONResponse({"number": number, "item": item, "amount": amount, "total": total}, 201)


async def get_order(request: Request) -> Response:
    number: int = request.path_params["number"]
    row = await pool.run(select_order, number)
    if row is None:
        return JSONResponse({"error": "no such order"}, 404)
    item, amount, total = row
    return JSONResponse({"number": number, "item": item, "amount": amount, "total": total})


async def get_livez(_: Request) -> Response:
    return PlainTextResponse("alive\n")


async def get_readyz(_: Request) -> Response:
    if state == "ready" and pool.healthy:
        return PlainTextResponse("ready\n")
    return PlainTextResponse("not ready\n", 503)


async def get_metrics(_: Request) -> Response:
    text = pool_metrics("orders", pool.statistics())
    text += semaphore_metrics("price service", upstream.statistics())
    return Response(text, media_type=CONTENT_TYPE)


async def answer_busy(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/orders", post_order, methods=["POST"]),
        Route("/orders/{number:int}", get_order),
        Route("/livez", get_livez),
        Route("/readyz", get_readyz),
        Route("/metrics", get_metrics),
    ],
    exception_handlers={PoolTimeout: answer_busy, httpx.HTTPError: answer_busy},
)
