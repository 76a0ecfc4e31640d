"""A program that loads a service: ``python load.py URL WHAT FIRST REQUESTS``.

WHAT is a request in which ``{n}`` stands for its number, such as ``POST /orders?item={n}``, or a
line for a TCP service. REQUESTS is their number, or "-": then they are sent until GET /readyz does
not answer 200. It prints "some" early, and a line of JSON at the end: the ``answers``, how many
connections were ``refused``, and the errors of requests that were ``lost``, which were sent and got
no answer.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from itertools import count
from typing import Any
from urllib.parse import urlsplit

CLIENTS = 12
TIMEOUT = 30.0


class Load:
    def __init__(self, url: str, what: str, first: int, requests: int | None) -> None:
        self.url = urlsplit(url)
        self.what = what
        self.numbers = iter(count(first) if requests is None else range(first, first + requests))
        self.enough = CLIENTS * 3 if requests is None else requests // 10
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.answers: list[Any] = []
        self.refused = 0
        self.lost: list[str] = []

    def work(self) -> None:
        while not self.done.is_set():
            with self.lock:
                number = next(self.numbers, None)
            if number is None:
                return
            self.send(self.what.replace("{n}", str(number)).replace("{m}", str(number % 10)))

    def send(self, what: str) -> None:
        try:
            connection = socket.create_connection((self.url.hostname, self.url.port), TIMEOUT)
        except OSError:
            with self.lock:
                self.refused += 1
            self.done.wait(0.05)
            return
        with connection:
            try:
                ask = ask_by_http if self.url.scheme == "http" else ask_by_line
                answer = ask(connection, what)
            except (OSError, http.client.HTTPException, ValueError) as error:
                with self.lock:
                    self.lost.append(f"{what}: {error!r}")
                return
        with self.lock:
            self.answers.append(answer)
            if len(self.answers) == self.enough:
                print("some", flush=True)

    def watch_readiness(self) -> None:
        while not self.done.wait(0.02):
            try:
                with socket.create_connection((self.url.hostname, self.url.port), TIMEOUT) as sock:
                    status, _ = ask_by_http(sock, "GET /readyz")
            except (OSError, http.client.HTTPException, ValueError):
                status = 0
            if status != 200:
                self.done.set()


def ask_by_http(connection: socket.socket, what: str) -> tuple[int, Any]:
    method, _, path = what.partition(" ")
    head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 0\r\n"
    connection.sendall(f"{head}\r\n".encode())
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        body = response.read().decode()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(body) if is_json else body


def ask_by_line(connection: socket.socket, what: str) -> Any:
    connection.sendall(f"{what}\n".encode())
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline())


def main(url: str, what: str, first: str, requests: str) -> None:
    load = Load(url, what, int(first), None if requests == "-" else int(requests))
    threads = [threading.Thread(target=load.work) for _ in range(CLIENTS)]
    if requests == "-":
        threads.append(threading.Thread(target=load.watch_readiness))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": load.answers, "refused": load.refused, "lost": load.lost}))


if __name__ == "__main__":
    main(*sys.argv[1:])
