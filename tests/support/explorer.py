"""An explorer of interleavings: two or three threads, one bytecode at a time, in every order.

What must live here: how threads are stopped and let go, and which orders are tried. What must not:
tests, and what a right outcome is; see `test_thread_orders`.

How it works
------------
The threads are real, but only one of them runs. Tracing stops it before each opcode that may touch
what threads share; there a *decision* says who goes on. (`sys.settrace` does it up to Python 3.11,
`sys.monitoring` from 3.12 on, where tracing opcodes in several threads crashes or comes late.) The
raw lock on which
a thread sleeps is replaced by a `_Bell`, which tells the explorer who is blocked; so it notices a
deadlock at once. Time does not pass: that a timeout is over is a decision, too.

A *schedule* is a list of exceptions from a rule. The rule: who runs goes on, and if it can't, the
first thread that can does; a timeout is over only if otherwise nobody could go on. The exception
``(12, 1)`` says that at decision 12 thread 1 goes on instead. Decisions are counted from 0, only
where there are two or more to choose from. The first one says who begins. After the same exceptions
the same happens, on the same version of Python: another one has other opcodes.

Schedules are tried in the order of their *preemptions*, that is of the exceptions that stop a
thread which could have gone on: first all those without, then those with one, then two. Most races
take no more. Each is found from one with one exception less, by adding an exception after its last,
so that none is tried twice. Of the last kind there may be too many; then some are drawn, by a
seeded generator of random numbers. Then follow random walks, which know no limit.

Why it need not stop before every opcode
----------------------------------------
An opcode that touches nothing but what belongs to its own thread (its stack, its local variables,
constants) can't be told from the outside to have run before or after a step of another thread. So
to stop before it is the same as to stop before the next opcode that does touch more. `_LOCAL` lists
those opcodes; whatever is not listed there is taken to be shared. Three are to be looked at closer:

- The load of an attribute, if none of that name is ever assigned, but to objects in the making, by
  any function of the package or of the scenario: it can't have another outcome at another time.
- The assignment of an attribute to an object in the making.
- A jump that depends on what is surely a bool, being the result of a comparison.

The functions in `_QUIET` are not looked at: they touch nothing but what belongs to the thread, such
as the question which event loop is running on it. The functions that they call are, as ever.
"""

from __future__ import annotations

import dis
import random
import sys
import time
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any
from unittest.mock import patch

import aiosync
from aiosync import _handoff, _park

Schedule = list[tuple[int, int]]
Scenario = Callable[[], "Plan"]

MUTANT = "<mutant>"
_PACKAGE = str(Path(aiosync.__file__).parent)
# So many decisions are no schedule any more, but an endless loop.
_ENDLESS = 20_000
# So long, in seconds, no schedule takes, unless a thread blocks in what the explorer can't see.
_STUCK = 30
_SETTRACE = sys.version_info < (3, 12)
_monitoring: Any = getattr(sys, "monitoring", None)
# The id of a tool for it; one of those that have no name.
TOOL = 4
# So many threads may a scenario have.
_MOST = 3


@dataclass
class Plan:
    """What a scenario returns: fresh objects, the threads that use them, and what must come of it.

    The functions of the threads may rebind no variable of another function (``nonlocal``).
    """

    threads: list[Callable[[], object]]
    # Called when no thread can go on, with those that are blocked.
    check: Callable[[list[int]], object]
    # So many of the threads run until they block or end, in turn, before the first decision.
    parked: int = 0
    # Or else a thread that is still blocked at the end is an error.
    may_block: bool = False


class Found(AssertionError):
    """A schedule after which something is wrong."""

    def __init__(
        self,
        scenario: Scenario,
        schedule: Schedule,
        seed: int | None,
        why: str,
        story: list[str],
    ) -> None:
        self.schedule = schedule
        self.story = story
        name = getattr(scenario, "__name__", "scenario")
        again = f"to see it again: replay({name}, {schedule})  # seed: {seed}"
        super().__init__("\n".join([why, *story, again]))


