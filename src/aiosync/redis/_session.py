"""A session of a `Redis`, from entering to leaving: its servers, and one task for each name."""

from __future__ import annotations

import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from anyio import create_task_group, move_on_after

from .._handoff import Mailbox
from .._park import (
    current_token,
    loop_ended,
    start_background_task,
    task_waiter,
    thread_waiter,
    wait_shielded,
    wake_all,
)
from ._carrier import Carrier, do_jobs
from ._conductor import Conductor
from ._errors import BackendUnavailable
from ._server import Server, describe, logger, noop
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from .._park import Waiter
    from ._batch import Settings
    from ._link import Client, Link

C = TypeVar("C", bound=Conductor)


class Session:
    """One session of a `Redis`, on one event loop.

    :param connect: returns a new client
    """

    def __init__(
        self, settings: Settings, connect: Callable[[], Client | Awaitable[Client]]
    ) -> None:
        self.settings = settings
        self.pid: int = os.getpid()
        self.finished: bool = False
        self._connect = connect
        self._closing = False
        # By kind, name and user. An object that is made just after the last one for its name was
        # dropped must not use the conductor of that one, which is about to be retired.
        self._conductors: dict[tuple[type[Conductor], str, object], Conductor] = {}
        # Conductors of objects that were garbage collected; each ends as soon as it is idle.
        self._retired: set[Conductor] = set()
        self._jobs: Mailbox[Callable[[], object]] = Mailbox()
        self._servers: list[Server] = []
        # The number of conductors with a carrier, or in a queue for one.
        self._carriers = 0
        # Conductors of the same name, by channel. The first one has a carrier.
        self._queues: dict[str, deque[Conductor]] = {}
        # In a cluster, the link with the newest layout.
        self._layout_link: Link | None = None
        self._has_warned = False
        self._opening: Ticket | None = None
        self._loop_token: object = None
        self._close_waiters: list[Waiter] = []
        # Set while the task runs.
        self._tasks: TaskGroup | None = None

    # -- From any thread.

    def conductor(self, kind: type[C], name: str, value: int, user: object = None) -> C:
        """Return the conductor for a name, a new one if there is none yet.

        :param user: stands for the object whose conductor it is
        """
        known = self._conductors.get((kind, name, user))
        if known is None:
            new = kind(name, value, self.settings)
            known = self._conductors.setdefault((kind, name, user), new)
            if known is new:
                self._jobs.post(lambda: self._begin(new))
        assert isinstance(known, kind)
        return known

    def retire(self, kind: type[Conductor], name: str, user: object = None) -> None:
        """End the conductor of an object that was garbage collected, as soon as it is idle."""
        known = self._conductors.get((kind, name, user))
        if known is not None:
            self._retired.add(known)
            del self._conductors[kind, name, user]
            known.retired = True
            known.post(noop)

    def post(self, conductor: Conductor, job: Callable[[], object], ticket: Ticket) -> None:
        """Run `job` in the carrier of `conductor`, or settle `ticket` if that has ended."""
        conductor.post(job)
        # Both are set before the last jobs are run. So either this job runs, or this sees the flag.
        if self.finished or conductor.ended:
            ticket.settle(_closed())

    def check_loop(self) -> None:
        """Raise the error for a thread whose answer will never come.

        :raises BackendUnavailable: if the event loop has ended without leaving the `Redis`
        """
        if loop_ended(self._loop_token):
            raise BackendUnavailable("the event loop of the Redis object has ended")

    def flush(self, new_waiter: Callable[[], Waiter]) -> list[Ticket]:
        """Return tickets that are settled when the server has received all that was posted."""
        tickets: list[Ticket] = []
        for conductor in self._all_conductors():
            ticket = Ticket(new_waiter())
            conductor.post(partial(conductor.flush, ticket))
            if conductor.ended:
                ticket.settle("")  # it had nothing more to say
            elif self.finished:
                ticket.settle(_closed())
            tickets.append(ticket)
        return tickets

    def _all_conductors(self) -> list[Conductor]:
        return [*list(self._conductors.values()), *list(self._retired)]

    # -- For the task that enters and leaves.

    async def open(self) -> None:
        """Start, and wait for the first connection.

        :raises BackendUnavailable: if there is no server
        :raises PermissionError: if the server does not allow what is needed
        """
        self._loop_token = current_token()
        self._opening = opening = Ticket(task_waiter())
        self._add_server(None)
        start_background_task(self._run, "aiosync.redis", self._finish)
        try:
            await opening.wait(None)
        except BaseException:
            await self.close()
            raise
        error: BaseException | None = opening.outcome
        if error is not None:
            await self.close()
            if isinstance(error, PermissionError | TypeError):
                raise error
            raise BackendUnavailable(f"no server: {describe(error)}") from error

    async def close(self) -> None:
        """Send what is outstanding, and stop. A cancellation is raised at the end."""
        self._closing = True
        self._jobs.post(noop)
        await wait_shielded(lambda: self.finished, self._close_waiters)

    # -- The tasks.

    async def _run(self) -> None:
        try:
            async with create_task_group() as tasks:
                self._tasks = tasks
                for server in self._servers:
                    tasks.start_soon(server.keep_connected)
                while not self._closing:
                    job = await self._jobs.wait(task_waiter(), None, noop)
                    job()
                with move_on_after(self.settings.lease / 3):
                    await self._end_all()
                tasks.cancel_scope.cancel()
        except Exception:
            logger.exception("aiosync.redis has failed")

    async def _end_all(self) -> None:
        do_jobs(self._jobs)  # start the conductors of names that were first used just now
        error = _closed()
        for conductor in self._all_conductors():
            conductor.retired = True
            conductor.post(partial(conductor.close, error))
        while self._carriers:
            job = await self._jobs.wait(task_waiter(), None, noop)
            job()

    def _finish(self) -> None:
        self.finished = True
        error = _closed()
        for conductor in self._all_conductors():
            do_jobs(conductor.inbox)
            conductor.close(error)
        if self._opening is not None:
            self._opening.settle(error)
        wake_all(self._close_waiters.copy())

    def _add_server(self, tag: str | None) -> Server:
        settings = self.settings
        server = Server(
            self._connect, settings.lease / 3, settings.prefix, tag, self._server_changed
        )
        self._servers.append(server)
        if self._tasks is not None:
            self._tasks.start_soon(server.keep_connected)
        return server

    def _server_changed(self, server: Server) -> None:
        """Handle a new link of `server`, or a failure to connect."""
        link = server.link
        if link is not None:
            if link.is_cluster:
                self._layout_link = link
                self._merge(server, link)
            self._check_policy(link)
        if self._opening is not None:
            self._opening.settle(None if link is not None else server.error)
            self._opening = None

    def _merge(self, server: Server, link: Link) -> None:
        """Drop `server` if another object is connected to the same node."""
        for other in self._servers:
            if other is not server and other.link is not None and other.link.node == link.node:
                server.duplicate_of = other
                server.wake()
        if server.duplicate_of is not None:
            self._servers.remove(server)

    def _check_policy(self, link: Link) -> None:
        if link.policy == "noeviction" or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "the server may evict keys (maxmemory_policy=%s), so permits and rounds may get lost; "
            "noeviction is safe",
            link.policy,
        )

    def _server_for(self, name: str, moved: Link | None) -> Server:
        """Return the server that has the keys of `name`.

        :param moved: the link that has just learned where they are now, or None
        """
        if moved is not None:
            self._layout_link = moved
        known = self._layout_link
        if known is None:
            return self._servers[0]
        node = known.node_of(name)
        for server in self._servers:
            if server.link is not None:
                at = server.link.node
            else:
                at = None if server.tag is None else known.node_of(server.tag)
            if at is not None and at == node:
                if server.tag is None:
                    server.tag = name
                return server
        return self._add_server(name)

    def _begin(self, conductor: Conductor) -> None:
        self._carriers += 1
        # One conductor of a name at a time, since each would release the permits of the other as
        # unknown. In FIFO order, so that a release or reset of an earlier object is sent before
        # the calls of a later one.
        queue = self._queues.setdefault(conductor.channel, deque())
        queue.append(conductor)
        if len(queue) == 1:
            self._start(queue)
        else:
            conductor.ahead = queue[0]
            conductor.post(noop)

    def _start(self, queue: deque[Conductor]) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._carry, queue)

    async def _carry(self, queue: deque[Conductor]) -> None:
        conductor = queue[0]
        try:
            await Carrier(queue, self._server_for).run()
        finally:
            conductor.ended = True
            do_jobs(conductor.inbox)
            conductor.close(_closed())
            self._retired.discard(conductor)
            self._carriers -= 1
            queue.popleft()
            if queue:
                for each in queue:
                    each.ahead = queue[0]
                queue[0].ahead = None
                self._start(queue)
            else:
                del self._queues[conductor.channel]
        self._jobs.post(noop)


