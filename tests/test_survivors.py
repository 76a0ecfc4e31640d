"""What no other test would notice if it were wrong; found by mutation testing.

What must live here: tests of behaviour that a mutant has survived (see `mutation/mutate.py`) and
that fits in no other file. Much of it is what another thread, or a signal handler, sees in the
middle of a call; here it is put in its place by hand.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import trio
from anyio import WouldBlock, create_task_group, wait_all_tasks_blocked
from helpers import PATIENCE, Indices, InThread, run_python, until

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore, as_threading
from aiosync._barrier import _Round, _Rounds, _Threads
from aiosync._handoff import HandoffQueue
from aiosync._park import ThreadWaiter, TrioWaiter, end_wait, task_waiter, wake, wake_all

Kind = type[Semaphore]


@pytest.fixture(params=[Semaphore, BoundedSemaphore])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- In the middle of a release: the permit is there, and is about to go to who waits.


@pytest.mark.anyio
async def test_acquire_does_not_take_what_a_waiter_is_about_to_get(kind: Kind) -> None:
    semaphore = kind(1)
    await semaphore.acquire()
    served: list[str] = []

    async def wait(name: str) -> None:
        await semaphore.acquire()
        served.append(name)
        semaphore.release()

    async with create_task_group() as tg:
        tg.start_soon(wait, "waiter")
        await wait_all_tasks_blocked()
        semaphore._queue.items.append(True)  # another thread has begun to release
        tg.start_soon(wait, "newcomer")
        await wait_all_tasks_blocked()
        semaphore._queue.dispatch()  # and goes on
    assert served == ["waiter", "newcomer"]


@pytest.mark.anyio
async def test_acquire_waits_if_what_was_free_is_gone_when_it_comes_to_take_it(kind: Kind) -> None:
    semaphore = kind(2)
    semaphore.acquire_nowait()
    semaphore.acquire_nowait()

    class Gone(deque[bool]):
        def __bool__(self) -> bool:
            return True

    async def release_later() -> None:
        await wait_all_tasks_blocked()
        semaphore._items = semaphore._queue.items
        semaphore.release()

    async with create_task_group() as tg:
        tg.start_soon(semaphore.acquire)
        await wait_all_tasks_blocked()
        tg.start_soon(release_later)
        semaphore.release()  # who has waited is granted it, but does not run before this one waits
        semaphore._items = Gone()
        assert await semaphore.acquire() is True


@pytest.mark.anyio
async def test_it_is_locked_for_others_while_a_waiter_is_about_to_get_what_is_free(
    kind: Kind,
) -> None:
    semaphore = kind(1)
    await semaphore.acquire()
    async with create_task_group() as tg:
        tg.start_soon(semaphore.acquire)
        await wait_all_tasks_blocked()
        semaphore._queue.items.append(True)
        assert semaphore.locked()
        semaphore._queue.dispatch()


def test_a_vain_acquire_nowait_is_none_that_may_be_released() -> None:
    semaphore = BoundedSemaphore(1)
    semaphore.acquire_nowait()
    with pytest.raises(WouldBlock):
        semaphore.acquire_nowait()
    semaphore.release()
    with pytest.raises(ValueError, match="released too often"):
        semaphore.release()


# -- Deadlines that the caller of `expire` keeps.


@pytest.mark.anyio
async def test_who_waits_until_a_deadline_gets_the_default_then_or_the_item_before() -> None:
    queue: HandoffQueue[str] = HandoffQueue()
    results: list[object] = []

    async def wait(deadline: float) -> None:
        results.append(await queue.wait(task_waiter(), None, "default", deadline))

    async with create_task_group() as tg:
        for deadline in (1.0, 2.0):
            tg.start_soon(wait, deadline)
            await wait_all_tasks_blocked()
        assert queue.expire(0.0) == 1.0
        assert queue.expire(1.0) == 2.0
        await wait_all_tasks_blocked()
        assert results == ["default"]
        queue.put("item")
    assert results == ["default", "item"]
    assert (queue.free(), len(queue.waiters), queue.granted) == (0, 0, {})


# -- Barriers.


@pytest.mark.anyio
@pytest.mark.parametrize("parties", [2, 3])
async def test_the_last_to_arrive_goes_on_without_a_checkpoint(parties: int) -> None:
    barrier = Barrier(parties)
    async with create_task_group() as tg:
        for _ in range(parties - 1):
            tg.start_soon(barrier.wait)
        await wait_all_tasks_blocked()
        with pytest.raises(StopIteration) as stop:
            barrier.wait().send(None)
        assert stop.value.value == parties - 1


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [0, -0.5, -1])
async def test_no_patience_breaks_the_barrier_without_a_checkpoint(timeout: float) -> None:
    with pytest.raises(BrokenBarrierError, match="broken: timeout"):
        Barrier(2).wait(timeout).send(None)


def test_a_thread_without_patience_that_comes_while_the_action_runs_waits_for_its_end() -> None:
    began, proceed = threading.Event(), threading.Event()

    def action() -> None:
        began.set()
        assert proceed.wait(PATIENCE)

    view = as_threading(Barrier(2, action))
    parties = [InThread(view.wait), InThread(view.wait)]
    assert began.wait(PATIENCE)
    late = InThread(lambda: view.wait(0))
    until(lambda: "latecomers" in view._shared._rounds.latest.decided)
    assert not late.done()
    proceed.set()
    assert {party.result() for party in parties} == {0, 1}
    assert isinstance(late.result(), BrokenBarrierError)


def test_who_is_interrupted_before_it_has_arrived_does_not_end_the_action_of_others() -> None:
    began, proceed = threading.Event(), threading.Event()

    def action() -> None:
        began.set()
        assert proceed.wait(PATIENCE)

    class Interrupt(BaseException):
        pass

    class Indices(list[int]):
        def pop(self, index: Any = -1) -> int:
            raise Interrupt

    view = as_threading(Barrier(2, action))
    parties = [InThread(view.wait), InThread(view.wait)]
    assert began.wait(PATIENCE)
    view._shared._rounds.latest.indices = Indices()
    with pytest.raises(Interrupt):
        view.wait()
    assert not view.broken
    proceed.set()
    assert {party.result() for party in parties} == {0, 1}


def test_a_thread_that_is_interrupted_while_the_action_runs_keeps_no_other_asleep() -> None:
    class Interrupt(BaseException):
        pass

    class Interrupted(ThreadWaiter):
        def __await__(self) -> Any:
            assert acting.wait(PATIENCE)
            raise Interrupt

    def action() -> None:
        acting.set()
        until(lambda: parties[1].done())  # nobody leaves after that before the round trips

    acting = threading.Event()
    barrier = Barrier(4, action)
    round = barrier._rounds.latest
    parties: list[InThread] = []
    for number in range(4):
        view = as_threading(barrier)
        if number == 1:
            view._shared._kind = _Threads()
            view._shared._kind.new_waiter = Interrupted
        parties.append(InThread(view.wait))
        if number < 3:
            until(lambda number=number: len(round.threads) == number + 1)  # type: ignore[misc]
    assert isinstance(parties[1].result(), Interrupt)
    assert [parties[index].result() for index in (0, 2, 3)] == [0, 2, 3]
    assert not barrier.broken


def test_a_thread_without_patience_and_too_late_to_give_up_is_woken_after_the_action() -> None:
    acting = threading.Event()

    def action() -> None:
        acting.set()
        until(lambda: bool(round.threads))  # it lies down

    def come_last() -> None:
        last.append(InThread(as_threading(barrier).wait))
        assert acting.wait(PATIENCE)

    barrier = Barrier(2, action)
    round = barrier._rounds.latest
    round.indices = Indices(round.indices, come_last)
    last: list[InThread] = []
    first = InThread(lambda: as_threading(barrier).wait(0))
    assert first.result() == 0
    assert last[0].result() == 1


@pytest.mark.parametrize("how", ["reset", "trip"])
def test_a_round_that_is_over_leads_to_the_current_one(how: str) -> None:
    barrier = Barrier(2)
    rounds = barrier._rounds
    old = rounds.latest
    for _ in range(2):
        if how == "trip":
            party = InThread(as_threading(barrier).wait)
            until(lambda: barrier.n_waiting == 1)
            assert as_threading(barrier).wait() == 1
            assert party.result() == 0
        else:
            barrier.abort()
            barrier.reset()
    new = rounds.current()
    rounds.latest = old  # a slow thread does now what it was about to do then
    assert (barrier.broken, barrier.n_waiting) == (False, 0)
    assert rounds.current() is new
    rounds.latest = old
    barrier.abort()
    assert barrier.broken
    assert new.outcome is not None


# -- KeyboardInterrupt under trio, which is raised in no function that is marked as critical.


def _round() -> _Round:
    return _Round([0])


# Functions that change what is shared, and arguments for them.
CRITICAL: list[tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = [
    (HandoffQueue.put, lambda: (HandoffQueue(), 1)),
    (HandoffQueue.put_many, lambda: (HandoffQueue(), 1, 1)),
    (HandoffQueue.get_nowait, lambda: (HandoffQueue(), None)),
    (HandoffQueue.join, lambda: (HandoffQueue(), task_waiter())),
    (HandoffQueue.leave, lambda: (HandoffQueue(), task_waiter())),
    (HandoffQueue.wait, lambda: (HandoffQueue([1]), task_waiter(), None, None)),
    (HandoffQueue.dispatch, lambda: (HandoffQueue(),)),
    (HandoffQueue.put_back, lambda: (HandoffQueue(), 1)),
    (HandoffQueue._pop_bulk, lambda: (HandoffQueue(),)),
    (HandoffQueue.give, lambda: (HandoffQueue(), 1)),
    (HandoffQueue._grant, lambda: (HandoffQueue(), ThreadWaiter(), 1)),
    (end_wait, lambda: (ThreadWaiter(),)),
    (wake, lambda: (ThreadWaiter(),)),
    (wake_all, lambda: ([ThreadWaiter()],)),
    (TrioWaiter.end, lambda: (task_waiter(),)),
    (Semaphore.acquire, lambda: (Semaphore(),)),
    (Semaphore._acquire_slowly, lambda: (Semaphore(), False, None)),
    (Semaphore._checkpoint, lambda: (Semaphore(), False)),
    (Semaphore.__aenter__, lambda: (Semaphore(),)),
    (Semaphore.acquire_nowait, lambda: (Semaphore(),)),
    (Semaphore.release, lambda: (Semaphore(),)),
    (Semaphore.__aexit__, lambda: (Semaphore(0), None, None, None)),
    (BoundedSemaphore.acquire, lambda: (BoundedSemaphore(),)),
    (BoundedSemaphore.acquire_nowait, lambda: (BoundedSemaphore(),)),
    (BoundedSemaphore.release, lambda: (_acquired(),)),
    (BoundedSemaphore._claim, lambda: (_acquired(), 1)),
    (_Round.break_, lambda: (_round(), "reset")),
    (_Round.abandon, lambda: (_round(),)),
    (_Round.wake, lambda: (_round(),)),
    (_Round.wake_a_thread, lambda: (_round(),)),
    (_Round.leave, lambda: (_round(), ThreadWaiter())),
    (_Rounds.after, lambda: (_Rounds(2, None), _round())),
    (_Rounds.fill, lambda: (_Rounds(2, None), _round())),
    (_Rounds.run_action, lambda: (_Rounds(2, bool), _round(), bool)),
    (_Rounds.trip, lambda: (_Rounds(2, None), _round())),
    (_Rounds.abort, lambda: (_Rounds(2, None),)),
    (_Rounds.reset, lambda: (_Rounds(2, None),)),
    (Barrier.wait, lambda: (Barrier(1),)),
]


_PROTECTED_FROM_THE_BEGINNING = """
import signal, threading
from aiosync import Semaphore, _handoff, as_threading
if {trio_first}:
    import trio
