"""When to connect again after a failure: pure, like `_policy`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ._entry import FOREVER, IMMEDIATELY

# So many failures in a row, or a row that lasts so many seconds, are an outage.
OUTAGE_FAILURES, OUTAGE_SECONDS = 3, 1.0
# How many attempts may run after the first and after the second failure of a row; later, one.
_RETRIES = {1: 3, 2: 1}
# During an outage: the delay before the next attempt, and its upper bound, in seconds. It doubles
# each time, and is multiplied by a random number from 0.5 to 1, so that the pools of many processes
# do not all connect at once.
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0


@dataclass
class Backoff:
    """How often connecting has failed in a row, and when to try again."""

    failures: int = 0
    # When the first attempt of the row began, but not before the latest success.
    began: float = FOREVER
    last_success: float = IMMEDIATELY
    next_attempt: float = IMMEDIATELY
    is_outage: bool = False

    def succeeded(self, now: float) -> bool:
        """Take note of a success. Return whether it ends an outage."""
        ended = self.is_outage
        self.last_success = now
        self.failures, self.began = 0, FOREVER
        self.next_attempt, self.is_outage = IMMEDIATELY, False
        return ended

    def failed(self, failures: int, began: float, now: float, chance: float) -> bool:
        """Take note of a failure. Return whether an outage begins with it.

        :param failures: what `failures` was when the attempt began: of several attempts that ran at
            the same time, one counts
        :param began: when the attempt began
        :param chance: a random number from 0 to 1
        """
        self.began = min(self.began, max(began, self.last_success))
        if self.failures in (0, failures):
            self.failures += 1
            rounds = self.failures - OUTAGE_FAILURES
            if rounds >= 0 or self._lasts(now):
                delay = min(FIRST_DELAY * 2 ** min(max(rounds, 0), 30), LONGEST_DELAY)
                self.next_attempt = now + delay * (0.5 + chance / 2)
        begins = not self.is_outage and (self.failures >= OUTAGE_FAILURES or self._lasts(now))
        self.is_outage = self.is_outage or begins
        return begins

    def _lasts(self, now: float) -> bool:
        return now - self.began >= OUTAGE_SECONDS

    def limit(self, under_way: int, now: float) -> float:
        """Return how many attempts may begin now.

        :param under_way: how many are running that have begun after the last failure
        """
        if not self.failures:
            return inf
        if now < self.next_attempt:
            return 0
        retries = 1 if self.is_outage else _RETRIES.get(self.failures, 1)
        return max(0, retries - under_way)
