"""Barrier: a number of parties wait for one another, one round at a time.

This module decides the outcome of a round and makes it visible. `_park` knows how a task or thread
sleeps.

How it works without a lock
---------------------------
A `_Round` collects the parties of one generation. A party arrives by popping an index, which is one
atomic step. The outcome of a round is decided once, by an atomic ``dict.setdefault``: either by the
last party to arrive, or by the first caller that breaks the round.

*Publish first, look second.* A party publishes its waiter and then looks at the outcome. A caller
that decides the outcome publishes it and then wakes the waiters that it sees. Whatever the order of
the four steps, the party sees the outcome or is woken. An outcome never changes, and each round is
an object of its own, so a late step of one round cannot affect another.

- Cancellation: a party that leaves before the outcome is decided breaks the round. If it is too
  late for that, the cancellation is raised in that party only.
- Timeout: the same, but a party that is too late for that waits for the outcome.
- Interruption: a signal handler may raise between any two bytecodes of a party. The party then
  breaks the round, or, if the outcome is known, wakes the others again: the exception may have come
  in the middle of waking them. Waking a waiter twice does no harm.
- Action: the last party to arrive decides FULL, which is provisional. From then on no party can
  time out, but the action may still fail. The end of the action decides the "verdict" in the same
  way; only `abort`, `reset` and a failure of the action may break a full round.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import isawaitable
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Union

from ._created import created
from ._errors import (
    BrokenBarrierError,
    NeedsAsyncWith,
    NotCopied,
    broken_barrier,
    check_count,
    check_name,
    check_timeout,
)
from ._park import (
    ThreadWaiter,
    checkpoint,
    enable_ki_protection,
    end_wait,
    ki_protected,
    task_waiter,
    thread_waiter,
    wait_with_timeout,
    wake_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ._errors import BrokenReason
    from ._park import Waiter


class _Broken:
    """The outcome of a round that was broken. Decisions are compared by identity."""

    __slots__ = ("cause", "missing", "reason")

    def __init__(self, reason: BrokenReason, missing: int, cause: BaseException | None) -> None:
        self.reason: BrokenReason = reason
        self.missing = missing  # parties that had not arrived
        self.cause = cause  # the exception of the action


_Outcome = Union[str, _Broken]

# The other outcomes. FULL is provisional: all parties have arrived, so none can time out any more,
# but the action is still running and may fail.
_FULL, _TRIPPED = "full", "tripped"

_done = methodcaller("done")


class _Round:
    """One generation of the barrier."""

    __slots__ = ("decided", "indices", "outcome", "threads", "waiters", "woken")

    def __init__(self, indices: list[int]) -> None:
        # The indices that are still free, taken from the right: 0 first, parties - 1 last. A party
        # arrives by removing one.
        self.indices = indices
        # The tasks to be woken once the outcome is known, in their order of arrival.
        self.waiters: list[Waiter] = []
        # The threads. Only one of them is woken, and each thread that leaves wakes one more: if all
        # were woken at once, they would compete for the interpreter (see docs/performance.md). A
        # thread removes itself before it leaves, so a thread found in here has not left yet.
        self.threads: dict[Any, None] = {}
        # Written by setdefault only, so each key is written once:
        #   "outcome": by the last party (TRIPPED, or FULL if there is an action), or by a caller
        #       that breaks the round, whichever is first
        #   "verdict": after FULL, how the action ended: TRIPPED, or broken
        #   "next": the round to join instead, if this one has tripped, or was broken and then reset
        #   "latecomers": the waiters of callers that found no free index while the action runs;
        #       woken together with the waiters of the round
        self.decided: dict[str, Any] = {}
        # A copy of the decision, because every party reads it often: TRIPPED or broken; None
        # while the round fills and while its action runs. Written before the waiters are woken, and
        # never changed.
        self.outcome: _Outcome | None = None
        # Whether all have been woken. If not, the caller that should was perhaps interrupted.
        self.woken = False

    @ki_protected
    def break_(
        self,
        reason: BrokenReason,
        *,
        although_full: bool = False,
        cause: BaseException | None = None,
    ) -> None:
        """Break the round for all its parties, unless its outcome was decided before.

        In either case all parties are awake afterwards, unless the action still runs.

        :param although_full: whether the round may be broken while the action runs
        :param cause: the exception of the action
        """
        broken = _Broken(reason, len(self.indices), cause)
        decided = self.decided.setdefault("outcome", broken)
        if decided is _FULL:
            if although_full:
                decided = self.decided.setdefault("verdict", broken)
            else:
                decided = self.decided.get("verdict")
        if decided is not None:
            # Another caller may have decided but not written this yet.
            self.outcome = decided
            if not self.woken:
                self.wake()

    @ki_protected
    def wake(self) -> None:
        """Wake all parties, once the outcome is known. May be repeated."""
        if self.waiters:
            wake_all(self.waiters)
        if self.threads:
            self.wake_a_thread()
        latecomers = self.decided.get("latecomers")
        if latecomers is not None:
            wake_all(latecomers)
        self.woken = True

    @ki_protected
    def wake_a_thread(self) -> None:
        """Wake a thread that has not left yet, which may be the one that was woken last."""
        threads = list(self.threads)
        if threads:
            threads[-1].wake_threadsafe()

    @ki_protected
    def leave(self, waiter: Waiter | None) -> None:
        """If `waiter` is a thread, which has stopped waiting, remove it and wake the next one."""
        if isinstance(waiter, ThreadWaiter):
            self.threads.pop(waiter, None)
            # If the thread was interrupted while the action runs, no other may be woken yet.
            if self.threads and self.outcome is not None:
                self.wake_a_thread()


class _Rounds:
    """The state that all views of one barrier share: the chain of its rounds."""

    __slots__ = ("_indices", "action", "last", "latest", "name")

    def __init__(
        self, parties: int, action: Callable[[], object] | None, name: str | None = None
    ) -> None:
        enable_ki_protection()
        self.action = action
        self.name = name
        self.last = parties - 1
        self._indices = list(range(self.last, -1, -1))
        # The current round or an earlier one: `current` follows the chain from there. So it does no
        # harm if the slower one of two threads assigns the older round.
        self.latest = _Round(self._indices.copy())

    def current(self) -> _Round:
        """Return the round that newcomers join, or the one that keeps the barrier broken."""
        round = self.latest
        if round.outcome is not None:
            while round.outcome is _TRIPPED or "next" in round.decided:
                round = self.after(round)
            self.latest = round
        return round

    @ki_protected
    def after(self, round: _Round) -> _Round:
        """Return the round after `round`, which is over."""
        if "next" not in round.decided:
            round.decided.setdefault("next", _Round(self._indices.copy()))
        following: _Round = round.decided["next"]
        return following

    def error(self, round: _Round) -> BrokenBarrierError:
        """Return a new error for a party of `round`, which was broken."""
        broken = round.decided.get("verdict", round.decided["outcome"])
        parties = self.last + 1
        error = broken_barrier(self.name, broken.reason, parties - broken.missing, parties)
        if broken.cause is not None:
            error.__cause__ = broken.cause
        return error

    @ki_protected
    def trip(self, round: _Round, decision: str) -> bool:
        """Trip the round, in which all have arrived; return False if it was broken before.

        :param decision: "outcome", or "verdict" after an action
        """
        if round.decided.setdefault(decision, _TRIPPED) is not _TRIPPED:
            return False
        round.outcome = _TRIPPED
        self.latest = round.decided.setdefault("next", _Round(self._indices.copy()))
        round.wake()
        return True

    @ki_protected
    async def run_action(self, round: _Round, action: Callable[[], object]) -> bool:
        """Run the action of a round in which all have arrived, then trip the round.

        :return: False if the round was broken before the action ended
        """
        try:
            if round.decided.setdefault("outcome", _FULL) is not _FULL:
                return False
            result = action()
            if isawaitable(result):
                await result
            return self.trip(round, "verdict")
        except BaseException as error:
            round.break_("action", although_full=True, cause=error)
            raise
        finally:
            del round  # see Barrier.wait


@dataclass(frozen=True, slots=True)
class BarrierStatistics:
    """What `Barrier.statistics` returns: a snapshot."""

    parties: int
    """How many parties a round takes."""

    tasks_waiting: int
    """How many tasks sleep in the current round. A task that runs the action is not counted."""

    threads_waiting: int
    """How many threads sleep in the current round. A thread that runs the action is not counted."""

    broken: bool
    """Whether `Barrier.wait` raises BrokenBarrierError."""


class Barrier(NeedsAsyncWith, NotCopied):
    """A reusable point that `parties` tasks and threads all have to reach before any goes on.

    One object serves tasks of any number of asyncio and trio event loops, all in one round. It may
    be created anywhere: at import time, in a thread, before any event loop runs.

    The semantics are those of `threading.Barrier`, except that `wait` is awaited. A round *trips*
    when its last party has arrived and the action, if there is one, has returned. Until then the
    round can be broken, always for all of its parties. A round that has tripped cannot be broken,
    even if its parties have not run yet.

    ``async with barrier as index:`` waits once, on entry.

    If the action raises, that exception is the ``__cause__`` of the BrokenBarrierError of each
    other party and of later calls of `wait`. The broken barrier keeps the exception and its
    traceback until `reset`.

    :param parties: how many parties a round takes, 1 or more
    :param action: called without arguments by the last party to arrive, before any of them goes on.
        If it returns an awaitable, that is awaited. If it raises, that party gets the exception and
        the others get BrokenBarrierError.
    :param timeout: the default timeout of `wait`, in seconds; None: no limit
    :param name: appears in the repr and in errors
    :raises TypeError: if `parties` is not an integer, `action` is not callable, `timeout` is not a
        number, or `name` is not a str
    :raises ValueError: if `parties` is smaller than 1, or `timeout` is NaN
    """

    __slots__ = ("__weakref__", "_new_waiter", "_record", "_rounds", "_timeout")

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        *,
        name: str | None = None,
    ) -> None:
        parties = check_count("parties", parties, 1)
        if action is not None and not callable(action):
            raise TypeError(f"action must be callable or None, not {type(action).__name__}")
        self._timeout = check_timeout(timeout)
        self._rounds = _Rounds(parties, action, check_name(name))
        self._new_waiter: Callable[[], Waiter] = task_waiter
        created(self)

    def _for_threads(self) -> Barrier:
        """Return a barrier with the same state whose `wait` blocks the calling thread."""
        twin = object.__new__(Barrier)
        twin._timeout = self._timeout
        twin._rounds = self._rounds
        twin._new_waiter = thread_waiter
        return twin

    # Longer than other functions. A helper that awaits would be one more coroutine on the hot path,
    # see docs/performance.md. And `round`, `index` and `waiter` have to be in one frame, because an
    # exception may interrupt it between any two steps.
    @ki_protected
    async def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties have called this.

        May be called from any task under asyncio or trio. If it is cancelled before the last party
        has arrived, the barrier is broken for all parties. If it is cancelled later, no other party
        is affected. In both cases the cancellation is raised here. A caller that comes while the
        action of a round runs waits until the action has ended, whatever its timeout, and arrives
        then; the same as in `threading`.

        The party that arrives last does not yield to the event loop, unless the action does or
        there is only one party. The same as `asyncio.Barrier.wait`.

        Arguments, results and exceptions are those of `threading.Barrier.wait`.

        :param timeout: how many seconds to wait for the other parties to arrive; after that, the
            barrier is broken for all. 0 or less: do not wait. None: the timeout of the barrier. It
            does not limit the action: once all parties have arrived, none times out.
        :return: the index of the party in its round: 0 for the first to arrive, and so on; each of
            0 to parties - 1 goes to one party
        :raises BrokenBarrierError: if the barrier is broken, or is broken or reset while waiting
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        :raises anyio.NoEventLoopError: if it would have to wait, and is not run by asyncio or trio;
            the caller has not arrived then
        """
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        rounds = self._rounds
        new_waiter = self._new_waiter
        is_task = new_waiter is task_waiter
        round = rounds.latest
        waiter: Waiter | None = None
        index = -1  # not arrived
        try:
            while True:
                if round.outcome is not None:
                    round = rounds.current()
                    if isinstance(round.outcome, _Broken):
                        raise rounds.error(round)
                # Created before the party arrives, since it may raise. The last one needs none, and
                # a thread that does not wait; but a task that is alone makes a checkpoint.
                if len(round.indices) != 1:
                    if is_task or timeout is None or timeout > 0:
                        waiter = new_waiter()
                elif is_task and rounds.last == 0:
                    waiter = new_waiter()
                try:
                    index = round.indices.pop()
                    break
                except IndexError:
                    await self._wait_for_action(round)
                except BaseException:
                    # A signal handler has raised: the party may have arrived.
                    round.break_("cancelled")
                    raise
            if index == rounds.last:
                # A party that was cancelled or has timed out, but has not run since, breaks the
                # round.
                if any(map(_done, round.waiters)):
                    round.break_("cancelled")
                if rounds.action is None:
                    passed = rounds.trip(round, "outcome")
                else:
                    passed = await rounds.run_action(round, rounds.action)
                if not passed:
                    raise rounds.error(round)
                # A task that is alone never waits for others, so without a checkpoint other tasks
                # might never run.
                if is_task and index == 0:
                    await checkpoint()
                return index
            while True:
                if waiter is not None:
                    if isinstance(waiter, ThreadWaiter):
                        round.threads[waiter] = None
                    else:
                        round.waiters.append(waiter)
                    if round.outcome is not None:
                        break
                    if timeout is None:
                        await waiter
                    elif timeout > 0:
                        await wait_with_timeout(waiter, timeout)
                if round.outcome is None:
                    round.break_("timeout")
                if round.outcome is not None:
                    break
                # Too late to time out: all parties have arrived, and the action runs.
                round.threads.pop(waiter, None)
                waiter, timeout = new_waiter(), None
            if round.outcome is not _TRIPPED:
                raise rounds.error(round)
            if round.threads:
                round.leave(waiter)
            return index
        except BaseException:
            if waiter is not None:
                end_wait(waiter)  # a late wake must not disturb the next sleep of this task
            if index >= 0:
                round.break_("cancelled")
                round.leave(waiter)
            raise
        finally:
            # A stored exception would otherwise keep this round alive through its traceback, and
            # with it all rounds that follow.
            del round

    async def _wait_for_action(self, round: _Round) -> None:
        """Wait until the action of `round`, which has no free index, has ended."""
        waiter = self._new_waiter()
        round.decided.setdefault("latecomers", []).append(waiter)
        try:
            if round.outcome is None:
                await waiter
        finally:
            end_wait(waiter)
            del round  # see `wait`

    @ki_protected
    def abort(self) -> None:
        """Break the barrier until `reset`: all calls of `wait` raise BrokenBarrierError.

        This includes the parties that are waiting. If the action is running, its round is broken
        too: the party that runs the action gets the error afterwards, the others get it at once. A
        round that has tripped is not affected.

        May be called from anywhere, including threads, signal handlers and finalizers. Never
        blocks. The same as `threading.Barrier.abort`.
        """
        while True:
            round = self._rounds.current()
            round.break_("aborted", although_full=True)
            if round.outcome is not _TRIPPED:  # otherwise it has just tripped
                return

    @ki_protected
    def reset(self) -> None:
        """Return the barrier to its initial state; parties that wait get BrokenBarrierError.

        A round that has tripped is not affected. An action that is running goes on, so the action
        of the next round may run at the same time.

        May be called from anywhere, including threads, signal handlers and finalizers. Never
        blocks. The same as `threading.Barrier.reset`.
        """
        rounds = self._rounds
        round = rounds.current()
        round.break_("reset", although_full=True)
        rounds.latest = rounds.after(round)

    @property
    def name(self) -> str | None:
        """The name of the barrier, or None."""
        return self._rounds.name

    @property
    def parties(self) -> int:
        """How many parties have to arrive. The same as `threading.Barrier.parties`."""
        return self._rounds.last + 1

    @property
    def n_waiting(self) -> int:
        """How many have arrived in the current round. The same as `threading.Barrier.n_waiting`."""
        round = self._rounds.current()
        return self.parties - len(round.indices) if round.outcome is None else 0

    @property
    def broken(self) -> bool:
        """Whether `wait` raises BrokenBarrierError. The same as `threading.Barrier.broken`."""
        return isinstance(self._rounds.current().outcome, _Broken)

    def statistics(self) -> BarrierStatistics:
        """Return a snapshot of the current round. May be called from anywhere."""
        round = self._rounds.current()
        filling = round.outcome is None
        return BarrierStatistics(
            parties=self.parties,
            # A task that sleeps for the second time has two waiters here, of which one is done.
            tasks_waiting=sum(not w.done() for w in round.waiters.copy()) if filling else 0,
            threads_waiting=len(round.threads) if filling else 0,
            broken=isinstance(round.outcome, _Broken),
        )

    async def __aenter__(self) -> int:
        """Do what ``wait()`` does."""
        return await self.wait()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing, as in `asyncio.Barrier`."""

    def __repr__(self) -> str:
        name = "" if self.name is None else f" {self.name!r}"
        state = "broken" if self.broken else f"waiting={self.n_waiting}"
        return (
            f"<aiosync.{type(self).__name__}{name} parties={self.parties} {state} at {id(self):#x}>"
        )