@dataclass
class Report:
    """What has been explored."""

    # How many schedules, by their number of preemptions; and how many random walks.
    schedules: list[int] = field(default_factory=list)
    walks: int = 0
    # How many preemptions were tried in every way there is; -1: not even none.
    complete: int = -1
    seconds: float = 0.0
    # The most decisions that a schedule had.
    decisions: int = 0

    def __str__(self) -> str:
        return (
            f"{sum(self.schedules)} schedules {self.schedules}, complete up to {self.complete} "
            f"preemptions, and {self.walks} walks; at most {self.decisions} decisions; "
            f"{self.seconds:.2f} s"
        )


def explore(
    scenario: Scenario, *, limit: int, walks: int = 0, preemptions: int = 2, seed: int = 1
) -> Report:
    """Try schedules of `scenario`, and raise `Found` for the first after which something is wrong.

    :param limit: how many at most, not counting random walks
    :param walks: how many random walks
    :param preemptions: how often a thread may be stopped that could have gone on
    """
    report = Report([0] * (preemptions + 1))
    began = time.perf_counter()
    chance = random.Random(seed)
    with _stage() as stage:
        # By the number of preemptions, those that remain to be tried.
        open_: list[list[Schedule]] = [[[]], *([] for _ in range(preemptions))]
        left = limit
        for cost, schedules in enumerate(open_):
            while schedules and left:
                # Any order will do if all are tried, and a fair choice is best if not.
                drawn = chance.randrange(len(schedules))
                schedules[drawn], schedules[-1] = schedules[-1], schedules[drawn]
                schedule = schedules.pop()
                run = stage.perform(scenario, schedule, seed)
                left -= 1
                report.schedules[cost] += 1
                report.decisions = max(report.decisions, len(run.decisions))
                first = schedule[-1][0] + 1 if schedule else 0
                # One more preemption is of interest only if there will be time for it.
                most = preemptions if len(schedules) < left else cost
                for step, (price, others) in enumerate(run.decisions[first:], first):
                    if cost + price <= most:
                        open_[cost + price] += [[*schedule, (step, other)] for other in others]
            if schedules:
                break
            report.complete = cost
        for _ in range(walks):
            stage.perform(scenario, [], seed, chance)
            report.walks += 1
    report.seconds = time.perf_counter() - began
    return report


def replay(scenario: Scenario, schedule: Schedule) -> list[str]:
    """Run one schedule again; raise `Found` if something is wrong after it.

    :return: the story: who went on where, and instead of whom; it is part of a `Found` as well
    """
    with _stage() as stage:
        return stage.perform(scenario, schedule, None, tell=True).story


def stops(function: Callable[[], object]) -> list[str]:
    """Return the names of the opcodes of `function` before which a thread is stopped."""
    code = _code_of(function)
    _map.add(code.co_filename)
    found = _map.stops(code) or ()
    return [each.opname for each in dis.get_instructions(code) if each.offset in found]


@contextmanager
def stopping_everywhere() -> Iterator[None]:
    """Let threads be stopped before each opcode, to see whether that makes a difference."""
    with patch.object(_Map, "_is_shared", lambda *_: True):
        _map.forget()
        try:
            yield
        finally:
            _map.forget()


@contextmanager
def mutated(function: Any, *changes: tuple[str, str]) -> Iterator[None]:
    """Change the source of `function` for a while, by replacing pieces of it."""
    path = function.__code__.co_filename
    source = Path(path).read_text(encoding="utf-8")
    for old, new in changes:
        # Of equal pieces in one module the one that is meant stands after the head of `function`.
        start = source.index(f"def {function.__name__}(", source.index(_head_of_class(function)))
        at = source.find(old, start)
        if at < 0:
            raise ValueError(f"{function.__qualname__} has changed: it has no {old!r} any more")
        source = source[:at] + new + source[at + len(old) :]
    code = compile(source, MUTANT, "exec", dont_inherit=True)
    for name in function.__qualname__.split("."):
        code = next(
            found
            for found in code.co_consts
            if isinstance(found, CodeType) and found.co_name == name
        )
    genuine = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = genuine


def _head_of_class(function: Any) -> str:
    *owners, _ = function.__qualname__.split(".")
    return f"class {owners[0]}" if owners else ""


# -- Which opcodes can be told from the outside.

