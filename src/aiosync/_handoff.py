"""Items and waiters, matched first-in first-out, and the proof that nothing is lost.

Everything is synchronous and lock-free, except the coroutine `HandoffQueue.wait`, which sleeps.
This module does not know what an item is (a permit, a connection) or what waits for it (a task of
any event loop, a thread).

Why it is correct without a lock
--------------------------------
Every operation on `items`, `waiters` and `granted` is a single C call on a builtin, so atomic:
no thread, signal handler or finalizer sees it half done. (Without the GIL, builtins lock
themselves; `_LockedDict` does so for OrderedDict.) A *removal is a claim*: if several threads try
to remove the same thing, one of them succeeds.

1. *No lost wake-up.* Both sides publish first and look second: `join` adds the waiter before it
   looks at the items, and `put` adds the item before it looks at the waiters. The side that
   publishes last sees the other, and gives one free item to the oldest waiter. A dispatcher that
   puts an item back publishes it, so it looks again too.
   Giving once for each item that was added is enough. A call is *open* from the moment it publishes
   until it has given an item, or has seen that there are no waiters or no free items. Let m be the
   number of waiters or the number of items that are free or held by a dispatcher, whichever is
   smaller. There are always at least m open calls. Publishing raises m by one at most, and opens a
   call. Giving lowers m by one, and closes a call. A call that sees no waiters closes while m is 0.
   A call that sees no free items closes while all items are held by other open calls. So when no
   call is open, m is 0: there are no waiters, or no free items.
2. *Conservation.* At any moment an item is in one place: in `items` (or `bulk`), held by one
   dispatcher, given to one waiter, or with the caller.
3. *One outcome.* A waiter is in `waiters` until it is removed. Only the dispatcher that removed it
   may give it an item. A waiter that removes itself was given nothing, and will be given nothing.
4. *Giving.* A dispatcher in a task on the event loop of the waiter calls ``set_result(item)``. If
   that fails because the waiter is over, the next waiter gets the item. From anywhere else, the
   dispatcher publishes the item in `granted`, and then looks whether the waiter is over. A waiter
   that leaves declares itself over, and then looks into `granted`. So at least one of the two sees
   the other, and removing the item from `granted` is the claim to it.
   (A waiter of a closed loop need not declare itself over, since waking it fails.)
5. *First-in first-out.* Waiters are served from the front only. A caller takes an item without
   waiting only if it sees no waiters.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from math import inf
from operator import length_hint
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._park import (
    FREE_THREADED,
    InvalidStateError,
    checkpoint,
    current_task,
    current_token,
    enable_ki_protection,
    end_wait,
    ki_protected,
    running_loop,
    wait_with_timeout,
    wake,
    wake_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ._park import Waiter

T = TypeVar("T")
D = TypeVar("D")


class _LockedDict(OrderedDict[Any, Any]):
    """An OrderedDict whose operations are atomic even where the interpreter has no GIL.

    The lock is held for one C call only. It is re-entrant, since a signal handler or a finalizer
    may interrupt a call.
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
if FREE_THREADED and hasattr(os, "register_at_fork"):
    # Otherwise a child could inherit it locked by a thread that it does not have.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )
_Waiters: type[OrderedDict[Any, Any]] = _LockedDict if FREE_THREADED else OrderedDict
_free_threaded_lock: AbstractContextManager[object] = _lock if FREE_THREADED else nullcontext()

# How many equal items `put_many` adds to `items`; an iterator in `bulk` counts the rest.
_MAX_COPIES = 256

_ABSENT = object()


