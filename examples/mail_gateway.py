"""A gateway to a mail provider, which accepts four deliveries at a time from all of its processes.

Start as many processes as you like, on any number of machines: ``python mail_gateway.py [PORT]``.

    POST /mails?to=ann    deliver a mail, and return 202
    GET  /readyz          200 if permits can be had, 503 otherwise
    GET  /metrics         for Prometheus

Environment variables: PROVIDER is the URL of the mail provider, REDIS_URL that of a Redis or Valkey
server, LEASE after how many seconds the permits of a dead process pass on.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from aiosync.redis import BackendUnavailable, LeaseLost, Redis

redis = Redis(os.environ["REDIS_URL"], lease=float(os.environ.get("LEASE", "10")))
deliveries = redis.semaphore("mail-deliveries", 4)  # the same name and number in all processes
client = httpx.AsyncClient(base_url=os.environ["PROVIDER"], timeout=10)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with redis, client:
        yield


async def post_mail(request: Request) -> Response:
    # If the permit is lost, the block is cancelled before another process gets the permit. The
    # provider can refuse a request that it receives too late: the fences of permits grow.
    async with deliveries.hold() as permit:
        mail = {"to": request.query_params["to"], "fence": str(permit.fence)}
        response = await client.post("/deliver", params=mail)
    return JSONResponse({"receipt": response.raise_for_status().json()["receipt"]}, 202)


async def get_readyz(_: Request) -> Response:
    await deliveries.statistics()  # raises BackendUnavailable
    return PlainTextResponse("ready\n")


async def get_metrics(_: Request) -> Response:
    statistics = await deliveries.statistics()
    return PlainTextResponse(
        f"mail_deliveries_limit {statistics.limit}\n"
        f"mail_deliveries_held {statistics.held}\n"
        f"mail_deliveries_waiting {statistics.waiting}\n"
        f"mail_processes {statistics.members}\n"
    )


async def answer_unavailable(_: Request, error: Exception) -> Response:
    """Tell the client to try again: the mail has not been delivered, or nobody knows."""
    return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/mails", post_mail, methods=["POST"]),
        Route("/readyz", get_readyz),
        Route("/metrics", get_metrics),
    ],
    exception_handlers={
        LeaseLost: answer_unavailable,
        BackendUnavailable: answer_unavailable,
        httpx.HTTPError: answer_unavailable,
    },
)


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    asyncio.run(server.serve(sockets=[listener]))