_LOCAL = frozenset(
    """
    ASYNC_GEN_WRAP BUILD_CONST_KEY_MAP BUILD_LIST BUILD_MAP BUILD_SET BUILD_SLICE BUILD_TUPLE CACHE
    CALL_INTRINSIC_1 CHECK_EXC_MATCH CLEANUP_THROW COPY COPY_FREE_VARS DELETE_FAST DUP_TOP
    DUP_TOP_TWO END_FOR END_SEND EXTENDED_ARG GEN_START GET_AWAITABLE GET_YIELD_FROM_ITER IS_OP
    JUMP_ABSOLUTE JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT JUMP_FORWARD JUMP_IF_NOT_EXC_MATCH
    KW_NAMES LOAD_ASSERTION_ERROR LOAD_CLOSURE LOAD_COMMON_CONSTANT LOAD_CONST LOAD_DEREF LOAD_FAST
    LOAD_FAST_AND_CLEAR LOAD_FAST_BORROW LOAD_FAST_BORROW_LOAD_FAST_BORROW LOAD_FAST_CHECK
    LOAD_FAST_LOAD_FAST LOAD_GLOBAL LOAD_SMALL_INT LOAD_SPECIAL MAKE_CELL MAKE_FUNCTION NOP
    NOT_TAKEN POP_BLOCK POP_EXCEPT POP_ITER POP_JUMP_BACKWARD_IF_NONE POP_JUMP_BACKWARD_IF_NOT_NONE
    POP_JUMP_FORWARD_IF_NONE POP_JUMP_FORWARD_IF_NOT_NONE POP_JUMP_IF_NONE POP_JUMP_IF_NOT_NONE
    POP_TOP PRECALL PUSH_EXC_INFO PUSH_NULL RAISE_VARARGS RERAISE RESUME RETURN_CONST
    RETURN_GENERATOR RETURN_VALUE ROT_FOUR ROT_N ROT_THREE ROT_TWO SEND SETUP_FINALLY
    SET_FUNCTION_ATTRIBUTE STORE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST SWAP YIELD_FROM
    YIELD_VALUE
    """.split()  # noqa: SIM905
)
_GIVE_BOOLS = frozenset(
    ["CHECK_EXC_MATCH", "COMPARE_OP", "CONTAINS_OP", "IS_OP", "TO_BOOL", "UNARY_NOT"]
)
# What makes an object, which nobody else has yet.
_MAKERS = frozenset(["__init__", "_share", "_for_threads"])

_QUIET = frozenset(
    [
        _park._running_trio.__code__,
        _park.current_token.__code__,
        _park.run_in_thread.__code__,
        _park.thread_waiter.__code__,
        # Atomic, as it promises, if it is in use at all.
        *(
            getattr(_handoff._LockedDict, name).__code__
            for name in ("__setitem__", "pop", "popitem")
        ),
    ]
)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _functions(spaces: list[dict[str, Any]]) -> Iterator[CodeType]:
    """Yield the code of the functions in some namespaces, and in the classes there."""
    for space in spaces:
        for found in list(space.values()):
            members = vars(found).values() if isinstance(found, type) else [found]
            for member in list(members):
                function = member.fget if isinstance(member, property) else member
                if isinstance(function, FunctionType):
                    yield function.__code__


def _assigned(path: Path) -> set[str]:
    """Return the names of the attributes that the functions of a module assign."""
    module = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
    return {
        instruction.argval
        for code in _codes(module)
        if code.co_name not in _MAKERS
        for instruction in dis.get_instructions(code)
        if instruction.opname in {"STORE_ATTR", "DELETE_ATTR"}
    }


