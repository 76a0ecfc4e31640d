"""Barrier: parties that wait for one another, a round at a time.

What must live here: the fate of a round, and what a user sees of it. How a party sleeps is
`_park`'s business.

How it works without a lock
---------------------------
A `_Round` collects the parties of one generation. Its fate is decided once, by an atomic
``dict.setdefault``: by the last party to arrive, or by whoever breaks it. A party first shows
itself and then looks at the fate; who decides the fate first writes it and then wakes those it
sees. So a waiter sees the fate, or is woken. A fate never changes, and the next round is another
object, so nothing that happens to the one can touch the other.
"""

from __future__ import annotations

from inspect import isawaitable
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Union

from ._errors import BrokenBarrierError, NotCopied, check_count, check_timeout
from ._park import (
    checkpoint,
    enable_ki_protection,
    ki_protected,
    task_waiter,
    thread_waiter,
    wait_with_timeout,
    wake_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from ._park import Waiter


class _Broken:
    """The fate of a round that was broken. Each decision is an object of its own."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


_Fate = Union[str, _Broken]

# The other fates. FULL is provisional: all have arrived, so nobody is late any more, but the action
# is still running and may fail.
_FULL, _TRIPPED = "full", "tripped"

_done = methodcaller("done")

_CANCELLED = "a party was cancelled or interrupted while it waited"
_GAVE_UP = "a party was cancelled, or ran out of time, as the last one arrived"
_TIMED_OUT = "a party waited longer than its timeout"
_ACTION_FAILED = "the action raised an exception"
_ABORTED = "abort() was called; call reset() to use the barrier again"
_RESET = "reset() was called"


class _Round:
    """One generation of the barrier."""

    __slots__ = ("decided", "fate", "next", "places", "threads", "waiters")

    def __init__(self, places: list[int]) -> None:
        # The indices not yet given out, taken from the right: 0 first, parties - 1 last. To remove
        # one is to arrive.
        self.places = places
        # The tasks to be woken once the fate is known, in the order in which they came.
        self.waiters: list[Waiter] = []
        # The threads. Of these only one is woken, and each that leaves wakes one more: to wake all
        # at once makes them fight for the interpreter, and a round of 8 take twice as long. A
        # thread takes itself out before it leaves. So whoever is found in here has not left yet.
        self.threads: dict[Any, None] = {}
        # Written by setdefault only, so each key once:
        #   "fate": by who came first, the last party (TRIPPED, or FULL if there is an action) or
        #       somebody who breaks the round
        #   "verdict": after FULL, how the action ended: TRIPPED, or broken
        #   "next": the round to join instead, if this one has tripped or was broken and then reset
        #   "latecomers": those who found no place while the action runs; woken with the waiters
        self.decided: dict[str, Any] = {}
        # TRIPPED or broken; None while it fills and while its action runs. Written before the
        # waiters are woken, and never changed. A copy, because all look at it all the time.
        self.fate: _Fate | None = None
        # The same of "next".
        self.next: _Round | None = None

    @ki_protected
    def break_(self, reason: str, *, although_full: bool) -> bool:
        """Break the round for all who are in it; False if its fate was decided before.

        :param although_full: whether this may happen while the action runs
        """
        broken = _Broken(reason)
        decided = self.decided.setdefault("fate", broken)
        if decided is _FULL:
            if not although_full:
                return False
            decided = self.decided.setdefault("verdict", broken)
        # Also if somebody else decided it and has not come to this yet: it is true from now on.
        self.fate = decided
        if decided is broken:
            self.wake()
        return decided is broken

    @ki_protected
    def abandon(self) -> None:
        """Break the round because a party was interrupted, who knows where."""
        if not self.break_(_CANCELLED, although_full=False) and self.fate is not None:
            self.wake()  # in case it was in the middle of that

    @ki_protected
    def wake(self) -> None:
        """Wake everybody, the fate being known. Does no harm if it is done again."""
        if self.waiters:
            wake_all(self.waiters)
        if self.threads:
            self.wake_a_thread()
        latecomers = self.decided.get("latecomers")
        if latecomers is not None:
            wake_all(latecomers)

    @ki_protected
    def wake_a_thread(self) -> None:
        """Wake one that has not left yet; which may be the one that was woken last time."""
        threads = list(self.threads)
        if threads:
            threads[-1].wake_threadsafe()  # for a thread this is the same from everywhere

    @ki_protected
    def leave(self, thread: Waiter) -> None:
        """Take out a thread that sleeps no more, and wake the next."""
        self.threads.pop(thread, None)
        # Not if it was interrupted while the action runs: nobody has been woken yet.
        if self.threads and self.fate is not None:
            self.wake_a_thread()

    def error(self) -> BrokenBarrierError:
        """Return what to raise for who lost against somebody that broke the round."""
        fate = self.decided.get("verdict", self.decided["fate"])
        return BrokenBarrierError(f"the barrier is broken: {fate.reason}")


class _Rounds:
    """All that the parties of one barrier share: the chain of rounds, and the rules."""

    __slots__ = ("_places", "action", "last", "latest")

    def __init__(self, parties: int, action: Callable[[], object] | None) -> None:
        enable_ki_protection()
        self.action = action
        self.last = parties - 1
        self._places = list(range(self.last, -1, -1))
        # The current round or one before it, from which `current` finds the way. So it does no
        # harm if of two threads the slower one assigns the older round.
        self.latest = _Round(self._places.copy())

    def current(self) -> _Round:
        """Return the round that newcomers join, or the one that keeps the barrier broken."""
        round = self.latest
        if round.fate is not None:
            while round.fate is _TRIPPED or round.next is not None:
                round = self.after(round)
            self.latest = round
        return round

    @ki_protected
    def after(self, round: _Round) -> _Round:
        """Return the round after `round`, which is over."""
        following = round.next
        if following is None:
            following = round.decided.setdefault("next", _Round(self._places.copy()))
            round.next = following  # of several who do this all assign the same one
        return following

    def unbroken(self) -> _Round:
        """Return the round that newcomers join.

        :raises BrokenBarrierError: if the barrier is broken
        """
        while True:
            round = self.current()
            fate = round.fate
            if fate is None:
                return round
            if fate is not _TRIPPED:
                try:
                    raise round.error()
                finally:
                    del round  # see Barrier.wait

    @ki_protected
    def fill(self, round: _Round) -> bool:
        """Arrive as the last party: trip the round, or let the action decide.

        :return: False if the round was broken before, or has just been abandoned
        """
        # Cancelled, or out of time, before we came, although it has not run since: then it was not
        # here with us.
        if any(map(_done, round.waiters)):
            round.break_(_GAVE_UP, although_full=False)
        decided = round.decided
        if self.action is not None:
            return decided.setdefault("fate", _FULL) is _FULL
        if decided.setdefault("fate", _TRIPPED) is not _TRIPPED:
            return False
        # The same as in `trip`, with fewer calls: a round of two takes 4% longer with them.
        round.fate = _TRIPPED
        round.next = self.latest = decided.setdefault("next", _Round(self._places.copy()))
        round.wake()
        return True

    @ki_protected
    def trip(self, round: _Round) -> bool:
        """Let everybody pass, the action being done; False if the round was broken before."""
        if round.decided.setdefault("verdict", _TRIPPED) is not _TRIPPED:
            return False
        round.fate = _TRIPPED
        self.latest = self.after(round)
        round.wake()
        return True

    @ki_protected
    def abort(self) -> None:
        round = self.current()
        while not round.break_(_ABORTED, although_full=True):
            following = self.current()
            if following is round:
                round.wake()  # it was broken before; in case that was interrupted
                return
            round = following  # it has just tripped

    @ki_protected
    def reset(self) -> None:
        round = self.current()
        if not round.break_(_RESET, although_full=True):
            round.wake()
        self.latest = self.after(round)


async def _run(action: Callable[[], object]) -> None:
    result = action()
    if isawaitable(result):
        await result


class Barrier(NotCopied):
    """A point that `parties` tasks or threads reach before any of them goes on; reusable.

    One object serves tasks of any number of asyncio and trio event loops, all in one round. It may
    be created anywhere: at import time, in a thread, before any event loop runs.

    The semantics are those of `threading.Barrier`, with `wait` to be awaited. A round *trips* when
    its last party has arrived and the action, if there is one, has returned. Until then it can be
    broken, for all of its parties alike; a round that has tripped stays so, for all of its parties
    alike, whatever happens before they get to run.

    ``async with barrier as index:`` waits once, on the way in.

    :param parties: how many there are, 1 or more
    :param action: called without arguments by the last party to arrive, before any of them goes on.
        If it returns an awaitable, that is awaited. If it raises, that party gets the exception and
        the others BrokenBarrierError.
    :param timeout: the `timeout` of a `wait` that is given none, in seconds; None: no limit
    :raises TypeError: if `parties` is no int, `action` is not callable or `timeout` is no number
    :raises ValueError: if `parties` is smaller than 1, or `timeout` is NaN
    """

    __slots__ = ("__weakref__", "_new_waiter", "_rounds", "_timeout")

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
    ) -> None:
        check_count("parties", parties, 1)
        if action is not None and not callable(action):
            raise TypeError(f"action must be callable or None, not {type(action).__name__}")
        self._timeout = check_timeout(timeout)
        self._rounds = _Rounds(parties, action)
        self._new_waiter: Callable[[], Waiter] = task_waiter

    def _for_threads(self) -> Barrier:
        """Return a barrier with the same state whose `wait` blocks the thread that runs it."""
        twin = object.__new__(Barrier)
        twin._timeout = self._timeout
        twin._rounds = self._rounds
        twin._new_waiter = thread_waiter
        return twin

    @ki_protected
    async def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties have called this.

        May be called from any task under asyncio or trio. If it is cancelled before the last party
        has arrived, the barrier is broken for all, and the cancellation is raised here. If it is
        cancelled later, the cancellation is raised here, and nobody else is concerned. Who comes
        while the action of a round runs arrives after that, whatever its timeout, as in threading.

        The party that arrives last does not yield to the event loop, unless the action does, or
        there is only one party; the same as `asyncio.Barrier.wait`.

        Arguments, results and exceptions are those of `threading.Barrier.wait`.

        :param timeout: how many seconds to wait for the others to arrive, at most; then the barrier
            is broken for all. 0 or less: do not wait. None: the barrier's own timeout. While the
            action runs all have arrived, and nobody runs out of time.
        :return: the index of the party in its round: 0 for the first to arrive, and so on; each of
            0 to parties - 1 goes to one party
        :raises BrokenBarrierError: if the barrier is broken, or is broken or reset while waiting
        :raises TypeError: if `timeout` is no number
        :raises ValueError: if `timeout` is NaN
        :raises anyio.NoEventLoopError: if it would have to wait, and is not run by asyncio or trio;
            it has not arrived then
        """
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        rounds = self._rounds
        round = rounds.latest
        is_task = self._new_waiter is task_waiter
        waiter: Waiter | None = None
        index = -1  # we have not arrived
        try:
            while True:
                if round.fate is not None:
                    round = rounds.unbroken()
                # Made before we arrive, since it may fail. Who arrives last needs none; but a task
                # that is the only party makes a checkpoint, which fails where this does. Nor does a
                # thread need one that will not wait.
                last = len(round.places) == 1
                if is_task:
                    waiter = None if last and rounds.last else task_waiter()
                elif last or (timeout is not None and timeout <= 0):
                    waiter = None
                else:
                    waiter = self._new_waiter()
                try:
                    index = round.places.pop()
                    break
                except IndexError:
                    # The action is running: there is no place for us before it has ended.
                    waiter = self._new_waiter()
                    round.decided.setdefault("latecomers", []).append(waiter)
                    if round.fate is None:
                        await waiter
                except BaseException:
                    # A signal handler has raised, and we may have arrived.
                    round.abandon()
                    raise
            if index == rounds.last:
                try:
                    if not rounds.fill(round):
                        raise round.error()
                    if rounds.action is not None:
                        await _run(rounds.action)
                        if not rounds.trip(round):
                            raise round.error()
                except BaseException:
                    if not round.break_(
                        _CANCELLED if rounds.action is None else _ACTION_FAILED,
                        although_full=True,
                    ):
                        round.wake()  # in case a signal handler has raised in the middle of it
                    raise
                if index == 0 and is_task:
                    # Nobody ever waits for others here, so others might never run.
                    await checkpoint()
                return index
            if waiter is not None:
                if is_task:
                    round.waiters.append(waiter)
                else:
                    round.threads[waiter] = None
                if round.fate is None:
                    if timeout is None:
                        await waiter
                    elif timeout > 0:
                        await wait_with_timeout(waiter, timeout)
            if round.fate is None and not round.break_(_TIMED_OUT, although_full=False):
                # Too late for that: all have arrived. What becomes of the round is not known. A
                # thread may sleep on the same bell again, if it has one.
                if is_task:
                    waiter = task_waiter()
                    round.waiters.append(waiter)
                elif waiter is None:
                    waiter = self._new_waiter()
                    round.threads[waiter] = None
                if round.fate is None:
                    await waiter
            if round.fate is not _TRIPPED:
                raise round.error()
            if not is_task and waiter is not None:
                round.leave(waiter)
            return index
        except BaseException as error:
            if is_task:
                # Not `abandon`: of a thousand that are cancelled at once each would wake all. It is
                # for handlers of signals that raise in the middle of waking others; trio lets none
                # do so, and asyncio's own only cancels.
                if index >= 0:
                    round.break_(_CANCELLED, although_full=False)
            else:
                if index >= 0 and not isinstance(error, BrokenBarrierError):
                    round.abandon()
                if waiter is not None:
                    round.leave(waiter)  # again, perhaps
            raise
        finally:
            # Or else an exception that somebody keeps would keep this round, by its traceback, and
            # so all that come after it.
            del round

    def abort(self) -> None:
        """Break the barrier: who waits, or calls `wait` later, gets BrokenBarrierError.

        Until `reset`. While an action runs, its round is broken as well: the others get the error
        at once, who runs the action gets it afterwards. A round that has tripped is not touched.

        May be called from anywhere, including threads, signal handlers and finalizers. Never
        blocks. The same as `threading.Barrier.abort`.
        """
        self._rounds.abort()

    def reset(self) -> None:
        """Make the barrier as new: who waits gets BrokenBarrierError, who comes later does not.

        A round that has tripped is not touched. An action that is running just now goes on; that of
        the next round may come to run beside it.

        May be called from anywhere, including threads, signal handlers and finalizers. Never
        blocks. The same as `threading.Barrier.reset`.
        """
        self._rounds.reset()

    @property
    def parties(self) -> int:
        """How many have to arrive. The same as `threading.Barrier.parties`."""
        return self._rounds.last + 1

    @property
    def n_waiting(self) -> int:
        """How many have arrived in the current round. The same as `threading.Barrier.n_waiting`."""
        round = self._rounds.current()
        return self.parties - len(round.places) if round.fate is None else 0

    @property
    def broken(self) -> bool:
        """Whether `wait` raises BrokenBarrierError. The same as `threading.Barrier.broken`."""
        return isinstance(self._rounds.current().fate, _Broken)

    def __aenter__(self) -> Coroutine[Any, Any, int]:
        """Do what ``wait()`` does."""
        return self.wait()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing; as `asyncio.Barrier` does."""

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiting={self.n_waiting}"
        return f"<aiosync.{type(self).__name__} parties={self.parties} {state} at {id(self):#x}>"
