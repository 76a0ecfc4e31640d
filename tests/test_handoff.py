"""HandoffQueue and the sleepers on their own: each step of a claim, in any order of the threads.

A `Step` stands for a sleeper, and lets a test do something at the very moment at which another
thread might: after a waiter was removed and before the decision, or between that and the bell.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiosync import Semaphore, _handoff, _park
from aiosync._handoff import HandoffQueue, new_claim
from aiosync._park import ThreadWaiter, run_in_thread


def nothing() -> None:
    pass


class Step:
    """A sleeper whose every step can be interrupted."""

    def __init__(
        self,
        before_grant: Callable[[], object] = nothing,
        before_bell: Callable[[], object] = nothing,
        loop_is_closed: bool = False,
    ) -> None:
        self.before_grant = before_grant
        self.before_bell = before_bell
        self.loop_is_closed = loop_is_closed
        self.is_cancelled = False
        self.bells = 0
        self.claim = new_claim()

    def join(self, queue: HandoffQueue[str]) -> None:
        queue.join(self, self.claim)  # type: ignore[arg-type]

    def leave(self, queue: HandoffQueue[str]) -> bool:
        return queue.leave(self, self.claim)  # type: ignore[arg-type]

    def done(self) -> bool:
        self.before_grant()
        return self.is_cancelled

    def get_loop(self) -> object:
        return self

    def set_result(self, result: None) -> None:
        raise AssertionError("this sleeper is never on the loop of who wakes it")

    def wake_threadsafe(self) -> None:
        self.before_bell()
        if self.loop_is_closed:
            raise RuntimeError("Event loop is closed")
        self.bells += 1


class TestMatching:
    def test_a_waiter_gets_an_item_that_is_put(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        queue.put("item")
        assert (waiter.bells, waiter.claim[0], queue.free()) == (1, "item", 0)
        assert waiter.leave(queue) is False

    def test_a_waiter_that_joins_looks_second(self) -> None:
        queue = HandoffQueue(["item"])
        waiter = Step()
        waiter.join(queue)
        assert (waiter.bells, waiter.claim[0], queue.free()) == (1, "item", 0)

    def test_the_oldest_is_served_first(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiters = [Step() for _ in range(3)]
        for waiter in waiters:
            waiter.join(queue)
        for number, waiter in enumerate(waiters):
            queue.put(str(number))
            assert waiter.claim[0] == str(number)

    def test_the_item_put_last_is_taken_first(self) -> None:
        queue = HandoffQueue(["a", "b"])
        queue.put("c")
        assert [queue.get_nowait(None) for _ in range(4)] == ["c", "b", "a", None]

    def test_a_newcomer_does_not_take_what_a_waiter_is_about_to_get(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        Step().join(queue)
        queue.items.append("item")  # another thread is in the middle of `put`
        assert queue.get_nowait(None) is None
        queue.dispatch()
        assert queue.free() == 0

    def test_who_leaves_gets_nothing(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)
        assert waiter.leave(queue) is True
        queue.put("item")
        assert (waiter.bells, len(queue.waiters), queue.free()) == (0, 0, 1)

    def test_a_cancelled_waiter_is_skipped(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(), Step()
        first.join(queue)
        second.join(queue)
        first.is_cancelled = True
        queue.put("item")
        assert (first.bells, second.bells) == (0, 1)
        assert first.leave(queue) is True
        assert second.leave(queue) is False


class TestRaces:
    def test_who_leaves_after_its_removal_and_before_the_grant_has_left(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        left: list[bool] = []
        waiter = Step(before_grant=lambda: left.append(waiter.leave(queue)))
        waiter.join(queue)
        queue.put("item")
        assert left == [True]
        assert (waiter.bells, queue.free()) == (0, 1)

    def test_who_leaves_after_the_grant_and_before_the_bell_owns_the_item(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        left: list[bool] = []
        waiter = Step(before_bell=lambda: left.append(waiter.leave(queue)))
        waiter.join(queue)
        queue.put("item")
        assert left == [False]
        assert (waiter.claim[0], waiter.bells, queue.free()) == ("item", 1, 0)

    def test_the_item_of_a_waiter_whose_loop_is_closed_goes_to_the_next(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(loop_is_closed=True), Step()
        first.join(queue)
        second.join(queue)
        queue.put("item")
        assert (second.claim[0], second.bells) == ("item", 1)
        # Its coroutine is destroyed at last, and finds that it has nothing.
        assert first.leave(queue) is True
        assert queue.free() == 0

    def test_a_coroutine_destroyed_while_its_loop_closes_takes_the_item_once(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        left: list[bool] = []
        waiter = Step(before_bell=lambda: left.append(waiter.leave(queue)), loop_is_closed=True)
        waiter.join(queue)
        queue.put("item")
        assert left == [False]
        assert (waiter.claim[0], queue.free()) == ("item", 0)

    def test_a_waiter_that_joins_while_another_is_skipped_is_served(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        late = Step()
        first = Step(before_grant=lambda: late.join(queue))
        first.is_cancelled = True
        first.join(queue)
        queue.put("item")
        assert late.bells == 1

    def test_an_item_that_is_put_while_another_is_handed_over_is_handed_over_too(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        first, second = Step(), Step()
        first.before_grant = lambda: queue.put("inner")
        first.join(queue)
        second.join(queue)
        queue.put("outer")
        assert {first.claim[0], second.claim[0]} == {"outer", "inner"}
        assert (first.bells, second.bells, queue.free()) == (1, 1, 0)

    def test_a_matcher_that_finds_the_items_gone_looks_again(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        waiter = Step()
        waiter.join(queue)

        class Fleeting(deque[str]):
            """Another matcher takes the only item, once, between the look and the removal."""

            stolen = False

            def pop(self) -> str:  # type: ignore[override]
                if not Fleeting.stolen:
                    Fleeting.stolen = True
                    raise IndexError
                return super().pop()

        queue.items = Fleeting(["item"])
        queue.dispatch()
        assert Fleeting.stolen
        assert waiter.claim[0] == "item"

    def test_a_matcher_that_finds_the_waiters_gone_gives_the_item_back(self) -> None:
        queue = HandoffQueue(["item"])

        class Fleeting(OrderedDict[Any, Any]):
            """Another matcher removes the only waiter between the look and the removal."""

            def popitem(self, last: bool = True) -> Any:
                self.clear()
                return super().popitem(last)

        queue.waiters = Fleeting({Step(): new_claim()})
        queue.dispatch()
        assert list(queue.items) == ["item"]


class TestReserves:
    def test_equal_items_beyond_the_stock_are_a_number(self) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        queue.put_many(True, sys.maxsize)
        assert queue.free() == sys.maxsize
        assert len(queue.items) < 1000
        for _ in range(5000):
            assert queue.get_nowait(False) is True
        assert queue.free() == sys.maxsize - 5000
        assert len(queue.items) < 1000

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
        assert not queue.reserves

    def test_a_waiter_gets_one_of_them(self) -> None:
        queue: HandoffQueue[Any] = HandoffQueue()
        queue.put_many(True, 1000)
        queue.items.clear()  # as if others had taken them
        waiter = Step()
        waiter.join(queue)
        assert waiter.bells == 1

    def test_a_reserve_that_another_thread_has_just_emptied_is_passed_over(self) -> None:
        class Fleeting(deque[Any]):
            """Not empty when it is looked at first."""

            looks = 0

            def __bool__(self) -> bool:
                Fleeting.looks += 1
                return Fleeting.looks == 1

        queue: HandoffQueue[bool] = HandoffQueue()
        queue.reserves = Fleeting()
        assert queue.get_nowait(False) is False
        assert Fleeting.looks == 2


class TestWithoutGIL:
    """The path for free-threaded interpreters, run on whichever this is."""

    def test_the_locked_dictionary_is_an_ordered_dictionary(self) -> None:
        queue: HandoffQueue[str] = HandoffQueue()
        queue.waiters = _handoff._Locked()
        first, second, third = Step(), Step(), Step()
        for waiter in (first, second, third):
            waiter.join(queue)
        assert second.leave(queue) is True
        queue.put("a")
        queue.put("b")
        assert (first.claim[0], third.claim[0]) == ("a", "b")
        with pytest.raises(KeyError):
            queue.waiters.popitem(last=False)
        assert queue.waiters.pop(first, "default") == "default"

    def test_a_bell_that_is_rung_twice_is_rung(self) -> None:
        sleeper = ThreadWaiter()
        assert _park.wake(sleeper, None) is True
        assert _park.wake(sleeper, object()) is True
        run_in_thread(_sleep(sleeper))


async def _sleep(sleeper: ThreadWaiter) -> None:
    await sleeper


class TestThreads:
    def test_a_thread_sleeps_until_the_bell_rings(self) -> None:
        sleeper = ThreadWaiter()
        assert sleeper.done() is False
        thread = threading.Thread(target=run_in_thread, args=[_sleep(sleeper)])
        thread.start()
        assert _park.wake(sleeper, _park.current_token()) is True
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
        live = [waiter for waiter in self.waiting if not waiter.is_cancelled]
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
            data.draw(st.sampled_from(self.waiting)).is_cancelled = True

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            waiter = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(waiter)
            assert waiter.leave(self.queue) is True

    @rule(data=st.data(), keep=st.booleans())
    def resume(self, data: st.DataObject, keep: bool) -> None:
        if self.granted:
            waiter, item = data.draw(st.sampled_from(self.granted))
            self.granted.remove((waiter, item))
            assert waiter.bells == 1
            assert waiter.leave(self.queue) is False
            assert waiter.claim[0] == item
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
        assert len(self.free) + len(granted) + len(self.held) == self.made


TestAnySequence = QueueMachine.TestCase
TestAnySequence.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestWhoIsRunning:
    @pytest.mark.parametrize("missing", ["sniffio", "trio"])
    def test_without_both_there_is_no_trio(
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

    def test_a_trio_task_that_is_being_rescheduled_can_not_be_aborted(self) -> None:
        async def main() -> object:
            sleeper = _park.task_waiter()
            assert isinstance(sleeper, _park.TrioWaiter)
            return sleeper._abort(None)

        assert trio.run(main) is trio.lowlevel.Abort.FAILED


def test_what_is_critical_is_told_at_a_checkpoint_if_trio_was_not_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semaphore = Semaphore()
    monkeypatch.setattr(_park, "_ki_protected", [nothing])
    trio.run(semaphore.acquire)
    assert _park._ki_protected == []
