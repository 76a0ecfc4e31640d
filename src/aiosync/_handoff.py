"""Items and waiters, matched first-in first-out: the heart of the package, and its proof.

Everything here is synchronous and without a lock: a caller joins the queue, sleeps by means of
`_park`, and comes back to see what was decided. Nothing here knows what an item is (a permit, a
connection) or who waits for it (a task of any event loop, a thread).

Why it is correct without a lock
--------------------------------
Every operation on `items`, `waiters` and a `Claim` is one C call on a builtin, and so one atomic
step: no thread, signal handler or finalizer sees it half done. (Without the GIL a lock makes it so;
see `_Locked` below.) A *removal is a claim*: of all who try to remove one thing, one succeeds.

1. *No lost wake-up.* Both sides publish first and look second: `join` adds the waiter before it
   looks at the items, `put` adds the item before it looks at the waiters. Whichever of the two
   publishes last sees the other, and calls `dispatch`. A matcher that gives back what it took
   publishes again, so it looks again. Items move from `reserves` to `items` without a look at the
   waiters; `join` looks at the two in that order, so it sees an item that moves meanwhile.
2. *Conservation.* An item is at any moment in one place: in `items`, in the hands of one matcher,
   in the claim of a waiter that was granted it, or with the caller. It moves on by removals only.
3. *One outcome.* A claim holds two tickets. Who draws the first decides: a matcher, that the waiter
   is granted an item, or the waiter itself, that it leaves (cancelled or out of time). Who draws
   the second, after a grant, owns the item: the waiter, or a matcher that could not wake it.
4. *First-in first-out.* Waiters are removed from the front only. A newcomer takes an item
   without waiting only if it sees nobody waiting.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, repeat
from math import inf
from operator import length_hint
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._park import (
    FREE_THREADED,
    InvalidStateError,
    current_token,
    enable_ki_protection,
    ki_protected,
    wait_with_timeout,
    wake,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ._park import Waiter

T = TypeVar("T")
D = TypeVar("D")

# What a waiter may still get: the item, its deadline, and two tickets that are drawn from the
# right. A list, because drawing from it is atomic; an object that holds one takes longer to make.
Claim = list[Any]
_COLLECTS, _DECIDES = object(), object()
new_claim: Callable[[], Claim] = [None, None, _COLLECTS, _DECIDES].copy


class _Locked(OrderedDict[Any, Any]):
    """An OrderedDict whose operations are atomic even where the interpreter has no GIL.

    Nothing but one C call runs under the lock, and it is re-entrant, so that a signal handler or
    a finalizer may come in between.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        with _lock:
            super().__setitem__(key, value)

    def pop(self, key: Any, default: Any = None) -> Any:
        with _lock:
            return super().pop(key, default)

    def popitem(self, last: bool = True) -> tuple[Any, Any]:
        with _lock:
            return super().popitem(last)


_lock = threading.RLock()
_Waiters: type[OrderedDict[Any, Any]] = _Locked if FREE_THREADED else OrderedDict
_restocking: AbstractContextManager[object] = _lock if FREE_THREADED else nullcontext()

# How many equal items are kept as items; the rest of them stays a number inside an iterator.
_STOCK = 256