class _Map:
    """Where the threads are stopped."""

    def __init__(self) -> None:
        self._assigned: set[str] = set()
        self._files = {MUTANT}
        for path in Path(_PACKAGE).rglob("*.py"):
            self.add(str(path))
        self._known: dict[CodeType, frozenset[int] | None] = {}

    def add(self, path: str) -> None:
        """Take a file to be one of those whose functions are looked at."""
        if path not in self._files:
            self._files.add(path)
            self._assigned |= _assigned(Path(path))
            self.forget()

    def forget(self) -> None:
        self._known = {}

    def stops(self, code: CodeType) -> frozenset[int] | None:
        """Return the offsets of the opcodes that may touch what is shared; None: do not look."""
        try:
            return self._known[code]
        except KeyError:
            looked_at = code.co_filename in self._files and code not in _QUIET
            found = frozenset(self._find(code)) if looked_at else None
            self._known[code] = found
            return found

    def _find(self, code: CodeType) -> Iterator[int]:
        before = ""
        prefix: int | None = None
        for instruction in dis.get_instructions(code):
            name = instruction.opname
            if name == "CACHE":
                continue
            if name == "EXTENDED_ARG":
                if instruction.is_jump_target:
                    before = ""
                prefix = instruction.offset if prefix is None else prefix
                continue
            if instruction.is_jump_target:
                before = ""
            if self._is_shared(code, name, instruction.argval, before):
                # Which of the two it is that is stopped at, if there is a prefix, is up to Python.
                yield instruction.offset
                if prefix is not None:
                    yield prefix
            prefix = None
            before = name

    def _is_shared(self, code: CodeType, name: str, argument: Any, before: str) -> bool:
        if name in _LOCAL or name == "STORE_DEREF":
            return False
        if name in {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}:
            return argument in self._assigned
        if name == "STORE_ATTR":
            return code.co_name not in _MAKERS
        if "JUMP_IF" in name:
            # From Python 3.13 on, such a jump takes nothing but a bool.
            return before not in _GIVE_BOOLS and sys.version_info < (3, 13)
        return True


_map = _Map()


# -- Threads, one of which runs.


class _AbandonedError(BaseException):
    """Ends a thread that is blocked when a schedule is over."""


class _Bell:
    """What a thread sleeps on, instead of a raw lock."""

    def __init__(self, stage: _Stage) -> None:
        self._stage = stage
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        assert blocking
        if self.held:
            self._stage.block(self, timeout >= 0)
            if self.held:
                return False  # the time is over
        self.held = True
        return True

    def release(self) -> None:
        if not self.held:
            raise RuntimeError("release unlocked lock")
        self.held = False
        self._stage.look_around()


class _Actor:
    """A thread of the stage, which runs one function for each schedule."""

    def __init__(self, stage: _Stage, number: int) -> None:
        self.number = number
        self.work: Callable[[], object] | None = None
        self.ended = True
        self.error: BaseException | None = None
        # On which it is blocked, and whether for a time only.
        self.bell: _Bell | None = None
        self.hurried = False
        self.cue = allocate_lock()
        self.cue.acquire()
        self._stage = stage
        self.left = allocate_lock()
        self.left.acquire()
        # No threading.Thread, for which coverage would install a tracer of its own.
        start_new_thread(self._live, ())

    def _live(self) -> None:
        before = sys.gettrace()
        try:
            while True:
                self.cue.acquire()
                if self.work is None:
                    break
                if _SETTRACE and sys.gettrace() is None:  # it is taken away if it raises
                    sys.settrace(self._stage.trace)
                try:
                    self.work()
                except _AbandonedError:
                    pass
                except BaseException as error:
                    self.error = error
                self._stage.end()
        finally:
            if _SETTRACE:
                sys.settrace(before)
            self.left.release()

    def can_go_on(self) -> bool:
        return not self.ended and (self.bell is None or not self.bell.held)

    def can_be_late(self) -> bool:
        return self.bell is not None and self.hurried and self.bell.held


class _Run:
    """One schedule, and what has come of it."""

    def __init__(self, schedule: Schedule, chance: random.Random | None, tell: bool) -> None:
        self.schedule = schedule
        self.exceptions = dict(schedule)
        # For a random walk, which writes the schedule.
        self.chance = chance
        self.nerves = 0.0 if chance is None else chance.choice([0.01, 0.05, 0.2])
        self.tell = tell
        self.story: list[str] = []
        # Of each decision: how many preemptions another choice is, and what other ones there are.
        self.decisions: list[tuple[int, list[int]]] = []
        self.endless = False
        # The schedule asks for what is impossible.
        self.misfit: str | None = None