semaphore = Semaphore(0)
import trio

def strike():
    _handoff.current_token = current_token
    signal.raise_signal(signal.SIGINT)
    return current_token()

async def main():
    if not {trio_first}:
        semaphore.release()
        await semaphore.acquire()  # the first checkpoint
    thread.start()
    while not semaphore.statistics().threads_waiting:
        await trio.sleep(0.001)
    _handoff.current_token = strike
    semaphore.release()
    thread.join(20)
    print(got)

got = []
current_token = _handoff.current_token
thread = threading.Thread(target=lambda: got.append(as_threading(semaphore).acquire()), daemon=True)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted later")
"""


_SO_IS_A_BARRIER = """
import signal, threading, trio
from aiosync import Barrier, BrokenBarrierError, _park, as_threading

barrier = Barrier(2)
ring = _park.ThreadWaiter.wake_threadsafe

def strike(self):
    signal.raise_signal(signal.SIGINT)
    ring(self)

def wait():
    try:
        as_threading(barrier).wait()
    except BrokenBarrierError:
        got.append(True)

async def main():
    thread.start()
    while not barrier._rounds.latest.threads:
        await trio.sleep(0.001)
    _park.ThreadWaiter.wake_threadsafe = strike
    barrier.abort()
    thread.join(20)
    print(got)