class HandoffQueue(Generic[T]):
    """Free items and waiters; `dispatch` runs until at least one side is empty.

    Every plain method may be called from any thread, signal handler or finalizer, and never blocks.
    An item is never None.
    """

    __slots__ = ("bulk", "granted", "items", "waiters")

    def __init__(self, items: Iterable[T] = ()) -> None:
        enable_ki_protection()
        # Free items, taken from the right: the last one returned is the first one taken.
        self.items: deque[T] = deque(items)
        # Iterators over further free items, for when `items` is empty.
        self.bulk: deque[Iterator[T]] = deque()
        # The waiters, oldest first, each with its deadline; see `expire`. A waiter that was given
        # an item is not in here, although it may not have run yet.
        self.waiters: OrderedDict[Waiter, float | None] = _Waiters()
        # Items given to waiters from outside their event loop, by the id of the waiter. The waiter
        # itself as the key would keep a task of a closed loop alive, which puts its item back when
        # it is collected. A waiter leaves before it is collected, so no id in here is reused.
        self.granted: dict[int, T] = {}

    def free(self) -> int:
        """Return the number of free items. Not ``__len__``, which cannot exceed `sys.maxsize`."""
        return len(self.items) + sum(length_hint(items) for items in self.bulk.copy())

    def waiting(self) -> list[Waiter]:
        """Return the waiters, the oldest first."""
        while True:
            try:
                with _free_threaded_lock:  # iterating is not atomic without the GIL
                    return list(self.waiters)
            except RuntimeError:
                pass  # changed by another thread

    @ki_protected
    def put(self, item: T) -> None:
        """Add `item` to the free items, and serve the oldest waiter.

        `Semaphore.release` contains a copy of this.
        """
        self.items.append(item)
        if self.waiters:
            self.give(None)

    @ki_protected
    def put_many(self, item: T, n: int) -> None:
        """Add `item` `n` times, in constant memory."""
        self.items.extend(repeat(item, min(n, _MAX_COPIES)))
        if n > _MAX_COPIES:
            self.bulk.append(repeat(item, n - _MAX_COPIES))
        if self.waiters:
            self.dispatch()

    @ki_protected
    def get_nowait(self, default: D) -> T | D:
        """Remove and return a free item, or return `default` if none is free or there are waiters.

        `Semaphore.acquire` and `ConnectionPool.acquire` contain a copy of this.
        """
        while not self.waiters:
            try:
                return self.items.pop()
            except IndexError:
                if not self.bulk:
                    break
                item = self._pop_bulk()
                if item is not None:
                    return item
        return default

    @ki_protected
    def join(self, waiter: Waiter, deadline: float | None = None) -> None:
        """Add `waiter`, which may be given an item before this returns.

        The owner has to call `leave` afterwards, even if this call is interrupted, unless the sleep
        of the waiter returned an item.
        """
        self.waiters[waiter] = deadline
        if self.items or self.bulk:
            self.dispatch()

    @ki_protected
    def leave(self, waiter: Waiter) -> T | None:
        """End the wait of `waiter`. Return the item that it has been given, or None."""
        if self.waiters.pop(waiter, _ABSENT) is not _ABSENT:
            return None
        item: T | None = end_wait(waiter)
        return self.granted.pop(id(waiter), None) if item is None else item

    @ki_protected
    async def wait(
        self, waiter: Waiter, timeout: float | None, default: D, deadline: float | None = None
    ) -> T | D:
        """Wait in FIFO order for an item.

        `Semaphore.acquire` and `ConnectionPool._take` contain copies of this.

        :param waiter: a new waiter of the calling task or thread
        :param timeout: how many seconds to wait at most; None: no limit
        :param deadline: when to stop waiting, on the clock of the caller of `expire`
        :return: the item, or `default` if there was none in time
        """
        try:
            self.join(waiter, deadline)
            if waiter.done():  # an item came just now, so awaiting the waiter does not yield
                await checkpoint()
            item = await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
            if item is None:
                item = self.leave(waiter)
        except BaseException:
            item = self.leave(waiter)
            if item is not None:
                self.put(item)
            raise
        return default if item is None else item

    def expire(self, now: float) -> float:
        """Wake the waiters whose deadline has passed. Return the next deadline, or infinity.

        The caller's one timer replaces a timer for each waiter, see docs/performance.md. Waiters
        with a deadline have to join in the order of their deadlines, so all need the same timeout.
        """
        expired: list[Waiter] = []
        following = inf
        while True:
            try:
                with _free_threaded_lock:  # see `waiting`
                    for waiter, deadline in self.waiters.items():
                        if deadline is not None:
                            if deadline > now:
                                following = deadline
                                break
                            expired.append(waiter)
            except RuntimeError:
                expired.clear()  # changed by another thread
            else:
                wake_all(expired)
                return following

    @ki_protected
    def dispatch(self) -> None:
        """Give free items to waiters, the oldest first, until either side is empty."""
        while self.waiters and (self.items or self.bulk):
            self.give(None)

    @ki_protected
    def give(self, item: T | None) -> None:
        """Give `item` to the oldest waiter, or put it back if there is none.

        :param item: None: a free item; do nothing if there is none
        """
        if item is None:
            try:
                item = self.items.pop()
            except IndexError:
                item = self._pop_bulk()
                if item is None:
                    return  # another dispatcher took it
        token: Any = running_loop()  # inlined: the most common case of `current_token`
        if token is None or current_task(token) is None:
            token = current_token()
        waiters = self.waiters
        try:
            while True:
                waiter, _ = waiters.popitem(False)
                if waiter.get_loop() is token:
                    try:
                        waiter.set_result(item)  # type: ignore[union-attr]
                    except InvalidStateError:
                        continue  # cancelled or timed out, but has not run since
                    return
                if self._grant(waiter, item):
                    return
        except KeyError:
            self.put_back(item)

    @ki_protected
    def _grant(self, waiter: Waiter, item: T) -> bool:
        """Give `item` to a waiter of another event loop or thread; return False if it is over."""
        if waiter.done():
            return False
        granted, key = self.granted, id(waiter)
        granted[key] = item
        if waiter.done() or not wake(waiter):
            return granted.pop(key, None) is None  # None: the waiter took it
        return True

    @ki_protected
    def put_back(self, item: T) -> None:
        """Add an item that could not be given, because there was no waiter."""
        self.items.append(item)
        if self.waiters:
            self.dispatch()

    @ki_protected
    def _pop_bulk(self) -> T | None:
        while self.bulk:
            with _free_threaded_lock:
                try:
                    items = self.bulk[0]
                    item = next(items, None)
                    if item is not None:
                        return item
                    self.bulk.remove(items)
                except (IndexError, ValueError):
                    pass  # another thread removed it
        return None


class Mailbox(HandoffQueue[T]):
    """Items for one reader, first-in first-out."""

    __slots__ = ()

    @ki_protected
    def post(self, item: T) -> None:
        """Add `item`, and wake the reader. May be called from anywhere; never blocks."""
        # `put`, for the other end of the queue.
        self.items.appendleft(item)
        if self.waiters:
            self.give(None)