class CurrentSession:
    """Refers to the present session of a `Redis`, if it has one."""

    __slots__ = ("session",)

    def __init__(self) -> None:
        self.session: Session | None = None

    def get(self) -> Session:
        """Return the session.

        :raises RuntimeError: if there is none, or if it belongs to the parent of this process
        """
        session = self.session
        if session is None or session.finished:
            raise RuntimeError("the Redis object is not entered: use 'async with redis'")
        self.refuse_fork()
        return session

    def refuse_fork(self) -> None:
        """Raise RuntimeError if the session belongs to the parent of this process."""
        if self.session is not None and self.session.pid != os.getpid():
            raise RuntimeError(
                "the Redis object was entered before a fork, and belongs to the parent process: "
                "make and enter one here"
            )

    def thread_waiter(self) -> Waiter:
        """Return a waiter for the calling thread, which wakes if the event loop has ended.

        :raises RuntimeError: if an event loop is running in this thread
        """
        session = self.get()
        try:
            return thread_waiter(session.check_loop)
        except RuntimeError:
            raise RuntimeError(
                "this would block the event loop that is running on this thread until the server "
                "answers: await the acquire() or wait() of the shared object itself"
            ) from None


def _closed() -> BackendUnavailable:
    return BackendUnavailable("the Redis object was closed")
