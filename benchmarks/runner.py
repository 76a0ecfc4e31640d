"""The method: contenders take turns, round by round, in one process.

What must live here: the order of the measurements, and their set-up. All suites get their samples
from `measure`.
"""

from __future__ import annotations

import gc
import pkgutil
import time
from collections.abc import Callable, Sequence

from .model import US, Contender, Effort, LeftOutError, Outcome, Row

METHOD = """\
Method: the implementations take turns in one process, round by round, in a rotating order; a first
round is thrown away. The garbage collector runs before each measurement, and not during it.
ratio: cost of the other / cost of aiosync in the same round, the median of all rounds; more than 1
means that aiosync is faster (or smaller). In brackets its 95% interval (bootstrap over the rounds).
Then the median costs, ± half of the distance between the quartiles. A floor is the cost of what no
implementation can do without. A wide interval means that the machine was busy with other work."""


def why_not(needs: str) -> str | None:
    """Return why `needs`, a module or a name in one, can't be imported; None if it can."""
    if needs:
        try:
            pkgutil.resolve_name(needs)
        except (ImportError, AttributeError) as error:
            return str(error)
    return None


def measure(row: Row, effort: Effort, tell: Callable[[str, str], None]) -> Outcome:
    """Return the samples of all contenders of `row` that can be measured.

    :param tell: called with the name of each contender that can't be measured, and the reason
    """

    def leave_out(name: str, reason: str) -> None:
        tell(f"{row.suite}: {row.work}" if name == US else name, reason)

    installed = _installed(row.contenders, leave_out)
    outcome = Outcome(row.suite, row.backend, row.work, row.size, row.unit)
    gc.collect()
    gc.freeze()  # later collections skip the objects that exist by now
    first = _first_round(installed, leave_out)
    contenders = list(first)
    if contenders and contenders[0].name == US:
        outcome.samples = {contender.name: [] for contender in contenders}
        if row.exact:
            outcome.samples = {contender.name: [sample] for contender, sample in first.items()}
        begin = time.perf_counter()
        least = effort.least_of_many if row.size else effort.least
        for number in range(0 if row.exact else effort.rounds):
            if number >= least and time.perf_counter() - begin > effort.seconds:
                break
            turn = number % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                outcome.samples[contender.name].append(_sample(contender))
    return outcome


def _installed(
    contenders: Sequence[Contender], leave_out: Callable[[str, str], None]
) -> list[Contender]:
    found = []
    for contender in contenders:
        reason = why_not(contender.needs)
        if reason is None:
            found.append(contender)
        else:
            leave_out(contender.name, reason)
    return found


def _first_round(
    contenders: list[Contender], leave_out: Callable[[str, str], None]
) -> dict[Contender, float]:
    """Measure each contender once; return those that can be measured, with their first samples.

    A peer whose version the adapters do not know must not end the whole run.
    """
    found = {}
    for contender in contenders:
        try:
            found[contender] = _sample(contender)
        except LeftOutError as error:
            leave_out(contender.name, str(error))
        except Exception as error:
            if contender.name == US:
                raise
            leave_out(contender.name, f"it fails with {error!r}")
    return found


def _sample(contender: Contender) -> float:
    gc.collect()
    gc.disable()
    try:
        return contender.measure()
    finally:
        gc.enable()