got = []
thread = threading.Thread(target=wait, daemon=True)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted later")
"""


@pytest.mark.parametrize(
    "program",
    [
        _PROTECTED_FROM_THE_BEGINNING.format(trio_first=True),
        _PROTECTED_FROM_THE_BEGINNING.format(trio_first=False),
        _SO_IS_A_BARRIER,
    ],
    ids=["trio first", "trio later", "barrier"],
)
def test_no_keyboard_interrupt_of_trio_hits_a_program_in_which_no_task_has_waited_yet(
    program: str,
) -> None:
    done = run_python("-c", program)
    assert done.stderr == ""
    assert done.stdout == "[True]\ninterrupted later\n"


def _acquired() -> BoundedSemaphore:
    semaphore = BoundedSemaphore()
    semaphore.acquire_nowait()
    return semaphore


@pytest.mark.parametrize(
    ("function", "arguments"), CRITICAL, ids=[function.__qualname__ for function, _ in CRITICAL]
)
def test_no_keyboard_interrupt_of_trio_is_raised_in_the_middle_of(
    function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]
) -> None:
    code: Any = function.__code__
    protected: list[bool] = []

    def look(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is code:
            protected.append(trio.lowlevel.currently_ki_protected())

    async def main() -> None:
        given = arguments()
        task_waiter()  # the first makes trio know what is critical
        assert not trio.lowlevel.currently_ki_protected()
        options = {"although_full": False} if function is _Round.break_ else {}
        before = sys.getprofile()
        sys.setprofile(look)
        try:
            result = function(*given, **options)
            if hasattr(result, "__await__"):
                await result
        finally:
            sys.setprofile(before)

    trio.run(main)
    assert protected
    assert all(protected)