class HandoffQueue(Generic[T]):
    """Items on one side, waiters on the other, never both for longer than one `dispatch`.

    Every method may be called from any thread, signal handler or finalizer, and never blocks.
    """

    __slots__ = ("items", "line", "reserves", "waiters")

    def __init__(self, items: Iterable[T] = ()) -> None:
        enable_ki_protection()
        # Free items. Taken from the right, so the last one returned is the first to be taken.
        self.items: deque[T] = deque(items)
        # Everybody who waits, the oldest first. A waiter stands here from `join` until a matcher
        # or the waiter itself removes it; being in here decides nothing, the tickets do.
        self.waiters: OrderedDict[Waiter, Claim] = _Waiters()
        # One entry for each who is inside `wait`: added before it can be seen in `waiters`, removed
        # when it knows the outcome. So if this is empty nobody waits. A list, because nothing else
        # has its truth told as fast: to ask `waiters` makes acquire and release take 4% longer.
        self.line: list[None] = []
        # Iterators over further free items, drawn upon when `items` runs out.
        self.reserves: deque[Iterator[T]] = deque()

    def free(self) -> int:
        """Return how many items are free; no ``__len__``, since that may not exceed sys.maxsize."""
        return len(self.items) + sum(length_hint(reserve) for reserve in self.reserves.copy())

    @ki_protected
    def put(self, item: T) -> None:
        """Add `item`: it goes to the oldest waiter, or is free."""
        self.items.append(item)
        if self.waiters:
            self.dispatch()

    @ki_protected
    def put_many(self, item: T, n: int) -> None:
        """Add `item` `n` times; the memory this takes does not depend on `n`."""
        self.items.extend(repeat(item, min(n, _STOCK)))
        if n > _STOCK:
            self.reserves.append(repeat(item, n - _STOCK))
        if self.waiters:
            self.dispatch()

    @ki_protected
    def get_nowait(self, default: D) -> T | D:
        """Remove and return a free item, or `default`: none is free, or somebody waits for it."""
        while not self.waiters:
            try:
                return self.items.pop()
            except IndexError:
                if not self._restock():
                    break
        return default

    @ki_protected
    def join(self, waiter: Waiter, claim: Claim) -> None:
        """Let `waiter` wait for an item. It may be granted one, and woken, before this returns.

        Whatever ends its sleep, or this call, the waiter has to `leave`; only if nothing but a
        grant can have ended it may it save itself the trouble.

        :param claim: a new one
        """
        self.waiters[waiter] = claim
        # In this order, in which `_restock` moves them, who does not look at the waiters.
        if self.reserves or self.items:
            self.dispatch()

    @ki_protected
    def leave(self, waiter: Waiter, claim: Claim) -> bool:
        """End the wait of `waiter`, which calls this itself, once, when it sleeps no more.

        :return: True if it leaves with empty hands; False if it was granted ``claim[0]`` in the
            meantime, which is now the caller's, to keep or to `put` back
        """
        ticket = claim.pop()
        if ticket is _DECIDES:
            self.waiters.pop(waiter, None)
        # The deadline, if a matcher took the item back because our loop had closed.
        return ticket is not _COLLECTS

    @ki_protected
    async def wait(
        self, waiter: Waiter, timeout: float | None, default: D, deadline: float | None = None
    ) -> T | D:
        """Wait in line for an item, with `waiter`, a new waiter of the task or thread that calls.

        :param timeout: how many seconds at most; None: no limit
        :param deadline: until when; but somebody else has to keep it, see `expire`
        :return: the item, or `default` if there was none in time
        """
        claim = new_claim()
        claim[1] = deadline
        line = self.line
        line.append(None)
        try:
            self.join(waiter, claim)
            await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
        except BaseException:
            if not self.leave(waiter, claim):
                self.put(claim[0])
            raise
        finally:
            line.pop()
        if (timeout is None and deadline is None) or not self.leave(waiter, claim):
            item: T = claim[0]
            return item
        return default

    def expire(self, now: float) -> float:
        """Wake those whose `deadline` is over; return that of the next, or infinity.

        This saves each waiter a timer of its own, half of what its wait costs. They have to come in
        the order of their deadlines: the same timeout, then, for all who give one.
        """
        at = current_token()
        while True:
            try:
                for waiter, claim in self.waiters.items():
                    deadline = claim[1]
                    if deadline is not None and deadline > now:
                        return float(deadline)
                    if deadline is not None:
                        wake(waiter, at)
            except RuntimeError:
                continue  # another thread has changed it meanwhile; to wake twice does no harm
            return inf

    @ki_protected
    def dispatch(self) -> None:
        """Hand free items to waiters, the oldest first, until one of the two has run out."""
        items, waiters, reserves = self.items, self.waiters, self.reserves
        at = current_token()
        # Items last: they may have come from the reserves meanwhile.
        while waiters and (items or (reserves and self._restock()) or items):
            try:
                item = items.pop()
            except IndexError:
                continue  # another matcher was faster
            try:
                waiter, claim = waiters.popitem(False)
            except KeyError:
                self.give_back(item)
                continue
            # Cancelled, or out of time, but not run since: it will leave with empty hands.
            if not waiter.done():
                # In its place before the ticket is drawn: who comes too late for that may read it.
                claim[0] = item
                if claim.pop() is _DECIDES:
                    # What `wake` does in the most common case, without the call.
                    if waiter.get_loop() is at:
                        try:
                            waiter.set_result(None)
                        except InvalidStateError:
                            pass
                        if reserves or items:
                            continue
                        return  # most often there is no other one
                    if wake(waiter, at) or claim.pop() is not _COLLECTS:
                        continue
            self.give_back(item)

    @ki_protected
    def give_back(self, item: T) -> None:
        """Put back an item that a matcher took, but found nobody for. It will look again."""
        self.items.append(item)

    @ki_protected
    def _restock(self) -> bool:
        """Move some items from the reserves to `items`, one atomic step each.

        :return: False if there is nothing to move
        """
        while self.reserves:
            with _restocking:
                try:
                    reserve = self.reserves[0]
                    self.items.extend(islice(reserve, _STOCK))
                    if not length_hint(reserve):
                        self.reserves.remove(reserve)
                except (IndexError, ValueError):
                    pass  # somebody else has emptied and removed it
            if self.items:
                return True
        return False
