"""HandoffQueue and the waiters on their own: each step of a grant, in any order of the threads.

A `Step` stands for a waiter of another event loop. It lets a test do something at the very moment
at which another thread might: before the item is published for it, after that, and before it is
woken.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
import trio
import trio.testing
from anyio import create_task_group
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.helpers import LONG, settle

from aiosync import (
    Semaphore,
    _handoff,
    _park,
)
from aiosync._handoff import _MAX_COPIES, HandoffQueue
from aiosync._park import (
    ThreadWaiter,
    run_in_thread,
    task_waiter,
)
from aiosync._pool._entry import FOREVER


def nothing() -> None:
    pass


class Step:
    """A waiter of another event loop, whose every step can be interrupted."""

    def __init__(
        self,
        before_grant: Callable[[], object] = nothing,
        after_grant: Callable[[], object] = nothing,
        before_wake: Callable[[], object] = nothing,
        loop_is_closed: bool = False,
    ) -> None:
        self.looks = iter([before_grant, after_grant])
        self.before_wake = before_wake
        self.loop_is_closed = loop_is_closed
        self.over = False
        self.wakes = 0

    def join(self, queue: HandoffQueue[str], deadline: float | None = None) -> None:
        queue.join(self, deadline)  # type: ignore[arg-type]

    def leave(self, queue: HandoffQueue[str]) -> str | None:
        return queue.leave(self)  # type: ignore[arg-type]

    def done(self) -> bool:
        over = self.over
        next(self.looks, nothing)()
        return over

    def end(self) -> None:
        self.over = True

    def get_loop(self) -> object:
        return self

    def set_result(self, result: object) -> None:
        raise AssertionError("this waiter is never on the loop of its waker")

    def wake_threadsafe(self) -> None:
        self.before_wake()
        if self.loop_is_closed:
            raise RuntimeError("Event loop is closed")
        self.wakes += 1


class TestDispatch:
    def test_a_waiter_gets_an_item_that_is_put(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        queue.put("item")
        assert (waiter.wakes, queue.free()) == (1, 0)
        assert waiter.leave(queue) == "item"
        assert not queue.granted

    def test_a_waiter_that_joins_looks_second(self) -> None:
        queue = HandoffQueue(["item"])
        waiter = Step()
        waiter.join(queue)
        assert (waiter.wakes, queue.free()) == (1, 0)
        assert waiter.leave(queue) == "item"

    def test_a_waiter_that_joins_gets_an_item_in_bulk(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        queue.bulk.append(repeat("item", 2))
        waiter = Step()
        waiter.join(queue)
        assert (waiter.wakes, queue.free()) == (1, 1)
        assert waiter.leave(queue) == "item"

    def test_the_oldest_is_served_first(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiters = [Step() for _ in range(3)]
        for waiter in waiters:
            waiter.join(queue)
        for number in range(3):
            queue.put(str(number))
        assert [waiter.leave(queue) for waiter in waiters] == ["0", "1", "2"]

    def test_the_item_put_last_is_taken_first(self) -> None:
        queue = HandoffQueue(["a", "b"])
        queue.put("c")
        assert [queue.get_nowait(None) for _ in range(4)] == ["c", "b", "a", None]

    def test_a_newcomer_does_not_take_what_a_waiter_is_about_to_get(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        queue.items.append("item")  # another thread is in the middle of `put`
        assert queue.get_nowait(None) is None
        queue.dispatch()
        assert queue.free() == 0
        assert waiter.leave(queue) == "item"

    def test_a_waiter_that_has_left_gets_nothing(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        assert waiter.leave(queue) is None
        queue.put("item")
        assert (waiter.wakes, len(queue.waiters), queue.free()) == (0, 0, 1)

    def test_a_cancelled_waiter_is_skipped(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(), Step()
        first.join(queue)
        second.join(queue)
        first.over = True
        queue.put("item")
        assert (first.wakes, second.wakes) == (0, 1)
        assert first.leave(queue) is None
        assert second.leave(queue) == "item"

    def test_a_waiter_that_has_not_run_yet_is_not_among_the_waiters(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        queue.put("granted")
        queue.put("free")
        assert queue.get_nowait(None) == "free"
        assert waiter.leave(queue) == "granted"


class TestRaces:
    def test_a_waiter_that_leaves_before_the_grant_gets_nothing(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        left: list[object] = []
        waiter = Step(before_grant=lambda: left.append(waiter.leave(queue)))
        waiter.join(queue)
        queue.put("item")
        assert left == [None]
        assert (waiter.wakes, queue.free(), queue.granted) == (0, 1, {})

    @pytest.mark.parametrize("moment", ["after_grant", "before_wake"])
    @pytest.mark.parametrize("loop_is_closed", [False, True])
    def test_a_waiter_that_leaves_after_the_grant_takes_the_item_once(
        self, moment: str, loop_is_closed: bool
    ) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        left: list[object] = []
        hook: Any = {moment: lambda: left.append(waiter.leave(queue))}
        waiter: Step = Step(loop_is_closed=loop_is_closed, **hook)
        waiter.join(queue)
        queue.put("item")
        assert left == ["item"]
        assert (queue.free(), queue.granted) == (0, {})

    def test_a_dispatcher_takes_back_what_a_waiter_did_not_see(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()

        def leave_without_a_look() -> None:
            # It has declared itself over, and is about to look into `granted`.
            waiter.over = True

        waiter = Step(before_grant=leave_without_a_look)
        second = Step()
        waiter.join(queue)
        second.join(queue)
        queue.put("item")
        assert (waiter.wakes, second.wakes) == (0, 1)
        assert (waiter.leave(queue), second.leave(queue)) == (None, "item")

    def test_the_item_of_a_waiter_whose_loop_is_closed_goes_to_the_next(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(loop_is_closed=True), Step()
        first.join(queue)
        second.join(queue)
        queue.put("item")
        assert second.wakes == 1
        # The coroutine of the first is destroyed at last, and finds that it has nothing.
        assert first.leave(queue) is None
        assert second.leave(queue) == "item"
        assert queue.free() == 0

    def test_a_waiter_that_joins_while_another_is_skipped_is_served(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        late = Step()
        first = Step(before_grant=lambda: late.join(queue))
        first.over = True
        first.join(queue)
        queue.put("item")
        assert late.wakes == 1

    def test_a_waiter_that_joins_as_the_item_is_put_back_is_served(self) -> None:
        late = Step()

        class Queue(HandoffQueue[str]):
            __slots__ = ()

            def put_back(self, item: str) -> None:
                if not late.wakes and late not in list[Any](self.waiters):
                    late.join(self)
                super().put_back(item)

        queue = Queue()
        first = Step()
        first.over = True
        first.join(queue)
        queue.put("item")
        assert (late.wakes, queue.free()) == (1, 0)

    def test_an_item_that_is_put_while_another_is_handed_over_is_handed_over_too(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(before_grant=lambda: queue.put("inner")), Step()
        first.join(queue)
        second.join(queue)
        queue.put("outer")
        assert (first.wakes, second.wakes, queue.free()) == (1, 1, 0)
        assert {first.leave(queue), second.leave(queue)} == {"outer", "inner"}

    def test_a_dispatcher_that_finds_the_items_gone_looks_again(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)

        class Fleeting(deque[str]):
            """Another dispatcher takes the only item, once, between the look and the removal."""

            stolen = False

            def pop(self) -> str:  # type: ignore[override]
                if not Fleeting.stolen:
                    Fleeting.stolen = True
                    raise IndexError
                return super().pop()

        queue.items = Fleeting(["item"])
        queue.dispatch()
        assert Fleeting.stolen
        assert waiter.leave(queue) == "item"

    def test_a_waiter_that_is_published_as_the_item_is_put_gets_it(self) -> None:
        queue: HandoffQueue[Any] = HandoffQueue()
        waiter: Any = Step()

        class Late(deque[Any]):
            """Another thread has published its waiter, and has found no item."""

            def append(self, item: Any) -> None:
                queue.waiters[waiter] = None
                super().append(item)

        queue.items = Late()
        queue.put("item")
        assert waiter.leave(queue) == "item"

    def test_a_dispatcher_that_finds_the_waiters_gone_puts_the_item_back(self) -> None:
        queue = HandoffQueue(["item"])

        class Fleeting(OrderedDict[Any, Any]):
            """Another dispatcher removes the only waiter between the look and the removal."""

            def popitem(self, last: bool = True) -> Any:
                self.clear()
                return super().popitem(last)

        queue.waiters = Fleeting({Step(): None})
        queue.dispatch()
        assert list(queue.items) == ["item"]

    @pytest.mark.parametrize("how", ["cancel", "wake"])
    def test_a_task_that_is_over_as_it_is_handed_something_is_skipped(self, how: str) -> None:
        class Struck(asyncio.Future[Any]):
            """A signal handler comes as the dispatcher looks at this."""

            def get_loop(self) -> asyncio.AbstractEventLoop:
                if not self.done():
                    self.cancel() if how == "cancel" else self.set_result(None)
                return super().get_loop()

        async def main() -> None:
            queue: HandoffQueue[str] = HandoffQueue()
            waiter = Struck()
            queue.join(waiter)
            queue.put("item")
            assert queue.free() == 1
            assert queue.leave(waiter) is None

        asyncio.run(main())

    def test_an_item_that_a_task_was_given_directly_is_returned_by_leave(self) -> None:
        async def main() -> None:
            queue: HandoffQueue[str] = HandoffQueue()
            waiter = task_waiter()
            queue.join(waiter)
            queue.put("item")
            assert queue.leave(waiter) == "item"
            assert queue.free() == 0

        asyncio.run(main())
        trio.run(main)


class TestDeadlines:
    @pytest.mark.parametrize(
        ("now", "woken", "following"),
        [
            (0.5, [0, 0, 0, 0], 1.0),
            (1.0, [1, 0, 0, 0], 2.0),
            (2.5, [1, 0, 1, 0], 3.0),
            (9.0, [1, 0, 1, 1], float("inf")),
        ],
    )
    def test_expire_wakes_those_whose_deadline_has_passed_and_returns_the_next(
        self, now: float, woken: list[int], following: float
    ) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiters = [Step() for _ in range(4)]
        for waiter, deadline in zip(waiters, (1.0, None, 2.0, 3.0), strict=True):
            waiter.join(queue, deadline)
        assert queue.expire(now) == following
        assert [waiter.wakes for waiter in waiters] == woken
        assert len(queue.waiters) == 4  # they leave by themselves

    def test_expire_and_waiting_look_again_if_another_thread_changes_the_waiters(self) -> None:
        class Changing(OrderedDict[Any, Any]):
            looks = 0

            def changed(self) -> bool:
                self.looks += 1
                return self.looks == 1

            def items(self) -> Any:
                if self.changed():
                    raise RuntimeError("OrderedDict mutated during iteration")
                return super().items()

            def __iter__(self) -> Any:
                if self.changed():
                    raise RuntimeError("OrderedDict mutated during iteration")
                return super().__iter__()

        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        queue.waiters = Changing({waiter: 1.0})
        assert queue.expire(5.0) == float("inf")
        assert waiter.wakes == 1
        queue.waiters = Changing({waiter: 1.0})
        assert list[Any](queue.waiting()) == [waiter]


class TestBulk:
    def test_many_equal_items_take_constant_memory(self) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        queue.put_many(True, sys.maxsize)
        assert queue.free() == sys.maxsize
        assert len(queue.items) <= _MAX_COPIES
        for _ in range(5000):
            assert queue.get_nowait(False) is True
        assert queue.free() == sys.maxsize - 5000
        assert len(queue.items) <= _MAX_COPIES

    def test_each_of_them_is_taken_once(self) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        queue.put_many(True, 3000)
        queue.put_many(True, 7)
        queue.put_many(True, 300)
        taken = 0
        while queue.get_nowait(False):
            taken += 1
        assert taken == 3307
        assert queue.free() == 0
        assert not queue.bulk

    def test_as_many_as_are_kept_as_items_leave_no_empty_bulk_behind(self) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        for _ in range(10):
            queue.put_many(True, _MAX_COPIES)
            for _ in range(_MAX_COPIES):
                assert queue.get_nowait(False)
        assert not queue.bulk

    def test_waiters_get_them_too(self) -> None:
        queue: HandoffQueue[Any] = HandoffQueue()
        early = [Step() for _ in range(2 * _MAX_COPIES)]
        for waiter in early:
            waiter.join(queue)
        queue.put_many(True, 1_000_000)
        assert [waiter.wakes for waiter in early] == [1] * len(early)
        assert queue.free() == 1_000_000 - len(early)
        queue.items.clear()  # as if others had taken them
        late = Step()
        late.join(queue)
        assert late.wakes == 1

    def test_a_bulk_that_another_thread_has_just_emptied_is_skipped(self) -> None:
        class Fleeting(deque[Any]):
            """Not empty when it is looked at first."""

            looks = 0

            def __bool__(self) -> bool:
                self.looks += 1
                return self.looks <= 2

        queue: HandoffQueue[bool] = HandoffQueue()
        queue.bulk = Fleeting()
        assert queue.get_nowait(False) is False
        queue.bulk = Fleeting()
        queue.waiters[Step()] = None  # type: ignore[index]
        queue.dispatch()
        assert len(queue.waiters) == 1


class TestWithoutGIL:
    """The path for free-threaded interpreters, run on whichever this is."""

    def test_the_locked_dictionary_is_an_ordered_dictionary(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        queue.waiters = _handoff._LockedDict()
        first, second, third = Step(), Step(), Step()
        for waiter in (first, second, third):
            waiter.join(queue)
        assert second.leave(queue) is None
        queue.put("a")
        queue.put("b")
        with pytest.raises(KeyError):
            queue.waiters.popitem(last=False)
        assert queue.waiters.pop(first, "default") == "default"
        assert (first.leave(queue), third.leave(queue)) == ("a", "b")

    def test_a_thread_that_is_woken_twice_is_woken(self) -> None:
        waiter = ThreadWaiter()
        assert _park.wake(waiter) is True
        assert _park.wake(waiter) is True
        run_in_thread(_sleep(waiter))


async def _sleep(waiter: ThreadWaiter) -> None:
    await waiter


class TestThreads:
    def test_a_thread_sleeps_until_it_is_woken(self) -> None:
        waiter = ThreadWaiter()
        assert waiter.done() is False
        thread = threading.Thread(target=run_in_thread, args=[_sleep(waiter)])
        thread.start()
        assert _park.wake(waiter) is True
        thread.join(10)
        assert not thread.is_alive()

    def test_a_thread_sleeps_for_a_time(self) -> None:
        run_in_thread(_park.wait_with_timeout(ThreadWaiter(), 0.01))

    def test_what_takes_a_task_raises_where_it_stands(self) -> None:
        class Elsewhere:
            def __await__(self) -> Any:
                yield self

        async def stubborn() -> str:
            for _ in range(3):
                with pytest.raises(RuntimeError, match="a thread can't await this"):
                    await Elsewhere()
            return "done"

        async def meek() -> None:
            await Elsewhere()

        assert run_in_thread(stubborn()) == "done"
        with pytest.raises(RuntimeError, match="it takes a task to do that"):
            run_in_thread(meek())


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of operations does what a plain list of items and of waiters would do."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: HandoffQueue[str] = HandoffQueue()
        self.made = 0
        self.free: list[str] = []
        self.waiting: list[Step] = []
        self.granted: list[tuple[Step, str]] = []
        self.held: list[str] = []

    def _put(self, item: str) -> None:
        """Put `item` as the model expects it: to the oldest live waiter, or on the stack."""
        live = [waiter for waiter in self.waiting if not waiter.over]
        if live:
            # Those before it were found cancelled, and removed.
            self.waiting = self.waiting[self.waiting.index(live[0]) + 1 :]
            self.granted.append((live[0], item))
        else:
            self.waiting = []
            self.free.append(item)

    @rule()
    def put(self) -> None:
        self.made += 1
        item = str(self.made)
        self._put(item)
        self.queue.put(item)

    @rule()
    def take(self) -> None:
        expected = self.free.pop() if self.free and not self.waiting else None
        assert self.queue.get_nowait(None) == expected
        if expected is not None:
            self.held.append(expected)

    @rule()
    def join(self) -> None:
        waiter = Step()
        if self.free:
            self.granted.append((waiter, self.free.pop()))
        else:
            self.waiting.append(waiter)
        waiter.join(self.queue)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            data.draw(st.sampled_from(self.waiting)).over = True

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            waiter = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(waiter)
            assert waiter.leave(self.queue) is None

    @rule(data=st.data(), keep=st.booleans())
    def resume(self, data: st.DataObject, keep: bool) -> None:
        if self.granted:
            waiter, item = data.draw(st.sampled_from(self.granted))
            self.granted.remove((waiter, item))
            assert waiter.wakes == 1
            assert waiter.leave(self.queue) == item
            if keep:
                self.held.append(item)
            else:
                self._put(item)
                self.queue.put(item)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert list(self.queue.items) == self.free
        assert [*map(id, self.queue.waiters)] == [*map(id, self.waiting)]
        granted = [item for _, item in self.granted]
        assert sorted(self.queue.granted.values()) == sorted(granted)
        assert len(self.free) + len(granted) + len(self.held) == self.made


TestAnySequence = QueueMachine.TestCase
TestAnySequence.settings = settings(
    max_examples=2000 if LONG else 60,
    stateful_step_count=40,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],  # on a busy machine
)


@pytest.mark.anyio
async def test_a_shielded_wait_that_is_over_as_it_begins_does_not_sleep() -> None:
    waiters: list[Any] = []

    def done() -> bool:
        assert len(waiters) == 1  # it looks after it has published its waiter
        return True

    await _park.wait_shielded(done, waiters)
    assert waiters == []


class TestWhoIsRunning:
    @pytest.fixture(autouse=True)
    def _forget_trio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_park, "_current_library", _park._NotImported)

    @pytest.mark.parametrize("missing", ["sniffio", "trio", "trio.lowlevel"])
    def test_without_all_there_is_no_trio(
        self, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def main() -> type:
            await _park.checkpoint()
            return type(_park.task_waiter())

        monkeypatch.delitem(sys.modules, missing)
        assert issubclass(asyncio.run(main()), asyncio.Future)

    def test_sniffio_that_is_being_imported_by_another_thread_means_no_trio(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def main() -> type:
            return type(_park.task_waiter())

        monkeypatch.setitem(sys.modules, "sniffio", types.ModuleType("sniffio"))
        assert issubclass(asyncio.run(main()), asyncio.Future)

    def test_two_trio_runs_that_begin_at_once_share_the_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Emptied(list[Any]):
            """The other run takes the last one between the look and the removal."""

            def pop(self, index: Any = -1) -> Any:
                super().pop(index)
                return super().pop(index)

        async def main() -> None:
            _park.task_waiter()

        monkeypatch.setattr(_park, "_ki_protected", Emptied([nothing]))
        trio.run(main)
        assert _park._ki_protected == []

    def test_an_item_is_not_lost_if_the_trio_task_is_woken_before_it_is_delivered(self) -> None:
        # A signal handler puts it while `expire` is about to wake the task, and KeyboardInterrupt
        # is pending, so that the task cannot be rescheduled at once.
        async def main() -> list[str]:
            queue: HandoffQueue[str] = HandoffQueue()
            got = []

            async def wait() -> None:
                got.append(await queue.wait(task_waiter(), None, "lost"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                (waiter,) = queue.waiting()
                runner = trio.lowlevel.current_task()._runner
                runner.ki_pending = True
                queue.put("item")
                _park.wake_all([waiter])
                runner.ki_pending = False
            return got

        assert trio.run(main) == ["item"]

    def test_a_trio_task_that_is_being_rescheduled_can_not_be_aborted(self) -> None:
        async def main() -> object:
            waiter = _park.task_waiter()
            assert isinstance(waiter, _park.TrioWaiter)
            return waiter._abort(None)

        assert trio.run(main) is trio.lowlevel.Abort.FAILED


def test_what_is_critical_is_told_at_a_checkpoint_if_trio_was_not_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semaphore = Semaphore()
    monkeypatch.setattr(_park, "_ki_protected", [nothing])
    trio.run(semaphore.acquire)
    assert _park._ki_protected == []


@pytest.mark.skipif(not _park.FREE_THREADED, reason="only without the GIL")
class TestWithoutTheGil:
    def test_the_waiters_are_listed_while_they_come_and_go(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        over = threading.Event()

        def come_and_go() -> None:
            while not over.is_set():
                waiters = [ThreadWaiter() for _ in range(20)]
                for waiter in waiters:
                    queue.join(waiter, 2.0)
                for waiter in waiters:
                    queue.leave(waiter)

        threads = [threading.Thread(target=come_and_go) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(2000):  # this crashed the interpreter
            queue.waiting()
            queue.expire(1.0)
        over.set()
        for thread in threads:
            thread.join()
        assert queue.waiting() == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="only with fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_child_does_not_inherit_the_lock_of_a_thread(self) -> None:
        held = threading.Event()

        def hold() -> None:
            with _handoff._lock:
                held.set()
                time.sleep(0.1)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # kills it if it waits for the lock
            HandoffQueue[str]().join(ThreadWaiter())
            os._exit(0)
        thread.join()
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.asyncio
async def test_to_wake_one_whose_time_is_over_and_who_was_cancelled_does_no_harm() -> None:
    queue: HandoffQueue[int] = HandoffQueue()
    waiter = _park.task_waiter()
    queue.join(waiter, 1.0)
    assert isinstance(waiter, asyncio.Future)
    waiter.cancel()
    assert queue.expire(2.0) == FOREVER
    assert queue.leave(waiter) is None


@pytest.mark.anyio
async def test_who_waits_until_a_deadline_gets_the_default_then_or_the_item_before() -> None:
    queue: HandoffQueue[str] = HandoffQueue()
    results: list[object] = []

    async def wait(deadline: float) -> None:
        results.append(await queue.wait(task_waiter(), None, "default", deadline))

    async with create_task_group() as tg:
        for deadline in (1.0, 2.0):
            tg.start_soon(wait, deadline)
            await settle()
        assert queue.expire(0.0) == 1.0
        assert queue.expire(1.0) == 2.0
        await settle()
        assert results == ["default"]
        queue.put("item")
    assert results == ["default", "item"]
    assert (queue.free(), len(queue.waiters), queue.granted) == (0, 0, {})