class _Stage:
    """The threads, and who of them runs."""

    def __init__(self) -> None:
        self._cast: list[_Actor] = []
        self._current: _Actor | None = None
        # Who could go on instead of the thread that runs. Empty, so that nothing is decided, also
        # before the first decision and after the last.
        self._others: list[int] = []
        self._deciding = False
        self._abandoned = False
        self._curtain = allocate_lock()
        self._curtain.acquire()
        self._tracers: dict[CodeType, Any] = {}
        self._looked_at: set[CodeType] = set()
        self._monitored: set[CodeType] = set()
        self._run = _Run([], None, False)
        self._next_parked: Iterator[_Actor] = iter(())
        self._actors = [_Actor(self, number) for number in range(_MOST)]

    # -- Called by who explores.

    def perform(
        self,
        scenario: Scenario,
        schedule: Schedule,
        seed: int | None,
        chance: random.Random | None = None,
        *,
        tell: bool = False,
    ) -> _Run:
        run = self._run = _Run(schedule, chance, tell)
        plan = scenario()
        self._look_at(plan.threads)
        self._cast = self._actors[: len(plan.threads)]
        for actor, work in zip(self._cast, plan.threads, strict=True):
            actor.work, actor.ended, actor.error, actor.bell = work, False, None, None
        self._next_parked = iter(self._cast[: plan.parked])
        self._abandoned = False
        self._current = None
        self._go_on()
        self._wait()
        self._current = None
        self._deciding = False
        self._others = []
        blocked = [actor.number for actor in self._cast if not actor.ended]
        why = self._verdict(plan, blocked)
        self._abandoned = True
        for number in blocked:
            self._cue(self._cast[number])
            self._wait()
        if schedule and schedule[-1][0] >= len(run.decisions):
            run.misfit = f"there is no decision {schedule[-1][0]}"
        if run.misfit is not None:
            raise ValueError(
                f"the schedule {schedule} does not fit, {run.misfit}: it is one of another scenario"
                f" or Python, or the scenario does not do the same each time"
            )
        if why is None:
            return run
        if not tell:
            # Once more, with the story.
            self.perform(scenario, run.schedule, seed, tell=True)
            why = f"{why}\n(but not when it was done again, so the scenario is to blame)"
        raise Found(scenario, run.schedule, seed, why, run.story)

    def _verdict(self, plan: Plan, blocked: list[int]) -> str | None:
        if self._run.endless:
            return f"no end after {_ENDLESS} decisions"
        for actor in self._cast:
            if actor.error is not None:
                return f"thread {actor.number} raised {actor.error!r}"
        if blocked and not plan.may_block:
            return f"deadlock: blocked for ever are the threads {blocked}"
        try:
            plan.check(blocked)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def close(self) -> None:
        for actor in self._actors:
            actor.work = None
            actor.cue.release()
            actor.left.acquire()
        if not _SETTRACE:
            for code in self._monitored:
                _monitoring.set_local_events(TOOL, code, 0)
            _monitoring.register_callback(TOOL, _monitoring.events.INSTRUCTION, None)
            _monitoring.free_tool_id(TOOL)

    def _wait(self) -> None:
        assert self._curtain.acquire(timeout=_STUCK), "a thread blocks where it can't be seen"

    def _look_at(self, functions: list[Callable[[], object]]) -> None:
        codes = [_code_of(function) for function in functions]
        if self._looked_at.issuperset(codes):
            return
        for code in codes:
            _map.add(code.co_filename)
        for code in codes:
            for inner in _codes(code):
                for instruction in dis.get_instructions(inner):
                    if instruction.opname == "STORE_GLOBAL" or (
                        instruction.opname == "STORE_DEREF"
                        and instruction.argval in code.co_freevars
                    ):
                        raise TypeError(f"{inner.co_name} rebinds {instruction.argval}")
        self._looked_at.update(codes)
        if _SETTRACE:
            return
        # All that may run, before any of it does: what begins to be monitored while it runs has
        # led to crashes.
        modules = [
            vars(module) for name, module in sys.modules.items() if name.startswith("aiosync")
        ]
        spaces = [
            function.__globals__ for function in functions if isinstance(function, FunctionType)
        ]
        for code in [*codes, *_functions([*modules, *spaces])]:
            for inner in _codes(code):
                if _map.stops(inner):
                    self._monitored.add(inner)
                    _monitoring.set_local_events(TOOL, inner, _monitoring.events.INSTRUCTION)

    def open(self) -> None:
        if not _SETTRACE:
            _monitoring.use_tool_id(TOOL, "explorer")
            # What was of no interest the last time may be now.
            _monitoring.restart_events()
            _monitoring.register_callback(TOOL, _monitoring.events.INSTRUCTION, self._monitor)

    # -- Called by the thread that runs.

    def _monitor(self, code: CodeType, offset: int) -> object:
        stops = _map.stops(code)
        if stops is None or offset not in stops:
            return _monitoring.DISABLE
        if self._others:
            self._decide(sys._getframe(1))
        return None

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """Look at a call: the function that `sys.settrace` is given."""
        code = frame.f_code
        try:
            tracer = self._tracers[code]
        except KeyError:
            stops = _map.stops(code)
            tracer = self._tracers[code] = None if stops is None else self._tracer(stops)
        if tracer is not None:
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return tracer

    def _tracer(self, stops: frozenset[int]) -> Any:
        def look(frame: FrameType, event: str, arg: object) -> Any:
            if event == "opcode" and self._others and frame.f_lasti in stops:
                self._decide(frame)
            return look

        return look

    def _decide(self, frame: FrameType) -> None:
        """Go on, or let another thread do so."""
        run = self._run
        me = self._current
        assert me is not None
        step = len(run.decisions)
        run.decisions.append((1, self._others))
        chosen = run.exceptions.get(step)
        if run.chance is not None and run.chance.random() < run.nerves:
            chosen = run.chance.choice(self._others)
            run.schedule.append((step, chosen))
        if chosen is not None:
            if chosen not in self._others:
                run.misfit = f"thread {chosen} can't go on at decision {step}"
                return
            if run.tell:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                run.story.append(f"{step}: thread {me.number} stops at {where}")
            self._cue(self._cast[chosen])
            me.cue.acquire()
        elif step > _ENDLESS:
            run.endless = True
            self._deciding = False
            self._others = []
            self._abandoned = True
            raise _AbandonedError

    def _cue(self, actor: _Actor) -> None:
        self._current = actor
        self.look_around()
        if self._run.tell and self._deciding:
            late = " (its time is over)" if actor.can_be_late() else ""
            self._run.story.append(f"   thread {actor.number} goes on{late}")
        actor.cue.release()

    def look_around(self) -> None:
        """Take note of who can go on, since that has changed."""
        if self._deciding:
            self._others = [
                actor.number
                for actor in self._cast
                if actor is not self._current and (actor.can_go_on() or actor.can_be_late())
            ]

    def block(self, bell: _Bell, hurried: bool) -> None:
        """Let others go on until somebody rings `bell`, or time is over."""
        me = self._current
        assert me is not None, "this would block who explores"
        if self._abandoned:
            raise _AbandonedError
        me.bell, me.hurried = bell, hurried
        self._go_on()
        me.cue.acquire()
        me.bell = None
        if self._abandoned:
            raise _AbandonedError
        self.look_around()

    def end(self) -> None:
        me = self._current
        assert me is not None
        me.ended = True
        if self._abandoned:
            self._curtain.release()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Let somebody go on, the thread that runs being unable to; or end the schedule."""
        parked = next(self._next_parked, None)
        if parked is not None:
            self._cue(parked)
            return
        run = self._run
        able = [actor.number for actor in self._cast if actor.can_go_on()]
        able += [actor.number for actor in self._cast if actor.can_be_late()]
        if not able:
            self._curtain.release()
            return
        self._deciding = True
        chosen = able[0]
        if len(able) > 1:
            step = len(run.decisions)
            run.decisions.append((0, able[1:]))
            other = run.exceptions.get(step)
            if run.chance is not None:
                other = run.chance.choice(able)
                run.schedule.append((step, other))
            if other is not None and other not in able:
                run.misfit = f"thread {other} can't go on at decision {step}"
            elif other is not None:
                chosen = other
        self._cue(self._cast[chosen])


def _code_of(function: Any) -> CodeType:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        raise TypeError(f"a thread of a scenario must be a function, not {function!r}")
    return code


@contextmanager
def _stage() -> Iterator[_Stage]:
    stage = _Stage()
    with (
        patch.object(_park, "allocate_lock", lambda: _Bell(stage)),
        # The step that it makes of several is one anyway for who can't be stopped within.
        patch.object(_handoff, "_free_threaded_lock", nullcontext()),
    ):
        stage.open()
        try:
            yield stage
        finally:
            stage.close()
